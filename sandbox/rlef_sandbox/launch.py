"""How a zygote starts a confined child: by `csrc/spawn.c`, or by the same steps in Python.

The C library makes a run of a Python program about a third cheaper and is what runs compiled
programs; `native.py` builds it where there is a C compiler. Either way `spawn` returns twice: in
the zygote with the child's id and pidfd, and in a child that is to go on as a Python program with
id 0, by which time the run's files are descriptors 0, 1, 2 ..., everything else is closed, the
limits hold and the system call filter is on.
"""

from __future__ import annotations

import ctypes
import enum
import mmap
import os
import resource
import struct
from typing import NamedTuple

from . import kernel
from .protocol import Phase
from .seccomp import Filter

RESERVED_DESCRIPTORS = 8  # MAX_FILES in spawn.c; kept occupied in the zygote
CELL = struct.Struct("=BBxxi")  # struct progress in spawn.c
UNLIMITED = 2**64 - 1  # RLIM_INFINITY as the kernel has it; Python says -1


class Step(enum.IntEnum):
    """What a child was at when it failed (`enum step` in spawn.c)."""

    NONE = 0
    PARENT = 1
    NAMESPACE = 2
    LIMITS = 3
    FILES = 4
    FILTER = 5
    EXEC = 6


class Progress:
    """A page shared with children, a cell for each, in which they tell their phase in trust."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        self._free = list(range(mmap.PAGESIZE // CELL.size))

    def take(self) -> int:
        cell = self._free.pop()
        self._page[cell * CELL.size : (cell + 1) * CELL.size] = bytes(CELL.size)
        return cell

    def give_back(self, cell: int) -> None:
        self._free.append(cell)

    def tell(self, cell: int, phase: Phase) -> None:
        self._page[cell * CELL.size] = phase

    def fail(self, cell: int, step: Step, number: int) -> None:
        CELL.pack_into(self._page, cell * CELL.size, Phase.SETUP, step, number)

    def phase(self, cell: int) -> Phase:
        return Phase(self._page[cell * CELL.size])

    def fault(self, cell: int) -> str:
        """What failed before the program began; empty if nothing did."""
        _, step, number = CELL.unpack_from(self._page, cell * CELL.size)
        return f"child set-up: {Step(step).name}: {os.strerror(number)}" if step else ""

    def leave_trust(self, cell: int) -> None:
        """In a child, the last step before the program's first line, or a program server's first
        test: after it, nobody hears what it says.
        """
        self._page[cell * CELL.size] = Phase.RUNNING
        self._page.close()


class Plan(NamedTuple):
    """What a child is held to, and what it becomes."""

    address_space_bytes: int
    cpu_s: int
    file_bytes: int
    open_files: int
    threads: int  # 0: not bounded
    own_user_namespace: bool
    filter: Filter | None
    executable: int = -1  # the file among its own to become
    stack_bytes: int = 0  # 0: as it is


class PythonLauncher:
    """Starts children without the C library; Python programs only."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def prepared(self, plan: Plan) -> Plan:
        return plan

    def spawn(self, plan: Plan, files: list[int], cell: int) -> tuple[int, int]:
        """`files` become descriptors 0, 1, ...; the child tells its progress in `cell`."""
        parent = os.getpid()
        pid = kernel.checked(kernel.fork(), "fork")
        if pid:
            return pid, os.pidfd_open(pid)
        step = Step.NAMESPACE
        try:
            if plan.own_user_namespace:
                kernel.unshare(kernel.CLONE_NEWUSER)
                kernel.drop_capabilities()
            step = Step.PARENT
            kernel.die_with_parent()
            if os.getppid() != parent:
                os._exit(1)
            os.setsid()  # its threads share one process's part of the machine
            step = Step.LIMITS
            set_limits(plan)
            step = Step.FILES
            for target, descriptor in enumerate(files):
                os.dup2(descriptor, target)
            kernel.close_from(len(files))
            step = Step.FILTER
            if plan.filter is not None:
                plan.filter.install(os.getpid())
        except OSError as error:
            self.progress.fail(cell, step, error.errno or 0)
            os._exit(1)
        return 0, -1


def set_limits(plan: Plan) -> None:
    """Bound this process."""
    hard_cpu_s = plan.cpu_s + 1 if plan.cpu_s < UNLIMITED else plan.cpu_s
    bounds = [
        (resource.RLIMIT_AS, plan.address_space_bytes, plan.address_space_bytes),
        (resource.RLIMIT_CPU, plan.cpu_s, hard_cpu_s),
        (resource.RLIMIT_FSIZE, plan.file_bytes, plan.file_bytes),
        (resource.RLIMIT_NOFILE, plan.open_files, plan.open_files),
    ]
    if plan.threads:
        bounds.append((resource.RLIMIT_NPROC, plan.threads, plan.threads))
    for kind, soft, hard in bounds:
        resource.setrlimit(kind, (_as_python_has_it(soft), _as_python_has_it(hard)))


def _as_python_has_it(bound: int) -> int:
    return resource.RLIM_INFINITY if bound == UNLIMITED else bound


class NativePlan(ctypes.Structure):
    """struct plan in spawn.c."""

    _fields_ = [
        ("address_space_bytes", ctypes.c_uint64),
        ("cpu_s", ctypes.c_uint64),
        ("file_bytes", ctypes.c_uint64),
        ("open_files", ctypes.c_uint64),
        ("threads", ctypes.c_uint64),
        ("stack_bytes", ctypes.c_uint64),
        ("files", ctypes.c_int32 * RESERVED_DESCRIPTORS),
        ("file_count", ctypes.c_int32),
        ("executable", ctypes.c_int32),
        ("own_user_namespace", ctypes.c_int32),
        ("own_pid_count", ctypes.c_int32),
        ("filter", ctypes.c_void_p),
        ("own_pids", ctypes.c_void_p),
        ("progress", ctypes.c_void_p),
    ]


class NativeLauncher:
    """Starts children by the C library."""

    def __init__(self, functions: ctypes.PyDLL, progress: Progress) -> None:
        self._spawn = functions.rlef_spawn
        self._pidfd = ctypes.c_int(-1)
        self._pidfd_reference = ctypes.byref(self._pidfd)
        self.progress = progress

    def prepared(self, plan: Plan) -> NativePlan:
        """The plan as C has it, to be used again and again: what is done in Python between two
        runs costs the zygote a page fault for every page it touches.
        """
        native = NativePlan()
        native.address_space_bytes = plan.address_space_bytes
        native.cpu_s = plan.cpu_s
        native.file_bytes = plan.file_bytes
        native.open_files = plan.open_files
        native.threads = plan.threads
        native.stack_bytes = plan.stack_bytes
        native.executable = plan.executable
        native.own_user_namespace = plan.own_user_namespace
        native.filter = plan.filter.address if plan.filter else None
        native.own_pids = plan.filter.own_pids_address if plan.filter else None
        native.own_pid_count = plan.filter.own_pid_count if plan.filter else 0
        return native

    def spawn(self, plan: NativePlan, files: list[int], cell: int) -> tuple[int, int]:
        plan.files[: len(files)] = files
        plan.file_count = len(files)
        plan.progress = self.progress.address + cell * CELL.size
        pid = self._spawn(ctypes.byref(plan), self._pidfd_reference)
        if pid < 0:
            kernel.checked(pid, "spawn")
        return pid, self._pidfd.value
