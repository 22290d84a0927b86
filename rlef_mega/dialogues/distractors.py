"""What random feedback is made of in training (RLEF C.2): what programs that are known to fail do
on the public tests of their own problems.

Theory of operation: before the first dialogue each rank runs its share of the programs, and then
all ranks hold all of what came of them, in the same order. Which problems give one follows from the
run's seed. A program that passes is left out, and so is one on which the sandbox fails: a fault is
not a verdict.
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

POOL = 64  # problems, each of which gives one at most
MOST_TESTS = 8  # of a problem: feedback shows no more
MOST_CPU_S = 2.0  # so that what never ends holds up the start of a run but little
MOST_BYTES = 64 << 10  # of what a program wrote, which is sent to all ranks
PASSES, SLOW, LARGE, FAULT = "it passes", "it takes long", "it writes much", "the sandbox failed"


def with_wrong_programs(problems: Sequence[Problem], source: str, seed: int) -> list[Problem]:
    """Up to `POOL` problems with a public test and wrong programs. ConfigError where `source` has
    fewer than two: a problem is told of another one's."""
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
    """Those of all ranks, alike on all. ConfigError where fewer than two problems have programs
    that fail. Collective."""
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
    """What its first program that fails did; or why there is none, by the last one."""
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
    """Why this is no feedback; empty where it is. An `unfair` limit of time is less than the
    problem's own, and running into it no failure."""
    results = [outcome.result for outcome in outcomes]
    if all(result.status is Status.OK for result in results):
        return PASSES
    if unfair and any(r.status in (Status.TIME_LIMIT, Status.IDLE_LIMIT) for r in results):
        return SLOW
    written = sum(len(result.stdout) + len(result.stderr) for result in results)
    return LARGE if written > MOST_BYTES else ""
