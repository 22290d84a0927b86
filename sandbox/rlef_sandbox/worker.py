"""The controller's handle on one zygote: starts it, sends requests to it, replaces it.

Files are passed as memfd descriptors. The source and the input are written before the request, and
the outputs are read after the answer, so nothing is streamed and no program waits for us.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

from . import callers_state, cgroups, page_tables
from .protocol import (
    MAX_MESSAGE_BYTES,
    PAUSE,
    RESUME,
    SLEEPING,
    STARVED_EXTENSION,
    TURN,
    WOKE,
    Outcome,
    ZygoteRequest,
    receive,
)
from .work_slots import WorkSlot

FLOOR = ("no_new_privs", "rlimits", "seccomp", "files")  # without these no sandbox starts
START_TIMEOUT_S = 60.0
ANSWER_GRACE_S = 20.0  # after the wall clock limit; then the zygote is killed
# For the C library: the first makes runs faster; with the second, threads reserve no 64 MiB each.
LOADER = {"LD_BIND_NOW": "1", "MALLOC_ARENA_MAX": "1"}
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "ONLINE_JUDGE": "true",  # as on contest sites: a program reads standard input, not a file
    **LOADER,
    "OPENBLAS_NUM_THREADS": "1",  # numpy must start no threads in a zygote, which forks
    "OMP_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
}
INHERITED = {"LD_LIBRARY_PATH"}  # this Python may need it to start; programs do not get it
PACKAGE_DIRECTORY = os.path.dirname(os.path.abspath(__file__))
# Makes an empty package of this name, so that the zygote loads none of the controller's modules.
BOOTSTRAP = f"""\
import sys, types
package = types.ModuleType("rlef_sandbox")
package.__path__ = [{PACKAGE_DIRECTORY!r}]
sys.modules["rlef_sandbox"] = package
from rlef_sandbox.MODULE import main
main()
child = package.child
try:
    exec(child.code, child.namespace)
except BaseException as error:
    child.error = error
child.finish()
"""
COMMAND = [sys.executable, "-s", "-S", "-P", "-B", "-c", BOOTSTRAP]

Layers = dict[str, object]


class ZygoteLostError(RuntimeError):
    """The zygote died or does not answer: a fault of the sandbox, never of the program."""


class Worker:
    """One zygote, shared by threads, each of which has sessions of its own.

    `accept` gets the layers of each zygote that starts, and raises an error if they are too few.
    """

    def __init__(
        self,
        accept: Callable[[Layers], None],
        *,
        module: str = "zygote",
        arguments: Sequence[str] = (),
        memory_bytes: int | None = None,
        scratch: bool = False,
    ) -> None:
        self.layers: Layers = {}
        self.starts = 0
        self._accept = accept
        self._module = module
        self.arguments = list(arguments)  # of the next zygote
        self._has_scratch = scratch
        self.scratch = ""  # of the zygote that runs
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        self._errors = -1
        self._cgroup = ""
        self._closed = False

    def launch(self) -> None:
        """Start a zygote, without waiting for it."""
        with contextlib.ExitStack() as on_failure, contextlib.ExitStack() as passed_on:
            control, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            on_failure.callback(control.close)
            passed_on.callback(remote.close)
            controller = os.pidfd_open(os.getpid())
            passed_on.callback(os.close, controller)
            passed = []
            # may be 0, 1 or 2 if the caller closed those
            for opened in (remote.fileno(), controller):
                passed.append(fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 3))
                passed_on.callback(os.close, passed[-1])
            stdin, stdout, stderr = memory_files(b"", b"", b"")
            passed_on.callback(os.close, stdin)
            passed_on.callback(os.close, stdout)
            on_failure.callback(os.close, stderr)
            arguments = [*map(str, passed), *self.arguments]
            on_failure.callback(self._remove_folders)
            self._cgroup = cgroups.create(self._memory_bytes)
            if self._has_scratch:
                self.scratch = tempfile.mkdtemp(prefix="rlef-sandbox-")
                os.chmod(self.scratch, 0o1777)  # the unprivileged user may write here
                arguments.append(self.scratch)
            bootstrap = COMMAND[-1].replace("MODULE", self._module)
            self._process = subprocess.Popen(
                [*COMMAND[:-1], bootstrap, *arguments, self._cgroup],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=passed,
                env=ENVIRONMENT
                | {name: os.environ[name] for name in INHERITED & os.environ.keys()},
                cwd="/",
            )
            self._control, self._errors = control, stderr
            on_failure.pop_all()  # it started; `_dispose` cleans up
        self.starts += 1

    def _remove_folders(self) -> None:
        if self._cgroup:
            cgroups.remove(self._cgroup)
        if self.scratch:
            shutil.rmtree(self.scratch, ignore_errors=True)
        self._cgroup = self.scratch = ""

    def greet(self) -> None:
        """Wait for the zygote just launched. Raises ZygoteLostError if it failed."""
        assert self._control is not None
        self._control.settimeout(START_TIMEOUT_S)
        try:
            message = self._control.recv(MAX_MESSAGE_BYTES)
        except OSError:
            message = b""
        if not message:
            errors = os.pread(self._errors, MAX_MESSAGE_BYTES, 0).decode(errors="replace")
            raise ZygoteLostError(f"the zygote did not start: {errors.strip()}")
        try:
            layers = json.loads(message)
        except (ValueError, RecursionError) as error:
            raise ZygoteLostError(f"the zygote's greeting is malformed: {error}") from None
        if not isinstance(layers, dict) or not layers.keys() >= set(FLOOR):
            raise ZygoteLostError(f"the zygote's greeting lacks layers: {message[:200]!r}")
        # the zygote does not know this: the reaper put it into its cgroup
        layers["cgroup"] = cgroups.layers(self._cgroup)
        assert self._process is not None
        layers["memory"] = [
            *("address_space", "resident"),
            *["page_tables"] * page_tables.can_be_bound(self._process.pid),
            *["cgroup"] * ("memory" in cgroups.layers(self._cgroup)),
        ]
        layers["core_dumps_stopped_by"] = callers_state.core_dumps_stopped_by(self._process.pid)
        self.layers = layers
        self._accept(layers)

    def start(self, request: ZygoteRequest, descriptors: Sequence[int]) -> ZygoteSession:
        """Send a request, to a new zygote if the last one is gone. Returns the session that
        receives the outcome. Raises ZygoteLostError if no zygote starts.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        session = ZygoteSession(ours)
        try:
            with self._lock:
                session.generation = self._send(request, [theirs.fileno(), *descriptors])
        except BaseException:
            session.close()
            raise
        finally:
            theirs.close()
        return session

    def _send(self, request: ZygoteRequest, descriptors: list[int]) -> int:
        """Send a request to the zygote. Returns its generation."""
        if self._closed:
            raise RuntimeError("the sandbox is closed")
        fault = ""
        for _ in range(2):
            if self._control is None:
                self.launch()
                try:
                    self.greet()
                except BaseException:
                    self._dispose()  # its layers are not proven: nothing may run in it
                    raise
            assert self._control is not None
            try:
                socket.send_fds(self._control, [request.pack()], descriptors)
                return self.starts
            except OSError as error:
                fault = str(error)
                self._dispose()
        raise ZygoteLostError(f"the zygote is gone: {fault}")

    def lose(self, session: ZygoteSession | None = None) -> None:
        """Kill the zygote, unless `session` is of an earlier one. The runs of its other sessions
        are repeated, and the next session starts another zygote.
        """
        with self._lock:
            if session is None or session.generation == self.starts:
                self._dispose()

    def close(self) -> None:
        """Kill the zygote and all its descendants, and never start another."""
        with self._lock:
            self._closed = True
            self._dispose()

    def _dispose(self) -> None:
        if self._process is None or self._control is None:
            return
        self._process.kill()
        self._process.wait()
        self._remove_folders()  # may be interrupted; what follows must not be done twice
        control, self._process, self._control = self._control, None, None
        control.close()
        os.close(self._errors)


