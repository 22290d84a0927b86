"""The warm interpreter that forks a confined child for each run, several at once.

Theory of operation. The controller starts `python -c` (`worker.py`) with one end of a socket pair
and a pidfd of the controller. That process enters a pid namespace if it can, and forks. The parent
stays outside as the reaper (`reaper.py`); the child, process 1 of its namespace, is the zygote. It
preloads the standard library, confines itself (`confinement.py`), proves the layers by trying to
break out, runs a few programs itself (`warm_up.py`), and reports the layers. Then it answers the
requests that come over the control channel, each on the session (a socket) that the request brings.

Each request starts a child for one run. The zygote supervises its children in one loop
(csrc/serve.c; supervisor_python.py without a C compiler). The loop polls for the end of each child,
reads its CPU clock, kills a child that passes a limit, reports that a child sleeps or wakes, and
sends what the kernel reported of its end. Each child is alone with its parent in a pid namespace
(csrc/spawn.c), if the machine allows one, so that its ids reveal nothing about other runs. The loop
never waits for one child alone, so a sleeper delays no other run. In memory that it shares with the
zygote, a child reports how far it has come. Before its program's first line it unmaps that memory
and closes every descriptor but its own files, so no program can reach zygote or controller.

A program with several tests is compiled once: the child of its first TEST writes the code into a
file before the program's first line, and closes the file. The others load the code from it.

What ends them: the end of a session kills its child. The end of the channel, or the controller's
death (seen by its pidfd), ends the zygote. The death of a parent kills its children (PDEATHSIG),
and the death of process 1 kills its namespace.
"""

from __future__ import annotations

import fcntl
import gc
import json
import mmap
import os
import resource
import sys
from typing import Any

from . import callers_state, kernel, program
from .confinement import VisibleFiles, confine_zygote, library_files
from .launch_plan import Bounds, LaunchPlan
from .probes import probe_child_layers
from .protocol import MAX_DESCRIPTORS, Task, ZygoteRequest
from .reaper import leave_reaper_behind
from .seccomp import filter_for_this_machine
from .supervisor_native import NativeSupervisor
from .supervisor_python import PythonSupervisor
from .syscalls import Profile
from .warm_up import warm_up

STREAMS = 3
TEST = Task.TEST  # looked up once, not in each child
# Writing 1 to it makes 2 the next id in the writer's pid namespace, and needs a capability there.
LAST_ID_FILE = "/proc/sys/kernel/ns_last_pid"


class Zygote:
    """Decides what a request means; its supervisor starts and supervises the children."""

    def __init__(self, channel: int, controller: int, library: str) -> None:
        of_programs = filter_for_this_machine(Profile.PROGRAM)
        self.filters = {
            Task.RUN: of_programs,
            Task.TEST: of_programs,
            Task.EXECUTE: filter_for_this_machine(Profile.EXECUTABLE),
        }
        try:
            last_id = os.open(LAST_ID_FILE, os.O_WRONLY | os.O_CLOEXEC)
        except OSError:  # this machine does not allow it
            last_id = -1
        namespaces = kernel.CLONE_NEWUSER | (kernel.CLONE_NEWPID if last_id >= 0 else 0)
        self.bounds = Bounds(_mapped_bytes(), namespaces)
        self.supervisor: NativeSupervisor | PythonSupervisor
        try:
            if not library:
                raise OSError("there is no C compiler")
            self.supervisor = NativeSupervisor(library, channel, controller, last_id, self.plan)
        except OSError:  # no library, or one that was built on another machine
            self.supervisor = PythonSupervisor(channel, controller, self.plan)
        self.leave_trust = self.supervisor.leave_trust

    def confine(self, namespaces: list[str], files: VisibleFiles) -> dict[str, object]:
        """Apply the zygote's layers. Returns those that hold."""
        layers = confine_zygote(namespaces, files)
        child_layers = probe_child_layers(self.supervisor, self.filters[Task.RUN], self.bounds)
        if not child_layers["seccomp"]:
            self.filters = dict.fromkeys(self.filters)
        if not child_layers["process_ids"]:
            of_a_run = kernel.CLONE_NEWUSER if child_layers["threads"] else 0
            self.bounds = self.bounds._replace(namespaces=of_a_run)
        return {**layers, **child_layers, "launcher": self.supervisor.name}

    def plan(self, request: ZygoteRequest, file_count: int) -> LaunchPlan:
        """Return the plan of a child."""
        return self.bounds.plan(request, file_count, self.filters[request.task])

    def serve(self) -> program.Child:
        """Serve until the process ends. Returns only in a forked child, with what it must run."""
        return self.child(*self.supervisor.serve())

    def child(self, task: Task, file_count: int) -> program.Child:
        """Return what a forked child must run. Its files have the numbers from 0."""
        source_file = file_count - 1
        source = _read(source_file)
        os.close(source_file)
        if task is TEST:
            code_file = source_file - 1
            call = _read_call() if code_file > STREAMS else None
            code = program.kept_code(code_file, _read(code_file), source)
            os.close(code_file)
        else:
            call = _read_call() if source_file > STREAMS else None
            code = program.compile_source(source)
        if code is None:
            os._exit(1)
        self.leave_trust()
        return program.Child(code, source, call)

    def warm_up(self) -> None:
        """Run programs in this process as children will."""
        self.leave_trust = lambda: None
        warm_up(lambda file_count: self.child(Task.RUN, file_count), _reserve_low_descriptors)
        self.leave_trust = self.supervisor.leave_trust


