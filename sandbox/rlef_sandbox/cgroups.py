"""Control groups (version 2), if the caller may make them: a backstop behind the rlimits.

Each worker gets a group below the caller's own. It counts what rlimits cannot (all processes of the
worker together, kernel memory, files in memory), and its `cgroup.kill` ends them all at once. It
can use only the controllers that the machine delegates to it. Where they are mounted as version 1,
there are none, and only `cgroup.kill` remains.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from pathlib import Path

PREFIX = "rlef-sandbox-"
PIDS_MAX = 4096  # processes and threads of one worker: four times 16 programs of 64 threads
REMOVE_WITHIN_S = 2.0

_numbers = itertools.count()


def own_group() -> Path | None:
    """Return the directory of the version 2 group that this process is in."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    paths = [line[3:] for line in groups if line.startswith("0::")]
    points = [line.split()[4] for line in mounts if " - cgroup2 " in line]
    if not paths or not points:
        return None
    return Path(points[0], paths[0].lstrip("/"))


def create(memory_bytes: int | None) -> str:
    """Make a group for a worker, with the bounds that its controllers allow. Returns its path, or
    "" if there can be none."""
    parent = own_group()
    if parent is None:
        return ""
    _remove_orphans(parent)
    group = parent / f"{PREFIX}{os.getpid()}-{next(_numbers)}"
    try:
        group.mkdir()
    except OSError:
        return ""
    write(group, "pids.max", PIDS_MAX)
    if memory_bytes is not None:
        write(group, "memory.max", memory_bytes)
    return str(group)


def write(group: str | Path, file: str, value: int) -> None:
    """Write to a group's file, if that is allowed. `layers` tells what has an effect."""
    with contextlib.suppress(OSError):
        Path(group, file).write_text(str(value))


def _remove_orphans(parent: Path) -> None:
    """Remove the groups that dead callers left, because their reapers were killed with them."""
    for group in parent.glob(f"{PREFIX}*-*"):
        if not os.path.exists(f"/proc/{group.name.removeprefix(PREFIX).partition('-')[0]}"):
            remove(str(group))


def layers(group: str) -> list[str]:
    """Return what a worker's group bounds, as the kernel reports it."""
    if not group or not _read(group, "cgroup.procs"):
        return []
    bounded = [name for name in ("pids", "memory") if _read(group, f"{name}.max").isdigit()]
    return bounded + ["kill"] * os.path.exists(f"{group}/cgroup.kill")


def _read(group: str, file: str) -> str:
    try:
        return Path(group, file).read_text().strip()
    except OSError:
        return ""


def remove(group: str) -> None:
    """Kill every process of the group, and remove it."""
    write(group, "cgroup.kill", 1)
    deadline = time.monotonic() + REMOVE_WITHIN_S
    while os.path.exists(group) and time.monotonic() < deadline:
        try:
            os.rmdir(group)
        except OSError:  # a killed process has not left yet
            time.sleep(0.005)
