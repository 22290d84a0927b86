"""The system call policy of a program: the table in syscalls.txt, and what its actions mean."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import NamedTuple


class Action(enum.Enum):
    """What the filter does with a call; the values are for SYSCALLS.md."""

    ALLOW = "allowed"
    NOTHING = "0, and nothing is done"
    DENY = "EPERM"
    READ_ONLY = "EACCES"
    ABSENT = "ENOSYS"
    KILL = "the run ends: SECURITY_VIOLATION"
    # Decided by the arguments:
    OPEN = "allowed to read; EACCES to write, or with O_DIRECT"
    CLONE = "threads that share all descriptors allowed; EPERM otherwise"
    CLOSE_RANGE = "allowed without CLOSE_RANGE_UNSHARE; EPERM with it"
    MMAP = "allowed unless shared and anonymous, huge or locked; EPERM for those"
    MADVISE = "listed advice allowed; EINVAL otherwise"
    FCNTL = "listed commands allowed; EPERM otherwise"
    IOCTL = "listed requests allowed; ENOTTY otherwise"
    SETRLIMIT = "allowed except for three limits; EPERM for those"
    PRLIMIT = "its own limits allowed, with exceptions; EPERM otherwise"
    FUTEX = "listed operations allowed; ENOSYS otherwise"
    PRCTL = "listed options allowed; EPERM otherwise"
    SIGNAL_SELF = "to itself allowed, except SIGKILL; EPERM otherwise"
    ABOUT_SELF = "about itself allowed; EPERM otherwise"
    CLOCK = "the machine's and its own clocks allowed; EINVAL otherwise"
    SOCKET_PAIR = "a pair of local streams allowed; EPERM otherwise"
    TO_PEER = "allowed without flags and address; EPERM otherwise"
    PROCESS = "allowed without a new namespace; EPERM otherwise"
    EXECUTE_GIVEN = "an open file allowed; EPERM otherwise"
    THREAD_POINTER = "to set and read it allowed; EINVAL otherwise"


class Profile(enum.Enum):
    """The purpose of a filter: the common table of system calls, with exceptions for it."""

    PROGRAM = "program"  # in an interpreter that runs already
    EXECUTABLE = "executable"  # a compiled program, which the child executes under the filter
    COMPILER = "compiler"  # a compiler and the programs it starts: trusted code, untrusted input


class CallGroup(NamedTuple):
    """Calls with the same action for the same reason."""

    action: Action
    reason: str
    calls: dict[str, tuple[str, ...]]  # name to numbers, as COLUMNS orders the architectures


COLUMNS = {"x86_64": 0, "aarch64": 1}


def read_groups() -> dict[Profile, list[CallGroup]]:
    """Return the common groups as those of PROGRAM, and the exceptions of the other profiles."""
    profile = Profile.PROGRAM
    groups: dict[Profile, list[CallGroup]] = {profile: []}
    for line in (Path(__file__).parent / "syscalls.txt").read_text().splitlines():
        if line.startswith("["):
            profile = Profile(line.strip("[]"))
            groups[profile] = []
        elif line.startswith("    "):
            for call in line.strip().rstrip(",").split(", "):
                name, numbers = call.split()
                groups[profile][-1].calls[name] = tuple(numbers.split("/"))
        elif line and not line.startswith("#"):
            action, _, reason = line.partition(": ")
            groups[profile].append(CallGroup(Action[action], reason, {}))
    return groups


def policy(machine: str, profile: Profile = Profile.PROGRAM) -> dict[int, Action]:
    """Return the action for each system call number on `machine` (as `platform.machine()`).

    Raises ValueError if there is no table for the machine.
    """
    if machine not in COLUMNS:
        raise ValueError(f"no system call table for {machine!r}; known: {', '.join(COLUMNS)}")
    groups = read_groups()
    exceptions = groups[profile] if profile is not Profile.PROGRAM else []
    return {
        int(numbers[COLUMNS[machine]]): group.action
        for group in (*groups[Profile.PROGRAM], *exceptions)
        for numbers in group.calls.values()
        if numbers[COLUMNS[machine]] != "-"
    }
