"""Steps an hour of synchronous and asynchronous training, on simulated servers in virtual time.

What is real: `Stream`, which says what starts and what a batch is made of, and the rollout code
with its prompts, programs, feedback and episodes. What is simulated: servers and grading
(simulated.py), and a trainer that takes a given time a step and then publishes, for which all
servers stand still. Nothing is random between modes: dialogue n says the same in each.

*Generation : training* is the time in which a batch is generated alone and to its end, the trainer
taking none, to the time of training on it.

    python -m rlef_mega.bench.overlap RESULTS.json PICTURE.png

draws a results file.
"""

import asyncio
import itertools
import json
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlef_mega.bench import virtual_time
from rlef_mega.bench.dialogues import curriculum_chat
from rlef_mega.bench.figures import Figure, Report, describe_benchmark
from rlef_mega.bench.simulated import (
    H100_8B,
    Lengths,
    ServerSpeed,
    SimulatedEngine,
    SimulatedGrader,
    made_up_problems,
)
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.judge import Judge
from rlef_mega.dialogues.rollout import DialogueLoop, Rules
from rlef_mega.dialogues.stream import Stream
from rlef_mega.report.plots import STYLE
from rlef_mega.types import Episode, Sampling

MODES = {"sync": 0, "one step off": 1, "async, 2": 2, "async, 4": 4}  # max_staleness
RATIOS = {"1:4": 0.25, "1:2": 0.5, "1:1": 1.0, "2:1": 2.0, "4:1": 4.0}
GOAL = 1.8  # async to sync at 1:1
RULES = Rules(turns=3, sampling=Sampling(max_new_tokens=2048), max_context=8192)


@dataclass(frozen=True)
class Workload:
    """What a step is made of. The lengths, the share of right programs and the times of grading and
    publishing are made up."""

    batch: int = 96
    servers: int = 3
    speed: ServerSpeed = H100_8B
    train_s: float = 0.0
    publish_s: float = 1.0
    lengths: Lengths = field(default_factory=Lengths)
    solve: float = 0.25  # programs that are right
    grading_s: float = 0.2  # median
    warmup: int = 5  # steps before the measured ones: the stream fills
    steps: int = 10  # measured


@dataclass(frozen=True)
class Run:
    """What was seen in the measured steps."""

    step_s: float
    trainer_idle: float  # share of time in which it waits for a batch
    engine_idle: float  # share of the servers' time with nothing to run
    staleness: float  # versions, mean over the tokens trained on
    oldest: int  # versions, of the oldest token trained on
    tokens: float  # sampled in a dialogue, mean over those trained on
    tokens_error: float  # standard error of it
    solved: float  # share of those trained on

    @property
    def steps_an_hour(self) -> float:
        return 3600 / self.step_s


QUANTITIES = {
    "steps_an_hour": "steps/hour",
    "trainer_idle": "share",
    "engine_idle": "share",
    "staleness": "versions",
    "oldest": "versions",
    "tokens": "tokens a dialogue",
    "solved": "share",
}


def benchmark() -> Report:
    chat, load = curriculum_chat(), Workload()
    generation_s = alone_s(chat, load)
    figures = [Figure("a batch alone", "s", (generation_s,))]
    runs: dict[tuple[str, str], Run] = {}
    for ratio, factor in RATIOS.items():
        for mode, max_staleness in MODES.items():
            run = simulate(chat, replace(load, train_s=generation_s / factor), max_staleness)
            runs[ratio, mode] = run
            for quantity, unit in QUANTITIES.items():
                value = float(getattr(run, quantity))
                figures.append(Figure(f"{ratio}, {mode} | {quantity}", unit, (value,)))
            speedup = runs[ratio, "sync"].step_s / run.step_s
            figures.append(Figure(f"{ratio}, {mode} | of sync", "ratio", (speedup,)))
    best = runs["1:1", "sync"].step_s / runs["1:1", "async, 2"].step_s
    widest = max(
        abs(run.tokens - runs[ratio, "sync"].tokens) / run.tokens_error
        for (ratio, _), run in runs.items()
    )
    return Report(
        "rlef bench overlap, simulated",
        describe_benchmark(workload=str(load)),
        tuple(figures),
        (
            f"async (2) at 1:1: {best:.2f} times sync; goal {GOAL}",
            f"tokens a dialogue: at most {widest:.1f} standard errors from sync's",
        ),
        pivoted=True,
    )


