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
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from . import values
from .exchange import (
    CANDIDATE_GONE,
    CANDIDATE_RAISED,
    CHECK_BROKEN,
    HAS_CALLED,
    HAS_RETURNED,
    OUT_OF_MEMORY,
    STAND_INS,
)
from .private_root import THIRD_PARTY
from .protocol import STARVED_EXTENSION, Ending, Outcome, Phase, Task, ZygoteRequest
from .verdict import AnyTest, CallTest, CheckTest, Limits, Result, Status, Test
from .work_slots import WorkSlot
from .worker import Worker, ZygoteLostError, ZygoteSession, memory_file, memory_files, receive_all

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
NO_MEMORY = (b"MemoryError", b"terminate called after throwing an instance of 'std::bad_alloc'")
NUMPY_NO_MEMORY = b"._exceptions._ArrayMemoryError: "
LIMIT_STATUSES = (Status.TIME_LIMIT, Status.IDLE_LIMIT, Status.MEMORY_LIMIT, Status.OUTPUT_LIMIT)


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
        self._code: int | None = None  # a file for what the program was compiled to
        self._compile_failure: FinishedRun | None = None

    def __exit__(self, *_: object) -> None:
        self._drop_code()

    def run(self, test: AnyTest, *, again: bool = False) -> FinishedRun:
        """Run the program on a test. With `again`, for a program with several tests, only the first
        of its runs compiles it."""
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
        with StreamFiles(test.stdin, None, stdout, test.expected) as files:
            outcome = self._ask(Task.EXECUTE, [*files.descriptors, self._program])
            result = files.finished(outcome, self._limits).result
        if result.status not in (Status.OK, Status.RUNTIME_ERROR) or (
            result.exit_code in (None, CHECKER_FAILED)
        ):
            return FinishedRun(result)
        return FinishedRun(result, b"false" if result.exit_code else b"true")

    def _with_retries(self, attempt: Callable[[], FinishedRun]) -> FinishedRun:
        fault = ""
        for _ in range(1 + RETRIES):
            try:
                return attempt()
            except (FaultError, ZygoteLostError) as error:
                fault = str(error)
            self._drop_code()  # it may have been written in part
        return FinishedRun(Result(Status.SANDBOX_ERROR, stderr=fault.encode()))

    def _drop_code(self) -> None:
        if self._code is not None:
            os.close(self._code)
        self._code = None

    def _ask(self, task: Task, descriptors: list[int]) -> Outcome:
        """Start a task in the zygote, and wait for its outcome."""
        request = self._request(task)
        # the zygote kills what runs in a session that is closed
        with contextlib.closing(self._worker.start(request, descriptors)) as session:
            return self._outcomes([session], request.wall_s)[0]

    def _outcomes(self, sessions: Sequence[ZygoteSession], wall_s: float) -> list[Outcome]:
        """Wait for the outcomes of `sessions`. Kills a zygote that does not answer."""
        try:
            return receive_all(sessions, wall_s, self._slot)
        except TimeoutError as error:
            self._worker.lose(sessions[0])
            raise FaultError(str(error)) from None

    def _attempt(self, test: AnyTest, again: bool) -> FinishedRun:
        if isinstance(test, CheckTest):
            return self._attempt_check(test)
        if again and not self._executable:
            return self._attempt_again(test)
        return self._attempt_once(test)

    def _attempt_once(self, test: Test | CallTest) -> FinishedRun:
        task = Task.EXECUTE if self._executable else Task.RUN
        with files_of_test(test) as files:
            outcome = self._ask(task, [*files.descriptors, self._program])
            run = files.finished(outcome, self._limits)
        failed = self._executable and run.result.status is Status.RUNTIME_ERROR
        if failed and static_bytes(self._program) > self._limits.memory_bytes:
            # the kernel cannot place its variables, or the C library those of its first thread
            return FinishedRun(replace(run.result, status=Status.MEMORY_LIMIT))
        return run

    def _attempt_again(self, test: Test | CallTest) -> FinishedRun:
        """Run one test of several. The child of the first test compiles the program and writes the
        code to a file, from which the children of the other tests load it."""
        if self._compile_failure is not None:
            return self._compile_failure
        is_first = self._code is None
        if self._code is None:
            self._code = memory_file()
        with files_of_test(test) as files:
            outcome = self._ask(Task.TEST, [*files.descriptors, self._code, self._program])
            run = files.finished(outcome, self._limits)
        if is_first and outcome.phase is not Phase.RUNNING:
            self._compile_failure = run
        return run

    def _attempt_check(self, test: CheckTest) -> FinishedRun:
        """Run a check. If it, or the program meanwhile, exceeded a limit, rehearse it too: it is
        broken if it exceeds its limits with every stand-in for the program.
        """
        candidate, checker, marks = self._run_check(test)
        broken = is_broken(checker, marks) and candidate.status in (Status.OK, Status.IDLE_LIMIT)
        if not broken and (candidate.status in LIMIT_STATUSES or exceeds_a_limit(checker)):
            broken = all(exceeds_a_limit(self._rehearsal(test, name)) for name in STAND_INS)
        if not broken:
            return FinishedRun(verdict_of_check(candidate, checker))
        why = checker.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        if checker.status is Status.OK:
            why = "it exited before its check returned"
        fault = f"the code of a CheckTest is broken: {checker.status} {why}"
        return FinishedRun(Result(Status.SANDBOX_ERROR, stderr=fault.encode()))

    def _run_check(self, test: CheckTest) -> tuple[Result, Result, bytes]:
        """Run two processes at the same time with a socket between them: the program, which answers
        calls, and the test's code, which makes them. Returns both results, and the marks of
        `exchange.check`.
        """
        serve = json.dumps({"serve": test.entry_point}).encode()
        check = json.dumps({"check": test.check}).encode()
        with (
            StreamFiles(exchange=serve) as candidate,
            StreamFiles(b"", check, test.code.encode()) as checker,
            contextlib.ExitStack() as on_exit,
        ):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                request = self._request(Task.RUN)
                # the program waits for the check, whose limit is extended if it is starved
                patient = request._replace(wall_s=STARVED_EXTENSION * request.wall_s)
                program_files = [*candidate.descriptors, ours.fileno(), self._program]
                serving = self._worker.start(patient, program_files)
                on_exit.callback(serving.close)
                *checker_files, code = checker.descriptors
                checking = self._worker.start(request, [*checker_files, theirs.fileno(), code])
                on_exit.callback(checking.close)
            served, checked = self._outcomes([serving, checking], patient.wall_s)
            return (
                candidate.finished(served, self._limits).result,
                checker.finished(checked, self._limits, is_believed=False).result,
                os.pread(checker.descriptors[EXCHANGE], 2, 0).ljust(2, b"0"),
            )

    def _rehearsal(self, test: CheckTest, stand_in: str) -> Result:
        """Run the test's code without the program, with a stand-in for what the program returns."""
        if self._slot is not None:
            self._slot.wake()
        call = json.dumps({"check": test.check, "stand_in": stand_in}).encode()
        with StreamFiles(b"", call, test.code.encode()) as files:
            outcome = self._ask(Task.RUN, files.descriptors)
            return files.finished(outcome, self._limits, is_believed=False).result

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
    """The memory files of one run: standard streams, for a function call the exchange, and more."""

    def __init__(self, stdin: bytes = b"", exchange: bytes | None = None, *more: bytes) -> None:
        self._has_exchange = exchange is not None
        exchanges = [exchange] if exchange is not None else []
        self.descriptors = memory_files(stdin, b"", b"", *exchanges, *more)

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)

    def finished(
        self, outcome: Outcome, limits: Limits, *, is_believed: bool = True
    ) -> FinishedRun:
        """Return the run that ended with `outcome`. Raises FaultError if that is not a verdict. A
        lack of memory that only stderr reports is a MEMORY_LIMIT if stderr `is_believed`.
        """
        _, stdout, stderr, *_ = self.descriptors
        stdout_bytes, stderr_bytes = os.fstat(stdout).st_size, os.fstat(stderr).st_size
        stderr_start = max(0, stderr_bytes - STDERR_BYTES)
        stderr_end = os.pread(stderr, min(STDERR_BYTES, limits.output_bytes), stderr_start)
        for path, shown in SHOWN_PATHS.items() if stderr_end else ():
            stderr_end = stderr_end.replace(path, shown)
        overflowed = max(stdout_bytes, stderr_bytes) > limits.output_bytes
        status = status_of(outcome, limits, overflowed, stderr_end if is_believed else b"")
        wire, returned = b"", None
        if self._has_exchange and status is Status.OK:  # the program's value, untrusted
            exchange = os.pread(self.descriptors[EXCHANGE], limits.output_bytes, 0)
            wire, _, shown = exchange.partition(b"\n")
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
    return any(x.startswith(NO_MEMORY) or NUMPY_NO_MEMORY in x for x in last_lines)


