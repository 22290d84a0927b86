"""Calls that the standard library lacks. All but `fork` and `load_locale` raise OSError."""

from __future__ import annotations

import ctypes
import os
import platform

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long

MACHINE = platform.machine()

DIE_WITH_PARENT = tuple(map(ctypes.c_ulong, (1, 9, 0, 0, 0)))  # PR_SET_PDEATHSIG, SIGKILL
PR_SET_DUMPABLE = 4
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

LC_ALL_MASK = 0x1FBF

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND = 1, 2, 4, 32, 4096
MS_REC, MS_PRIVATE = 16384, 1 << 18
MNT_DETACH = 2

# Since Linux 5.1, a new system call has the same number on every architecture.
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
SYS_CLOSE_RANGE = 436
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}

# The C library's fork with the GIL held, without Python's at-fork handlers (they cost more than
# the fork). Returns -1 if it fails. Safe only in a process with one thread.
fork = ctypes.PyDLL(None).fork


def checked(result: int, what: str) -> int:
    """Return `result`. Raises OSError with errno if it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(what: str, number: int, *arguments: object) -> int:
    return checked(LIBC.syscall(ctypes.c_long(number), *arguments), what)


def prctl(option: int, value: int = 0) -> int:
    word = ctypes.c_ulong
    return checked(
        LIBC.prctl(option, word(value), word(0), word(0), word(0)), f"prctl({option}, {value})"
    )


def load_locale(name: str) -> bool:
    """Load a locale's files and keep them; they may be out of reach later. Returns False if there
    are none.
    """
    LIBC.newlocale.restype = ctypes.c_void_p
    return LIBC.newlocale(LC_ALL_MASK, name.encode(), None) is not None


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies."""
    checked(LIBC.prctl(*DIE_WITH_PARENT), "prctl(PR_SET_PDEATHSIG)")


def unshare(flags: int) -> None:
    checked(LIBC.unshare(flags), f"unshare({flags:#x})")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    checked(
        LIBC.mount(
            source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
        ),
        f"mount {source} on {target}",
    )


def pivot_root(new_root: str, put_old: str) -> None:
    number = SYS_PIVOT_ROOT[MACHINE]
    syscall("pivot_root", number, new_root.encode(), put_old.encode())


def unmount(target: str) -> None:
    checked(LIBC.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def close_from(first: int) -> None:
    syscall("close_range", SYS_CLOSE_RANGE, first, 0xFFFFFFFF, 0)


def drop_capabilities() -> None:
    """Drop every capability, effective, permitted and inheritable."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    none = (ctypes.c_uint32 * 6)()
    checked(LIBC.capset(ctypes.byref(header), ctypes.byref(none)), "capset")