def alone_s(chat: ChatFormat, load: Workload) -> float:
    """Seconds in which a batch is generated while nothing else happens."""
    return simulate(chat, replace(load, train_s=0.0, publish_s=0.0), 0).step_s


def simulate(chat: ChatFormat, load: Workload, max_staleness: int) -> Run:
    return virtual_time.run(train(chat, load, max_staleness))


async def train(chat: ChatFormat, load: Workload, max_staleness: int) -> Run:
    loop = asyncio.get_running_loop()
    engine = SimulatedEngine(
        chat,
        servers=load.servers,
        speed=load.speed,
        lengths=load.lengths,
        max_new_tokens=RULES.sampling.max_new_tokens,
        solve=load.solve,
        publish_s=load.publish_s,
    )
    dialogues = DialogueLoop(engine, Judge(SimulatedGrader(load.grading_s)), chat, RULES)
    problems = made_up_problems(64)

    async def hold(number: int) -> Episode | str:
        return await dialogues.run(problems[number % len(problems)], number)

    stream = Stream(
        hold,
        itertools.count(),
        batch=load.batch,
        version=0,
        max_staleness=max_staleness,
        open_dialogues=load.batch * (max_staleness + 1),
    )
    waited_s = begun = busy_s = 0.0
    taken: list[tuple[int, Episode]] = []  # with the version of the weights that train on it
    for step in range(load.warmup + load.steps):
        if step == load.warmup:
            waited_s, begun, busy_s = 0.0, loop.time(), engine.busy_s()
            taken.clear()
        asked = loop.time()
        batch = await stream.take()
        waited_s += loop.time() - asked
        taken += [(step, episode) for episode in batch.values() if isinstance(episode, Episode)]
        await asyncio.sleep(load.train_s)
        await engine.publish(step + 1)
        stream.advance(step + 1)
    wall_s = loop.time() - begun
    busy_s = engine.busy_s() - busy_s
    await stream.close()
    return summary(load, taken, wall_s, waited_s, busy_s)


def summary(
    load: Workload,
    taken: list[tuple[int, Episode]],
    wall_s: float,
    waited_s: float,
    busy_s: float,
) -> Run:
    ages = [
        version - of_token
        for version, episode in taken
        for turn in episode.turns
        for of_token in turn.completion.weight_versions
    ]
    tokens = [sum(len(turn.completion.token_ids) for turn in episode.turns) for _, episode in taken]
    return Run(
        step_s=wall_s / load.steps,
        trainer_idle=waited_s / wall_s,
        engine_idle=1 - busy_s / (wall_s * load.servers),
        staleness=statistics.fmean(ages),
        oldest=max(ages),
        tokens=statistics.fmean(tokens),
        tokens_error=statistics.stdev(tokens) / len(tokens) ** 0.5,
        solved=statistics.fmean(episode.solved for _, episode in taken),
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Steps an hour and idle trainer by ratio, a line a mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = results["figures"]

    def of(ratio: str, mode: str, quantity: str) -> float:
        return figures[f"{ratio}, {mode} | {quantity}"]["median"]

    with matplotlib.rc_context(STYLE):
        figure, (speed, idle) = pyplot.subplots(ncols=2, figsize=(9, 3.4))
        for mode in MODES:
            style = {"color": "#555555", "linestyle": "--"} if mode == "sync" else {}
            label = mode if mode == "sync" else f"{mode} (max_staleness {MODES[mode]})"
            speed.plot(
                list(RATIOS),
                [of(r, mode, "of sync") for r in RATIOS],
                marker="o",
                label=label,
                **style,
            )
            idle.plot(
                list(RATIOS), [of(r, mode, "trainer_idle") for r in RATIOS], marker="o", **style
            )
        speed.axhline(GOAL, color="black", linewidth=0.8, linestyle=":")
        speed.set_title("steps an hour, to sync's")
        idle.set_title("share of time in which the trainer waits")
        for axes in (speed, idle):
            axes.set_xlabel("generation : training")
            axes.set_ylim(bottom=0)
        speed.legend(fontsize=7)
        figure.suptitle("Simulated servers", fontsize=9, x=0.01, ha="left")
        figure.tight_layout()
        figure.savefig(path, dpi=150, facecolor="white")


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
