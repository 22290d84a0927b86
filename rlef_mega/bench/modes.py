"""Does it learn the same? The demo's training by the embedded engine, and by two real SGLang
servers in sync and in async mode, some seeds each, from the same base model.

Runs stand in runs/modes; one that is finished is not run again, and a killed one goes on. The
difference between two ways has an interval over test problems (paired) and seeds, by resampling
both.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rlef_mega.bench.figures import Figure, Report, describe_benchmark
from rlef_mega.config import ConfigError, TrainConfig, find_recipe, load_config
from rlef_mega.intervals import interval_over_seeds
from rlef_mega.run.directory import RunDirectory
from rlef_mega.run.launch import rlef

RUNS = Path("runs/modes")
SEEDS = (1, 2)
SERVED = "tiny_sglang_cpu --serve"
WAYS = {  # what comes after `rlef train`
    "embedded": "demo",
    "sync": SERVED,
    "async, staleness 1": f"{SERVED} --set rollout.mode=async --set rollout.max_staleness=1",
    "async, staleness 2": f"{SERVED} --set rollout.mode=async --set rollout.max_staleness=2",
    # as many dialogues and updates, in steps half as large: a version behind is half as far behind
    "async, staleness 1, half batches": f"{SERVED} --set rollout.mode=async"
    " --set rollout.max_staleness=1 --set rollout.episodes_per_batch=128"
    " --set ppo.updates_per_batch=2 --set run.steps=60 --set run.checkpoint_every=10"
    " --set eval.every=20",
}


def benchmark() -> Report:
    """ConfigError without the base model, RuntimeError with the end of its output for a run that
    fails."""
    recipe = find_recipe("demo")
    base = Path(load_config(recipe, [], TrainConfig).model.path)
    if not (base / "config.json").is_file():
        raise ConfigError(f"no model in {base}: `rlef sft demo_base` makes it")
    runs = {way: [trained(way, seed) for seed in SEEDS] for way in WAYS}
    embedded = [outcomes(run) for run in runs["embedded"]]
    notes = (
        "solved: 1@3 on the demo's test problems, T = 1, after the same number of updates",
        "runs with servers do not repeat bit for bit; all ways share the machine's cores",
    )
    about = describe_benchmark(
        seeds=list(SEEDS),
        commands={way: f"rlef train {words}" for way, words in WAYS.items()},
        difference_to_embedded={
            way: interval_over_seeds([outcomes(run) for run in them], beside=embedded)
            for way, them in runs.items()
            if way != "embedded"
        },
    )
    figures = [figure for way, them in runs.items() for figure in figures_of(way, them)]
    return Report("rlef bench modes", about, tuple(figures), notes, pivoted=True)


def trained(way: str, seed: int) -> RunDirectory:
    name = way.replace(", staleness ", "").replace(", ", "-").replace(" ", "-")
    run = RunDirectory(RUNS / f"{name}-{seed}")
    if not (run.path / "eval/after.json").is_file():
        words = [*WAYS[way].split(), "--set", f"run.dir={run.path}", "--set", f"run.seed={seed}"]
        print(f"rlef train {' '.join(words)}", flush=True)
        rlef("train", *words)
    return run


def outcomes(run: RunDirectory) -> list[float]:
    """Of each test problem: 1 if solved by the trained model."""
    return json.loads((run.path / "eval/after.json").read_text())["protocols"]["multi_turn"][
        "outcomes"
    ]


def figures_of(way: str, runs: Sequence[RunDirectory]) -> list[Figure]:
    steps = [run.read_metrics() for run in runs]

    def over_runs(quantity: str, unit: str, values: Sequence[float]) -> Figure:
        return Figure(f"{way} | {quantity}", unit, tuple(values))

    def total(records: list[dict[str, Any]], name: str) -> float:
        return sum(record["servers"].get(name, 0) for record in records)

    figures = [
        over_runs("solved", "share", [mean(outcomes(run)) for run in runs]),
        over_runs("step", "s", [mean(r["time"]["step"] for r in records) for records in steps]),
        over_runs(
            "log-prob gap, greatest",
            "nats",
            [max(r["logprob_gap_max"] or 0.0 for r in records) for records in steps],
        ),
        over_runs("dropped", "", [sum(sum(r["dropped"].values()) for r in rs) for rs in steps]),
    ]
    if "servers" in steps[0][0]:
        cached = [total(rs, "cached_tokens") / total(rs, "context_tokens") for rs in steps]
        figures.append(over_runs("context from cache", "share", cached))
    if "async" in way:
        sizes = [min(r["effective_sample_size"] for r in records) for records in steps]
        figures += [
            over_runs("effective sample size, least", "share", sizes),
            over_runs(
                "staleness", "versions", [mean(r["staleness_mean"] for r in rs) for rs in steps]
            ),
        ]
    return figures
