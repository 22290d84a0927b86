"""The isolation layers of a zygote, which its children inherit.

Theory of operation. The zygote starts in a pid namespace (`reaper.py`). It enters, in this order,
the other namespaces (which let it arrange mounts) and the private root, becomes an unprivileged
user, drops all capabilities, and sets no_new_privs and Landlock. A forked child inherits all of
these at no cost. It starts in a user namespace, in which its threads are counted, and in a pid
namespace. It then sets the limits of its run and, last, installs the system call filter
(`csrc/spawn.c`). A layer is reported only after a probe has shown its effect. A layer that this
machine lacks is left out of the report, and the controller decides whether the others are enough.
The layers of children are probed in children (`probes.py`).
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import kernel, landlock, private_root

UNPRIVILEGED_ID = 65534  # nobody, on every distribution
HOST_FILE = "/etc/passwd"  # must be out of reach
TIME_ZONES = "/usr/share/zoneinfo"  # public, and not in Python's library
HOST_NAME = "sandbox"  # the same on every machine

NAMESPACES = {
    "mount": kernel.CLONE_NEWNS,
    "net": kernel.CLONE_NEWNET,
    "ipc": kernel.CLONE_NEWIPC,
    "uts": kernel.CLONE_NEWUTS,
}


def library_directories() -> list[str]:
    """Return the directories of the standard library, without those that lie within another."""
    paths = sorted({os.path.realpath(path) for path in sys.path if os.path.isdir(path)})
    return [p for p in paths if not any(p.startswith(other + "/") for other in paths)]


class VisibleFiles(NamedTuple):
    """The part of the file system that a zygote and its children see."""

    directories: list[str]
    restrict: Callable[[], None]  # by Landlock
    packages: Sequence[str] = ()  # shown in addition, though third-party packages are hidden
    scratch: str = ""  # a directory that they may write to


def library_files(packages: list[str]) -> VisibleFiles:
    """Return the standard library and the time zones, read-only, with no other third-party packages
    than these.
    """
    directories = library_directories()
    packages = [*packages, *filter(os.path.isdir, [TIME_ZONES])]
    return VisibleFiles(directories, lambda: _restrict_to_library(directories, packages), packages)


def confine_zygote(namespaces: list[str], files: VisibleFiles) -> dict[str, object]:
    """Apply every layer that this machine supports, in addition to `namespaces`, which this process
    is in already. Returns the layers that proved effective.
    """
    for name, flag in NAMESPACES.items():
        if succeeds(kernel.unshare, flag):
            namespaces.append(name)
    if "uts" in namespaces:
        socket.sethostname(HOST_NAME)
    if "net" in namespaces and socket.if_nameindex() != [(1, "lo")]:
        namespaces.remove("net")
    effective = []
    process = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    has_landlock = landlock.abi() > 0
    if "mount" in namespaces and succeeds(
        private_root.enter, files.directories, files.packages, files.scratch
    ):
        effective += ["private_root"] * _fails_with(FileNotFoundError, HOST_FILE)
    elif not has_landlock and not files.scratch and succeeds(private_root.enter_nothing):
        effective += ["empty_root"] * _fails_with(FileNotFoundError, HOST_FILE)
    unprivileged = _become_unprivileged(namespaces, process)
    os.close(process)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if has_landlock and succeeds(files.restrict):
        effective += [f"landlock_abi_{landlock.abi()}"] * _fails_with(PermissionError, "/")
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.die_with_parent()  # again: the change of user undid it
    return {
        "namespaces": namespaces,
        "files": effective,
        "unprivileged_user": unprivileged,
        "no_new_privs": kernel.prctl(kernel.PR_GET_NO_NEW_PRIVS) == 1,
    }


def succeeds(step: Callable[..., None], *arguments: object) -> bool:
    """Return whether `step` raises no OSError."""
    try:
        step(*arguments)
    except OSError:
        return False
    return True


def enter_user_namespace(process: int | None = None) -> None:
    """Enter a user namespace in which this user is mapped to itself; an unmapped user could enter
    no further namespace. `process` is this process's directory in /proc, if the path to it is gone.
    """
    uid, gid = os.getuid(), os.getgid()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # otherwise root would own these files
    kernel.unshare(kernel.CLONE_NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        path = name if process is not None else f"/proc/self/{name}"
        with open(os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=process), "wb", 0) as file:
            file.write(text.encode())


def _become_unprivileged(namespaces: list[str], process: int) -> bool:
    """Drop root and all capabilities. Returns False if the process could still regain them."""
    if os.getuid() == 0:
        succeeds(os.setgroups, [])
        succeeds(os.setresgid, *[UNPRIVILEGED_ID] * 3)
        succeeds(os.setresuid, *[UNPRIVILEGED_ID] * 3)
    if "user" not in namespaces and succeeds(enter_user_namespace, process):
        namespaces.append("user")
    kernel.drop_capabilities()
    return os.getuid() != 0 and not succeeds(os.setuid, 0)


def _restrict_to_library(directories: list[str], packages: list[str]) -> None:
    entries = [
        entry.path
        for directory in directories
        if os.path.isdir(directory)
        for entry in os.scandir(directory)
        if entry.name not in private_root.THIRD_PARTY and os.path.exists(entry.path)
    ]
    landlock.restrict_to([d for d in directories if os.path.isdir(d)], [*entries, *packages])


def _fails_with(error: type[OSError], path: str) -> bool:
    """Return whether opening `path` fails with `error`, which identifies the layer that refused."""
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError as refusal:
        return isinstance(refusal, error)
    return False
