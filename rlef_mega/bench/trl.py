"""Our learner beside TRL's GRPOTrainer, what one would take instead on a laptop: same model, same
episodes, same threads.

TRL 1.16 has no PPO trainer; GRPO has no critic. So two of our figures stand beside its one: the
whole learner (policy and critic, as RLEF trains) and the policy alone, which is the same work as
TRL's. Both trainers are given the same token ids, responses and feedback alike, with feedback
masked; both compute old and reference log-probs of the batch and then make the same number of
optimizer steps over it. Generation is left out of both. Trained tokens are the tokens of the
episodes, padding not counted.

Ours runs with the recipe's layout and micro-batches. TRL runs in one process with as many threads
as our ranks have together, and is first tried with several micro-batch sizes, of which it keeps its
fastest. Rounds alternate, and a ratio is taken within a round, so that what else the machine does
hits both.
"""

import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlef_mega.bench import train
from rlef_mega.bench.figures import Figure, Report
from rlef_mega.bench.workload import Workload, random_episodes, workload
from rlef_mega.config import ConfigError
from rlef_mega.preflight import model_shape
from rlef_mega.types import Episode

ROUNDS = 3
REPEATS = 3  # of TRL's whole iteration a round, after a warm-up
MICROBATCHES = (8, 16, 32, 64)  # sequences; TRL's default is 8
PYTHON = Path(".venv-bench/bin/python")
WORKER = Path(__file__).with_name("trl_worker.py")


def benchmark(recipe: str) -> Report:
    python = find_python()
    with workload(recipe) as work:
        episodes = random_episodes(
            work.config.rollout, model_shape(work.config)["vocab_size"], work.config.run.seed
        )
        ours = work.run("rlef_mega.bench.train")  # also tells the threads
        threads = ours["threads"] * work.config.parallel.world_size
        tried = {
            size: run_trl(python, work, episodes, size, threads, repeats=1)
            for size in microbatches_to_try(work)
        }
        size = min(tried, key=lambda candidate: min(tried[candidate]["seconds"]))
        rounds = []
        for _ in range(ROUNDS):
            theirs = run_trl(python, work, episodes, size, threads, repeats=REPEATS)
            ours = work.run("rlef_mega.bench.train")
            rounds.append((ours, theirs))
        about = train.describe_work(work, ours) | {
            "threads_in_total": threads,
            "trl": theirs["versions"]
            | {"trainer": "GRPOTrainer", "microbatch_sequences": size, "processes": 1},
            "trl_microbatches_tried": {
                str(candidate): min(result["seconds"]) for candidate, result in tried.items()
            },
        }
    return Report(
        f"rlef bench train --against-trl: {recipe}", about, figures(rounds), notes(rounds)
    )


def find_python() -> Path:
    """The interpreter of TRL's own environment; RLEF_BENCH_PYTHON names another one."""
    python = Path(os.environ.get("RLEF_BENCH_PYTHON", PYTHON))
    if not python.is_file():
        raise ConfigError(
            f"no {python}: TRL has an environment of its own; run `make bench-trl`, or set "
            "RLEF_BENCH_PYTHON to a Python that has benchmarks/requirements-trl.txt installed"
        )
    return python.absolute()


def microbatches_to_try(work: Workload) -> list[int]:
    """Sizes that divide an update; a small recipe's whole update if none does."""
    update = work.config.rollout.episodes_per_batch // work.config.ppo.updates_per_batch
    return [size for size in MICROBATCHES if update % size == 0] or [update]


def run_trl(
    python: Path,
    work: Workload,
    episodes: Sequence[Episode],
    microbatch: int,
    threads: int,
    *,
    repeats: int,
) -> dict[str, Any]:
    """Seconds of each of TRL's iterations over these episodes, in a process of its own."""
    config, policy = work.config, work.config.learner.policy
    request, result = work.folder / "trl_request.json", work.folder / "trl_result.json"
    result.unlink(missing_ok=True)
    request.write_text(
        json.dumps(
            {
                "model": str(Path(config.model.path).absolute()),
                "dtype": config.model.dtype,
                "sequences": [as_rollout(episode) for episode in episodes],
                "updates": config.ppo.updates_per_batch,
                "microbatch": microbatch,
                "repeats": repeats,
                "threads": threads,
                "beta": config.ppo.beta,
                "epsilon": config.ppo.clip_eps,
                "learning_rate": policy.lr,
                "weight_decay": policy.weight_decay,
                "adam": [policy.beta1, policy.beta2, policy.eps],
                "clip_grad": policy.clip_grad,
                "folder": str(work.folder / "trl"),
                "result": str(result),
            }
        )
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    # -P: the folder of the script holds modules of ours with common names
    done = subprocess.run(
        [str(python), "-P", str(WORKER), str(request)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode or not result.is_file():
        raise RuntimeError(f"TRL's worker failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return json.loads(result.read_text())


def as_rollout(episode: Episode) -> dict[str, list]:
    """In TRL's terms: the first prompt, everything after it as completion, and which of that the
    model said."""
    start = episode.turns[0].context_len
    said = [0] * len(episode.token_ids)
    logprobs = [0.0] * len(episode.token_ids)
    for turn in episode.turns:
        end = turn.context_len + len(turn.action_ids)
        said[turn.context_len : end] = [1] * len(turn.action_ids)
        logprobs[turn.context_len : end] = turn.action_logprobs
    return {
        "prompt_ids": list(episode.token_ids[:start]),
        "completion_ids": list(episode.token_ids[start:]),
        "env_mask": said[start:],
        "logprobs": logprobs[start:],
    }


def figures(rounds: Sequence[tuple[dict, dict]]) -> tuple[Figure, ...]:
    """Medians of each round, and their ratios."""
    tokens = rounds[0][0]["tokens"]
    whole = [
        statistics.median(sum(times[part] for part in train.LEARNING) for times in ours["phases"])
        for ours, _ in rounds
    ]
    policy = [statistics.median(ours["policy_alone"]) for ours, _ in rounds]
    trl = [statistics.median(theirs["seconds"]) for _, theirs in rounds]

    def speed(name: str, seconds: list[float]) -> Figure:
        return Figure(name, "tokens/s", tuple(tokens / s for s in seconds))

    def ratio(name: str, ours: list[float]) -> Figure:
        return Figure(name, "ratio", tuple(t / s for s, t in zip(ours, trl, strict=True)))

    return (
        speed("ours, policy and critic", whole),
        speed("ours, policy alone", policy),
        speed("TRL GRPOTrainer, policy alone", trl),
        ratio("ours with critic / TRL without", whole),
        ratio("ours, policy alone / TRL", policy),
    )


def notes(rounds: Sequence[tuple[dict, dict]]) -> tuple[str, ...]:
    ours, theirs = rounds[0]
    padded = theirs["padded_tokens"] / ours["tokens"]
    return (
        f"both train on the same {ours['tokens']:,} tokens in {ours['sequences']} episodes; "
        f"TRL pads them to {padded:.2f} times as many",
    )
