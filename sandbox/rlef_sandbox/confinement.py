"""What holds a program: the layers of a zygote, put on once and inherited, and those of a child.

Theory of operation. The zygote is born into a pid namespace (`reaper.py`) and puts on, in this
order: the other namespaces (so that there are mounts to arrange), the private root, the
unprivileged user, the loss of all capabilities, no_new_privs, and Landlock. A forked child inherits
them for nothing; it adds a user namespace in which its threads are counted, the limits of its run
and, last of all, the system call filter (`launch.py`). Each layer is tried, then believed only
after a probe of its effect; a layer this machine does not give is left out of the report, and the
controller decides whether the rest is enough. The children's layers are probed in children.
"""

from __future__ import annotations

import math
import os
import resource
import socket
import sys
from collections.abc import Callable
from typing import NamedTuple, TypedDict

from . import kernel, landlock, private_root
from .launch import UNLIMITED
from .protocol import Request, Task

UNPRIVILEGED_ID = 65534  # nobody, on every distribution
# Address space beyond the memory limit, for what is mapped and not touched: programs reserve
# thread stacks of 128 to 512 MiB. Resident memory is judged by the limit itself.
RESERVED_BYTES = 512 << 20
EXECUTABLE_RESERVED_BYTES = 256 << 20  # compiled: thread stacks of 2 MiB, and no interpreter
OPEN_FILES = 64
HOST_FILE = "/etc/passwd"

NAMESPACES = {
    "mount": kernel.CLONE_NEWNS,
    "net": kernel.CLONE_NEWNET,
    "ipc": kernel.CLONE_NEWIPC,
    "uts": kernel.CLONE_NEWUTS,
}

Layers = dict[str, object]


def library_directories() -> list[str]:
    """The directories of the standard library, none within another."""
    paths = sorted({os.path.realpath(path) for path in sys.path if os.path.isdir(path)})
    return [p for p in paths if not any(p.startswith(other + "/") for other in paths)]


class Files(NamedTuple):
    """What of the file system a zygote and its children see."""

    directories: list[str]
    restrict: Callable[[], None]  # by Landlock
    scratch: str = ""  # a directory to write to
    forbidden: str = HOST_FILE  # proof that the rest is not there


def library_files() -> Files:
    """The standard library, read-only, without the third-party packages within it."""
    directories = library_directories()
    return Files(directories, lambda: _restrict_to_library(directories))


def confine_zygote(namespaces: list[str], files: Files) -> Layers:
    """Put on every layer that this machine gives, beside the `namespaces` that this process is in;
    those that proved effective, by name.
    """
    for name, flag in NAMESPACES.items():
        if succeeds(kernel.unshare, flag):
            namespaces.append(name)
    if "net" in namespaces and socket.if_nameindex() != [(1, "lo")]:
        namespaces.remove("net")
    held = []
    process = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    has_landlock = landlock.abi() > 0
    if "mount" in namespaces and succeeds(private_root.enter, files.directories, files.scratch):
        held += ["private_root"] * _fails_with(FileNotFoundError, files.forbidden)
    elif not has_landlock and not files.scratch and succeeds(private_root.enter_nothing):
        held += ["empty_root"] * _fails_with(FileNotFoundError, files.forbidden)
    unprivileged = _become_unprivileged(namespaces, process)
    os.close(process)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if has_landlock and succeeds(files.restrict):
        held += [f"landlock_abi_{landlock.abi()}"] * _fails_with(PermissionError, "/")
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kernel.die_with_parent()  # again: the change of user undid it
    return {
        "namespaces": namespaces,
        "files": held,
        "unprivileged_user": unprivileged,
        "no_new_privs": kernel.prctl(kernel.PR_GET_NO_NEW_PRIVS) == 1,
    }


def succeeds(step: Callable[..., None], *arguments: object) -> bool:
    try:
        step(*arguments)
    except OSError:
        return False
    return True


def enter_user_namespace(process: int | None = None) -> None:
    """With its one user mapped to itself, since an unmapped one could enter no further one.
    `process` is this process's directory in /proc, where that cannot be reached by its name.
    """
    uid, gid = os.getuid(), os.getgid()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # or these files are root's
    kernel.unshare(kernel.CLONE_NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        path = name if process is not None else f"/proc/self/{name}"
        file = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=process)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)


def _become_unprivileged(namespaces: list[str], process: int) -> bool:
    """Leave root for good, give up all capabilities; whether no way back is left."""
    if os.getuid() == 0:
        succeeds(os.setgroups, [])
        succeeds(os.setresgid, *[UNPRIVILEGED_ID] * 3)
        succeeds(os.setresuid, *[UNPRIVILEGED_ID] * 3)
    if "user" not in namespaces and succeeds(enter_user_namespace, process):
        namespaces.append("user")
    kernel.drop_capabilities()
    return os.getuid() != 0 and not succeeds(os.setuid, 0)


def _restrict_to_library(directories: list[str]) -> None:
    entries = [
        entry.path
        for directory in directories
        if os.path.isdir(directory)
        for entry in os.scandir(directory)
        if entry.name not in private_root.THIRD_PARTY and os.path.exists(entry.path)
    ]
    landlock.restrict_to([d for d in directories if os.path.isdir(d)], entries)


def _fails_with(error: type[OSError], path: str) -> bool:
    """Whether opening `path` is refused, and by the layer that gives this error."""
    try:
        os.close(os.open(path, os.O_RDONLY))
    except error:
        return True
    except OSError:
        pass
    return False


class ChildLimits(TypedDict):
    """The part of a `launch.Plan` that follows from a request's limits."""

    address_space_bytes: int
    cpu_s: int
    file_bytes: int
    open_files: int
    threads: int
    own_user_namespace: bool


class Bounds(NamedTuple):
    """What a child's limits are counted from on this machine."""

    base_bytes: int  # the address space that the zygote maps already
    own_user_namespace: bool  # where RLIMIT_NPROC counts a run's own threads, and nothing else

    def limits(self, request: Request) -> ChildLimits:
        serves = request.task is Task.PROGRAM
        # A server's children enter a namespace each, which takes one whose user is mapped.
        counts_threads = self.own_user_namespace and not serves
        own_bytes = self.base_bytes + RESERVED_BYTES
        if request.task is Task.EXECUTE:
            own_bytes = EXECUTABLE_RESERVED_BYTES
        return ChildLimits(
            address_space_bytes=own_bytes + request.memory_bytes,
            # A backstop: the supervisor keeps the exact time, and that of a program server.
            cpu_s=UNLIMITED if serves else math.ceil(request.cpu_s) + 1,
            # One byte more than is allowed, to tell a full output from an overflowing one.
            file_bytes=request.output_bytes + 1,
            open_files=OPEN_FILES,
            threads=request.processes if counts_threads else 0,
            own_user_namespace=counts_threads,
        )
