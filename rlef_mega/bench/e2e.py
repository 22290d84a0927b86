"""`rlef bench e2e`: the whole loop as users run it, measured by its metrics.jsonl.

Runs a few steps of `rlef train` in a temporary folder, with SGLang servers if the recipe has some.
If the recipe's model is not on this machine, and its shape is not stated, random weights of the
demo's shape are used; they write hardly any valid code, so grading takes almost no time.
"""

from typing import Any

from rlef_mega.bench.results import Figure, Results, shares
from rlef_mega.bench.workload import Workload, workload
from rlef_mega.run.directory import RunDirectory
from rlef_mega.run.launch import rlef

STEPS = 6  # the first is the warm-up


def benchmark(recipe: str) -> Results:
    with workload(recipe) as work:
        records = train(work)[1:]
        config = work.config
        about = work.about(
            problems=config.data.train,
            dialogues=config.rollout.episodes_per_batch,
            engine=config.rollout.engine,
            mode=config.rollout.mode,
            ranks=config.world_size,
        )
    notes = (
        "tokens are counted over whole dialogues, prompts and feedback included; sampled tokens, "
        "over responses only",
    )
    return Results(f"rlef bench e2e: {recipe}", about, figures(records, config.world_size), notes)


def train(work: Workload) -> list[dict[str, Any]]:
    """Train without evaluations, with one checkpoint at the end. Returns the steps' metrics."""
    run = work.folder / "run"
    settings = [
        f'run.dir="{run}"',
        f"run.steps={STEPS}",
        f"run.checkpoint_every={STEPS}",
        "eval.every=0",
        'data.test=""',
        "guard.max_invalid_fraction=1.0",  # random weights write no code
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    if work.config.rollout.engine == "sglang":
        words.append("--serve")
    rlef("train", str(work.folder / "config.toml"), *words)
    return RunDirectory(run).read_metrics()


def figures(records: list[dict[str, Any]], ranks: int) -> tuple[Figure, ...]:
    times = [with_outside(record["time"]) for record in records]
    tokens = [record["tokens"] for record in records]
    sampled = [r["episodes"] * r["turns_mean"] * r["response_tokens_mean"] for r in records]

    def rates(counts: list[float], phase: str) -> tuple[float, ...]:
        return tuple(count / of[phase] for count, of in zip(counts, times, strict=True))

    def speed(name: str, counts: list[float], phase: str) -> Figure:
        return Figure(name, "tokens/s/rank", tuple(r / ranks for r in rates(counts, phase)))

    idle = sorted({name for record in records for name in record["idle_time"]})
    return (
        Figure("step", "s", tuple(of["step"] for of in times)),
        Figure("episodes", "episodes/s", rates([r["episodes"] for r in records], "step")),
        speed("end to end", tokens, "step"),
        speed("sampled, while the trainer waits for episodes", sampled, "rollout"),
        speed("scored", tokens, "score"),
        speed("trained", tokens, "update"),
        Figure("publication", "s", tuple(of["publish"] for of in times)),
        *(
            Figure(f"idle: {name}", "share", tuple(r["idle_time"].get(name, 0.0) for r in records))
            for name in idle
        ),
        *shares(times),
    )


def with_outside(times: dict[str, float]) -> dict[str, float]:
    """Add `outside`, the seconds of the step that belong to no phase."""
    claimed = sum(seconds for phase, seconds in times.items() if phase != "step")
    return {**times, "outside": max(0.0, times["step"] - claimed)}
