"""How a supervisor starts a child: its limits, the files it gets, its filter."""

from __future__ import annotations

import ctypes
import math
import resource
from typing import NamedTuple

from .protocol import MAX_DESCRIPTORS, Task, ZygoteRequest
from .seccomp import Filter

UNLIMITED = 2**64 - 1  # RLIM_INFINITY as the kernel writes it; Python writes -1
# Address space beyond the memory limit, for what is mapped and not touched: programs reserve
# thread stacks of 128 to 512 MiB. Resident memory is judged by the limit itself.
RESERVED_BYTES = 512 << 20
EXECUTABLE_RESERVED_BYTES = 256 << 20  # compiled: thread stacks of 2 MiB, and no interpreter
OPEN_FILES = 64
# Queued real-time signals, which are counted for each user; as in csrc/spawn.c.
PENDING_SIGNALS = 64
# The main thread's stack in a compiled program. If it is unlimited, the address space bounds it,
# and glibc gives the other threads 2 MiB each; otherwise each gets as much as the main thread.
MAX_STACK_BYTES = resource.getrlimit(resource.RLIMIT_STACK)[1] & UNLIMITED


class LaunchPlan(ctypes.Structure):
    """`struct plan` of csrc/zygote.h, which the Python supervisor reads too."""

    _fields_ = [
        ("address_space_bytes", ctypes.c_uint64),
        ("cpu_s", ctypes.c_uint64),
        ("file_bytes", ctypes.c_uint64),
        ("open_files", ctypes.c_uint64),
        ("threads", ctypes.c_uint64),
        ("stack_bytes", ctypes.c_uint64),
        ("files", ctypes.c_int32 * MAX_DESCRIPTORS),
        ("file_count", ctypes.c_int32),
        ("executable", ctypes.c_int32),
        ("namespaces", ctypes.c_int32),
        ("own_pid_count", ctypes.c_int32),
        ("filter", ctypes.c_void_p),
        ("own_pids", ctypes.c_void_p),
        ("progress", ctypes.c_void_p),
    ]
    call_filter: Filter | None = None  # the object behind `filter` and `own_pids`


class Bounds(NamedTuple):
    """What the limits of a child depend on, apart from its request."""

    base_bytes: int  # the address space that the zygote has mapped already
    # of each run: CLONE_NEWUSER, where RLIMIT_NPROC counts its threads, and CLONE_NEWPID; or 0
    namespaces: int

    def plan(
        self, request: ZygoteRequest, file_count: int, call_filter: Filter | None
    ) -> LaunchPlan:
        """Return the plan for a child that does what `request` asks and gets `file_count` files.
        `call_filter` is None on a machine for which there is none."""
        executes = request.task is Task.EXECUTE
        own_bytes = EXECUTABLE_RESERVED_BYTES if executes else self.base_bytes + RESERVED_BYTES
        plan = LaunchPlan(
            address_space_bytes=own_bytes + request.memory_bytes,
            # A backstop: the supervisor enforces the exact limit.
            cpu_s=math.ceil(request.cpu_s) + 1,
            # One byte more than allowed, to distinguish a full output from an overflowing one.
            file_bytes=request.output_bytes + 1,
            open_files=OPEN_FILES,
            threads=request.processes if self.namespaces else 0,
            stack_bytes=MAX_STACK_BYTES if executes else 0,
            file_count=file_count,
            executable=file_count - 1 if executes else -1,
            namespaces=self.namespaces,
        )
        if call_filter is not None:
            plan.call_filter = call_filter
            plan.filter, plan.own_pids = call_filter.address, call_filter.own_pids_address
            plan.own_pid_count = call_filter.own_pid_count
        return plan
