"""One program under way: its runs, their retries after a fault, and what their ends mean."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple

from . import values
from .exchange import CANDIDATE_GONE, CANDIDATE_RAISED, CHECK_BROKEN
from .protocol import Ending, Outcome, Phase, Request, Task
from .verdict import AnyTest, CallTest, CheckTest, Limits, Result, Status, Test
from .worker import Session, Worker, ZygoteLostError, memory_file, memory_files

RETRIES = 2  # of a run that ended in a fault of the sandbox
STDERR_BYTES = 64 << 10
SHOWN_BYTES = 64 << 10  # of a returned value's repr
OUT_OF_MEMORY = (b"MemoryError", b"terminate called after throwing an instance of 'std::bad_alloc'")


class FaultError(Exception):
    """The run says nothing about the program."""


class Run(NamedTuple):
    """A finished run, and the wire form of the value that a function call returned."""

    result: Result
    returned_wire: bytes = b""


class Job:
    """A program to be run, once or often, with the zygote of `worker`.

    `executable` says that the program is a file to be executed, not Python. `on_sleep` is called
    when a run waits instead of working, `on_test` before each test.
    """

    def __init__(
        self,
        worker: Worker,
        program: int,
        limits: Limits,
        on_sleep: Callable[[], None],
        *,
        executable: bool = False,
        on_test: Callable[[], None] = lambda: None,
    ) -> None:
        self._worker = worker
        self._program = program  # a descriptor of its file, somebody else's to close
        self._limits = limits
        self._on_sleep, self._on_test = on_sleep, on_test
        self._executable = executable
        self._session: Session | None = None
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
        self._end_session()

    def run(self, test: AnyTest, *, again: bool = False) -> Run:
        """Run the program on a test. `again` says that more tests follow or came before: then a
        program server, which compiles once, is the cheaper way.
        """
        self._on_test()
        if isinstance(test, CheckTest):
            return self._with_retries(lambda: self._attempt_check(test))
        if again and not self._executable:
            return self._with_retries(lambda: self._attempt_again(test))
        return self._with_retries(lambda: self._attempt_once(test))

    def accepted_by(self, test: Test, stdout: bytes) -> bool | Result:
        """What the problem's own checker, which is this job's program, says of an output; a
        SANDBOX_ERROR if it is broken. One that fails on this output, but accepts the expected one,
        is not: it met an output that it could not read.
        """
        run = self._checked(test, stdout)
        if run.returned_wire in (b"true", b"false"):
            return run.returned_wire == b"true"
        if run.result.status is Status.SANDBOX_ERROR:
            return run.result
        if self._checked(test, test.expected).returned_wire == b"true":
            return False
        words = run.result.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        fault = f"the checker program is broken: {run.result.status} {words}"
        return Result(Status.SANDBOX_ERROR, stderr=fault.encode())

    def _checked(self, test: Test, stdout: bytes) -> Run:
        call = CallTest("check", (test.stdin, test.expected, stdout))
        return self._with_retries(lambda: self._attempt_once(call))

    def _with_retries(self, attempt: Callable[[], Run]) -> Run:
        fault = ""
        for _ in range(1 + RETRIES):
            try:
                return attempt()
            except (FaultError, ZygoteLostError) as error:
                fault = str(error)
            except TimeoutError:
                fault = "the zygote fell silent"
                if self._session is not None:
                    self._worker.give_up(self._session)
            self._end_session()
        return Run(Result(Status.SANDBOX_ERROR, stderr=fault.encode()))

    def _end_session(self) -> None:
        """Whatever still runs for it is killed."""
        if self._session is not None:
            self._session.close()
        self._session, self._server_runs = None, False

    def _ask(self, task: Task, descriptors: list[int]) -> Outcome:
        """Start something in the zygote, and wait for what comes of it."""
        request = self._request(task)
        self._session = self._worker.start(request, descriptors)
        return self._session.receive(request.wall_s, self._on_sleep)

    def _attempt_once(self, test: Test | CallTest) -> Run:
        task = Task.EXECUTE if self._executable else Task.RUN
        with files_for(test) as files:
            outcome = self._ask(task, [*files.descriptors, self._program])
            self._end_session()
            return files.finished(outcome, self._limits)

    def _attempt_again(self, test: Test | CallTest) -> Run:
        if self._compile_failure is None and not self._server_runs:
            self._start_server()
        if self._compile_failure is not None:
            return Run(self._compile_failure)
        with files_for(test) as files:
            assert self._session is not None
            request = self._request(Task.TEST)
            outcome = self._session.ask(request, files.descriptors, self._on_sleep)
            return files.finished(outcome, self._limits)

    def _start_server(self) -> None:
        with Files() as files:
            outcome = self._ask(Task.PROGRAM, [*files.descriptors, self._program])
            if outcome.phase is Phase.RUNNING:
                self._server_runs = True
            else:
                self._compile_failure = files.finished(outcome, self._limits).result
                self._end_session()  # its server is gone

    def _attempt_check(self, test: CheckTest) -> Run:
        """Two runs at once, with a socket between them: the program, which answers calls, and the
        test's code, which makes them.
        """
        serve = json.dumps({"serve": test.entry_point}).encode()
        check = json.dumps({"check": test.check}).encode()
        with contextlib.ExitStack() as stack:
            candidate = stack.enter_context(Files(exchange=serve))
            checker = stack.enter_context(Files(exchange=check))
            code = memory_file(test.code.encode())
            stack.callback(os.close, code)
            peers = socket.socketpair()
            request = self._request(Task.RUN)
            try:
                program_files = [*candidate.descriptors, peers[0].fileno(), self._program]
                self._session = self._worker.start(request, program_files)
                checker_files = [*checker.descriptors, peers[1].fileno(), code]
                checking = self._worker.start(request, checker_files)
                stack.callback(checking.close)
            finally:
                for peer in peers:
                    peer.close()
            served = self._session.receive(request.wall_s, self._on_sleep)
            checked = checking.receive(request.wall_s)
            self._end_session()
            return verdict_of_check(
                candidate.finished(served, self._limits).result,
                checker.finished(checked, self._limits).result,
            )

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

    def __init__(self, stdin: bytes = b"", exchange: bytes | None = None) -> None:
        contents = [stdin, b"", b""] if exchange is None else [stdin, b"", b"", exchange]
        self.descriptors = memory_files(*contents)
        self.stdout, self.stderr = self.descriptors[1:3]
        self.exchange = None if exchange is None else self.descriptors[3]

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)

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


def files_for(test: Test | CallTest) -> Files:
    if isinstance(test, CallTest):
        return Files(exchange=call_to_make(test))
    return Files(test.stdin)


def call_to_make(test: CallTest) -> bytes:
    """The call as the child reads it; ValueError where something in it is not plain data."""
    arguments = _encoded("args", list(test.args), test).decode()
    _encoded("expected", test.expected, test)  # or no answer could ever match
    return json.dumps({"entry_point": test.entry_point, "args": arguments}).encode()


def _encoded(field: str, value: object, test: CallTest) -> bytes:
    try:
        return values.encode(value)
    except TypeError as error:
        raise ValueError(f"CallTest.{field} of {test.entry_point}: {error}") from None


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
    return Status.MEMORY_LIMIT if ran_out_of_memory(stderr) else Status.RUNTIME_ERROR


def ran_out_of_memory(stderr: bytes) -> bool:
    """Whether an uncaught exception says so: the limit holds by refusing memory."""
    last_lines = stderr.rstrip().rsplit(b"\n", 2)[-2:]
    return any(line.startswith(OUT_OF_MEMORY) for line in last_lines)


def verdict_of_check(candidate: Result, checker: Result) -> Run:
    """What the ends of a CheckTest's two processes mean. FaultError if its code is broken."""
    if candidate.status is not Status.OK:
        return Run(candidate)
    if checker.exit_code == 0 and checker.status is Status.OK:
        return Run(candidate)
    if checker.exit_code in (CANDIDATE_RAISED, CANDIDATE_GONE):
        words = checker.stderr or b"the program ended before the check did\n"
        status = Status.MEMORY_LIMIT if ran_out_of_memory(words) else Status.RUNTIME_ERROR
        return Run(replace(candidate, status=status, stderr=words))
    if checker.status in (Status.TIME_LIMIT, Status.IDLE_LIMIT, Status.MEMORY_LIMIT):
        return Run(replace(candidate, status=checker.status))
    if checker.exit_code == CHECK_BROKEN:
        said = checker.stderr.decode(errors="replace")
        raise FaultError(f"the code of a CheckTest is broken: {said}")
    # However else it ended, it was after the program had answered, whose values it met.
    return Run(replace(candidate, status=Status.WRONG_ANSWER, stderr=checker.stderr))


def _size(descriptor: int) -> int:
    return os.fstat(descriptor).st_size
