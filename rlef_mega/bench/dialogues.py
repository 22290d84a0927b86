"""How many dialogues one process drives, and how long its event loop stands still meanwhile.

The real rollout code in real time: a real tokenizer and chat format, prompts and feedback of the
usual lengths, programs that are parsed. Only the servers and the grading are simulated
(simulated.py), with so many servers that the process has no rest. A probe sleeps for a millisecond
again and again; what it oversleeps is how long the loop stood still, or how long other processes
had its core; how much of it the loop's thread computed is told apart (*longest computing in
a row*).

- *together*: all dialogues are started at once, as `rollout` does in synchronous training.
- *stream*: a `Stream` keeps as many open, and starts a new one for each that ends.
"""

import asyncio
import itertools
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlef_mega.bench.figures import Figure, Report, describe_benchmark
from rlef_mega.bench.simulated import (
    Lengths,
    ServerSpeed,
    SimulatedEngine,
    SimulatedGrader,
    made_up_problems,
)
from rlef_mega.demo.tokenizer import train_tokenizer
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.judge import Judge
from rlef_mega.dialogues.rollout import DialogueLoop, Rules
from rlef_mega.dialogues.stream import Stream
from rlef_mega.run.launch import collect_garbage_by_hand
from rlef_mega.types import Episode, Sampling

RULES = Rules(turns=3, sampling=Sampling(max_new_tokens=2048), max_context=8192)
IN_FLIGHT = (2000, 8000)
GOAL_MS = 50.0
REPEATS = 3
# Fifty times as fast as an H100, so that the process is what there is too little of.
SERVERS, FAST = 100, ServerSpeed(step_s=1.4e-4, step_per_request_s=2e-6, prefill_token_s=7e-7)


@dataclass(frozen=True)
class Drive:
    """Dialogues that ended in how long, and the probe's delays."""

    dialogues: int
    wall_s: float
    cpu_s: float
    delays_ms: list[float]  # in order of size
    computing_ms: list[float]  # the same of the thread's CPU time

    @property
    def p99_ms(self) -> float:
        return self.delays_ms[int(0.99 * (len(self.delays_ms) - 1))]


def benchmark(every: Sequence[int] = IN_FLIGHT, repeats: int = REPEATS) -> Report:
    chat = curriculum_chat()
    figures = []
    for in_flight in every:
        for name, drive in (("together", drive_together), ("stream", drive_stream)):
            drives = [drive(chat, in_flight) for _ in range(repeats)]
            for quantity, unit, of in QUANTITIES:
                samples = tuple(of(one) for one in drives)
                figures.append(Figure(f"{in_flight:,} {name} | {quantity}", unit, samples))
    longest = max(f.high for f in figures if f.name.startswith("2,000") and "computing" in f.name)
    return Report(
        "rlef bench dialogues",
        describe_benchmark(servers=SERVERS, speed=str(FAST), lengths=str(Lengths())),
        tuple(figures),
        (f"longest computing in a row at 2,000: {longest:.0f} ms; goal below {GOAL_MS:.0f} ms",),
        pivoted=True,
    )


QUANTITIES: tuple[tuple[str, str, Callable[[Drive], float]], ...] = (
    ("longest delay", "ms", lambda drive: drive.delays_ms[-1]),
    ("longest computing in a row", "ms", lambda drive: drive.computing_ms[-1]),
    ("p99 delay", "ms", lambda drive: drive.p99_ms),
    ("dialogues a second", "dialogues/s", lambda drive: drive.dialogues / drive.wall_s),
    ("CPU time a dialogue", "ms", lambda drive: 1e3 * drive.cpu_s / drive.dialogues),
)


def curriculum_chat(folder: Path | None = None) -> ChatFormat:
    """A byte-level BPE in Llama 3.1's format, learnt in seconds, which all machines have; kept in
    the folder, if there is one."""
    if folder is not None:
        return ChatFormat.for_tokenizer(train_tokenizer(folder, 704))
    with tempfile.TemporaryDirectory(prefix="rlef-bench-") as name:
        return curriculum_chat(Path(name))


def drive_together(chat: ChatFormat, in_flight: int) -> Drive:
    problems = made_up_problems(64)
    chosen = [problems[number % len(problems)] for number in range(in_flight)]

    async def work() -> int:
        engine, judge = fast_servers(chat)
        held = await DialogueLoop(engine, judge, chat, RULES).run_all(chosen, range(in_flight))
        return len(held.episodes)

    return asyncio.run(probed(work))


def drive_stream(chat: ChatFormat, in_flight: int) -> Drive:
    """A batch is as many as are open; two are taken."""
    problems = made_up_problems(64)

    async def work() -> int:
        engine, judge = fast_servers(chat)
        dialogues = DialogueLoop(engine, judge, chat, RULES)

        async def hold(number: int) -> Episode | str:
            return await dialogues.run(problems[number % len(problems)], number)

        stream = Stream(
            hold,
            itertools.count(),
            batch=in_flight,
            version=0,
            max_staleness=1,
            open_dialogues=in_flight,
        )
        taken = await stream.take()
        await engine.publish(1)
        stream.advance(1)
        taken |= await stream.take()
        await stream.close()
        return sum(isinstance(outcome, Episode) for outcome in taken.values())

    return asyncio.run(probed(work))


def fast_servers(chat: ChatFormat) -> tuple[SimulatedEngine, Judge]:
    engine = SimulatedEngine(
        chat,
        servers=SERVERS,
        speed=FAST,
        lengths=Lengths(),
        max_new_tokens=RULES.sampling.max_new_tokens,
    )
    return engine, Judge(SimulatedGrader(median_s=0.05))


async def probed(work: Callable[[], Awaitable[int]]) -> Drive:
    delays_ms: list[float] = []
    computing_ms: list[float] = []

    async def probe() -> None:
        while True:
            begun, computed = time.perf_counter(), time.thread_time()
            await asyncio.sleep(1e-3)
            delays_ms.append(1e3 * (time.perf_counter() - begun - 1e-3))
            computing_ms.append(1e3 * (time.thread_time() - computed))

    collect_garbage_by_hand()  # as in training
    probing = asyncio.ensure_future(probe())
    begun, cpu = time.perf_counter(), time.process_time()
    dialogues = await work()
    wall_s, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
    probing.cancel()
    return Drive(dialogues, wall_s, cpu_s, sorted(delays_ms), sorted(computing_ms))
