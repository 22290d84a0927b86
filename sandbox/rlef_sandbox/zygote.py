"""The warm interpreter that forks a confined child per run, several at once.

Theory of operation. The controller starts `python -c` (`worker.py`) with one end of a socket pair
and a pidfd of the controller. That process enters a pid namespace if it can and forks: the parent
stays outside as the reaper (`reaper.py`), the child is the zygote (process 1 of its namespace). The
zygote preloads the standard library, confines itself (`confinement.py`), proves the layers by
trying to break out, reports them, and answers the requests that come in over the control channel,
each on the session, a socket, that it brings.

RUN and EXECUTE start a child for one run; PROGRAM starts a program server, which compiles once,
takes the session over as its channel, and forks a child per TEST until that ends. Whoever forks
children supervises them in one loop: it polls their pidfds, reads their CPU clocks, kills a child
that passes a limit, says once of a child that it sleeps, and sends what the kernel said of its end.
Nobody waits for one child alone, so a sleeper holds up nobody. A child tells how far it came in
a shared page; before its program's first line it unmaps that, and has every descriptor but its
own files closed, so that no program can speak to anyone.

What ends them: the end of a session kills its child or server; the channel's end of file,
or the controller's death seen by its pidfd, ends the zygote; the death of a parent kills its
children (PDEATHSIG), and the death of process 1 kills its namespace.
"""

from __future__ import annotations

import array
import fcntl
import gc
import json
import mmap
import os
import resource
import select
import signal
import socket
import sys
import time
import types
from typing import Any, NamedTuple

from . import program
from .confinement import Bounds, confine_zygote, library_files
from .launch import RESERVED_DESCRIPTORS, UNLIMITED, Plan, Progress, launcher_for
from .probes import probe_child_layers
from .protocol import (
    MAX_DESCRIPTORS,
    MAX_MESSAGE_BYTES,
    SLEEPING,
    Ending,
    Outcome,
    Phase,
    Request,
    Task,
    failed_to_start,
)
from .reaper import leave_reaper_behind
from .seccomp import filter_for_this_machine
from .syscalls import Profile

STACK_BYTES = 256 << 20  # of the main thread, for deep recursion; fixed when a process is exec'd
# Of a compiled program's main thread. Where that is without limit, the address space bounds it, and
# its other threads get 2 MiB each, as glibc has it; else as much as the main thread.
MOST_STACK_BYTES = resource.getrlimit(resource.RLIMIT_STACK)[1]
KEPT_PLANS = 256
LEAST_WAIT_S = 0.005  # between two readings of a child's CPU clock
# A child that used less than this share of a core over this long is asleep: a machine four times
# overloaded still gives a busy one 0.2.
SLEEP_WINDOW_S, SLEEP_SHARE = 0.1, 0.05
# One that worked at least this share of its wall clock limit is starved, not idle, and gets as much
# wall clock time again.
STARVED_SHARE, STARVED_EXTENSION = 0.01, 2
READABLE = select.POLLIN | 0x2000  # POLLRDHUP
STREAMS = 3
SOURCE_OF_A_SERVER, SESSION_OF_A_SERVER, CONTROLLER_OF_A_SERVER = 3, 4, 5


class Child(NamedTuple):
    """What a forked child is to run; it travels up to `main`, so that no frame stays below."""

    code: types.CodeType
    source: bytes
    call: bytes | None


class Running:
    """A child under supervision, and whom to tell of its end."""

    __slots__ = (
        "cell",
        "clock",
        "ending",
        "next_check",
        "pid",
        "pidfd",
        "request",
        "session",
        "slept",
        "started",
        "window_cpu_s",
        "window_started",
    )

    def __init__(self, pid: int, pidfd: int, cell: int, session: int, request: Request) -> None:
        self.pid, self.pidfd, self.cell = pid, pidfd, cell
        self.session, self.request = session, request
        self.started = self.window_started = time.monotonic()
        self.window_cpu_s = 0.0
        self.clock = ~pid << 3 | 2  # the process's CPU clock, as clock_getcpuclockid(3) makes it
        self.ending = Ending.ITSELF
        self.slept = False
        self.next_check = self.started + min(request.cpu_s, request.wall_s, SLEEP_WINDOW_S)

    def check(self, now: float) -> None:
        """Kill the child if it passed a limit; tell if it sleeps."""
        cpu_s = time.clock_gettime(self.clock)
        cpu_left_s = self.request.cpu_s - cpu_s
        elapsed_s, wall_s = now - self.started, self.request.wall_s
        if elapsed_s >= wall_s and cpu_s >= STARVED_SHARE * wall_s:
            wall_s *= STARVED_EXTENSION
        wall_left_s = wall_s - elapsed_s
        if cpu_left_s <= 0 or wall_left_s <= 0:
            self.ending = Ending.CPU_LIMIT if cpu_left_s <= 0 else Ending.WALL_LIMIT
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            self.next_check = float("inf")
            return
        left_s = min(cpu_left_s, wall_left_s)
        if not self.slept:
            window_s = now - self.window_started
            if window_s >= SLEEP_WINDOW_S:
                self.slept = cpu_s - self.window_cpu_s < SLEEP_SHARE * window_s
                if self.slept:
                    send(self.session, SLEEPING)
                self.window_started, self.window_cpu_s = now, cpu_s
            left_s = min(left_s, SLEEP_WINDOW_S)
        self.next_check = now + max(LEAST_WAIT_S, left_s)


