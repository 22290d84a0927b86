"""An almost empty, read-only file system for a zygote: only the folders that it is given.

With a mount namespace the standard library is bound into it at its own path, even from below a
directory that the unprivileged user could not enter, so modules still load on demand. With only the
right to chroot, the root becomes a directory that no longer exists.
"""

from __future__ import annotations

import glob
import os
import stat
import tempfile
from collections.abc import Sequence

from . import kernel

MOUNT_POINT = "/tmp"  # a directory that always exists; covered in our own namespace only
SCRATCH_OPTIONS = "mode=1777,size=512m"
THIRD_PARTY = ("site-packages", "dist-packages")
# Flags of another namespace's mount that a user namespace may not remove: kept as they are.
LOCKED_FLAGS = os.ST_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME | os.ST_RELATIME


def enter(directories: list[str], packages: Sequence[str], scratch: str = "") -> None:
    """Make a read-only root of only `directories` and `packages`, and move this mount namespace
    into it. At the path `scratch`, if given, it has a directory in memory that all may write to.

    Needs CAP_SYS_ADMIN over a mount namespace of our own, and /proc.
    """
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    links = {path: os.readlink(path) for path in directories if os.path.islink(path)}
    shown = [path for path in [*directories, *packages] if path not in links]
    sources = [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in shown]
    kernel.mount("tmpfs", MOUNT_POINT, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    hidden: list[str] = []
    for source, path in zip(sources, shown, strict=True):
        hidden += _bind(source, MOUNT_POINT + path)
        os.close(source)
    for path, target in links.items():
        os.symlink(target, MOUNT_POINT + path)
    if scratch:
        os.makedirs(MOUNT_POINT + scratch)
        flags = kernel.MS_NOSUID | kernel.MS_NODEV
        kernel.mount("tmpfs", MOUNT_POINT + scratch, "tmpfs", flags, SCRATCH_OPTIONS)
    os.chdir(MOUNT_POINT)
    kernel.pivot_root(".", ".")
    kernel.unmount(".")  # the old root, now lying over the new one
    os.chdir("/")
    read_only = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY
    for path in ["/", *(path.removeprefix(MOUNT_POINT) for path in hidden)]:
        kernel.mount("none", path, "", read_only | kernel.MS_NOSUID | kernel.MS_NODEV)


def _bind(source: int, target: str) -> list[str]:
    """Bind the file or directory open as `source` on `target`, read-only, with all third-party
    packages hidden. Returns the mounts that hide them, which are not read-only yet.
    """
    if stat.S_ISDIR(os.fstat(source).st_mode):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.mknod(target)
    kernel.mount(f"/proc/self/fd/{source}", target, "", kernel.MS_BIND)
    flags = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY
    flags |= kernel.MS_NOSUID | kernel.MS_NODEV | os.statvfs(target).f_flag & LOCKED_FLAGS
    kernel.mount("none", target, "", flags)
    hidden = list(filter(os.path.isdir, third_party_in(target)))
    for path in hidden:
        kernel.mount("tmpfs", path, "tmpfs", 0, "mode=755")
    return hidden


def third_party_in(directory: str) -> list[str]:
    """Return the third-party package folders of a Python library, or of all libraries in a /usr."""
    places = ("", "python3*", "lib*/python3*", "local/lib*/python3*")
    patterns = [os.path.join(directory, place, name) for place in places for name in THIRD_PARTY]
    return [found for pattern in patterns for found in glob.glob(pattern)]


def enter_nothing() -> None:
    """Make the root a deleted directory, in which no path exists. Needs CAP_SYS_CHROOT."""
    empty = tempfile.mkdtemp()
    try:
        os.chdir(empty)
    finally:
        os.rmdir(empty)
    os.chroot(".")