class ZygoteSession:
    """The socket on which a zygote answers one request. Used by one thread."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self.generation = 0  # of the zygote

    def fileno(self) -> int:
        return self._channel.fileno()

    def tell(self, word: bytes) -> None:
        """Send a one-byte message about the run, which may have ended."""
        with contextlib.suppress(OSError):
            self._channel.send(word)

    def receive(self, within_s: float | None = None) -> tuple[bytes, list[int]]:
        """Wait for a message. Returns it with its descriptors (`compiler.py` sends one)."""
        self._channel.settimeout(within_s)
        try:
            message, descriptors = receive(self._channel)
        except TimeoutError:
            raise
        except OSError as error:
            raise ZygoteLostError(f"the zygote does not answer: {error}") from None
        if not message:
            raise ZygoteLostError("the zygote died")
        return message, descriptors

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._channel.close()


def receive_all(
    sessions: Sequence[ZygoteSession], wall_s: float, slot: WorkSlot | None = None
) -> list[Outcome]:
    """Wait for the outcomes of runs that wait for one another and share a `slot`. While all of them
    sleep, the slot is given up. When one wakes, all are paused until they have a slot again.

    Raises ZygoteLostError if the zygote died, TimeoutError if it does not answer.
    """
    deadline = time.monotonic() + STARVED_EXTENSION * wall_s + ANSWER_GRACE_S
    outcomes: dict[ZygoteSession, Outcome] = {}
    working = set(sessions)
    poller = select.poll()
    of_descriptor = {session.fileno(): session for session in sessions}
    for descriptor in of_descriptor:
        poller.register(descriptor, select.POLLIN)
    while len(outcomes) < len(sessions):
        ready = poller.poll(max(1.0, (deadline - time.monotonic()) * 1e3))
        if not ready:
            raise TimeoutError("the zygote does not answer")
        session = of_descriptor[ready[0][0]]
        message, _ = session.receive()
        if message == WOKE:
            asked = time.monotonic()
            _take_turn(slot, [one for one in sessions if one not in outcomes])
            deadline += time.monotonic() - asked
            session.tell(TURN)
            working.add(session)
            continue
        working.discard(session)
        if message != SLEEPING:
            poller.unregister(session.fileno())
            try:
                outcomes[session] = Outcome.unpack(message)
            except ValueError as error:
                raise ZygoteLostError(f"the zygote's answer is malformed: {error}") from None
        if slot is not None and not working and len(outcomes) < len(sessions):
            slot.sleep()
    return [outcomes[session] for session in sessions]


def _take_turn(slot: WorkSlot | None, sessions: Sequence[ZygoteSession]) -> None:
    if slot is not None and not slot.wake(wait=False):
        for session in sessions:
            session.tell(PAUSE)
        slot.wake()
        for session in sessions:
            session.tell(RESUME)


def memory_file(content: bytes = b"") -> int:
    """Return a descriptor, at offset 0, of a new file in memory that contains `content`."""
    descriptor = os.memfd_create("rlef-sandbox", os.MFD_CLOEXEC)
    written = 0
    try:
        while written < len(content):
            written += os.pwrite(descriptor, content[written:], written)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def memory_files(*contents: bytes) -> list[int]:
    """Return a file for each content. None stays open if one of them cannot be made."""
    files: list[int] = []
    try:
        for content in contents:
            files.append(memory_file(content))
    except BaseException:
        for file in files:
            os.close(file)
        raise
    return files