class Server:
    """A zygote, or a program server forked from one: starts children and supervises them.

    Requests come over `channel`. A zygote's bring the session to answer on; a program server has
    one session, which is its channel, and has compiled its `program`.
    """

    def __init__(self, channel: socket.socket, controller: int, library: str) -> None:
        self.library = library
        self.filters = {
            Task.RUN: filter_for_this_machine(Profile.PROGRAM),
            Task.EXECUTE: filter_for_this_machine(Profile.EXECUTABLE),
        }
        self.bounds = Bounds(base_bytes=_mapped_bytes(), own_user_namespace=False)
        self.program: tuple[types.CodeType, bytes] | None = None
        self.listen(channel, controller)

    def listen(self, channel: socket.socket, controller: int) -> None:
        """Begin with nothing under way."""
        self.channel, self.controller = channel, controller
        self.progress = Progress()
        self.launcher = launcher_for(self.library, self.progress)
        self.plans: dict[tuple[bytes, int], tuple[Request, Any]] = {}
        self.running: dict[int, Running] = {}  # by pidfd
        self.awaited: dict[int, Running] = {}  # by the descriptor of the session
        self.poller = select.poll()
        self.poller.register(channel, READABLE)
        self.poller.register(controller, select.POLLIN)

    def confine(self, namespaces: list[str]) -> dict[str, object]:
        """Put on the zygote's layers and report those that hold."""
        layers = confine_zygote(namespaces, library_files())
        child_layers = probe_child_layers(self.launcher, self.filters[Task.RUN], self.bounds)
        if not child_layers["seccomp"]:
            self.filters = dict.fromkeys(self.filters)
        self.bounds = self.bounds._replace(own_user_namespace=bool(child_layers["threads"]))
        return {**layers, **child_layers, "launcher": self.launcher.name}

    def serve(self) -> Child:
        """Answer requests for ever. Returns only in a forked child, with what it is to run."""
        channel = self.channel.fileno()
        while True:
            for descriptor, _ in self.poller.poll(self.until_next_check_ms()):
                if descriptor in self.running:
                    self.finish(self.running.pop(descriptor))
                elif descriptor == channel:
                    child = self.answer()
                    if child is not None:
                        return child
                elif descriptor in self.awaited:
                    self.abandon(self.awaited[descriptor])
                elif descriptor == self.controller:
                    os._exit(0)
            if self.running:
                self.keep_limits()

    def until_next_check_ms(self) -> float | None:
        if not self.running:
            return None
        soonest = min(child.next_check for child in self.running.values())
        return None if soonest == float("inf") else max(0.0, soonest - time.monotonic()) * 1e3

    def keep_limits(self) -> None:
        now = time.monotonic()
        for child in self.running.values():
            if child.next_check > now:
                continue
            serves = child.request.task is Task.PROGRAM
            if serves and self.progress.phase(child.cell) is Phase.RUNNING:
                child.next_check = float("inf")  # its own children have limits of their own
            else:
                child.check(now)

    def answer(self) -> Child | None:
        """Act on the next request. A Child only in a forked child."""
        message, files = _receive(self.channel)
        if not message:
            os._exit(0)  # the controller is gone, or done with this program
        session = self.channel.fileno() if self.program else files.pop(0)
        request, plan = self.prepared(message, len(files))
        served = []
        if request.task is Task.PROGRAM:
            served = [session, self.controller]
        cell = self.progress.take()
        try:
            pid, pidfd = self.launcher.spawn(plan, [*files, *served], cell)
        except OSError as error:
            self.progress.give_back(cell)
            send(session, failed_to_start(f"start of a child: {error}").pack())
        else:
            if pid == 0:
                return self.go_on_as_child(request, len(files), cell)
            child = Running(pid, pidfd, cell, session, request)
            self.running[pidfd] = child
            self.poller.register(pidfd, select.POLLIN)
            if not (self.program or served):
                self.awaited[session] = child
                self.poller.register(session, READABLE)
        for descriptor in files:
            os.close(descriptor)
        return None

    def prepared(self, message: bytes, file_count: int) -> tuple[Request, Any]:
        """The request and the launcher's plan for it; the same message comes again and again."""
        key = message, file_count
        if key not in self.plans:
            if len(self.plans) >= KEPT_PLANS:
                self.plans.clear()
            request = Request.unpack(message)
            plan = self.launcher.prepared(self.plan(request, file_count))
            self.plans[key] = request, plan
        return self.plans[key]

    def plan(self, request: Request, file_count: int) -> Plan:
        limits = self.bounds.limits(request)
        if request.task is Task.PROGRAM:
            return Plan(**limits, filter=None)
        if request.task is Task.EXECUTE:
            return Plan(
                **limits,
                filter=self.filters[Task.EXECUTE],
                executable=file_count - 1,
                stack_bytes=MOST_STACK_BYTES & UNLIMITED,
            )
        return Plan(**limits, filter=self.filters[Task.RUN])

    def go_on_as_child(self, request: Request, file_count: int, cell: int) -> Child:
        """In a forked child, whose files are in place: compile, or become a program server."""
        if request.task is Task.TEST:
            assert self.program is not None
            call = _read_call() if file_count > STREAMS else None
            self.leave_trust(cell)
            return Child(*self.program, call)
        source_file = SOURCE_OF_A_SERVER if request.task is Task.PROGRAM else file_count - 1
        source = _read(source_file)
        os.close(source_file)
        call = _read_call() if source_file > STREAMS else None
        self.progress.tell(cell, Phase.COMPILING)
        code = program.compile_source(source)
        if code is None:
            os._exit(1)
        self.leave_trust(cell)
        if request.task is Task.PROGRAM:
            return self.serve_program(code, source)
        return Child(code, source, call)

    def leave_trust(self, cell: int) -> None:
        """The last step before the program's first line, or a program server's first test."""
        self.progress.tell(cell, Phase.RUNNING)
        self.progress.unmap()

    def serve_program(self, code: types.CodeType, source: bytes) -> Child:
        """In a program server: serve the one session. Returns in its forked children."""
        self.program = code, source
        self.channel.detach()  # closed already; the number is another's now
        session = socket.socket(fileno=_moved_out_of_the_way(SESSION_OF_A_SERVER))
        controller = _moved_out_of_the_way(CONTROLLER_OF_A_SERVER)
        _reserve_low_descriptors()
        self.listen(session, controller)
        send(session.fileno(), Outcome(Phase.RUNNING, Ending.ITSELF, 0, 0.0, 0.0, 0).pack())
        return self.serve()

    def abandon(self, child: Running) -> None:
        """The controller gave the session up: kill what runs for it."""
        self.poller.unregister(child.session)
        del self.awaited[child.session]
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

    def finish(self, child: Running) -> None:
        """Say what became of a child that ended."""
        self.poller.unregister(child.pidfd)
        os.close(child.pidfd)
        _, wait_status, usage = os.wait4(child.pid, 0)
        phase, fault = self.progress.phase(child.cell), self.progress.fault(child.cell)
        self.progress.give_back(child.cell)
        if not (child.request.task is Task.PROGRAM and phase is Phase.RUNNING):
            outcome = Outcome(
                Phase.SETUP if fault else phase,
                child.ending,
                wait_status,
                usage.ru_utime + usage.ru_stime,
                time.monotonic() - child.started,
                usage.ru_maxrss * 1024,
                fault,
            )
            send(child.session, outcome.pack())
        if not self.program:
            if self.awaited.pop(child.session, None) is not None:
                self.poller.unregister(child.session)
            os.close(child.session)


