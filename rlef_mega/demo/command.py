"""`rlef demo`: make a base model, train it with RLEF, export it, write the report.

The base model and the export are made once, training resumes from its newest checkpoint, and the
report is written again; so an interrupted or killed demo resumes.
"""

import time
from pathlib import Path

from rlef_mega.config import TrainConfig, find_recipe, load_config
from rlef_mega.run.launch import say, stage


def run_demo() -> None:
    """Run the four stages, each as a command in a process of its own."""
    run = load_config(find_recipe("demo"), [], TrainConfig)
    run_dir = Path(run.run.dir)
    started = time.monotonic()
    stage("1/4 supervised stage: tokenizer and base model", "sft", "demo_base")
    stage("2/4 RLEF, evaluated on held-out problems before and after", "train", "demo")
    exported = run_dir / "model"
    if not exported.exists():
        stage("3/4 export to Hugging Face format", "export-hf", str(run_dir), str(exported))
    say(f"checking that transformers loads {exported}")
    check_export(exported)
    stage("4/4 report", "view", str(run_dir))
    minutes = (time.monotonic() - started) / 60
    say(f"done in {minutes:.1f} minutes; base model {run.model.path}, trained model {exported}")


def check_export(folder: Path) -> None:
    """Load the exported model with transformers and print its size."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{type(model).__name__}, {parameters:,} parameters, {len(tokenizer)} tokens")
