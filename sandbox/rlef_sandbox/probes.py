"""Checks, when a zygote starts, of the layers that only its children apply: a child tries what each
layer must refuse.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import socket
from collections.abc import Callable

from .launch_plan import RESERVED_BYTES, Bounds, LaunchPlan
from .protocol import Task, ZygoteRequest
from .seccomp import Filter

PROBE_LIMITS = ZygoteRequest(
    Task.RUN, 1.0, 1.0, memory_bytes=64 << 20, output_bytes=1 << 10, processes=1
)


def holds_in_a_child(probe: Callable[[], bool]) -> bool:
    """Return whether the probe succeeds in a plain fork of this process."""
    return _succeeds_in(os.fork(), probe)


def _succeeds_in(pid: int, probe: Callable[[], bool]) -> bool:
    """Run the probe in the child, which sees 0 as `pid`. Returns, in the parent, its success."""
    if pid == 0:
        held = False
        try:
            held = probe()
        finally:
            os._exit(0 if held else 1)
    return os.waitpid(pid, 0)[1] == 0


def probe_child_layers(
    fork_confined: Callable[[LaunchPlan, list[int]], int],
    call_filter: Filter | None,
    bounds: Bounds,
) -> dict[str, bool]:
    """Start children as for a run, which try what each layer must refuse. Returns which hold."""

    def holds(probe: Callable[[], bool], bounds: Bounds, call_filter: Filter | None) -> bool:
        files = [os.dup(descriptor) for descriptor in range(3)]
        plan = bounds.plan(PROBE_LIMITS, len(files), call_filter)
        held = _succeeds_in(fork_confined(plan, files), probe)
        for descriptor in files:
            os.close(descriptor)
        return held

    return {
        "rlimits": holds(lambda: _limits_hold(bounds.base_bytes), bounds, None),
        "seccomp": call_filter is not None and holds(_filter_holds, bounds, call_filter),
        "threads": holds(_threads_are_counted, bounds._replace(own_user_namespace=True), None),
    }


def _limits_hold(base_bytes: int) -> bool:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails instead
    output = os.memfd_create("probe")
    beyond_bytes = base_bytes + PROBE_LIMITS.memory_bytes + RESERVED_BYTES
    past_end = PROBE_LIMITS.output_bytes + 1
    return refused(errno.ENOMEM, mmap.mmap, -1, beyond_bytes) and refused(
        errno.EFBIG, os.pwrite, output, b"x", past_end
    )


def _threads_are_counted() -> bool:
    return refused(errno.EAGAIN, os.fork)


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
