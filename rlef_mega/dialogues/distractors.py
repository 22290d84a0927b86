"""Random feedback for training (RLEF C.2): outcomes of programs that are known to fail, on the
public tests of their own problems.

Theory of operation: before the first dialogue, each rank runs its share of the programs; then all
ranks gather all outcomes, in the same order. The run's seed chooses the problems. A program is left
out if it passes, or if the sandbox fails on it: a fault is not a verdict.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

from rlef_mega.config import ConfigError
from rlef_mega.dialogues.judge import Judge, JudgeError
from rlef_mega.dialogues.rollout import TRIES, Distractor
from rlef_mega.run.ranks import gather, interleave, my_share
from rlef_mega.types import PrivateTests, Problem, TestOutcome
from rlef_sandbox import Status

POOL = 64  # problems, each with one program at most
MOST_TESTS = 8  # of a problem; feedback shows no more
MOST_CPU_S = 2.0  # an endless program delays the start of a run by no more
MOST_BYTES = 64 << 10  # of a program's output, which is sent to all ranks
PASSES, SLOW, LARGE, FAULT = "it passes", "it takes long", "it writes much", "the sandbox failed"


def with_wrong_programs(problems: Sequence[Problem], source: str, seed: int) -> list[Problem]:
    """Return up to `POOL` problems with public tests and wrong programs. Raises ConfigError if
    `source` has fewer than two, because a dialogue needs another problem's outcomes."""
    order = list(range(len(problems)))
    random.Random(f"distractors {seed}").shuffle(order)
    chosen: list[Problem] = []
    for place in order:
        problem = problems[place]
        if problem.wrong_programs and problem.public_tests:
            chosen.append(problem)
        if len(chosen) == POOL:
            break
    if len(chosen) < 2:
        raise ConfigError(
            f'rollout.feedback = "random" needs wrong programs of at least two problems, and '
            f"{len(chosen)} of {source} have any (and a public test): for CodeContests ask for "
            "them, as in codecontests:PLACE?wrong_programs=2; in JSONL of your own give "
            "`wrong_programs`; LiveCodeBench has none"
        )
    return chosen


def collect_distractors(
    problems: Sequence[Problem], source: str, judge: Judge, *, seed: int
) -> tuple[Distractor, ...]:
    """Return the same distractors on all ranks. Collective. Raises ConfigError if fewer than two
    problems have a program that fails."""
    chosen = with_wrong_programs(problems, source, seed)
    tried = interleave(gather(asyncio.run(try_all(my_share(chosen), judge))))
    found = tuple(outcome for outcome in tried if isinstance(outcome, Distractor))
    if len(found) < 2:
        reasons = ", ".join(sorted({outcome for outcome in tried if isinstance(outcome, str)}))
        raise ConfigError(
            f'rollout.feedback = "random": of {len(chosen)} problems of {source} {len(found)} have '
            f"a wrong program that fails as it should ({reasons}); give others"
        )
    return found


async def try_all(problems: Sequence[Problem], judge: Judge) -> list[Distractor | str]:
    return list(await asyncio.gather(*(try_out(problem, judge) for problem in problems)))


async def try_out(problem: Problem, judge: Judge) -> Distractor | str:
    """Return the outcomes of the problem's first usable program, or why the last one is not
    usable."""
    limits = replace(problem.limits, cpu_s=min(problem.limits.cpu_s, MOST_CPU_S))
    shown = replace(
        problem,
        public_tests=problem.public_tests[:MOST_TESTS],
        private_tests=PrivateTests(()),
        limits=limits,
    )
    unfair = limits != problem.limits
    reason = ""
    for program in problem.wrong_programs:
        for _ in range(TRIES):
            try:
                verdict = await judge.judge(shown, program, last_turn=False)
                break
            except JudgeError:
                reason = FAULT
        else:
            continue
        reason = why_not(verdict.public, unfair=unfair)
        if not reason:
            return Distractor(problem.id, verdict.public)
    return reason


def why_not(outcomes: Sequence[TestOutcome], *, unfair: bool) -> str:
    """Return why these outcomes are not usable as feedback; "" if they are. Exceeding an `unfair`
    time limit, one below the problem's own, is not a failure."""
    results = [outcome.result for outcome in outcomes]
    if all(result.status is Status.OK for result in results):
        return PASSES
    if unfair and any(r.status in (Status.TIME_LIMIT, Status.IDLE_LIMIT) for r in results):
        return SLOW
    written = sum(len(result.stdout) + len(result.stderr) for result in results)
    return LARGE if written > MOST_BYTES else ""
