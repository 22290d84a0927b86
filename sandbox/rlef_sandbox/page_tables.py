"""Bound the page tables of programs, which only a cgroup's limit counts.

Many small mappings far apart cost 8 KiB of page tables each and almost no resident memory. The
reaper, the only process that sees /proc, reads their size every MEASURE_EVERY_S. A program that has
too many may map no more: its address space limit becomes 0, which its supervisor reports as
MEMORY_LIMIT.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

MEASURE_EVERY_S = 0.05
FREE_BYTES = 16 << 20  # in addition to 16 bytes per mapped page, twice what dense mappings need


def children_of(pid: int) -> list[int]:
    """Return the children of a process with one thread; none if the kernel does not list them."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as children:
        return [int(child) for child in children.read().split()]
    return []


def _facts(pid: int) -> dict[str, str]:
    """Return the lines of a process's status. They show no memory if its first thread has ended;
    then return those of another thread."""
    facts = _status(f"/proc/{pid}")
    if "VmPTE" not in facts:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                others = _status(f"/proc/{pid}/task/{thread}")
                if "VmPTE" in others:
                    return others
    return facts


def _status(folder: str) -> dict[str, str]:
    with open(f"{folder}/status") as status:
        return dict(line.split(":\t", 1) for line in status if ":\t" in line)


def programs_below(process: int) -> Iterator[int]:
    """Yield the descendants that have no children; process 1 of a run has one, the program."""
    for child in children_of(process):
        yield from list(programs_below(child)) or [child]


def bound(zygote: int) -> None:
    """Let a program of a zygote map no more memory once it has too many page tables."""
    for program in programs_below(zygote):
        with contextlib.suppress(OSError):
            facts = _facts(program)
            mapped_kib, tables_kib = (
                int(facts.get(name, "0").split()[0]) for name in ("VmPeak", "VmPTE")
            )
            if tables_kib > (FREE_BYTES >> 10) + (mapped_kib >> 8):
                _take_address_space(program, facts)


def _take_address_space(program: int, facts: dict[str, str]) -> None:
    """Set a program's address space limit to 0, as its user: root may lack CAP_SYS_RESOURCE."""
    user, group = os.getuid(), os.getgid()
    os.setresgid(int(facts["Gid"].split()[0]), -1, -1)
    os.setresuid(int(facts["Uid"].split()[0]), -1, -1)
    try:
        resource.prlimit(program, resource.RLIMIT_AS, (0, 0))
    finally:
        os.setresuid(user, -1, -1)
        os.setresgid(group, -1, -1)


def can_be_bound(reaper: int) -> bool:
    """Return whether the page tables of a zygote, the child of `reaper`, can be read."""
    with contextlib.suppress(OSError):
        return any("VmPTE" in _facts(zygote) for zygote in children_of(reaper))
    return False
