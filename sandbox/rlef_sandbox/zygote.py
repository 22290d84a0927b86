"""The warm interpreter that forks a confined child per run, several at once.

Theory of operation. The controller starts `python -c` (`worker.py`) with one end of a socket pair
and a pidfd of the controller. That process enters a pid namespace if it can and forks: the parent
stays outside as the reaper (`reaper.py`), the child is the zygote (process 1 of its namespace). The
zygote preloads the standard library, confines itself (`confinement.py`), proves the layers by
trying to break out, reports them, and answers the requests that come in over the control channel,
each on the session, a socket, that it brings.

RUN and EXECUTE start a child for one run; PROGRAM starts a program server, which compiles once,
takes the session over as its channel, and forks a child per TEST until that ends. Whoever forks
children supervises them in one loop (csrc/serve.c; supervise.py without a C compiler): it polls
their pidfds, reads their CPU clocks, kills a child that passes a limit, says once of a child that
it sleeps, and sends what the kernel said of its end. Nobody waits for one child alone, so a sleeper
holds up nobody. A child tells how far it came in a shared page; before its program's first line it
unmaps that, and has every descriptor but its own files closed, so that no program can speak to
anyone.

What ends them: the end of a session kills its child or server; the channel's end of file, or the
controller's death seen by its pidfd, ends the zygote; the death of a parent kills its children
(PDEATHSIG), and the death of process 1 kills its namespace.
"""

from __future__ import annotations

import fcntl
import gc
import json
import mmap
import os
import resource
import sys
import types
from typing import NamedTuple

from . import program
from .confinement import Bounds, confine_zygote, library_files
from .launch import RESERVED_DESCRIPTORS, UNLIMITED, Plan
from .probes import probe_child_layers
from .protocol import Ending, Outcome, Phase, Request, Task
from .reaper import leave_reaper_behind
from .seccomp import filter_for_this_machine
from .supervise import PythonSupervisor
from .supervise_native import NativeSupervisor
from .syscalls import Profile

STACK_BYTES = 256 << 20  # of the main thread, for deep recursion; fixed when a process is exec'd
# Of a compiled program's main thread. Where that is without limit, the address space bounds it, and
# its other threads get 2 MiB each, as glibc has it; else as much as the main thread.
MOST_STACK_BYTES = resource.getrlimit(resource.RLIMIT_STACK)[1]
STREAMS = 3
SOURCE_OF_A_SERVER, SESSION_OF_A_SERVER, CONTROLLER_OF_A_SERVER = 3, 4, 5


class Child(NamedTuple):
    """What a forked child is to run; it travels up to `main`, so that no frame stays below."""

    code: types.CodeType
    source: bytes
    call: bytes | None


class Server:
    """A zygote, or a program server forked from one, which has compiled its `program`: what becomes
    of requests. Who starts and supervises the children is the supervisor's affair.
    """

    def __init__(self, channel: int, controller: int, library: str) -> None:
        self.library = library
        self.filters = {
            Task.RUN: filter_for_this_machine(Profile.PROGRAM),
            Task.EXECUTE: filter_for_this_machine(Profile.EXECUTABLE),
        }
        self.bounds = Bounds(base_bytes=_mapped_bytes(), own_user_namespace=False)
        self.program: tuple[types.CodeType, bytes] | None = None
        self.supervisor = self.new_supervisor(channel, controller)

    def new_supervisor(self, channel: int, controller: int) -> NativeSupervisor | PythonSupervisor:
        """In C; in Python where `library` is empty or cannot be loaded here."""
        serves_program = self.program is not None
        if self.library:
            try:
                return NativeSupervisor(
                    self.library, channel, controller, self.plan, serves_program=serves_program
                )
            except OSError:  # built on another machine
                self.library = ""
        return PythonSupervisor(channel, controller, self.plan, serves_program=serves_program)

    def confine(self, namespaces: list[str]) -> dict[str, object]:
        """Put on the zygote's layers and report those that hold."""
        layers = confine_zygote(namespaces, library_files())
        launcher = self.supervisor.launcher
        child_layers = probe_child_layers(launcher, self.filters[Task.RUN], self.bounds)
        if not child_layers["seccomp"]:
            self.filters = dict.fromkeys(self.filters)
        self.bounds = self.bounds._replace(own_user_namespace=bool(child_layers["threads"]))
        return {**layers, **child_layers, "launcher": self.supervisor.name}

    def serve(self) -> Child:
        """Serve for ever. Returns only in a forked child, with what it is to run."""
        return self.go_on_as_child(*self.supervisor.serve())

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

    def go_on_as_child(self, task: Task, file_count: int, cell: int) -> Child:
        """In a forked child, whose files are in place: compile, or become a program server."""
        if task is Task.TEST:
            assert self.program is not None
            call = _read_call() if file_count > STREAMS else None
            return Child(*self.program, call)
        source_file = SOURCE_OF_A_SERVER if task is Task.PROGRAM else file_count - 1
        source = _read(source_file)
        os.close(source_file)
        call = _read_call() if source_file > STREAMS else None
        code = program.compile_source(source)
        if code is None:
            os._exit(1)
        self.supervisor.progress.leave_trust(cell)
        if task is Task.PROGRAM:
            return self.serve_program(code, source)
        return Child(code, source, call)

    def serve_program(self, code: types.CodeType, source: bytes) -> Child:
        """In a program server: serve the one session. Returns in its forked children."""
        self.program = code, source
        self.supervisor.forget()
        session = _moved_out_of_the_way(SESSION_OF_A_SERVER)
        controller = _moved_out_of_the_way(CONTROLLER_OF_A_SERVER)
        _reserve_low_descriptors()
        self.supervisor = self.new_supervisor(session, controller)
        os.write(session, Outcome(Phase.RUNNING, Ending.ITSELF, 0, 0.0, 0.0, 0).pack())
        return self.serve()


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
    namespaces = leave_reaper_behind(channel, controller, cgroup)
    server = Server(channel, controller, library)
    program.preload()
    for name in [name for name in sys.modules if name.startswith("rlef_sandbox")]:
        del sys.modules[name]  # no such module in a program's world
    layers = server.confine(namespaces)
    gc.collect()
    gc.freeze()
    gc.disable()
    os.write(channel, json.dumps(layers).encode())
    child = server.serve()
    program.run(*child)
