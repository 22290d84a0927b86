"""Proof by effect, at a zygote's start, of the layers that only children put on."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import socket
from collections.abc import Callable

from . import kernel
from .confinement import RESERVED_BYTES, set_limits
from .protocol import Request, Task
from .seccomp import Filter

PROBE_LIMITS = Request(Task.RUN, 1.0, 1.0, memory_bytes=64 << 20, output_bytes=1 << 10, processes=4)


def probe_child_layers(call_filter: Filter | None, base_bytes: int) -> dict[str, bool]:
    """Fork a child as for a run and let it try what each layer must refuse."""
    probes = {
        "rlimits": lambda: _limits_hold(base_bytes),
        "seccomp": lambda: call_filter is not None and _filter_holds(call_filter),
    }
    return {name: _holds_in_a_child(probe) for name, probe in probes.items()}


def _holds_in_a_child(probe: Callable[[], bool]) -> bool:
    pid = kernel.checked(kernel.fork(), "fork")
    if pid == 0:
        held = False
        try:
            held = probe()
        finally:
            os._exit(0 if held else 1)
    return os.waitpid(pid, 0)[1] == 0


def _limits_hold(base_bytes: int) -> bool:
    set_limits(PROBE_LIMITS, base_bytes, own_user_namespace=False)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # answer with an error instead
    output = os.memfd_create("probe")
    beyond_bytes = base_bytes + PROBE_LIMITS.memory_bytes + RESERVED_BYTES
    past_end = PROBE_LIMITS.output_bytes + 1
    return _refused(errno.ENOMEM, mmap.mmap, -1, beyond_bytes) and _refused(
        errno.EFBIG, os.pwrite, output, b"x", past_end
    )


def _filter_holds(call_filter: Filter) -> bool:
    call_filter.install(os.getpid())
    return all(
        (
            _refused(errno.EPERM, socket.socket),
            _refused(errno.EPERM, os.fork),
            _refused(errno.EPERM, os.execv, "/", ["/"]),
            _refused(errno.EPERM, os.kill, os.getppid() or 1, 0),
            _refused(errno.EACCES, os.open, "/probe", os.O_WRONLY | os.O_CREAT),
            _refused(errno.EACCES, os.unlink, "/probe"),
        )
    )


def _refused(number: int, call: Callable[..., object], *arguments: object) -> bool:
    try:
        call(*arguments)
    except OSError as error:
        return error.errno == number
    return False
