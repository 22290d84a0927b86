"""What holds a program: the layers of a zygote, put on once and inherited, and those of a child.

Theory of operation. The zygote puts on, in this order: namespaces (so that there are mounts to
arrange), the private root, the unprivileged user, the loss of all capabilities, no_new_privs, and
Landlock. A forked child inherits them for nothing; it adds the limits of its run and, last of all,
the system call filter. Each layer is tried, then believed only after a probe of its effect;
a layer this machine does not give is left out of the report, and the controller decides whether
the rest is enough. The probes of the child's layers run in a child made for it (`zygote.py`).
"""

from __future__ import annotations

import math
import os
import resource
import socket
import sys
from collections.abc import Callable

from . import kernel, landlock, private_root
from .protocol import Request

UNPRIVILEGED_ID = 65534  # nobody, on every distribution
# Address space beyond the memory limit, for what is mapped and not touched: programs reserve
# thread stacks of 128 to 512 MiB. Resident memory is judged by the limit itself.
RESERVED_BYTES = 512 << 20
OPEN_FILES = 64
OTHER_PROCESSES = 3  # reaper, zygote and program server count against RLIMIT_NPROC too
HOST_FILE = "/etc/passwd"

NAMESPACES = {
    "mount": kernel.CLONE_NEWNS,
    "net": kernel.CLONE_NEWNET,
    "ipc": kernel.CLONE_NEWIPC,
    "uts": kernel.CLONE_NEWUTS,
    "pid": kernel.CLONE_NEWPID,
}

Layers = dict[str, object]


def library_directories() -> list[str]:
    """The directories of the standard library, none within another."""
    paths = sorted({os.path.realpath(path) for path in sys.path if os.path.isdir(path)})
    return [p for p in paths if not any(p.startswith(other + "/") for other in paths)]


def confine_zygote() -> tuple[Layers, list[str]]:
    """Put on every layer that this machine gives: those that proved effective, by name, and the
    namespaces among them.
    """
    directories = library_directories()
    namespaces = _enter_namespaces()
    if "net" in namespaces and socket.if_nameindex() != [(1, "lo")]:
        namespaces.remove("net")
    files = []
    has_landlock = landlock.abi() > 0
    if "mount" in namespaces and _succeeds(private_root.enter, directories):
        files += ["private_root"] * _fails_with(FileNotFoundError, HOST_FILE)
    elif not has_landlock and _succeeds(private_root.enter_nothing):
        files += ["empty_root"] * _fails_with(FileNotFoundError, HOST_FILE)
    unprivileged = _become_unprivileged(namespaces)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if has_landlock and _succeeds(_restrict_files, directories):
        files += [f"landlock_abi_{landlock.abi()}"] * _fails_with(PermissionError, "/")
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    layers: Layers = {
        "namespaces": namespaces,
        "files": files,
        "unprivileged_user": unprivileged,
        "no_new_privs": kernel.prctl(kernel.PR_GET_NO_NEW_PRIVS) == 1,
    }
    return layers, namespaces


def _succeeds(step: Callable[..., None], *arguments: object) -> bool:
    try:
        step(*arguments)
    except OSError:
        return False
    return True


def _enter_namespaces() -> list[str]:
    """Namespaces by name; without root they take a user namespace first."""
    entered = []
    if os.geteuid() != 0 and _succeeds(_enter_user_namespace):
        entered.append("user")
    return entered + [name for name, flag in NAMESPACES.items() if _succeeds(kernel.unshare, flag)]


def _enter_user_namespace() -> None:
    uid, gid = os.getuid(), os.getgid()
    kernel.unshare(kernel.CLONE_NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _become_unprivileged(namespaces: list[str]) -> bool:
    """Leave root for good, give up all capabilities; whether no way back is left."""
    if os.getuid() == 0:
        _succeeds(os.setgroups, [])
        _succeeds(os.setresgid, *[UNPRIVILEGED_ID] * 3)
        _succeeds(os.setresuid, *[UNPRIVILEGED_ID] * 3)
    if "user" not in namespaces and _succeeds(kernel.unshare, kernel.CLONE_NEWUSER):
        namespaces.append("user")  # where RLIMIT_NPROC counts our own processes alone
    kernel.drop_capabilities()
    return os.getuid() != 0 and not _succeeds(os.setuid, 0)


def _restrict_files(directories: list[str]) -> None:
    """Landlock down to the standard library without the third-party packages within it."""
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


def set_limits(request: Request, base_bytes: int, own_user_namespace: bool) -> None:
    """Bound this process. `base_bytes` is the address space that the zygote maps already."""
    address_space = base_bytes + request.memory_bytes + RESERVED_BYTES
    cpu_s = math.ceil(request.cpu_s) + 1  # a backstop: the supervisor keeps the exact time
    # One byte more than is allowed, to tell a full output from an overflowing one.
    file_bytes = request.output_bytes + 1
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    if own_user_namespace:  # elsewhere it counts whatever else the user runs
        threads = request.processes + OTHER_PROCESSES
        resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))
