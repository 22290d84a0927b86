"""Where the time of a finished run's steps went, from its metrics.jsonl: no new measurement."""

from pathlib import Path

from rlef_mega.bench.figures import Figure, Report, describe_benchmark, shares
from rlef_mega.config import ConfigError
from rlef_mega.run.directory import RunDirectory

OUTSIDE_GOAL = 0.05  # of a step's wall time, in none of its phases


def benchmark(run: Path) -> Report:
    """The first step pays for warm-ups and is left out."""
    records = RunDirectory(run).read_metrics()
    if len(records) < 2:
        raise ConfigError(
            f"{run / 'metrics.jsonl'} has {len(records)} steps, 2 are needed; "
            "give the directory of a run: rlef bench step runs/demo"
        )
    steps = [with_outside(record["time"]) for record in records[1:]]
    wall = tuple(times["step"] for times in steps)
    whole = {name: sum(times.get(name, 0.0) for times in steps) for name in names_in(steps)}
    speed = tuple(r["tokens"] / r["time"]["step"] for r in records[1:])
    outside = whole["outside"] / whole["step"]
    verdict = "met" if outside < OUTSIDE_GOAL else "missed"
    return Report(
        f"rlef bench step: {run}",
        describe_benchmark(run=str(run), steps=len(steps), share_of_all_steps=fractions(whole)),
        (
            Figure("step", "s", wall),
            Figure("tokens of dialogues", "tokens/s", speed),
            *shares(steps),
        ),
        (
            f"over all {len(steps)} steps together: "
            + ", ".join(f"{name} {share:.1%}" for name, share in fractions(whole).items()),
            f"outside all phases: {outside:.1%}, goal below {OUTSIDE_GOAL:.0%}: {verdict}",
        ),
    )


def names_in(steps: list[dict[str, float]]) -> list[str]:
    return sorted({name for times in steps for name in times})


def with_outside(times: dict[str, float]) -> dict[str, float]:
    """`outside` is what no phase of the step claims."""
    claimed = sum(seconds for phase, seconds in times.items() if phase != "step")
    return {**times, "outside": max(0.0, times["step"] - claimed)}


def fractions(whole: dict[str, float]) -> dict[str, float]:
    return {
        name: round(seconds / whole["step"], 4) for name, seconds in whole.items() if name != "step"
    }
