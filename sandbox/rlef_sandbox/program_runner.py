"""Runs one program on tests: retries after faults, and the verdict on each run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from . import values
from .exchange import (
    CANDIDATE_GONE,
    CANDIDATE_RAISED,
    CHECK_BROKEN,
    HAS_LARGE_REPLY,
    HAS_RETURNED,
    IN_A_CALL,
)
from .private_root import THIRD_PARTY
from .protocol import STARVED_EXTENSION, Ending, Outcome, Phase, Task, ZygoteRequest
from .verdict import AnyTest, CallTest, CheckTest, Limits, Result, Status, Test
from .work_slots import WorkSlot
from .worker import (
    Worker,
    ZygoteLostError,
    ZygoteSession,
    memory_file,
    memory_files,
    receive_all,
)

RETRIES = 2  # of a run that ended in a fault of the sandbox
EXCHANGE = 3  # among the files of a function call, after the standard streams
CHECKER_FAILED = 3  # exit code of testlib's checkers for a fault of the test
STDERR_BYTES = 64 << 10
SHOWN_BYTES = 64 << 10  # of a returned value's repr
PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")  # of ELF
PT_LOAD, PT_TLS = 1, 7
# What messages show in place of this machine's paths.
LIBRARY = sysconfig.get_path("stdlib")
PACKAGES = [path for path in sys.path if os.path.basename(path) in THIRD_PARTY]
SHOWN_PATHS = {
    os.fsencode(os.path.dirname(os.path.abspath(__file__))): b"rlef_sandbox",
    **dict.fromkeys(map(os.fsencode, PACKAGES), b"/usr/lib/python3/site-packages"),
    os.fsencode(os.path.realpath(LIBRARY)): b"/usr/lib/python3",
    os.fsencode(LIBRARY): b"/usr/lib/python3",
}
OUT_OF_MEMORY = (b"MemoryError", b"terminate called after throwing an instance of 'std::bad_alloc'")
NUMPY_OUT_OF_MEMORY = b"._exceptions._ArrayMemoryError: "


class FaultError(Exception):
    """A run that gives no verdict on the program."""


class FinishedRun(NamedTuple):
    """The result of a run, and the wire form of the value that a function call returned."""

    result: Result
    returned_wire: bytes = b""


class ProgramRunner(contextlib.AbstractContextManager):
    """Runs a program, once or often, in the zygote of `worker`.

    `program` is a descriptor of its file, which the caller closes: an `executable`, or Python.
    A run releases its `slot` while it waits instead of working.
    """

    def __init__(
        self,
        worker: Worker,
        program: int,
        limits: Limits,
        slot: WorkSlot | None = None,
        *,
        executable: bool = False,
    ) -> None:
        self._worker = worker
        self._program = program
        self._limits = limits
        self._slot = slot
        self._executable = executable
        self._session: ZygoteSession | None = None
        self._server_runs = False
        self._compile_failure: Result | None = None

    def __exit__(self, *_: object) -> None:
        self._end_session()

    def run(self, test: AnyTest, *, again: bool = False) -> FinishedRun:
        """Run the program on a test. With `again`, because more tests of this program follow, a
        program server compiles it once for all of them, if the zygote can start one.
        """
        if self._slot is not None:
            self._slot.wake()
        return self._with_retries(lambda: self._attempt(test, again))

    def accepted_by(self, test: Test, stdout: bytes) -> bool | Result:
        """Return whether this program, the problem's own checker, accepts an output, or a
        SANDBOX_ERROR if it is broken. A checker that fails on this output but accepts the expected
        one is not broken: it met an output that it could not read.
        """
        run = self._checked(test, stdout)
        if run.returned_wire in (b"true", b"false"):
            return run.returned_wire == b"true"
        if run.result.status is Status.SANDBOX_ERROR:
            return run.result
        if self._checked(test, test.expected).returned_wire == b"true":
            return False
        reason = run.result.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        fault = f"the checker program is broken: {run.result.status} {reason}"
        return Result(Status.SANDBOX_ERROR, stderr=fault.encode())

    def _checked(self, test: Test, stdout: bytes) -> FinishedRun:
        if self._executable:
            return self._with_retries(lambda: self._attempt_checker(test, stdout))
        call = CallTest("check", (test.stdin, test.expected, stdout))
        return self._with_retries(lambda: self._attempt_once(call))

    def _attempt_checker(self, test: Test, stdout: bytes) -> FinishedRun:
        """Run a checker in C++. It accepts or refuses by its exit code, as testlib does."""
        with StreamFiles(test.stdin) as files, contextlib.ExitStack() as passed_on:
            texts = memory_files(stdout, test.expected)
            for text in texts:
                passed_on.callback(os.close, text)
            outcome = self._ask(Task.EXECUTE, [*files.descriptors, *texts, self._program])
            self._end_session()
            result = files.finished(outcome, self._limits).result
        is_answer = result.status in (Status.OK, Status.RUNTIME_ERROR) and result.exit_code not in (
            None,
            CHECKER_FAILED,
        )
        answer = b"false" if result.exit_code else b"true"
        return FinishedRun(result, answer if is_answer else b"")

    def _with_retries(self, attempt: Callable[[], FinishedRun]) -> FinishedRun:
        fault = ""
        for _ in range(1 + RETRIES):
            try:
                return attempt()
            except (FaultError, ZygoteLostError) as error:
                fault = str(error)
            except TimeoutError:
                fault = "the zygote does not answer"
                if self._session is not None:
                    self._worker.give_up(self._session)
            self._end_session()
        return FinishedRun(Result(Status.SANDBOX_ERROR, stderr=fault.encode()))

    def _end_session(self) -> None:
        """Close the session; the zygote then kills whatever runs in it."""
        if self._session is not None:
            self._session.close()
        self._session, self._server_runs = None, False

    def _ask(self, task: Task, descriptors: list[int]) -> Outcome:
        """Start a task in the zygote, and wait for its outcome."""
        request = self._request(task)
        self._session = self._worker.start(request, descriptors)
        return self._session.receive(request.wall_s, self._slot)

    def _attempt(self, test: AnyTest, again: bool) -> FinishedRun:
        if isinstance(test, CheckTest):
            return self._attempt_check(test)
        if again and not self._executable and self._worker.layers.get("launcher") == "native":
            return self._attempt_again(test)
        return self._attempt_once(test)

    def _attempt_once(self, test: Test | CallTest) -> FinishedRun:
        task = Task.EXECUTE if self._executable else Task.RUN
        with files_of_test(test) as files:
            outcome = self._ask(task, [*files.descriptors, self._program])
            self._end_session()
            run = files.finished(outcome, self._limits)
        failed = self._executable and run.result.status is Status.RUNTIME_ERROR
        if failed and static_bytes(self._program) > self._limits.memory_bytes:
            # the kernel cannot place its variables, or the C library those of its first thread
            return FinishedRun(replace(run.result, status=Status.MEMORY_LIMIT))
        return run

    def _attempt_again(self, test: Test | CallTest) -> FinishedRun:
        if self._compile_failure is None and not self._server_runs:
            self._start_server()
        if self._compile_failure is not None:
            return FinishedRun(self._compile_failure)
        with files_of_test(test) as files:
            assert self._session is not None
            request = self._request(Task.TEST)
            outcome = self._session.ask(request, files.descriptors, self._slot)
            return files.finished(outcome, self._limits)

    def _start_server(self) -> None:
        with StreamFiles() as files:
            outcome = self._ask(Task.PROGRAM, [*files.descriptors, self._program])
            if outcome.phase is Phase.RUNNING:
                self._server_runs = True
            else:
                self._compile_failure = files.finished(outcome, self._limits).result
                self._end_session()  # its server is gone

    def _attempt_check(self, test: CheckTest) -> FinishedRun:
        """Run two processes at the same time with a socket between them: the program, which answers
        calls, and the test's code, which makes them.
        """
        serve = json.dumps({"serve": test.entry_point}).encode()
        check = json.dumps({"check": test.check}).encode()
        with StreamFiles(exchange=serve) as candidate, StreamFiles(exchange=check) as checker:
            with contextlib.ExitStack() as passed_on:
                code = memory_file(test.code.encode())
                passed_on.callback(os.close, code)
                ours, theirs = map(passed_on.enter_context, socket.socketpair())
                request = self._request(Task.RUN)
                # it waits for a check that may be starved, and so get its limit more than once
                patient = request._replace(wall_s=STARVED_EXTENSION * request.wall_s)
                program_files = [*candidate.descriptors, ours.fileno(), self._program]
                self._session = self._worker.start(patient, program_files)
                checker_files = [*checker.descriptors, theirs.fileno(), code]
                checking = self._worker.start(request, checker_files)
            with contextlib.closing(checking):
                sessions = [self._session, checking]
                served, checked = receive_all(sessions, patient.wall_s, self._slot)
            self._end_session()
            return verdict_of_check(
                candidate.finished(served, self._limits).result,
                checker.finished(checked, self._limits).result,
                os.pread(checker.descriptors[EXCHANGE], 3, 0).ljust(3, b"0"),
            )

    def _request(self, task: Task) -> ZygoteRequest:
        limits = self._limits
        return ZygoteRequest(
            task,
            limits.cpu_s,
            limits.effective_wall_s,
            limits.memory_bytes,
            limits.output_bytes,
            limits.processes,
        )


class StreamFiles(contextlib.AbstractContextManager):
    """The memory files of one run: standard streams and, for a function call, the exchange."""

    def __init__(self, stdin: bytes = b"", exchange: bytes | None = None) -> None:
        contents = [stdin, b"", b""] if exchange is None else [stdin, b"", b"", exchange]
        self.descriptors = memory_files(*contents)

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)

    def finished(self, outcome: Outcome, limits: Limits) -> FinishedRun:
        """Return the run that ended with `outcome`. Raises FaultError if that is not a verdict."""
        _, stdout, stderr, *exchange = self.descriptors
        stdout_bytes, stderr_bytes = os.fstat(stdout).st_size, os.fstat(stderr).st_size
        stderr_start = max(0, stderr_bytes - STDERR_BYTES)
        stderr_end = os.pread(stderr, min(STDERR_BYTES, limits.output_bytes), stderr_start)
        for path, shown in SHOWN_PATHS.items():
            stderr_end = stderr_end.replace(path, shown)
        overflowed = max(stdout_bytes, stderr_bytes) > limits.output_bytes
        status = status_of(outcome, limits, overflowed, stderr_end)
        wire, returned = b"", None
        if exchange and status is Status.OK:  # what the program wrote as its value, untrusted
            wire, _, shown = os.pread(exchange[0], limits.output_bytes, 0).partition(b"\n")
            returned = shown[:SHOWN_BYTES].decode(errors="replace")
        killed_by = outcome.killed_by
        result = Result(
            status,
            os.pread(stdout, min(stdout_bytes, limits.output_bytes), 0),
            stderr_end,
            None if killed_by else os.WEXITSTATUS(outcome.wait_status),
            killed_by or None,
            outcome.cpu_s,
            outcome.wall_s,
            outcome.max_rss_bytes,
            returned,
        )
        return FinishedRun(result, wire)


def static_bytes(executable: int) -> int:
    """Return how much memory the segments of a 64-bit ELF file need, global variables included."""
    (table_at,) = struct.unpack("<Q", os.pread(executable, 8, 32))
    (count,) = struct.unpack("<H", os.pread(executable, 2, 56))
    segments = os.pread(executable, PROGRAM_HEADER.size * count, table_at)
    return sum(
        memory_bytes
        for kind, *_, memory_bytes, _ in PROGRAM_HEADER.iter_unpack(segments)
        if kind in (PT_LOAD, PT_TLS)
    )


def files_of_test(test: Test | CallTest) -> StreamFiles:
    """Return the files of a run. Raises ValueError if a value of the test is not plain data."""
    if isinstance(test, Test):
        return StreamFiles(test.stdin)
    arguments = _encoded("args", list(test.args), test).decode()
    _encoded("expected", test.expected, test)  # or no answer could ever match
    call = {"entry_point": test.entry_point, "args": arguments}
    return StreamFiles(exchange=json.dumps(call).encode())


def _encoded(field: str, value: object, test: CallTest) -> bytes:
    try:
        return values.encode(value)
    except TypeError as error:
        raise ValueError(f"CallTest.{field} of {test.entry_point}: {error}") from None


def status_of(outcome: Outcome, limits: Limits, overflowed: bool, stderr: bytes) -> Status:
    """Return the verdict on a run. Raises FaultError if the sandbox or the machine failed."""
    if outcome.phase is Phase.SETUP:
        raise FaultError(outcome.fault or "a child ended before its program began")
    killed_by = outcome.killed_by
    if outcome.ending is Ending.CPU_LIMIT or outcome.cpu_s > limits.cpu_s:
        return Status.TIME_LIMIT
    if outcome.ending is Ending.MEMORY_LIMIT or outcome.max_rss_bytes > limits.memory_bytes:
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
    """Return whether an uncaught exception reports a lack of memory, as the limit causes."""
    last_lines = stderr.rstrip().rsplit(b"\n", 2)[-2:]
    return any(x.startswith(OUT_OF_MEMORY) or NUMPY_OUT_OF_MEMORY in x for x in last_lines)


def verdict_of_check(candidate: Result, checker: Result, marks: bytes) -> FinishedRun:
    """Return the verdict on the two processes of a CheckTest, which ended. `marks` are those of
    `exchange.check`. Raises FaultError if the test's code is broken or exceeds a limit by itself.
    """
    broken = checker.exit_code == CHECK_BROKEN or checker.status is Status.COMPILE_ERROR
    if checker.status is Status.OK and marks[HAS_RETURNED:] != b"1":
        broken = True  # by SystemExit(0) or the like, which would pass any program
    answered = checker.exit_code in (CANDIDATE_RAISED, CANDIDATE_GONE)
    # If it did not end by an exception, the program's values can be the cause only if one is large.
    stopped = checker.exit_code not in (0, 1) or checker.status not in (
        Status.OK,
        Status.RUNTIME_ERROR,
    )
    if stopped and not broken and not answered and marks[HAS_LARGE_REPLY:HAS_RETURNED] != b"1":
        broken = marks[IN_A_CALL : IN_A_CALL + 1] != b"1"
    # While no call is under way the program waits, until its wall clock limit, for the check.
    if broken and candidate.status in (Status.OK, Status.IDLE_LIMIT):
        why = checker.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        if checker.status is Status.OK:
            why = "it exited before its check returned"
        raise FaultError(f"the code of a CheckTest is broken: {checker.status} {why}")
    if candidate.status is not Status.OK or checker.status is Status.OK:
        return FinishedRun(candidate)
    if answered:
        reason = checker.stderr or b"the program ended before the check did\n"
        status = Status.MEMORY_LIMIT if ran_out_of_memory(reason) else Status.RUNTIME_ERROR
        return FinishedRun(replace(candidate, status=status, stderr=reason))
    if checker.status in (Status.TIME_LIMIT, Status.IDLE_LIMIT, Status.MEMORY_LIMIT):
        return FinishedRun(replace(candidate, status=checker.status))
    # It raised after the program had answered, so the answers were wrong.
    return FinishedRun(replace(candidate, status=Status.WRONG_ANSWER, stderr=checker.stderr))
