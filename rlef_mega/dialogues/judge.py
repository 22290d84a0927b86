"""Grade a program with a problem's tests.

All public tests are run, and their outcomes may be shown to the model. Private tests are run only
if all public tests pass, until the first failure; only their statuses leave this file. Both kinds
are graded in one call of the sandbox, which compiles the program once for all tests.

Theory of operation: programs run in the embedded sandbox's processes, for which threads of this
process wait, or on grading servers. The servers' client has a thread and an event loop of its own,
so that it outlives the event loops of the rollouts (one for each step) and keeps retrying while the
engine blocks them.
"""

import ast
import asyncio
import contextlib
import re
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import takewhile
from typing import Any, TypeGuard

from rlef_mega.config import ConfigError, JudgeConfig, requires_extra
from rlef_mega.dialogues.programs import Extracted
from rlef_mega.run.event_loop import LivesInLoop
from rlef_mega.run.launch import sandbox_token
from rlef_mega.types import Problem, TestOutcome, Verdict, tests_of
from rlef_sandbox import Result, Sandbox, Status
from rlef_sandbox.packages import find_packages
from rlef_sandbox.sandbox import JOBS_PER_WORKER
from rlef_sandbox.worker import ZygoteLostError


class JudgeError(RuntimeError):
    """The sandbox failed, not the program: the episode is retried, then dropped and counted, never
    scored."""


class EmbeddedGrader:
    """Grades in a sandbox of this process, which the caller closes."""

    def __init__(self, sandbox: Sandbox, *, workers: int) -> None:
        self.sandbox = sandbox
        self.isolation = sandbox.isolation  # the layers that confine programs, for the manifest
        # more threads than workers: a sleeping program keeps its thread but frees its worker
        self.threads = ThreadPoolExecutor(workers * JOBS_PER_WORKER, thread_name_prefix="judge")

    async def grade(self, problem: Problem, program: str) -> list[Result]:
        """Return a result for each public test and, if all pass, for the private tests until the
        first failure. Raises JudgeError if no sandbox could run them."""
        grading = asyncio.get_running_loop().run_in_executor(
            self.threads, lambda: self.sandbox.grade(program, **grading_options(problem))
        )
        try:
            return await grading
        except (OSError, ZygoteLostError, ValueError) as error:
            # this machine lacks descriptors, memory, or the problem's language
            raise JudgeError(f"the sandbox failed: {error}") from None


class RemoteGrader(LivesInLoop):
    """Grades on servers (`python -m rlef_sandbox serve`); a context manager.

    Opening asks every server for its health. Raises ServiceError if one is not ready or refuses
    the token, ValueError if an address is malformed.
    """

    def __init__(self, servers: Sequence[str], token: str | None, *, deadline_s: float) -> None:
        from rlef_sandbox.service.client import SandboxClient  # an extra: it needs aiohttp

        self.client = SandboxClient(servers, token, deadline_s=deadline_s)
        super().__init__("grader")

    async def open(self) -> None:
        await self.client.__aenter__()
        health = await self.client.health()
        self.isolation = {"servers": {url: about["isolation"] for url, about in health.items()}}

    async def shut(self) -> None:
        await self.client.__aexit__(None, None, None)

    async def grade(self, problem: Problem, program: str) -> list[Result]:
        from rlef_sandbox.service.client import RequestRefusedError, ServiceError

        grading = self.client.grade(program, **grading_options(problem))
        try:
            return await asyncio.wrap_future(self.submit(grading))
        except (ServiceError, RequestRefusedError) as error:
            raise JudgeError(str(error)) from None


Grader = EmbeddedGrader | RemoteGrader


@contextlib.contextmanager
def open_grader(asked: JudgeConfig) -> Iterator[Grader]:
    """Open a client of the grading servers, if any are given, else a sandbox of this process."""
    if asked.servers:
        with RemoteGrader(asked.servers, sandbox_token(), deadline_s=asked.deadline_s) as remote:
            yield remote
    else:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        # each running program needs a dozen descriptors
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        with Sandbox(asked.workers, asked.isolation, packages=asked.packages) as sandbox:
            yield EmbeddedGrader(sandbox, workers=asked.workers)


