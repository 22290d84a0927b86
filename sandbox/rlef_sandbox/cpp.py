"""C++ to executables, compiled in confinement (`compiler.py`) and cached by their source's hash.

The first program of a C++ standard starts a compiler; each standard has at most `workers` of them.
Executables are copied into sealed memory files, which no run can change; the most recent are kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import queue
import re
import shutil
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from . import native
from .program_runner import RETRIES, StreamFiles
from .protocol import Ending, Outcome, Phase, Task, ZygoteRequest
from .verdict import Result, Status
from .worker import ANSWER_GRACE_S, ENVIRONMENT, Layers, Worker, ZygoteLostError

STANDARDS = {"cpp": "gnu++17"} | {f"cpp{year}": f"gnu++{year}" for year in (11, 14, 17, 20, 23)}
FLAGS = ("-O2", "-DONLINE_JUDGE", "-w", "-fmax-errors=20")
COMPILE = ZygoteRequest(
    Task.COMPILE, cpu_s=10.0, wall_s=60.0, memory_bytes=2 << 30, output_bytes=128 << 20
)
# Appended to a checker, which may open no file: the paths that it is given are descriptors. testlib
# opens each of them twice.
CHECKER_FILES = rb"""
#include <stdio.h>
#include <string.h>
#include <unistd.h>
static FILE *rlef_open_given(const char *path, const char *mode)
{
    if (strlen(path) != 9 || lseek(path[8] - '0', 0, SEEK_SET) != 0)
        return NULL;
    return fdopen(dup(path[8] - '0'), mode);
}
extern "C" FILE *fopen(const char *path, const char *mode) { return rlef_open_given(path, mode); }
extern "C" FILE *fopen64(const char *path, const char *mode) { return rlef_open_given(path, mode); }
"""
KEPT_BYTES, KEPT_EXECUTABLES = 512 << 20, 128  # each executable is an open descriptor
STDERR_BYTES = 16 << 10
MFD_EXEC = 0x10  # since Linux 6.3; some systems require it
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
# Messages of g++ about its own child. The limits send other signals before SIGKILL, so a killed
# child is the machine's fault.
TOO_LONG = b"CPU time limit exceeded"
KILLED = (b"Killed signal terminated program", b"terminated with signal 9")


class CompileFailedError(Exception):
    """There is no executable. `result` is a COMPILE_ERROR or SANDBOX_ERROR with the reason."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.status)
        self.result = result


class ReportsAKillError(CompileFailedError):
    """The compiler's messages report a kill, but a source can write messages too. `result` is the
    verdict if the source wrote them.
    """


class Cpp:
    """The compilers of a sandbox for one standard of C++, and the executables they made."""

    def __init__(self, accept: Callable[[Layers], None], workers: int, standard: str) -> None:
        self._flags = (f"-std={standard}", *FLAGS)
        self._all = [Worker(accept, module="compiler", scratch=True) for _ in range(workers)]
        self._free: queue.LifoQueue[Worker] = queue.LifoQueue()  # prefers one that has started
        for worker in self._all:
            self._free.put(worker)
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        self._under_way: dict[bytes, Future[None]] = {}

    @staticmethod
    def compiler() -> str | None:
        """Return the path of g++, if it is where the confined compiler looks for it."""
        return shutil.which("g++", path=ENVIRONMENT["PATH"])

    def executable(self, source: bytes) -> int:
        """Return a descriptor of the compiled program, which the caller closes.

        Raises CompileFailedError if there is none. Waits for another thread that compiles the
        same source.
        """
        key = hashlib.sha256(source).digest()
        while True:
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return os.dup(self._kept[key])
                other = self._under_way.get(key)
                if other is None:
                    mine = self._under_way[key] = Future()
                    break
            other.result()  # raises the error of that compilation
        try:
            file = self._compile(source)
            with self._lock:
                self._keep(key, file)
            mine.set_result(None)
            return file
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._under_way[key]

    def _keep(self, key: bytes, file: int) -> None:
        self._kept[key] = os.dup(file)
        kept_bytes = sum(os.fstat(kept).st_size for kept in self._kept.values())
        while len(self._kept) > 1 and (
            kept_bytes > KEPT_BYTES or len(self._kept) > KEPT_EXECUTABLES
        ):
            _, oldest = self._kept.popitem(last=False)
            kept_bytes -= os.fstat(oldest).st_size
            os.close(oldest)

    def _compile(self, source: bytes) -> int:
        worker = self._free.get()
        try:
            return self._with_retries(worker, source)
        finally:
            self._free.put(worker)

    def _with_retries(self, worker: Worker, source: bytes) -> int:
        headers = precompiled_headers(self._flags)
        worker.arguments = [*self._flags, *([f"-I{headers}"] if headers else [])]
        fault = ""
        for attempt in range(1 + RETRIES):
            try:
                return self._attempt(worker, source)
            except ReportsAKillError:
                fault = "the compiler was killed from outside"
                if attempt == RETRIES:  # in every attempt, though the kernel counted no kill
                    raise
            except (ZygoteLostError, TimeoutError) as error:
                fault = str(error) or "the compiler does not answer"
                worker.lose()
        raise CompileFailedError(Result(Status.SANDBOX_ERROR, stderr=fault.encode()))

    def _attempt(self, worker: Worker, source: bytes) -> int:
        kills_before = out_of_memory_kills()
        with (
            StreamFiles(source) as files,
            contextlib.closing(worker.start(COMPILE, files.descriptors)) as session,
        ):
            message, made = session.receive(COMPILE.wall_s + ANSWER_GRACE_S)
            stderr = files.descriptors[2]
            errors = without_paths(os.pread(stderr, STDERR_BYTES, 0), worker)
            end_at = max(0, os.fstat(stderr).st_size - STDERR_BYTES)
            end = os.pread(stderr, STDERR_BYTES, end_at)
        try:
            outcome = Outcome.unpack(message)
            if made:
                return sealed_copy(made[0])
        except ValueError as error:
            raise ZygoteLostError(str(error)) from None
        finally:
            for descriptor in made:
                os.close(descriptor)
        starved = out_of_memory_kills() > kills_before
        raise CompileFailedError(compile_error(outcome, errors, end, starved=starved))

    def close(self) -> None:
        for worker in self._all:
            worker.close()
        with self._lock:
            for kept in self._kept.values():
                os.close(kept)
            self._kept.clear()