def _read(descriptor: int) -> bytes:
    """Return a whole file. Reads without the file's offset, which several runs share."""
    return os.pread(descriptor, os.lseek(descriptor, 0, os.SEEK_END), 0)


def _read_call() -> bytes:
    """Return the call to make, and empty the exchange for its result."""
    call = _read(program.EXCHANGE_DESCRIPTOR)
    os.lseek(program.EXCHANGE_DESCRIPTOR, 0, os.SEEK_SET)
    os.ftruncate(program.EXCHANGE_DESCRIPTOR, 0)
    return call


def _mapped_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * mmap.PAGESIZE


def _moved_out_of_the_way(descriptor: int) -> int:
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, MAX_DESCRIPTORS)
    os.close(descriptor)
    return moved


def _reserve_low_descriptors() -> None:
    """Occupy the descriptors that a child's files will get, so that no other file gets one."""
    while (descriptor := os.dup(2)) < MAX_DESCRIPTORS:
        pass
    os.close(descriptor)


def _set_stack_limit() -> None:
    """Restart this interpreter unless its main thread's stack may grow to STACK_BYTES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if soft != callers_state.STACK_BYTES:
        resource.setrlimit(resource.RLIMIT_STACK, (callers_state.STACK_BYTES, hard))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> None:
    """Become a zygote. Returns only in its children, with a `program.Child` as `child` of the
    package. The arguments are the descriptors of the control channel and the controller, the path
    of the C library, the packages (`packages.Packages`) as JSON, and the cgroup; library and cgroup
    may be empty.
    """
    callers_state.reset()
    _set_stack_limit()
    package: Any = sys.modules[__package__]
    *descriptors, library, packages, cgroup = sys.argv[1:]
    named, modules, paths = json.loads(packages)
    channel, controller = (_moved_out_of_the_way(int(number)) for number in descriptors)
    _reserve_low_descriptors()
    namespaces = leave_reaper_behind(channel, controller, cgroup)
    program.preload()
    program.load_packages(named, modules)
    zygote = Zygote(channel, controller, library)
    for name in ("LD_BIND_NOW", "MALLOC_ARENA_MAX", "LD_LIBRARY_PATH"):  # have had their effect
        os.environ.pop(name, None)
    if not kernel.load_locale(os.environ["LANG"]):
        os.environ["LANG"] = "C"
    for name in [name for name in sys.modules if name.startswith("rlef_sandbox")]:
        del sys.modules[name]  # a program must not find these modules
    layers = zygote.confine(namespaces, library_files(paths))
    zygote.warm_up()
    gc.collect()
    kernel.LIBC.malloc_trim(0)
    gc.freeze()
    gc.disable()
    os.write(channel, json.dumps(layers).encode())
    package.child = zygote.serve()
    package.child.kept = zygote, layers, namespaces