class Judge:
    """Turns a grader's results into verdicts. The caller closes the grader."""

    def __init__(self, grader: Grader) -> None:
        self.grader = grader
        self.runs = 0  # tests run so far, over all programs

    async def judge(self, problem: Problem, found: Extracted, *, last_turn: bool) -> Verdict:
        """Grade a response: public tests first, private tests if all of them pass."""
        results = [] if found.program is None else await self.grade(problem, found.program)
        public = results[: len(problem.public_tests)]
        private = results[len(problem.public_tests) :]
        passed = found.program is not None and all_passed(public)
        solved = passed and all_passed(private)
        return Verdict(
            tuple(map(TestOutcome, problem.public_tests, public)),
            public_passed=passed,
            solved=solved if passed or last_turn else None,
            private_statuses=tuple(result.status for result in private),
            invalid=found.invalid,
        )

    async def grade(self, problem: Problem, program: str) -> list[Result]:
        """Return the grader's results. Raises JudgeError if the sandbox failed on any test."""
        prelude, program = with_prelude(problem, program)
        results = await self.grader.grade(problem, prelude + program)
        if prelude:
            results = [own_lines(result, prelude.count("\n")) for result in results]
        self.runs += len(results)
        for result in results:
            if result.status is Status.SANDBOX_ERROR:
                raise JudgeError(f"sandbox failed on {problem.id}: {result.stderr!r}")
        return results


def grading_options(problem: Problem) -> dict[str, Any]:
    """Return what a sandbox or a server needs of a problem to grade a program."""
    return {
        "tests": tests_of(problem),
        "limits": problem.limits,
        "checker": problem.checker,
        "language": problem.language,
        "run_at_least": len(problem.public_tests),
    }


def is_future_import(node: ast.stmt) -> TypeGuard[ast.ImportFrom]:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def with_prelude(problem: Problem, program: str) -> tuple[str, str]:
    """Return the lines to put before a program, and the program. Its `from __future__` imports,
    which must stand first in a file, move before the prelude; its lines keep their numbers."""
    if not problem.prelude or problem.language != "python" or "__future__" not in program:
        return problem.prelude, program
    try:
        body = ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return problem.prelude, program  # its own error is the verdict
    body = body[1:] if ast.get_docstring(ast.Module(body, []), clean=False) is not None else body
    imports = list(takewhile(is_future_import, body))  # one that stands later stays an error
    lines = program.encode().splitlines(keepends=True)
    for node in reversed(imports):  # so that those before it keep their columns
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        start, rest = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        lines[first : last + 1] = [start + b"pass" + rest, *[b"\n"] * (last - first)]
    moved = "".join(f"{ast.unparse(node)}\n" for node in imports)
    return moved + problem.prelude, b"".join(lines).decode()


FRAME_LINE = re.compile(rb'(  File "solution\.py", line )(\d+)')


def own_lines(result: Result, before: int) -> Result:
    """Return the result with the lines in its tracebacks numbered from the program's first line,
    which follows `before` lines of prelude."""
    stderr = FRAME_LINE.sub(
        lambda frame: frame[1] + b"%d" % max(1, int(frame[2]) - before), result.stderr
    )
    return replace(result, stderr=stderr)


def all_passed(results: Sequence[Result]) -> bool:
    """Return whether all tests passed; grading stops at the first private one that does not."""
    return all(result.status is Status.OK for result in results)


def check_judge(judge: JudgeConfig) -> None:
    """Raise ConfigError unless every grading server is ready, accepts the token, isolates programs
    as the recipe asks, and offers its packages. Without servers, raises ValueError if a package is
    not installed here."""
    if not judge.servers:
        find_packages(judge.packages)
        return
    with requires_extra("judge.servers", "serve"):
        import rlef_sandbox.service.client  # noqa: F401 - RemoteGrader imports it, too
    try:
        with RemoteGrader(judge.servers, sandbox_token(), deadline_s=judge.deadline_s) as grader:
            servers = grader.isolation["servers"]
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"judge.servers: {error}. Start each with `python -m rlef_sandbox serve`, and give "
            "their token in RLEF_SANDBOX_TOKEN"
        ) from None
    for url, isolation in servers.items():
        level = isolation["level"]
        if judge.isolation == "default" and level != "default":
            raise ConfigError(
                f"judge.servers: {url} runs with isolation {level!r}; start it without "
                "--isolation, or set judge.isolation to the same"
            )
        if missing := sorted({*judge.packages}.difference(isolation.get("packages", ()))):
            raise ConfigError(
                f"judge.packages: programs on {url} cannot import {', '.join(missing)}; start it "
                f"with `python -m rlef_sandbox --packages {','.join(judge.packages)} serve`"
            )
