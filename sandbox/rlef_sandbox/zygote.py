"""The warm interpreter that forks one confined child per run.

Theory of operation. The controller starts `python -c` with BOOTSTRAP, holding one end of a socket
pair and a pidfd of the controller. That process preloads the standard library, confines itself
(`confinement.py`), and forks: the child is the zygote (process 1 of the pid namespace, if there
is one); the parent stays as its reaper, since only a parent can be told of its death. The
zygote proves the layers by trying to break out, reports them, and serves requests one by one.

RUN forks a child that compiles and runs the program. PROGRAM forks a program server, which
compiles once, takes over the socket, and forks a child per TEST until END; the zygote waits.
Whoever forks a child supervises it: it holds a pidfd, reads the child's CPU clock, kills it when
a limit is passed, and sends what the kernel said of its end. A child tells how far it came in a
shared page; before its program's first line it unmaps that, and closes every descriptor but its
own files, so that no program can speak to anyone.

What ends them: the socket's end of file, or the controller's death seen by its pidfd, ends the
zygote and the program server; the death of a parent kills its children (PDEATHSIG), and
the death of process 1 kills its namespace.
"""

from __future__ import annotations

import array
import gc
import json
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import types
from typing import NamedTuple, NoReturn

from . import kernel, program
from .confinement import confine_zygote, set_limits
from .probes import probe_child_layers
from .protocol import MAX_DESCRIPTORS, MAX_MESSAGE_BYTES, Ending, Outcome, Phase, Request, Task
from .seccomp import Filter

STACK_BYTES = 256 << 20  # of the main thread, for deep recursion; fixed when a process is exec'd
LEAST_WAIT_S = 0.005  # between two readings of a child's CPU clock
POLLRDHUP = 0x2000


class Child(NamedTuple):
    """What a forked child is to run; it travels up to `main`, so that no frame stays below."""

    code: types.CodeType
    source: bytes
    call: bytes | None


