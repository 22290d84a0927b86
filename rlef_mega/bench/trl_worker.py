"""TRL's side of the comparison, in TRL's own environment: a GRPOTrainer that is handed given
episodes instead of sampling.

    torchrun --nproc-per-node N trl_worker.py REQUEST.json

Measured is one iteration without its generation: from the moment the trainer has the completions
(its `rollout_func` returns) to the end of the last optimizer step on them. In between it pads,
computes old and reference log-probs, and trains. Imports nothing of this project, which is not
installed there.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Stopwatch(TrainerCallback):
    """Seconds from each rollout to the last update on it."""

    def __init__(self, updates: int) -> None:
        self.updates = updates
        self.begun = 0.0
        self.seconds: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if state.global_step % self.updates == 0:
            self.seconds.append(time.perf_counter() - self.begun)


def main(request: dict[str, Any]) -> None:
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(request["threads"] // processes)
    sequences = request["sequences"][rank::processes]
    stopwatch = Stopwatch(request["updates"])

    def replay(prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        assert len(prompts) == len(sequences), (len(prompts), len(sequences))
        rollout = {name: [s[name] for s in sequences] for name in sequences[0]}
        stopwatch.begun = time.perf_counter()
        return rollout

    generator = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    trainer = GRPOTrainer(
        model=request["model"],
        args=settings(request, processes),
        reward_funcs=lambda completions, **unused: [generator.random() for _ in completions],
        train_dataset=Dataset.from_list([{"prompt": f"problem {n}"} for n in range(4096)]),
        processing_class=tokenizer,
        rollout_func=replay,
        callbacks=[stopwatch],
    )
    trainer.train()
    if rank:
        return
    longest = [max(len(s[part]) for s in sequences) for part in ("prompt_ids", "completion_ids")]
    result = {
        "seconds": stopwatch.seconds[1:],  # the first is the warm-up
        "padded_tokens": sum(longest) * len(sequences) * processes,
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__}
        | {"torch": torch.__version__},
    }
    Path(request["result"]).write_text(json.dumps(result))


def settings(request: dict[str, Any], processes: int) -> GRPOConfig:
    """Ours where TRL has the setting; what only costs it time on a tiny model is off (gradient
    checkpointing, logging, saving, mixed precision)."""
    count, size, updates = len(request["sequences"]), request["microbatch"], request["updates"]
    beta1, beta2, eps = request["adam"]
    group = next(g for g in (8, 4, 2, 1) if count % g == 0)
    return GRPOConfig(
        output_dir=request["folder"],
        model_init_kwargs={"dtype": request["dtype"]},
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=count // updates // size // processes,
        steps_per_generation=count // size // processes,
        num_generations=group,
        num_iterations=1,
        max_steps=updates * (1 + request["repeats"]),
        beta=request["beta"],
        epsilon=request["epsilon"],
        learning_rate=request["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=request["weight_decay"],
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_epsilon=eps,
        max_grad_norm=request["clip_grad"],
        logging_steps=1000,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
