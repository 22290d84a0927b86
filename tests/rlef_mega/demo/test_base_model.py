"""The supervised stage learns, survives a kill, and leaves a model that transformers loads."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.rlef_mega.distributed import launch

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SETTINGS = [
    "steps=60",
    "optimizer.warmup_updates=5",
    "checkpoint_every=20",
    "dialogues_per_step=16",
    "hidden_size=32",
    "num_layers=2",
    "ffn_hidden_size=64",
]


def command(folder: Path) -> list[str]:
    words = [sys.executable, "-m", "rlef_mega.cli", "sft", "demo_base"]
    settings = [f"dir={json.dumps(str(folder))}", *SETTINGS]
    return words + [part for setting in settings for part in ("--set", setting)]


def losses(folder: Path) -> list[float]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sft") / "base"
    subprocess.run(command(folder), env=ENVIRONMENT, timeout=300, check=True)
    return folder


def test_the_loss_starts_at_chance_and_falls(base):
    first, *_, last = losses(base)
    assert first == pytest.approx(math.log(704), rel=0.05)  # the head starts small
    assert last < first / 3


def test_a_killed_stage_resumes_with_the_same_losses(base, tmp_path):
    folder = tmp_path / "killed"
    child = subprocess.Popen(command(folder), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while len(losses(folder)) < 30:
        assert child.poll() is None
        time.sleep(0.05)
    child.kill()
    child.wait()
    time.sleep(1)  # the ranks die with it
    launch("rlef_mega.demo.base_model", str(folder), processes=2)  # as the same command does
    assert losses(folder) == losses(base)


def test_transformers_loads_the_result(base):
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    assert model.config.num_key_value_heads == 2
    assert len(tokenizer) == model.config.vocab_size == 704
    assert tokenizer.chat_template
