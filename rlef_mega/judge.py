"""Code and tests to a verdict.

The public tests are all run and shown to the model; the private tests only when the response is
final, until the first failure, and of them nothing but pass or fail leaves this file. Grading
happens in the sandbox's processes; threads here only wait for them.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rlef_mega.types import AnyTest, Problem, TestOutcome, Verdict
from rlef_sandbox import Result, Sandbox, Status


class JudgeError(RuntimeError):
    """The sandbox failed, not the program: the episode is retried, then dropped and counted, never
    scored."""


class Judge:
    """Grades programs in a sandbox from asynchronous code. Closing is up to the sandbox's owner."""

    def __init__(self, sandbox: Sandbox, *, workers: int) -> None:
        self.sandbox = sandbox
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix="judge")
        self.runs = 0  # programs x tests run so far
        self.run_s = 0.0  # wall time inside the sandbox, summed over runs

    async def judge(self, problem: Problem, program: str | None, *, last_turn: bool) -> Verdict:
        """Public tests first; private ones if all of them pass. A final response that fails is not
        solved."""
        if program is None:
            return Verdict((), public_passed=False, solved=False if last_turn else None)
        public = await self.grade(problem, program, problem.public_tests, stop_early=False)
        outcomes = tuple(map(TestOutcome, problem.public_tests, public))
        if not all_passed(public):
            return Verdict(outcomes, public_passed=False, solved=False if last_turn else None)
        tests = problem.private_tests.tests
        private = await self.grade(problem, program, tests, stop_early=True)
        return Verdict(
            outcomes,
            public_passed=True,
            solved=all_passed(private),
            private_passed=sum(result.status is Status.OK for result in private),
            private_run=len(private),
        )

    async def grade(
        self, problem: Problem, program: str, tests: Sequence[AnyTest], *, stop_early: bool
    ) -> list[Result]:
        if not tests:
            return []
        loop = asyncio.get_running_loop()
        results = await loop.run_in_executor(
            self.threads,
            lambda: self.sandbox.grade(
                program,
                tests,
                limits=problem.limits,
                checker=problem.checker,
                stop_at_first_failure=stop_early,
                language=problem.language,
            ),
        )
        self.runs += len(results)
        self.run_s += sum(result.wall_s for result in results)
        for result in results:
            if result.status is Status.SANDBOX_ERROR:
                raise JudgeError(f"sandbox failed on {problem.id}: {result.stderr!r}")
        return results


def all_passed(results: Sequence[Result]) -> bool:
    """Every test that was asked for passed (grading stops at the first that does not)."""
    return all(result.status is Status.OK for result in results)
