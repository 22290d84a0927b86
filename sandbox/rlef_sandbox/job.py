"""One program in one slot: its runs, their retries after a fault, and what their ends mean."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from . import values
from .protocol import Ending, Outcome, Phase, Request, Task
from .slot import Slot, ZygoteLostError, memory_file
from .verdict import CallTest, Limits, Result, Status, Test

RETRIES = 2  # of a run that ended in a fault of the sandbox
STDERR_BYTES = 64 << 10
SHOWN_BYTES = 64 << 10  # of a returned value's repr


class FaultError(Exception):
    """The run says nothing about the program."""


class Run(NamedTuple):
    """A finished run, and the wire form of the value that a function call returned."""

    result: Result
    returned_wire: bytes


class Job:
    """A program to be run, once or often, in a slot that `renew` can start anew."""

    def __init__(
        self, slot: Slot, renew: Callable[[], None], source: bytes, limits: Limits
    ) -> None:
        self._slot = slot
        self._renew = renew
        self._limits = limits
        self._source = memory_file("source", source)
        self._server_runs = False
        self._compile_failure: Result | None = None

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._source)
        if self._server_runs and kind is None:
            self._slot.tell(Request(Task.END))

    def run_once(self, test: Test | CallTest) -> Run:
        """Compile and run in one process: the cheapest way to run a program once."""
        return self._with_retries(self._attempt_once, test)

    def run_again(self, test: Test | CallTest) -> Run:
        """Run in a fork of a program server that has compiled: the cheapest way to run often."""
        return self._with_retries(self._attempt_again, test)

    def _with_retries(
        self, attempt: Callable[[Test | CallTest], Run], test: Test | CallTest
    ) -> Run:
        fault = ""
        for _ in range(1 + RETRIES):
            try:
                return attempt(test)
            except (FaultError, ZygoteLostError) as error:
                fault = str(error)
            self._server_runs = False
            try:
                self._renew()
            except ZygoteLostError as error:
                fault = str(error)
        return Run(Result(Status.SANDBOX_ERROR, stderr=fault.encode()), b"")

    def _attempt_once(self, test: Test | CallTest) -> Run:
        with Files(test) as files:
            outcome = self._slot.ask(self._request(Task.RUN), [self._source, *files.descriptors])
            return files.finished(outcome, self._limits)

    def _attempt_again(self, test: Test | CallTest) -> Run:
        if self._compile_failure is None and not self._server_runs:
            self._start_server()
        if self._compile_failure is not None:
            return Run(self._compile_failure, b"")
        with Files(test) as files:
            outcome = self._slot.ask(self._request(Task.TEST), files.descriptors)
            return files.finished(outcome, self._limits)

    def _start_server(self) -> None:
        with Files(Test(b"", b"")) as files:
            outcome = self._slot.ask(self._request(Task.PROGRAM), [self._source, files.stderr])
            if outcome.phase is Phase.RUNNING:
                self._server_runs = True
            else:
                self._compile_failure = files.finished(outcome, self._limits).result

    def _request(self, task: Task) -> Request:
        limits = self._limits
        return Request(
            task,
            limits.cpu_s,
            limits.effective_wall_s,
            limits.memory_bytes,
            limits.output_bytes,
            limits.processes,
        )


class Files:
    """The memory files of one run: standard streams and, for a function call, the exchange."""

    def __init__(self, test: Test | CallTest) -> None:
        self.exchange: int | None = None
        if isinstance(test, CallTest):
            self.exchange = memory_file("exchange", call_to_make(test))
        self.stdin = memory_file("stdin", test.stdin if isinstance(test, Test) else b"")
        self.stdout = memory_file("stdout")
        self.stderr = memory_file("stderr")

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)

    @property
    def descriptors(self) -> list[int]:
        streams = [self.stdin, self.stdout, self.stderr]
        return streams if self.exchange is None else [*streams, self.exchange]

    def finished(self, outcome: Outcome, limits: Limits) -> Run:
        """The run that ended with `outcome`. FaultError if that is no word on the program."""
        stdout_bytes, stderr_bytes = _size(self.stdout), _size(self.stderr)
        stderr_start = max(0, stderr_bytes - STDERR_BYTES)
        stderr = os.pread(self.stderr, min(STDERR_BYTES, limits.output_bytes), stderr_start)
        overflowed = max(stdout_bytes, stderr_bytes) > limits.output_bytes
        status = status_of(outcome, limits, overflowed, stderr)
        wire, shown = self._returned(limits) if status is Status.OK else (b"", None)
        killed_by = (
            os.WTERMSIG(outcome.wait_status) if os.WIFSIGNALED(outcome.wait_status) else None
        )
        result = Result(
            status,
            os.pread(self.stdout, min(stdout_bytes, limits.output_bytes), 0),
            stderr,
            os.WEXITSTATUS(outcome.wait_status) if killed_by is None else None,
            killed_by,
            outcome.cpu_s,
            outcome.wall_s,
            outcome.max_rss_bytes,
            shown,
        )
        return Run(result, wire)

    def _returned(self, limits: Limits) -> tuple[bytes, str | None]:
        """What the program wrote as its function's value, untrusted: wire form and repr."""
        if self.exchange is None:
            return b"", None
        wire, _, shown = os.pread(self.exchange, limits.output_bytes, 0).partition(b"\n")
        return wire, shown[:SHOWN_BYTES].decode(errors="replace")


def call_to_make(test: CallTest) -> bytes:
    """The call as the child reads it; ValueError where an argument is not plain data."""
    try:
        arguments = values.encode(list(test.args)).decode()
    except TypeError as error:
        raise ValueError(f"CallTest.args of {test.entry_point}: {error}") from None
    return json.dumps({"entry_point": test.entry_point, "args": arguments}).encode()


def status_of(outcome: Outcome, limits: Limits, overflowed: bool, stderr: bytes) -> Status:
    """What an end means for the program. FaultError where the sandbox or machine failed it."""
    if outcome.phase is Phase.SETUP:
        raise FaultError(outcome.fault or "a child ended before its program began")
    killed_by = os.WTERMSIG(outcome.wait_status) if os.WIFSIGNALED(outcome.wait_status) else 0
    if outcome.ending is Ending.CPU_LIMIT or outcome.cpu_s > limits.cpu_s:
        return Status.TIME_LIMIT
    if outcome.max_rss_bytes > limits.memory_bytes:
        return Status.MEMORY_LIMIT
    if outcome.ending is Ending.WALL_LIMIT:
        return Status.IDLE_LIMIT
    if outcome.phase is Phase.RUNNING and (overflowed or killed_by == signal.SIGXFSZ):
        return Status.OUTPUT_LIMIT
    if killed_by == signal.SIGSYS:
        return Status.SECURITY_VIOLATION
    if killed_by == signal.SIGKILL:
        raise FaultError("a child was killed from outside; the machine may be out of memory")
    if outcome.wait_status == 0:
        return Status.OK
    if outcome.phase is Phase.COMPILING:
        return Status.COMPILE_ERROR
    if stderr.rstrip().rpartition(b"\n")[2].startswith(b"MemoryError"):
        return Status.MEMORY_LIMIT
    return Status.RUNTIME_ERROR


def _size(descriptor: int) -> int:
    return os.fstat(descriptor).st_size