class ProgressPage:
    """A page shared with the forked child, in which it tells its phase while it is trusted."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    def tell(self, phase: Phase, fault: str = "") -> None:
        text = fault.encode(errors="replace")[:1000]
        self._page[:3] = struct.pack("<BH", phase, len(text))
        self._page[3 : 3 + len(text)] = text

    def read(self) -> tuple[Phase, str]:
        phase, length = struct.unpack("<BH", self._page[:3])
        return Phase(phase), self._page[3 : 3 + length].decode(errors="replace")

    def unmap(self) -> None:
        self._page.close()


class Server:
    """A zygote, or a program server forked from one: forks children and supervises them."""

    def __init__(self, channel: socket.socket, controller: int) -> None:
        self.channel = channel
        self.controller = controller
        self.filter = _filter_for_this_machine()
        self.own_user_namespace = False
        self.page = ProgressPage()
        self.poller = select.poll()
        self.poller.register(channel, POLLRDHUP)
        self.poller.register(controller, select.POLLIN)
        with open("/proc/self/statm") as statm:
            self.base_bytes = int(statm.read().split()[0]) * mmap.PAGESIZE

    def confine(self) -> dict[str, object]:
        """Put on the zygote's layers, become the zygote, and report the layers that hold."""
        layers, namespaces = confine_zygote()
        self.own_user_namespace = "user" in namespaces
        _leave_reaper_behind(self.channel, self.controller)
        child_layers = probe_child_layers(self.filter, self.base_bytes)
        if not child_layers["seccomp"]:
            self.filter = None
        return layers | child_layers

    def receive(self) -> tuple[Request, list[int]]:
        """The next request and its descriptors; exits when the controller is gone."""
        space = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)
        message, ancillary, _, _ = self.channel.recvmsg(MAX_MESSAGE_BYTES, space)
        if not message:
            os._exit(0)
        descriptors = array.array("i")
        for _, _, data in ancillary:
            descriptors.frombytes(data)
        return Request.unpack(message), list(descriptors)

    def serve(self) -> Child:
        """Answer requests for ever. Returns only in a forked child, with what it is to run."""
        while True:
            request, files = self.receive()
            if request.task in (Task.TEST, Task.END):  # for a program server that died
                _close(files)
                continue
            started = time.monotonic()
            pid = self.fork()
            if pid == 0:
                if request.task is Task.PROGRAM:
                    return self.serve_program(request, files)
                return self.become_child(request, files)
            _close(files)
            if request.task is Task.PROGRAM:
                self.await_program_server(pid, started)
            else:
                self.channel.send(self.supervise(pid, request, started).pack())

    def fork(self) -> int:
        self.page.tell(Phase.SETUP)
        parent = os.getpid()
        pid = kernel.checked(kernel.fork(), "fork")
        if pid == 0:
            kernel.die_with_parent()
            if os.getppid() != parent:
                os._exit(1)
        return pid

    def become_child(self, request: Request, files: list[int]) -> Child:
        """In a forked child: put on the last layers, then compile. Exits if there is no code."""
        try:
            source_file, *files = files
            set_limits(request, self.base_bytes, self.own_user_namespace)
            source = _read(source_file)
            call = self.enter_child(files)
        except OSError as error:
            self.fail(error)
        self.page.tell(Phase.COMPILING)
        code = program.compile_source(source)
        if code is None:
            os._exit(1)
        self.leave_trust()
        return Child(code, source, call)

    def enter_child(self, files: list[int]) -> bytes | None:
        """Put the run's files in place, close all else, filter system calls. The call to make."""
        exchange = files[3:]
        for target, descriptor in enumerate(files):
            os.dup2(descriptor, target)
        kernel.close_from(len(files))
        call = _read(program.EXCHANGE_DESCRIPTOR) if exchange else None
        if exchange:
            os.ftruncate(program.EXCHANGE_DESCRIPTOR, 0)
            os.lseek(program.EXCHANGE_DESCRIPTOR, 0, os.SEEK_SET)
        if self.filter is not None:
            self.filter.install(os.getpid())
        return call

    def leave_trust(self) -> None:
        """The last step before the program's first line."""
        self.page.tell(Phase.RUNNING)
        self.page.unmap()

    def fail(self, error: OSError) -> NoReturn:
        """In a child that could not be set up: no verdict on the program."""
        self.page.tell(Phase.SETUP, f"child set-up: {error}")
        os._exit(1)

    def supervise(self, pid: int, request: Request, started: float) -> Outcome:
        """Wait for the child, kill it at a limit, and say what became of it."""
        pidfd = os.pidfd_open(pid)
        self.poller.register(pidfd, select.POLLIN)
        clock = ~pid << 3 | 2  # the process's CPU clock, as clock_getcpuclockid(3) makes it
        ending = Ending.ITSELF
        left_s: float | None = min(request.cpu_s, request.wall_s)
        while not self.ended(pidfd, left_s):
            cpu_left_s = request.cpu_s - time.clock_gettime(clock)
            wall_left_s = started + request.wall_s - time.monotonic()
            left_s = max(LEAST_WAIT_S, min(cpu_left_s, wall_left_s))
            if cpu_left_s <= 0 or wall_left_s <= 0:
                ending = Ending.CPU_LIMIT if cpu_left_s <= 0 else Ending.WALL_LIMIT
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                left_s = None
        self.poller.unregister(pidfd)
        os.close(pidfd)
        _, wait_status, usage = os.wait4(pid, 0)
        phase, fault = self.page.read()
        return Outcome(
            phase,
            ending,
            wait_status,
            usage.ru_utime + usage.ru_stime,
            time.monotonic() - started,
            usage.ru_maxrss * 1024,
            fault,
        )

    def ended(self, pidfd: int, timeout_s: float | None) -> bool:
        """Whether the child ended within the time. Exits when the controller is gone."""
        ready = self.poller.poll(None if timeout_s is None else timeout_s * 1000)
        if any(descriptor != pidfd for descriptor, _ in ready):
            os._exit(0)
        return bool(ready)

    def serve_program(self, request: Request, files: list[int]) -> Child:
        """In a program server: compile once, fork a child per test. Returns in the children."""
        try:
            source_file, error_file = files
            set_limits(request, self.base_bytes, self.own_user_namespace)
            source = _read(source_file)
            os.dup2(error_file, 2)
            _close(files)
        except OSError as error:
            self.fail(error)
        self.page.tell(Phase.COMPILING)
        code = program.compile_source(source)
        if code is None:
            os._exit(1)
        self.page.tell(Phase.RUNNING)
        self.channel.send(Outcome(Phase.RUNNING, Ending.ITSELF, 0, 0.0, 0.0, 0).pack())
        while True:
            test, files = self.receive()
            if test.task is Task.END:
                os._exit(0)
            started = time.monotonic()
            pid = self.fork()
            if pid == 0:
                return self.become_test(code, source, files)
            _close(files)
            self.channel.send(self.supervise(pid, test, started).pack())

    def become_test(self, code: types.CodeType, source: bytes, files: list[int]) -> Child:
        """In a child of a program server, whose limits it has inherited."""
        try:
            call = self.enter_child(files)
        except OSError as error:
            self.fail(error)
        self.leave_trust()
        return Child(code, source, call)

    def await_program_server(self, pid: int, started: float) -> None:
        """Wait for the end of a program server; speak for it where it could not answer."""
        pidfd = os.pidfd_open(pid)
        self.poller.register(pidfd, select.POLLIN)
        self.ended(pidfd, None)
        self.poller.unregister(pidfd)
        os.close(pidfd)
        _, wait_status, usage = os.wait4(pid, 0)
        if wait_status == 0:
            return
        phase, fault = self.page.read()
        if phase is not Phase.COMPILING:
            phase, fault = Phase.SETUP, fault or f"program server ended with status {wait_status}"
        cpu_s, wall_s = usage.ru_utime + usage.ru_stime, time.monotonic() - started
        rss_bytes = usage.ru_maxrss * 1024
        outcome = Outcome(phase, Ending.ITSELF, wait_status, cpu_s, wall_s, rss_bytes, fault)
        self.channel.send(outcome.pack())


def _read(descriptor: int) -> bytes:
    """A whole file, whatever its offset, which several runs share."""
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _filter_for_this_machine() -> Filter | None:
    try:
        return Filter()
    except ValueError:  # an architecture without a table; the controller judges what is left
        return None


def _leave_reaper_behind(channel: socket.socket, controller: int) -> None:
    """Fork: the child goes on, process 1 of a new pid namespace; the parent waits for its end."""
    pid = kernel.checked(kernel.fork(), "fork")
    if pid == 0:
        kernel.die_with_parent()
        return
    channel.close()
    os.close(controller)
    os.waitpid(pid, 0)
    os._exit(0)


def _raise_stack_limit() -> None:
    """Start this interpreter anew where its main thread's stack could not grow as it should."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> None:
    """Become a zygote; the arguments are the descriptors of the channel and of the controller."""
    _raise_stack_limit()
    channel = socket.socket(fileno=int(sys.argv[1]))
    server = Server(channel, controller=int(sys.argv[2]))
    program.preload()
    for name in [name for name in sys.modules if name.startswith("rlef_sandbox")]:
        del sys.modules[name]  # no such module in a program's world
    layers = server.confine()
    gc.collect()
    gc.freeze()
    gc.disable()
    channel.send(json.dumps(layers).encode())
    child = server.serve()
    program.run(*child)