def send(session: int, message: bytes) -> None:
    """To a controller that may have given the session up."""
    try:
        os.write(session, message)
    except BrokenPipeError:
        return


def _receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * 4)
    message, ancillary, _, _ = channel.recvmsg(
        MAX_MESSAGE_BYTES, space, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    )
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    return message, list(descriptors)


def _read(descriptor: int) -> bytes:
    """A whole file, whatever its offset, which several runs share."""
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _read_call() -> bytes:
    """The call to make, from the exchange, which is left empty for what comes of it."""
    call = _read(program.EXCHANGE_DESCRIPTOR)
    os.ftruncate(program.EXCHANGE_DESCRIPTOR, 0)
    return call


def _mapped_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * mmap.PAGESIZE


def _moved_out_of_the_way(descriptor: int) -> int:
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, RESERVED_DESCRIPTORS)
    os.close(descriptor)
    return moved


def _reserve_low_descriptors() -> None:
    """Occupy the numbers that a child's files go to, so that no file to be placed lies there."""
    while (descriptor := os.dup(2)) < RESERVED_DESCRIPTORS:
        pass
    os.close(descriptor)


def _raise_stack_limit() -> None:
    """Start this interpreter anew where its main thread's stack could not grow as it should."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> None:
    """Become a zygote; the arguments are the descriptors of the control channel and the
    controller, the path of the C library and the cgroup, either perhaps empty.
    """
    _raise_stack_limit()
    *descriptors, library, cgroup = sys.argv[1:]
    channel, controller = (_moved_out_of_the_way(int(number)) for number in descriptors)
    _reserve_low_descriptors()
    control = socket.socket(fileno=channel)
    namespaces = leave_reaper_behind(control, controller, cgroup)
    server = Server(control, controller, library)
    program.preload()
    for name in [name for name in sys.modules if name.startswith("rlef_sandbox")]:
        del sys.modules[name]  # no such module in a program's world
    layers = server.confine(namespaces)
    gc.collect()
    gc.freeze()
    gc.disable()
    control.send(json.dumps(layers).encode())
    child = server.serve()
    program.run(*child)
