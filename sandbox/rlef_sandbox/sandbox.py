"""The public class: programs in, verdicts out. It compares outputs with the expected ones.

Theory of operation. A Sandbox owns `workers` zygotes (`worker.py`, `zygote.py`). Each is an
interpreter process of its own, exec'd rather than forked from the caller. A call of `run` or
`grade` first waits for a slot (`work_slots.py`): at most `workers` programs work at a time, but one
that sleeps lets another start, so up to JOBS_PER_WORKER are under way in a zygote. The call then
opens a session with the least loaded zygote, so any number of threads may share a Sandbox. Expected
outputs never leave this process, except in a test's own code (`CheckTest`) and to a problem's own
checker (`CheckerProgram`); each is confined in a process of its own. A child gets source and input;
its output is compared here. If a zygote is lost, its tests run again on a new one. After RETRIES a
test is a SANDBOX_ERROR, which is not a verdict on the program.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from . import native, values
from .checkers import Checker, checker_named
from .cpp import CHECKER_FILES, CompileFailedError
from .languages import Languages
from .launch_plan import OPEN_FILES
from .packages import find_packages
from .program_runner import FinishedRun, ProgramRunner
from .verdict import (
    AnyTest,
    CallTest,
    CheckerProgram,
    CheckTest,
    Limits,
    Result,
    Status,
    Test,
    as_bytes,
)
from .work_slots import WorkSlots
from .worker import FLOOR, Layers, Worker

ISOLATION_LEVELS = ("default", "minimal")
JOBS_PER_WORKER = 16
DEFAULT_LIMITS = Limits()
PIPE_PAGES_PER_RUN = (OPEN_FILES - 3) // 2 * 16


class IsolationError(RuntimeError):
    """This machine lacks layers that running untrusted programs needs."""


def most_open_programs(workers: int) -> int:
    """Return how many programs may be under way. All their pipes must fit into the kernel's
    allowance for a user: beyond it a new pipe holds only 8 KiB, and honest programs hang.
    """
    most = workers * JOBS_PER_WORKER
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/sys/fs/pipe-user-pages-soft").read_text())
        if pages > 0:
            most = min(most, max(workers, pages // PIPE_PAGES_PER_RUN))
    return most


class Sandbox(contextlib.AbstractContextManager["Sandbox"]):
    """Runs and grades untrusted programs; a context manager that threads may share.

    `workers` is how many programs may work at once: one per core. `isolation="default"` raises
    IsolationError on a machine without the floor of layers: no_new_privs, rlimits, seccomp and one
    file layer. `"minimal"` runs with the layers that exist. `worker_memory_bytes` bounds all that
    runs in a worker together, if the caller has the memory controller of a version 2 cgroup.
    `packages` are those of the caller's environment that Python programs may import, by the names
    that `import` takes; what they require comes with them.
    """

    def __init__(
        self,
        workers: int = 2,
        isolation: str = "default",
        *,
        worker_memory_bytes: int | None = None,
        packages: Sequence[str] = (),
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1")
        if isolation not in ISOLATION_LEVELS:
            known = ", ".join(ISOLATION_LEVELS)
            raise ValueError(f"unknown isolation {isolation!r}; known: {known}")
        self._level = isolation
        self._owner = os.getpid()
        self._slots = WorkSlots(workers, most_open_programs(workers))
        self._packages = find_packages(packages)
        arguments = [str(native.spawn_library() or ""), json.dumps(self._packages)]
        self._workers = [
            Worker(self._accept, arguments=arguments, memory_bytes=worker_memory_bytes)
            for _ in range(workers)
        ]
        self._load = [0] * workers
        self._load_lock = threading.Lock()
        try:
            for worker in self._workers:
                worker.launch()
            for worker in self._workers:
                worker.greet()
            has_launcher = self._workers[0].layers.get("launcher") == "native"
            self._languages = Languages(self._accept, workers, has_launcher=has_launcher)
        except BaseException:
            for worker in self._workers:
                worker.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every process of the sandbox. Calls in other threads raise RuntimeError."""
        if os.getpid() != self._owner:  # a fork of the owner owns nothing
            return
        self._slots.close()
        for worker in self._workers:
            worker.close()
        self._languages.close()

    @property
    def isolation(self) -> Layers:
        """Return the layers in force, each proved by its effect, and the level and packages."""
        layers = self._workers[0].layers
        return {"level": self._level, **layers, "packages": sorted(self._packages.modules)}

    @property
    def zygotes_started(self) -> int:
        """Return how many zygotes were started: one per worker, and one for each lost one."""
        return sum(worker.starts for worker in self._workers)

    @property
    def languages(self) -> tuple[str, ...]:
        """Return the languages that this machine runs."""
        return self._languages.available

    def run(
        self,
        source: str | bytes,
        stdin: str | bytes = b"",
        limits: Limits | None = None,
        language: str = "python",
    ) -> Result:
        """Run a program once. Returns OK if it exited with 0 within the limits."""
        limits = limits or DEFAULT_LIMITS
        try:
            with self._runner(source, limits, language) as runner:
                return runner.run(Test(as_bytes(stdin), b"")).result
        except CompileFailedError as failure:
            return failure.result

    def grade(
        self,
        source: str | bytes,
        tests: Sequence[AnyTest],
        limits: Limits | None = None,
        checker: str | CheckerProgram = "tokens",
        stop_at_first_failure: bool = True,
        language: str = "python",
        run_at_least: int = 0,
    ) -> list[Result]:
        """Grade a program. Returns a result for each test, in order; OK means passed.

        With `stop_at_first_failure` the list ends with the first test that is not OK. The first
        `run_at_least` tests always run, so that the results of all public tests can be shown.
        """
        limits = limits or DEFAULT_LIMITS
        check = checker if isinstance(checker, CheckerProgram) else checker_named(checker)
        self._languages.check(language, tests)
        if isinstance(check, CheckerProgram):
            self._languages.check(check.language)
        results: list[Result] = []
        failed = False
        try:
            with self._runner(source, limits, language) as runner:
                for test in tests:
                    run = runner.run(test, again=len(tests) > 1)
                    results.append(self._judged(test, run, check))
                    failed = failed or results[-1].status is not Status.OK
                    if failed and stop_at_first_failure and len(results) >= run_at_least:
                        break
        except CompileFailedError as failure:
            count = max(1, run_at_least) if stop_at_first_failure else len(tests)
            return [failure.result] * min(count, len(tests))
        return results

    def _judged(self, test: AnyTest, run: FinishedRun, check: Checker | CheckerProgram) -> Result:
        """Return the result of a run, with the verdict on what it wrote or returned."""
        result = run.result
        if result.status is not Status.OK or isinstance(test, CheckTest):
            return result
        if isinstance(test, CallTest):
            passed = values.matches(test.expected, run.returned_wire)
        elif isinstance(check, CheckerProgram):
            answer = self._ask_checker(check, test, result.stdout)
            if isinstance(answer, Result):
                return answer
            passed = answer
        else:
            passed = check(test.expected, result.stdout)
        return result if passed else replace(result, status=Status.WRONG_ANSWER)

    def _ask_checker(self, checker: CheckerProgram, test: Test, stdout: bytes) -> bool | Result:
        source = as_bytes(checker.source)
        if checker.language != "python":
            source += CHECKER_FILES
        try:
            with (
                self._languages.prepared(source, checker.language) as (program, is_executable),
                self._least_loaded() as worker,
                ProgramRunner(worker, program, checker.limits, executable=is_executable) as runner,
            ):
                return runner.accepted_by(test, stdout)
        except CompileFailedError as failure:
            fault = b"the checker program does not compile: " + failure.result.stderr
            return Result(Status.SANDBOX_ERROR, stderr=fault)

    @contextlib.contextmanager
    def _runner(
        self, source: str | bytes, limits: Limits, language: str
    ) -> Iterator[ProgramRunner]:
        """Wait for a slot; yield a runner of the program in the least loaded worker."""
        if os.getpid() != self._owner:
            raise RuntimeError("a Sandbox serves the process that made it; make one per process")
        with (
            self._slots.take() as slot,
            self._languages.prepared(as_bytes(source), language) as (program, is_executable),
            self._least_loaded() as worker,
            ProgramRunner(worker, program, limits, slot, executable=is_executable) as runner,
        ):
            yield runner

    @contextlib.contextmanager
    def _least_loaded(self) -> Iterator[Worker]:
        """Yield the worker with the fewest programs, and count one more while it is used."""
        with self._load_lock:
            index = min(range(len(self._load)), key=self._load.__getitem__)
            self._load[index] += 1
        try:
            yield self._workers[index]
        finally:
            with self._load_lock:
                self._load[index] -= 1

    def _accept(self, layers: Layers) -> None:
        """Raise IsolationError if the layers of a new zygote are below the floor."""
        missing = [name for name in FLOOR if not layers[name]]
        if missing and self._level == "default":
            raise IsolationError(
                f"this machine lacks {', '.join(missing)}; see `python -m rlef_sandbox "
                'doctor`. isolation="minimal" runs without it, for programs you trust'
            )
