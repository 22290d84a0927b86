"""The whole loop as users run it, for some steps: `rlef train` in a folder of its own, then what
its metrics.jsonl says.

Where the recipe's model is not on this machine, it is random weights of the demo's shape; they
write hardly any valid code, so that grading is left out of what is measured (the table says which
model it was). With servers in the recipe they are started, too, by `--serve`.
"""

from typing import Any

from rlef_mega.bench.figures import Figure, Report, shares
from rlef_mega.bench.step import with_outside
from rlef_mega.bench.workload import Workload, workload
from rlef_mega.run.directory import RunDirectory
from rlef_mega.run.launch import rlef

STEPS = 6  # the first is the warm-up


def benchmark(recipe: str) -> Report:
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
    notes = ("tokens are those of whole dialogues, prompts and feedback included",)
    return Report(f"rlef bench e2e: {recipe}", about, figures(records, config.world_size), notes)


def train(work: Workload) -> list[dict[str, Any]]:
    """Without evaluations, and one checkpoint at the end."""
    run = work.folder / "run"
    settings = [
        f'run.dir="{run}"',
        f"run.steps={STEPS}",
        f"run.checkpoint_every={STEPS}",
        "eval.every=0",
        'data.test=""',
        "guard.max_invalid_fraction=1.0",  # random weights write no code
    ]
    if work.config.rollout.engine == "sglang" and work.config.rollout.servers.count:
        settings.append("--serve")
    words = [w for s in settings for w in ((s,) if s.startswith("--") else ("--set", s))]
    rlef("train", str(work.folder / "config.toml"), *words)
    return RunDirectory(run).read_metrics()


def figures(records: list[dict[str, Any]], ranks: int) -> tuple[Figure, ...]:
    times = [with_outside(record["time"]) for record in records]
    tokens = [record["tokens"] for record in records]
    written = [r["episodes"] * r["turns_mean"] * r["response_tokens_mean"] for r in records]

    def speed(name: str, counts: list[float], *phases: str) -> Figure:
        seconds = [sum(of[phase] for phase in phases) for of in times]
        rates = tuple(c / s / ranks for c, s in zip(counts, seconds, strict=True))
        return Figure(name, "tokens/s/rank", rates)

    idle = {name for record in records for name in record["idle_time"]}
    return (
        Figure("step", "s", tuple(of["step"] for of in times)),
        Figure(
            "episodes",
            "episodes/s",
            tuple(r["episodes"] / of["step"] for r, of in zip(records, times, strict=True)),
        ),
        speed("end to end", tokens, "step"),
        speed("sampled, while the trainer waits for episodes", written, "rollout"),
        speed("scored", tokens, "score"),
        speed("trained", tokens, "update"),
        Figure("publication", "s", tuple(of["publish"] for of in times)),
        *(
            Figure(f"idle: {name}", "share", tuple(r["idle_time"].get(name, 0.0) for r in records))
            for name in sorted(idle)
        ),
        *shares(times),
    )
