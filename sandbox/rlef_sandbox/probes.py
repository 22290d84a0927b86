"""Test, when a zygote starts, the layers that only its children apply: a child tries what each
layer must refuse.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import socket
from collections.abc import Callable

from . import kernel
from .launch_plan import RESERVED_BYTES, Bounds
from .protocol import Task, ZygoteRequest
from .seccomp import Filter
from .supervisor_native import NativeSupervisor
from .supervisor_python import PythonSupervisor

FIRST_ID = 2  # of a program in a pid namespace of its own; process 1 waits for it (csrc/spawn.c)
Supervisor = NativeSupervisor | PythonSupervisor
PROBE_LIMITS = ZygoteRequest(
    Task.RUN, 1.0, 1.0, memory_bytes=64 << 20, output_bytes=1 << 10, processes=1
)


def holds_in_a_child(probe: Callable[[], bool]) -> bool:
    """Return whether the probe succeeds in a plain fork of this process."""
    return _succeeds_in(os.fork(), probe, lambda pid: os.waitpid(pid, 0)[1])


def _succeeds_in(pid: int, probe: Callable[[], bool], wait: Callable[[int], int]) -> bool:
    """Run the probe in the child, where `pid` is 0. Returns in the parent whether it succeeded."""
    if pid == 0:
        held = False
        try:
            held = probe()
        finally:
            os._exit(0 if held else 1)
    return wait(pid) == 0


def probe_child_layers(
    supervisor: Supervisor, call_filter: Filter | None, bounds: Bounds
) -> dict[str, bool]:
    """Start children as for a run, which try what each layer must refuse. Returns the layers that
    hold. `bounds` has the namespaces of a run.
    """

    def holds(probe: Callable[[], bool], bounds: Bounds, call_filter: Filter | None) -> bool:
        files = [os.dup(descriptor) for descriptor in range(3)]
        plan = bounds.plan(PROBE_LIMITS, len(files), call_filter)
        try:
            return _succeeds_in(supervisor.fork_confined(plan, files), probe, supervisor.wait)
        except OSError:  # no namespaces
            return False
        finally:
            for descriptor in files:
                os.close(descriptor)

    without = bounds._replace(namespaces=0)
    user = bounds._replace(namespaces=bounds.namespaces & kernel.CLONE_NEWUSER)
    return {
        "rlimits": holds(lambda: _limits_hold(bounds.base_bytes), without, None),
        "seccomp": call_filter is not None and holds(_filter_holds, without, call_filter),
        # twice, since the second child must not know that there was a first
        "process_ids": all(holds(lambda: os.getpid() == FIRST_ID, bounds, None) for _ in range(2)),
        "threads": holds(lambda: refused(errno.EAGAIN, os.fork), user, None),
    }


def _limits_hold(base_bytes: int) -> bool:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails instead
    output = os.memfd_create("probe")
    beyond_bytes = base_bytes + PROBE_LIMITS.memory_bytes + RESERVED_BYTES
    past_end = PROBE_LIMITS.output_bytes + 1
    return refused(errno.ENOMEM, mmap.mmap, -1, beyond_bytes) and refused(
        errno.EFBIG, os.pwrite, output, b"x", past_end
    )


def _filter_holds() -> bool:
    return all(
        (
            refused(errno.EPERM, socket.socket),
            refused(errno.EPERM, os.fork),
            refused(errno.EPERM, os.execv, "/", ["/"]),
            refused(errno.EPERM, os.kill, os.getppid() or 1, 0),
            refused(errno.EACCES, os.open, "/probe", os.O_WRONLY | os.O_CREAT),
            refused(errno.EACCES, os.unlink, "/probe"),
        )
    )


def refused(number: int, call: Callable[..., object], *arguments: object) -> bool:
    """Return whether the call fails with this errno."""
    try:
        result = call(*arguments)
    except OSError as error:
        return error.errno == number
    if call is os.fork and result == 0:
        os._exit(0)
    return False