def without_paths(messages: bytes, worker: Worker) -> bytes:
    """Replace this machine's paths to object file and headers in g++'s messages."""
    messages = re.sub(re.escape(os.fsencode(worker.scratch)) + rb"/cc\w+", b"program", messages)
    for flag in worker.arguments:
        if flag.startswith("-I"):
            messages = messages.replace(os.fsencode(flag[2:]), b"/usr/include")
    return messages


def out_of_memory_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory since it started."""
    try:
        fields = Path("/proc/vmstat").read_bytes().split()
        return int(fields[fields.index(b"oom_kill") + 1])
    except (OSError, ValueError):
        return 0


def compile_error(outcome: Outcome, errors: bytes, end: bytes, *, starved: bool) -> Result:
    """Return the verdict on a compilation without an executable. `errors` and `end` are the first
    and the last bytes of its messages; `starved` is whether the kernel has meanwhile killed any
    process for lack of memory. Raises ZygoteLostError for a fault, ReportsAKillError if only the
    messages report one.
    """
    if outcome.phase is Phase.SETUP:
        raise ZygoteLostError(outcome.fault)
    too_long = outcome.ending is not Ending.ITSELF or TOO_LONG in errors
    reports_a_kill = not too_long and any(words in errors or words in end for words in KILLED)
    if too_long:
        errors += b"compilation took too long\n"
    elif outcome.wait_status == signal.SIGKILL or (reports_a_kill and starved):
        raise ZygoteLostError("the compiler was killed from outside; is memory short?")
    result = Result(
        Status.COMPILE_ERROR,
        stderr=errors,
        exit_code=1,
        cpu_s=outcome.cpu_s,
        wall_s=outcome.wall_s,
        max_rss_bytes=outcome.max_rss_bytes,
    )
    if reports_a_kill:
        raise ReportsAKillError(result)
    return result


def sealed_copy(source: int) -> int:
    """Return a copy of an executable in a sealed memfd, which nobody can change."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        copy = os.memfd_create("program", flags | MFD_EXEC)
    except OSError:
        copy = os.memfd_create("program", flags)
    size, done = os.fstat(source).st_size, 0
    while done < size:
        sent = os.sendfile(copy, source, done, size - done)
        if sent == 0:
            break
        done += sent
    # an exec makes a process dumpable again, unless it cannot read the file
    os.fchmod(copy, 0o111)
    fcntl.fcntl(copy, fcntl.F_ADD_SEALS, SEALS)
    return copy


def precompiled_headers(flags: Sequence[str]) -> Path | None:
    """Return a folder for -I with <bits/stdc++.h> precompiled. That saves three quarters of the
    compilation of a program that begins with this header, as most do. g++ is not confined
    here, since the text is ours.
    """
    compiler = Cpp.compiler()
    if compiler is None:
        return None
    recipe = " ".join([os.path.realpath(compiler), *flags]).encode()
    made = native.built(
        "bits/stdc++.h.gch",
        recipe + native.version_of(compiler),
        lambda to: [compiler, *flags, "-x", "c++-header", "-o", str(to), "/dev/stdin"],
        text=b"#include <bits/stdc++.h>\n",
    )
    return made.parent.parent if made else None
