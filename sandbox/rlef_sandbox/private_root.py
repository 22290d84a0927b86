"""An almost empty, read-only file system for the zygote: the standard library and nothing else.

With a mount namespace the standard library is bound into it at its own path, also from below a
directory that the unprivileged user could not cross, so that modules still load on demand. With
the right to chroot only, the root becomes a directory that no longer exists.
"""

from __future__ import annotations

import glob
import os
import tempfile

from . import kernel

MOUNT_POINT = "/tmp"  # any directory that is always there; covered in our own namespace only
SCRATCH_OPTIONS = "mode=1777,size=512m"
THIRD_PARTY = ("site-packages", "dist-packages")
# Flags that a user namespace may not take off a mount it did not make: kept as they are.
LOCKED_FLAGS = os.ST_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME | os.ST_RELATIME


def enter(directories: list[str], scratch: str = "") -> None:
    """Make a root of `directories` alone, read-only, and move this mount namespace into it. With
    `scratch` it has a directory of that name too, in memory and open to all.

    Wants CAP_SYS_ADMIN over a mount namespace of our own, and /proc.
    """
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    links = {path: os.readlink(path) for path in directories if os.path.islink(path)}
    directories = [path for path in directories if path not in links]
    sources = [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in directories]
    kernel.mount("tmpfs", MOUNT_POINT, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    for source, path in zip(sources, directories, strict=True):
        _bind(source, MOUNT_POINT + path)
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
    kernel.mount("none", "/", "", read_only | kernel.MS_NOSUID | kernel.MS_NODEV)


def _bind(source: int, target: str) -> None:
    """Bind the directory open as `source` on `target`, read-only, third-party packages hidden."""
    os.makedirs(target)
    kernel.mount(f"/proc/self/fd/{source}", target, "", kernel.MS_BIND)
    flags = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY
    flags |= kernel.MS_NOSUID | kernel.MS_NODEV | os.statvfs(target).f_flag & LOCKED_FLAGS
    kernel.mount("none", target, "", flags)
    for packages in filter(os.path.isdir, third_party_in(target)):
        kernel.mount("tmpfs", packages, "tmpfs", kernel.MS_RDONLY, "mode=755")


def third_party_in(directory: str) -> list[str]:
    """Where a directory that is a Python's library, or holds some (/usr), has others' packages."""
    places = ("", "python3*", "lib*/python3*", "local/lib*/python3*")
    patterns = [os.path.join(directory, place, name) for place in places for name in THIRD_PARTY]
    return [found for pattern in patterns for found in glob.glob(pattern)]


def enter_nothing() -> None:
    """Make the root a directory that is deleted at once: no path leads anywhere from then on.

    Wants CAP_SYS_CHROOT.
    """
    empty = tempfile.mkdtemp()
    try:
        os.chdir(empty)
    finally:
        os.rmdir(empty)
    os.chroot(".")
