"""Our learner against TRL's GRPOTrainer: same model, same episodes, same threads.

    python -m venv .venv-bench
    .venv-bench/bin/python -m pip install --requirement benchmarks/experiments/requirements-trl.txt
    .venv/bin/python benchmarks/experiments/against_trl.py --json FILE.json

TRL 1.16 has no PPO trainer; GRPO has no critic. So two of our figures are compared with its one:
the whole learner (policy and critic, as RLEF trains) and the policy alone, which is the same work
as TRL's. Both trainers are given the same token ids, of responses and feedback, with feedback
masked; both compute old and reference log-probs of the batch and then make the same number of
optimizer steps over it. Generation is left out of both. Tokens do not include padding.

Ours runs in the recipe's layout. TRL runs in one process with as many threads as our ranks have
together; it is first tried with several micro-batch sizes and keeps its fastest. Rounds alternate,
and a ratio is taken within a round, so that other work on the machine affects both.

This file is also TRL's side, started in TRL's own environment: measured is one iteration from the
moment the trainer has the completions (its `rollout_func` returns) to the end of the last optimizer
step on them. That side imports nothing of this project, which is not installed there.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROUNDS = 3
REPEATS = 3  # of TRL's whole iteration in a round, after a warm-up
MICROBATCHES = (8, 16, 32, 64)  # sequences; TRL's default is 8


def main() -> None:
    from rlef_mega.bench import train
    from rlef_mega.bench.results import Results
    from rlef_mega.bench.workload import random_batch, workload
    from rlef_mega.preflight import model_shape

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--python", default=".venv-bench/bin/python", help="with TRL installed")
    asked = parser.parse_args()
    with workload(asked.recipe) as work:
        config = work.config
        vocabulary = model_shape(config)["vocab_size"]
        episodes = random_batch(config.rollout, vocabulary, config.run.seed)
        trial = work.run("rlef_mega.bench.train")  # also reports its threads
        request = request_of(work.folder, config, episodes)
        request["threads"] = trial["threads"] * config.parallel.world_size
        update = len(episodes) // config.ppo.updates_per_batch
        tried = {}
        for size in [size for size in MICROBATCHES if update % size == 0] or [update]:
            theirs = run_trl(asked.python, request | {"microbatch": size})
            tried[size] = statistics.median(theirs["seconds"])
        fastest = min(tried, key=lambda size: tried[size])
        rounds = []
        for _ in range(ROUNDS):
            theirs = run_trl(asked.python, request | {"microbatch": fastest})
            rounds.append((work.run("rlef_mega.bench.train"), theirs["seconds"]))
        about = train.about_training(work, trial) | {
            "command": " ".join(sys.argv),
            "threads_in_total": request["threads"],
            "trl": theirs["versions"] | {"trainer": "GRPOTrainer", "microbatch": fastest},
            "trl_tried_seconds": tried,
        }
    padded = theirs["padded_tokens"] / trial["batch"]["tokens"]
    notes = (f"TRL pads the batch to {padded:.2f} times as many tokens",)
    results = Results(f"our learner against TRL: {asked.recipe}", about, figures(rounds), notes)
    results.write(asked.json)
    results.show()


def figures(rounds: Sequence[tuple[dict[str, Any], list[float]]]) -> tuple:
    """Return speeds by the medians of each round, and their ratios."""
    from rlef_mega.bench.results import Figure
    from rlef_mega.bench.train import LEARNING

    trl = [statistics.median(theirs) for _, theirs in rounds]
    whole = [
        statistics.median(sum(times[part] for part in LEARNING) for times in ours["phases"])
        for ours, _ in rounds
    ]
    policy = [statistics.median(ours["policy_alone"]) for ours, _ in rounds]
    tokens = rounds[0][0]["batch"]["tokens"]
    sides = {"TRL GRPOTrainer": trl, "ours, policy and critic": whole, "ours, policy alone": policy}
    speeds = [
        Figure(name, "tokens/s", tuple(tokens / s for s in each)) for name, each in sides.items()
    ]
    ratios = [
        Figure(f"{name} / TRL", "ratio", tuple(t / s for t, s in zip(trl, each, strict=True)))
        for name, each in list(sides.items())[1:]
    ]
    return (*speeds, *ratios)


def request_of(folder: Path, config: Any, episodes: Sequence[Any]) -> dict[str, Any]:
    policy = config.learner.policy
    return {
        "model": str(Path(config.model.path).absolute()),
        "dtype": config.model.dtype,
        "sequences": [as_rollout(episode) for episode in episodes],
        "updates": config.ppo.updates_per_batch,
        "beta": config.ppo.beta,
        "epsilon": config.ppo.clip_eps,
        "learning_rate": policy.lr,
        "weight_decay": policy.weight_decay,
        "adam": [policy.beta1, policy.beta2, policy.eps],
        "clip_grad": policy.clip_grad,
        "folder": str(folder),
    }


def as_rollout(episode: Any) -> dict[str, list]:
    """Return the first prompt, everything after it as completion, and a mask of the responses."""
    start = len(episode.turns[0].observed_ids)
    mask: list[int] = []
    logprobs: list[float] = []
    for turn in episode.turns:
        observed, sampled = len(turn.observed_ids), turn.completion
        mask += [0] * observed + [1] * len(sampled.token_ids)
        logprobs += [0.0] * observed + list(sampled.logprobs)
    return {
        "prompt_ids": list(episode.token_ids[:start]),
        "completion_ids": list(episode.token_ids[start:]),
        "env_mask": mask[start:],
        "logprobs": logprobs[start:],
    }


def run_trl(python: str, request: dict[str, Any]) -> dict[str, Any]:
    """Run TRL's side in its own environment. Raises RuntimeError if it fails."""
    folder = Path(request["folder"])
    (folder / "trl_request.json").write_text(json.dumps(request))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(request["threads"]),
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [python, __file__, "--trl-side", str(folder / "trl_request.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"TRL's side failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return json.loads((folder / "trl_result.json").read_text())


# -------------------------------------------------------------------------------------- TRL's side


def trl_side(request: dict[str, Any]) -> None:
    import torch
    import transformers
    import trl
    from datasets import Dataset

    torch.set_num_threads(request["threads"])
    sequences, updates = request["sequences"], request["updates"]
    begun, seconds = 0.0, []

    class Stopwatch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            if state.global_step % updates == 0:
                seconds.append(time.perf_counter() - begun)

    def replay(prompts: list, trainer: Any) -> dict[str, list]:
        nonlocal begun
        assert len(prompts) == len(sequences), (len(prompts), len(sequences))
        rollout = {name: [s[name] for s in sequences] for name in sequences[0]}
        begun = time.perf_counter()
        return rollout

    generator = random.Random(0)
    trl.GRPOTrainer(
        model=request["model"],
        args=trl.GRPOConfig(**settings(request)),
        reward_funcs=lambda completions, **unused: [generator.random() for _ in completions],
        train_dataset=Dataset.from_list([{"prompt": f"problem {n}"} for n in range(4096)]),
        processing_class=transformers.AutoTokenizer.from_pretrained(request["model"]),
        rollout_func=replay,
        callbacks=[Stopwatch()],
    ).train()
    longest = [max(len(s[part]) for s in sequences) for part in ("prompt_ids", "completion_ids")]
    packages = (trl, transformers, torch)
    result = {
        "seconds": seconds[1:],  # the first is the warm-up
        "padded_tokens": sum(longest) * len(sequences),
        "versions": {package.__name__: str(package.__version__) for package in packages},
    }
    (Path(request["folder"]) / "trl_result.json").write_text(json.dumps(result))


def settings(request: dict[str, Any]) -> dict[str, Any]:
    """Return our settings in TRL's terms; what only costs it time on a tiny model is off (gradient
    checkpointing, logging, saving, mixed precision)."""
    count, size, updates = len(request["sequences"]), request["microbatch"], request["updates"]
    beta1, beta2, eps = request["adam"]
    return {
        "output_dir": f"{request['folder']}/trl",
        "model_init_kwargs": {"dtype": request["dtype"]},
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": count // updates // size,
        "steps_per_generation": count // size,
        "num_generations": next(group for group in (8, 4, 2, 1) if count % group == 0),
        "num_iterations": 1,
        "max_steps": updates * (1 + REPEATS),
        "beta": request["beta"],
        "epsilon": request["epsilon"],
        "learning_rate": request["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": request["weight_decay"],
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        "adam_epsilon": eps,
        "max_grad_norm": request["clip_grad"],
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trl-side"]:
        trl_side(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    else:
        main()
