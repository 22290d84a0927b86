"""The public class: programs in, verdicts out. The only holder of expected outputs.

Theory of operation. A Sandbox owns `workers` zygotes (`worker.py`, `zygote.py`), each an
interpreter process of its own that was exec'd, never forked, from the caller. A call of `run` or
`grade` waits for its turn (`turns.py`): at most `workers` programs work at a time, and one that
sleeps gives its turn away, up to JOBS_A_WORKER under way in a zygote. The call then opens a session
with the zygote that has fewest, so as many threads as like may share a Sandbox. Expected
outputs never leave this process, unless for a checker of the problem's own (`CheckerProgram`),
which is confined apart from the program: a child gets the source and the input, and what it wrote
is compared here. If a zygote is lost, its tests are run again on a new one; after RETRIES a test
is a SANDBOX_ERROR, which says nothing about the program.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

from . import native, values
from .checkers import Checker, checker_named
from .job import Job, Run
from .languages import CompileFailedError, Languages
from .turns import Turns
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
from .worker import FLOOR, Layers, Worker, memory_file

ISOLATION_LEVELS = ("default", "minimal")
JOBS_A_WORKER = 16


class IsolationError(RuntimeError):
    """This machine does not give the layers that running untrusted programs takes."""


class Sandbox:
    """Runs and grades untrusted programs; a context manager, to be shared by threads.

    `workers` is how many programs may work at once: one a core. `isolation="default"` refuses, with
    IsolationError, a machine without the floor of layers: no_new_privs, rlimits, seccomp and one
    file layer. `"minimal"` runs on whatever there is. `worker_memory_bytes` bounds all that runs in
    a worker together, where the memory controller of a version 2 cgroup is delegated to the caller.
    """

    def __init__(
        self,
        workers: int = 2,
        isolation: str = "default",
        *,
        worker_memory_bytes: int | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1")
        if isolation not in ISOLATION_LEVELS:
            known = ", ".join(ISOLATION_LEVELS)
            raise ValueError(f"unknown isolation {isolation!r}; known: {known}")
        self._level = isolation
        self._owner = os.getpid()
        self._closed = False
        self._turns = Turns(workers, workers * JOBS_A_WORKER)
        library = str(native.spawn_library() or "")
        self._workers = [
            Worker(self._accept, arguments=[library], memory_bytes=worker_memory_bytes)
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

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every process of the sandbox; runs under way in other threads raise."""
        if self._closed or os.getpid() != self._owner:  # a fork of the owner owns nothing
            return
        self._closed = True
        self._turns.close()
        for worker in self._workers:
            worker.close()
        self._languages.close()

    @property
    def isolation(self) -> Layers:
        """The layers that hold here, each proved by its effect, and the level asked for."""
        return {"level": self._level, **self._workers[0].layers}

    @property
    def zygotes_started(self) -> int:
        """Beyond one a worker, as many were lost and replaced."""
        return sum(worker.starts for worker in self._workers)

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages that this machine runs."""
        return self._languages.available

    def run(
        self,
        source: str | bytes,
        stdin: str | bytes = b"",
        limits: Limits | None = None,
        language: str = "python",
    ) -> Result:
        """Run a program once; OK means that it exited with 0 within the limits."""
        limits = limits or Limits()
        try:
            with self._job(source, limits, language) as job:
                return job.run(Test(as_bytes(stdin), b"")).result
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
        """Grade a program: a result per test, in order; OK means passed.

        With `stop_at_first_failure` the list ends with the first test that is not OK, but the
        first `run_at_least` tests are run in any case: public tests to be shown, private ones to
        be stopped at.
        """
        limits = limits or Limits()
        check = checker if isinstance(checker, CheckerProgram) else checker_named(checker)
        self._languages.check(language, tests)
        results: list[Result] = []
        failed = False
        try:
            with self._job(source, limits, language) as job:
                for test in tests:
                    run = job.run(test, again=len(tests) > 1)
                    results.append(self._judged(test, run, check))
                    failed = failed or results[-1].status is not Status.OK
                    if failed and stop_at_first_failure and len(results) >= run_at_least:
                        break
        except CompileFailedError as failure:
            count = max(1, run_at_least) if stop_at_first_failure else len(tests)
            return [failure.result] * min(count, len(tests))
        return results

    def _judged(self, test: AnyTest, run: Run, check: Checker | CheckerProgram) -> Result:
        """The result of a run, with the verdict on what it wrote or returned."""
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
        source = memory_file(checker.source.encode())
        try:
            with (
                self._placed() as worker,
                Job(worker, source, checker.limits, lambda: None) as job,
            ):
                return job.accepted_by(test, stdout)
        finally:
            os.close(source)

    @contextlib.contextmanager
    def _job(self, source: str | bytes, limits: Limits, language: str) -> Iterator[Job]:
        """A job in the worker that has fewest, when it is its turn."""
        if os.getpid() != self._owner:
            raise RuntimeError("a Sandbox serves the process that made it; make one per process")
        with (
            self._turns.take() as turn,
            self._languages.prepared(as_bytes(source), language) as program,
            self._placed() as worker,
            Job(
                worker,
                program.file,
                limits,
                turn.sleep,
                executable=program.executable,
                on_test=turn.wake,
            ) as job,
        ):
            yield job

    @contextlib.contextmanager
    def _placed(self) -> Iterator[Worker]:
        """The worker with the fewest jobs, which counts one more for the while."""
        with self._load_lock:
            index = min(range(len(self._load)), key=self._load.__getitem__)
            self._load[index] += 1
        try:
            yield self._workers[index]
        finally:
            with self._load_lock:
                self._load[index] -= 1

    def _accept(self, layers: Layers) -> None:
        """IsolationError if the layers of a fresh zygote are below the floor."""
        missing = [name for name in FLOOR if not layers[name]]
        if missing and self._level == "default":
            raise IsolationError(
                f"this machine gives no {', '.join(missing)}; see `python -m rlef_sandbox "
                'doctor`. isolation="minimal" runs without, for programs you trust'
            )
