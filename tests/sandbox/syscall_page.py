"""Print the system call policy: python -m tests.sandbox.syscall_page > sandbox/SYSCALLS.md"""

from __future__ import annotations

from rlef_sandbox.syscalls import CallGroup, Profile, read_groups

HEADINGS = {
    Profile.PROGRAM: """\
# System calls

What a program may ask of the kernel, and why. This page is generated from
`rlef_sandbox/syscalls.txt`, from which the filter is assembled. A call that is not listed gets
ENOSYS, as on an older kernel. On x86-64 the x32 numbers and the 32-bit entry end the run. Numbers
are x86-64/aarch64; a test compares them with libseccomp's.
""",
    Profile.EXECUTABLE: "\n## Exceptions for a compiled program\n",
    Profile.COMPILER: "\n## Exceptions for the compiler, which runs no code of the program\n",
}


def rows(groups: list[CallGroup]) -> list[str]:
    lines = ["| why | answer | calls |", "|---|---|---|"]
    for group in groups:
        calls = ", ".join(f"{name} {'/'.join(numbers)}" for name, numbers in group.calls.items())
        lines.append(f"| {group.reason} | {group.action.value} | {calls} |")
    return lines


def page() -> str:
    groups = read_groups()
    lines = [line for profile in Profile for line in (HEADINGS[profile], *rows(groups[profile]))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
