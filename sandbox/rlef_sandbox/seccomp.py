"""The system call policy compiled to a seccomp-BPF filter, once per zygote, and its installation.

The filter checks the architecture (and on x86-64 refuses the x32 numbers). Then it finds the call
by binary search over runs of numbers with the same action, which takes about ten instructions. For
some calls it checks arguments; it cannot check what a pointer points to.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Mapping

from . import kernel
from .syscalls import Action, Profile, policy

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant

LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
AND = 0x54  # the accumulator and the constant
JUMP = 0x05  # always, by the constant
REACH = 200  # how far a conditional jump goes; 255 is the most
# Offsets into struct seccomp_data. Arguments are 64 bits, little-endian. For an `int` the kernel
# reads the low word, and so does the filter; a pointer is both words.
NUMBER, ARCHITECTURE = 0, 4
LOW = [16 + 8 * index for index in range(6)]
HIGH = [20 + 8 * index for index in range(6)]

AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT = 0x40000000
SIGN_BIT = 0x80000000

ALLOWED = (RETURN, 0, 0, 0x7FFF0000)
KILLED = (RETURN, 0, 0, 0x80000000)

WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000  # WRONLY RDWR CREAT TRUNC TMPFILE
CLONE_FILES, CLONE_THREAD = 0x00000400, 0x00010000
CLOSE_RANGE_CLOEXEC = 4
# MAP_SHARED, whose bit MAP_SHARED_VALIDATE has too; MAP_ANONYMOUS; MAP_LOCKED MAP_HUGETLB
MAP_SHARED, MAP_ANONYMOUS, MAP_UNCOUNTED = 0x01, 0x20, 0x42000
# NORMAL RANDOM SEQUENTIAL WILLNEED DONTNEED FREE DONTFORK DOFORK HUGEPAGE NOHUGEPAGE DONTDUMP
# DODUMP WIPEONFORK KEEPONFORK POPULATE_READ POPULATE_WRITE; not MERGEABLE PAGEOUT GUARD_INSTALL
ADVICE = (0, 1, 2, 3, 4, 8, 10, 11, 14, 15, 16, 17, 18, 19, 22, 23)
# VM FS FILES SIGHAND THREAD SYSVSEM SETTLS PARENT_SETTID CHILD_CLEARTID DETACHED, the flags with
# which C libraries make threads: no namespace, pidfd, parent, trace, vfork or exit signal
THREAD_FLAGS = 0x007D0F00
O_DIRECT = {"x86_64": 0o40000, "aarch64": 0o200000}  # past the page cache, so from the disk
F_SETFL = 4
# F_DUPFD F_GETFD F_SETFD F_GETFL F_DUPFD_CLOEXEC F_GETPIPE_SZ F_GET_SEALS
FCNTL_COMMANDS = (0, 1, 2, 3, 1030, 1032, 1034)
# TCGETS FIONREAD FIONBIO FIONCLEX FIOCLEX
IOCTL_REQUESTS = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)
PRCTL_OPTIONS = (15, 16, 0x53564D41)  # PR_SET_NAME PR_GET_NAME PR_SET_VMA
# RLIMIT_CPU and RLIMIT_RTTIME: their hard limits send SIGKILL, which counts as the machine's fault.
# RLIMIT_CORE: 1 stops a core_pattern that is a pipe, 0 does not (core(5)).
KEPT_LIMITS = (0, 4, 15)
FUTEX_COMMAND = 0x7F  # the rest are flags
# WAIT WAKE REQUEUE CMP_REQUEUE WAKE_OP WAIT_BITSET WAKE_BITSET; no priority inheritance
FUTEX_COMMANDS = (0, 1, 3, 4, 5, 9, 10)
SIGKILL = 9
AF_UNIX, SOCK_STREAM, SOCKET_FLAGS = 1, 1, 0o2004000  # SOCK_CLOEXEC SOCK_NONBLOCK
AT_EMPTY_PATH = 0x1000
ARCH_SET_FS, ARCH_GET_FS = 0x1002, 0x1003
NAMESPACE_FLAGS = 0x7E020080  # every CLONE_NEW* flag
OWN_PID = 0xFEEDBEEF  # stands for the child's pid until the child is forked


def refused(number: int) -> Instruction:
    return (RETURN, 0, 0, 0x00050000 | number)


def one_of(offset: int, accepted: tuple[int, ...], otherwise: Instruction) -> list[Instruction]:
    """Allow a call whose argument at `offset` is one of `accepted`."""
    tests = [(JUMP_EQUAL, len(accepted) - index, 0, value) for index, value in enumerate(accepted)]
    return [(LOAD, 0, 0, offset), *tests, otherwise, ALLOWED]


def without_bits(offset: int, bits: int, otherwise: Instruction) -> list[Instruction]:
    """Allow a call whose argument at `offset` has none of `bits`."""
    return [(LOAD, 0, 0, offset), (JUMP_ANY_BIT, 0, 1, bits), otherwise, ALLOWED]


def none_of(offset: int, excepted: tuple[int, ...]) -> list[Instruction]:
    """Allow a call whose argument at `offset` is none of `excepted`. For any other call, go on with
    the instructions that follow these."""
    return one_of(offset, excepted, ALLOWED)[:-1]


def if_null(argument: int, otherwise: Instruction) -> list[Instruction]:
    """Allow a call whose argument of this index is a null pointer."""
    low = [(LOAD, 0, 0, LOW[argument]), (JUMP_EQUAL, 0, 2, 0)]
    return [*low, (LOAD, 0, 0, HIGH[argument]), (JUMP_EQUAL, 1, 0, 0), otherwise, ALLOWED]


def decisions(number: int, action: Action, machine: str) -> list[Instruction]:
    """Return the instructions that end the filter for one call."""
    denied = refused(errno.EPERM)
    if action is Action.OPEN:
        flags = LOW[1] if (machine, number) == ("x86_64", 2) else LOW[2]  # open or openat
        return without_bits(flags, WRITING | O_DIRECT[machine], refused(errno.EACCES))
    if action is Action.FCNTL:
        set_flags = [(JUMP_EQUAL, 0, 4, F_SETFL), *without_bits(LOW[2], O_DIRECT[machine], denied)]
        return [(LOAD, 0, 0, LOW[1]), *set_flags, *one_of(LOW[1], FCNTL_COMMANDS, denied)]
    if action is Action.CLONE:
        thread_only = without_bits(LOW[0], ~THREAD_FLAGS & 0xFFFFFFFF, denied)
        files = [(JUMP_ANY_BIT, 1, 0, CLONE_FILES), denied]
        thread = [(LOAD, 0, 0, LOW[0]), (JUMP_ANY_BIT, 1, 0, CLONE_THREAD), denied]
        return [*thread, *files, *thread_only]
    if action is Action.MMAP:
        counted = [(LOAD, 0, 0, LOW[3]), (JUMP_ANY_BIT, 0, 1, MAP_UNCOUNTED), denied]
        shared = [(JUMP_ANY_BIT, 1, 0, MAP_ANONYMOUS), ALLOWED, (JUMP_ANY_BIT, 0, 1, MAP_SHARED)]
        return [*counted, *shared, denied, ALLOWED]
    if action is Action.SIGNAL_SELF:
        kill = {"x86_64": 62, "aarch64": 129}[machine]
        signal_at = LOW[1] if number == kill else LOW[2]
        own = [(LOAD, 0, 0, LOW[0]), (JUMP_EQUAL, 1, 0, OWN_PID), denied]
        return [*own, (LOAD, 0, 0, signal_at), (JUMP_EQUAL, 0, 1, SIGKILL), denied, ALLOWED]
    if action is Action.ABOUT_SELF:
        priority = {"x86_64": 140, "aarch64": 141}[machine]  # getpriority(which, who)
        return one_of(LOW[1 if number == priority else 0], (0, OWN_PID), denied)
    if action is Action.FUTEX:
        load, *rest = one_of(LOW[1], FUTEX_COMMANDS, refused(errno.ENOSYS))
        return [load, (AND, 0, 0, FUTEX_COMMAND), *rest]
    if action is Action.PRLIMIT:
        own = [(LOAD, 0, 0, LOW[0]), (JUMP_EQUAL, 1, 0, 0), denied]
        return [*own, *none_of(LOW[1], KEPT_LIMITS), *if_null(2, denied)]
    if action is Action.SOCKET_PAIR:
        local = [(LOAD, 0, 0, LOW[0]), (JUMP_EQUAL, 1, 0, AF_UNIX), denied]
        load, *rest = one_of(LOW[1], (SOCK_STREAM,), denied)
        return [*local, load, (AND, 0, 0, ~SOCKET_FLAGS & 0xFFFFFFFF), *rest]
    if action is Action.TO_PEER:
        return [(LOAD, 0, 0, LOW[3]), (JUMP_EQUAL, 1, 0, 0), denied, *if_null(4, denied)]
    return {
        Action.ALLOW: [ALLOWED],
        Action.NOTHING: [refused(0)],
        Action.DENY: [denied],
        Action.READ_ONLY: [refused(errno.EACCES)],
        Action.ABSENT: [refused(errno.ENOSYS)],
        Action.KILL: [KILLED],
        Action.CLOSE_RANGE: one_of(LOW[2], (0, CLOSE_RANGE_CLOEXEC), denied),
        Action.MADVISE: one_of(LOW[2], ADVICE, refused(errno.EINVAL)),
        Action.IOCTL: one_of(LOW[1], IOCTL_REQUESTS, refused(errno.ENOTTY)),
        Action.SETRLIMIT: [*none_of(LOW[0], KEPT_LIMITS), denied],
        Action.PRCTL: one_of(LOW[0], PRCTL_OPTIONS, denied),
        Action.PROCESS: without_bits(LOW[0], NAMESPACE_FLAGS, denied),
        Action.CLOCK: without_bits(LOW[0], SIGN_BIT, refused(errno.EINVAL)),
        Action.EXECUTE_GIVEN: one_of(LOW[4], (AT_EMPTY_PATH,), denied),
        Action.THREAD_POINTER: one_of(LOW[0], (ARCH_SET_FS, ARCH_GET_FS), refused(errno.EINVAL)),
    }[action]


def assemble(actions: Mapping[int, Action], machine: str) -> list[Instruction]:
    """Return the whole filter. Calls that are not in `actions` get ENOSYS."""
    absent = decisions(0, Action.ABSENT, machine)
    runs: list[tuple[int, list[Instruction]]] = [(0, absent)]
    for number in sorted(actions):
        block = decisions(number, actions[number], machine)
        if runs[-1][0] == number:
            runs.pop()
        if not runs or runs[-1][1] != block:
            runs.append((number, block))
        if number + 1 not in actions:
            runs.append((number + 1, absent))
    search = _search(runs)
    not_x32 = [(JUMP_AT_LEAST, 0, 1, X32_BIT), KILLED] if machine == "x86_64" else []
    return [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, AUDIT_ARCHITECTURE[machine]),
        KILLED,
        (LOAD, 0, 0, NUMBER),
        *not_x32,
        *search,
    ]


def _search(runs: list[tuple[int, list[Instruction]]]) -> list[Instruction]:
    """Return a binary search for the run with the number in the accumulator."""
    backwards: list[Instruction] = []  # the last one first
    starts: dict[tuple[Instruction, ...], int] = {}  # of blocks, as lengths of `backwards`

    def placed(runs: list[tuple[int, list[Instruction]]]) -> int:
        """Add the search, unless it is a block near enough to share. Returns its start."""
        if len(runs) == 1:
            block = tuple(runs[0][1])
            if len(backwards) - starts.get(block, -REACH) >= REACH:
                backwards.extend(reversed(block))
                starts[block] = len(backwards)
            return starts[block]
        middle = len(runs) // 2
        targets = [placed(runs[middle:]), placed(runs[:middle])]
        for index, start in enumerate(targets):
            if len(backwards) - start > REACH:
                backwards.append((JUMP, 0, 0, len(backwards) - start))
                targets[index] = len(backwards)
        above, below = (len(backwards) - start for start in targets)
        backwards.append((JUMP_AT_LEAST, above, below, runs[middle][0]))
        return len(backwards)

    placed(runs)
    return backwards[::-1]


class SockFprog(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


class Filter:
    """An assembled filter in memory, ready for one system call to install it."""

    def __init__(self, profile: Profile = Profile.PROGRAM) -> None:
        """Raise ValueError on a machine without a system call table."""
        instructions = assemble(policy(kernel.MACHINE, profile), kernel.MACHINE)
        code = b"".join(struct.pack("<HBBI", *instruction) for instruction in instructions)
        self._code = ctypes.create_string_buffer(code, len(code))
        self._program = SockFprog(len(instructions), ctypes.addressof(self._code))
        self._own_pids = [
            ctypes.c_uint32.from_buffer(self._code, 8 * index + 4)
            for index, step in enumerate(instructions)
            if step[3] == OWN_PID
        ]
        # the same for spawn.c, as addresses
        self.own_pid_count = len(self._own_pids)
        self._pointers = (ctypes.c_void_p * self.own_pid_count)(
            *map(ctypes.addressof, self._own_pids)
        )
        self.own_pids_address = ctypes.addressof(self._pointers)
        self.address = ctypes.addressof(self._program)
        # SECCOMP_SET_MODE_FILTER, no flags. Converted once: a child copies every page it touches.
        number = kernel.SYS_SECCOMP[kernel.MACHINE]
        self._arguments = (ctypes.c_long(number), 1, 0, ctypes.byref(self._program))

    def install(self, pid: int) -> None:
        """Install the filter in this process, whose id is `pid`; nothing can remove it."""
        for own_pid in self._own_pids:
            own_pid.value = pid
        kernel.checked(kernel.LIBC.syscall(*self._arguments), "seccomp")


def filter_for_this_machine(profile: Profile) -> Filter | None:
    """Return a profile's filter, or None on a machine for which there is no system call table."""
    try:
        return Filter(profile)
    except ValueError:
        return None