def is_broken(checker: Result, marks: bytes) -> bool:
    """Return whether a test's code failed before the program had any part in it, or ended without a
    verdict. `marks` are those of `exchange.check`.
    """
    if checker.status is Status.OK:  # by SystemExit(0) or the like, which would pass any program
        return marks[HAS_RETURNED:] != b"1"
    failed_alone = exceeds_a_limit(checker) and marks[: HAS_CALLED + 1] != b"1"
    return (
        failed_alone or checker.exit_code == CHECK_BROKEN or checker.status is Status.COMPILE_ERROR
    )


def exceeds_a_limit(checker: Result) -> bool:
    """Return whether a test's code was stopped, rather than ended by an exception of its own."""
    is_stopped = checker.status in LIMIT_STATUSES or checker.signal is not None
    return is_stopped or checker.exit_code == OUT_OF_MEMORY


def verdict_of_check(candidate: Result, checker: Result) -> Result:
    """Return the verdict of a CheckTest, whose check works, from the results of its two processes:
    the program's and the check's."""
    if candidate.status is not Status.OK or checker.status is Status.OK:
        return candidate
    if checker.exit_code in (CANDIDATE_RAISED, CANDIDATE_GONE):
        reason = checker.stderr or b"the program ended before the check did\n"
        status = Status.MEMORY_LIMIT if ran_out_of_memory(reason) else Status.RUNTIME_ERROR
        return replace(candidate, status=status, stderr=reason)
    if checker.exit_code == OUT_OF_MEMORY:
        return replace(candidate, status=Status.MEMORY_LIMIT)
    if checker.status in (Status.TIME_LIMIT, Status.IDLE_LIMIT, Status.MEMORY_LIMIT):
        return replace(candidate, status=checker.status)
    # It raised after the program had answered, so the answers were wrong.
    return replace(candidate, status=Status.WRONG_ANSWER, stderr=checker.stderr)
