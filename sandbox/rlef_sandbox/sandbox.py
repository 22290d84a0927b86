"""The public class: programs in, verdicts out. The only holder of expected outputs.

Theory of operation. A Sandbox owns `workers` zygotes (`slot.py`, `zygote.py`), each an
interpreter process of its own that was exec'd, never forked, from the caller. A call of `run` or
`grade` takes a free zygote, waits for one if there is none, and hands it back; so as many threads
as like may share a Sandbox. Expected outputs never leave this process: a child gets the source
and the input, and what it wrote is compared here. If a zygote is lost, its test is run again on a
new one; after RETRIES it is a SANDBOX_ERROR, which says nothing about the program.
"""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Iterator, Sequence
from dataclasses import replace

from . import values
from .checkers import Checker, checker_named
from .job import Job, Run
from .slot import Slot
from .verdict import CallTest, Limits, Result, Status, Test, as_bytes

LANGUAGES = ("python",)
ISOLATION_LEVELS = ("default", "minimal")
FLOOR = ("no_new_privs", "rlimits", "seccomp", "files")


class IsolationError(RuntimeError):
    """This machine does not give the layers that running untrusted programs takes."""


class Sandbox:
    """Runs and grades untrusted programs; a context manager, to be shared by threads.

    `isolation="default"` refuses, with IsolationError, a machine without the floor of layers:
    no_new_privs, rlimits, seccomp and one file layer. `"minimal"` runs on whatever there is.
    """

    def __init__(self, workers: int = 2, isolation: str = "default") -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1")
        if isolation not in ISOLATION_LEVELS:
            known = ", ".join(ISOLATION_LEVELS)
            raise ValueError(f"unknown isolation {isolation!r}; known: {known}")
        self._level = isolation
        self._owner = os.getpid()
        self._slots = [Slot() for _ in range(workers)]
        self._free: queue.LifoQueue[Slot] = queue.LifoQueue()
        self._closed = False
        try:
            for slot in self._slots:
                slot.start()
            for slot in self._slots:
                self._layers = self._greeted(slot)
        except BaseException:
            for slot in self._slots:
                slot.stop()
            raise
        for slot in self._slots:
            self._free.put(slot)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every process of the sandbox; runs under way in other threads raise."""
        if self._closed or os.getpid() != self._owner:  # a fork of the owner owns nothing
            return
        self._closed = True
        for slot in self._slots:
            slot.interrupt()
        for slot in [self._free.get() for _ in self._slots]:
            slot.stop()
            self._free.put(slot)  # wakes whoever still waits for one, to be told

    @property
    def isolation(self) -> dict[str, object]:
        """The layers that hold here, each proved by its effect, and the level asked for."""
        return {"level": self._level, **self._layers}

    def run(
        self,
        source: str | bytes,
        stdin: str | bytes = b"",
        limits: Limits | None = None,
        language: str = "python",
    ) -> Result:
        """Run a program once; OK means that it exited with 0 within the limits."""
        _check_language(language)
        with self._job(source, limits) as job:
            return job.run_once(Test(as_bytes(stdin), b"")).result

    def grade(
        self,
        source: str | bytes,
        tests: Sequence[Test | CallTest],
        limits: Limits | None = None,
        checker: str = "tokens",
        stop_at_first_failure: bool = True,
        language: str = "python",
    ) -> list[Result]:
        """Grade a program: a result per test, in order; OK means passed.

        With `stop_at_first_failure` the list ends with the first test that is not OK.
        """
        _check_language(language)
        check = checker_named(checker)
        results = []
        with self._job(source, limits) as job:
            run_test = job.run_once if len(tests) == 1 else job.run_again
            for test in tests:
                run = run_test(test)
                result = run.result
                if result.status is Status.OK and not _passed(test, run, check):
                    result = replace(result, status=Status.WRONG_ANSWER)
                results.append(result)
                if stop_at_first_failure and result.status is not Status.OK:
                    break
        return results

    def _greeted(self, slot: Slot) -> dict[str, object]:
        """The layers of a fresh zygote, or IsolationError if they are below the floor."""
        layers = slot.greet()
        missing = [name for name in FLOOR if not layers[name]]
        if missing and self._level == "default":
            raise IsolationError(
                f"this machine gives no {', '.join(missing)}; see `python -m rlef_sandbox "
                'doctor`. isolation="minimal" runs without, for programs you trust'
            )
        return layers

    @contextlib.contextmanager
    def _job(self, source: str | bytes, limits: Limits | None) -> Iterator[Job]:
        """A job in a free slot; waits until there is one."""
        if os.getpid() != self._owner:
            raise RuntimeError("a Sandbox serves the process that made it; make one per process")
        slot = self._free.get()
        try:
            if self._closed:
                raise RuntimeError("the sandbox is closed")
            with Job(slot, lambda: self._renew(slot), as_bytes(source), limits or Limits()) as job:
                yield job
        except BaseException:
            if not self._closed:
                self._renew(slot)  # an answer may still be under way
            raise
        finally:
            self._free.put(slot)

    def _renew(self, slot: Slot) -> None:
        if self._closed:
            raise RuntimeError("the sandbox was closed during a run")
        slot.start()
        self._greeted(slot)


def _check_language(language: str) -> None:
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}; known: {', '.join(LANGUAGES)}")


def _passed(test: Test | CallTest, run: Run, check: Checker) -> bool:
    if isinstance(test, CallTest):
        return values.matches(test.expected, run.returned_wire)
    return check(test.expected, run.result.stdout)
