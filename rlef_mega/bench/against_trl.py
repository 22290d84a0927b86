"""Our learner beside TRL's GRPOTrainer, what one would take instead on a laptop: same model, same
episodes, same threads.

TRL 1.16 has no PPO trainer; GRPO has no critic. So two of our figures stand beside its one: the
whole learner (policy and critic, as RLEF trains) and the policy alone, which is the same work as
TRL's. Both trainers are given the same token ids, responses and feedback alike, with feedback
masked; both compute old and reference log-probs of the batch and then make the same number of
optimizer steps over it. Generation is left out of both. Trained tokens are the tokens of the
episodes, padding not counted.

Ours runs with the recipe's micro-batches, in the recipe's layout and in data parallel. TRL gets as
many threads as our ranks have together, and is first tried in several ways, of which it keeps its
fastest: one process or one a thread, micro-batches of 8 to 64 sequences. Rounds alternate, and a
ratio is taken within a round, so that what else the machine does hits both.
"""

import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
TRAINING = "rlef_mega.bench.train"
WORKER = Path(__file__).with_name("trl_worker.py")


@dataclass(frozen=True)
class Way:
    """How TRL is run: processes, and sequences a process takes at once."""

    processes: int
    microbatch: int


@dataclass(frozen=True)
class Round:
    """What was measured within minutes: ours by layout, and TRL's."""

    ours: dict[str, dict[str, Any]]
    theirs: dict[str, Any]


def benchmark(recipe: str) -> Report:
    python = find_python()
    with workload(recipe) as work:
        episodes = random_episodes(
            work.config.rollout, model_shape(work.config)["vocab_size"], work.config.run.seed
        )
        trial = work.run(TRAINING)  # tells the threads
        threads = trial["threads"] * work.config.parallel.world_size
        tried = {
            way: statistics.median(
                run_trl(python, work, episodes, way, threads, repeats=REPEATS)["seconds"]
            )
            for way in ways_to_try(work, threads)
        }
        best = min(tried, key=lambda way: tried[way])
        rounds = []
        for _ in range(ROUNDS):
            theirs = run_trl(python, work, episodes, best, threads, repeats=REPEATS)
            ours = {name: variant.run(TRAINING) for name, variant in layouts(work).items()}
            rounds.append(Round(ours, theirs))
        about = train.describe_work(work, trial) | {
            "threads_in_total": threads,
            "trl": theirs["versions"] | {"trainer": "GRPOTrainer", **asdict(best)},
            "trl_tried": [{**asdict(way), "seconds": seconds} for way, seconds in tried.items()],
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


def layouts(work: Workload) -> dict[str, Workload]:
    """The recipe's own, and data parallel, which is how TRL uses several processes."""
    config = work.config
    own = config.parallel
    variants = {
        f"TP {own.tensor_model_parallel_size} x PP {own.pipeline_model_parallel_size} x "
        f"DP {own.data_parallel_size}": work
    }
    update = config.rollout.episodes_per_batch // config.ppo.updates_per_batch
    if own.data_parallel_size < own.world_size and update % own.world_size == 0:
        variants[f"DP {own.world_size}"] = work.in_data_parallel()
    return variants


def ways_to_try(work: Workload, threads: int) -> list[Way]:
    """One process with all threads, and one process a thread, each with every micro-batch size that
    divides its share of an update (a small recipe's whole share if none does)."""
    update = work.config.rollout.episodes_per_batch // work.config.ppo.updates_per_batch
    ways = []
    for processes in sorted({1, threads}):
        share, rest = divmod(update, processes)
        if rest == 0:
            sizes = [size for size in MICROBATCHES if share % size == 0] or [share]
            ways += [Way(processes, size) for size in sizes]
    return ways


def run_trl(
    python: Path,
    work: Workload,
    episodes: Sequence[Episode],
    way: Way,
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
                "microbatch": way.microbatch,
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
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads // way.processes),
        "PYTHONSAFEPATH": "1",  # the script's folder holds modules of ours with common names
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={way.processes}"]
    done = subprocess.run(
        [str(python), *launcher, str(WORKER), str(request)],
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
    start = len(episode.turns[0].observed_ids)
    said: list[int] = []
    logprobs: list[float] = []
    for turn in episode.turns:
        observed, sampled = len(turn.observed_ids), turn.completion
        said += [0] * observed + [1] * len(sampled.token_ids)
        logprobs += [0.0] * observed + list(sampled.logprobs)
    return {
        "prompt_ids": list(episode.token_ids[:start]),
        "completion_ids": list(episode.token_ids[start:]),
        "env_mask": said[start:],
        "logprobs": logprobs[start:],
    }


def figures(rounds: Sequence[Round]) -> tuple[Figure, ...]:
    """Medians of each round, and their ratios."""
    first = next(iter(rounds[0].ours.values()))
    trl = [statistics.median(r.theirs["seconds"]) for r in rounds]
    seconds = {"TRL GRPOTrainer, policy": trl}
    for layout in rounds[0].ours:
        mine = [r.ours[layout] for r in rounds]
        seconds[f"ours {layout}, policy and critic"] = [whole_iteration(m) for m in mine]
        seconds[f"ours {layout}, policy"] = [statistics.median(m["policy_alone"]) for m in mine]
    speeds = [
        Figure(name, "tokens/s", tuple(first["tokens"] / s for s in each))
        for name, each in seconds.items()
    ]
    ratios = [
        Figure(f"{name} / TRL", "ratio", tuple(t / s for s, t in zip(each, trl, strict=True)))
        for name, each in seconds.items()
        if each is not trl
    ]
    return (*speeds, *ratios)


def whole_iteration(measured: dict[str, Any]) -> float:
    return statistics.median(
        sum(times[part] for part in train.LEARNING) for times in measured["phases"]
    )


def notes(rounds: Sequence[Round]) -> tuple[str, ...]:
    ours = next(iter(rounds[0].ours.values()))
    padded = rounds[0].theirs["padded_tokens"] / ours["tokens"]
    return (
        f"both train on the same {ours['tokens']:,} tokens in {ours['sequences']} episodes; "
        f"TRL pads them to {padded:.2f} times as many",
    )
