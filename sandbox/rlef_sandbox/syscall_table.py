"""The system call policy as a page: python -m rlef_sandbox.syscall_table > sandbox/SYSCALLS.md"""

from __future__ import annotations

from .syscalls import EXCEPTIONS, GROUPS, Action, Group, Profile

HEAD = """\
# System calls

What a program may ask of the kernel, and why: written from `rlef_sandbox/syscalls.py`, which the
filter is assembled from. A call that stands in no row is answered ENOSYS, as an older kernel would.
On x86-64 the x32 numbers and the 32-bit entry end the run. Numbers are x86-64/aarch64; the tests
hold them against libseccomp's.
"""
ANSWERS = {
    Action.ALLOW: "allowed",
    Action.DENY: "EPERM",
    Action.READ_ONLY: "EACCES",
    Action.ABSENT: "ENOSYS",
    Action.KILL: "the run ends: SECURITY_VIOLATION",
    Action.OPEN: "allowed to read; EACCES to write",
    Action.CLONE: "threads allowed; EPERM otherwise",
    Action.FCNTL: "listed commands allowed; EPERM otherwise",
    Action.IOCTL: "listed requests allowed; ENOTTY otherwise",
    Action.FUTEX: "listed operations allowed; ENOSYS otherwise",
    Action.SETRLIMIT: "allowed but for two limits; EPERM for those",
    Action.PRLIMIT: "its own; EPERM otherwise",
    Action.PRCTL: "listed options allowed; EPERM otherwise",
    Action.SIGNAL_SELF: "to itself, no SIGKILL; EPERM otherwise",
    Action.ABOUT_SELF: "about itself; EPERM otherwise",
    Action.CLOCK: "the machine's and its own clocks; EINVAL otherwise",
    Action.PROCESS: "allowed without a new namespace; EPERM otherwise",
    Action.EXECUTE_GIVEN: "an open file allowed; EPERM otherwise",
    Action.THREAD_POINTER: "to set and read it; EINVAL otherwise",
}
PROFILES = {
    Profile.EXECUTABLE: "A compiled program has these exceptions",
    Profile.COMPILER: "The compiler, which runs none of the program, has these",
}


def rows(groups: tuple[Group, ...]) -> list[str]:
    lines = ["| why | answer | calls |", "|---|---|---|"]
    for group in groups:
        calls = ", ".join(" ".join(call.split()) for call in group.calls.split(","))
        lines.append(f"| {group.reason} | {ANSWERS[group.action]} | {calls} |")
    return lines


def page() -> str:
    lines = [HEAD, *rows(GROUPS)]
    for profile, heading in PROFILES.items():
        lines += ["", f"## {heading}", "", *rows(EXCEPTIONS[profile])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
