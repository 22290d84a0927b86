"""An attack as data: a program, and layers, any one of which is enough to stop it.

The same table is tried in every world of `worlds.py`. Where one of its layers is on, an attack must
fail; where none is, it must succeed, which proves that the attack is real and that its test can
fail.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlef_sandbox import CallTest, CheckTest, Limits, Result, Status, Test

ESCAPED = b"ESCAPED"  # printed by an attack that has succeeded
LIMITS = Limits(cpu_s=4.0, wall_s=20.0, memory_bytes=128 << 20, output_bytes=64 << 10)
STDIN = b"input\n"

# Names of layers, as `Sandbox.isolation` has them. Any one of FILES confines reading.
FILES = ("private_root", "landlock", "empty_root")
# Not layers but the sandbox's design, so never off: no process that runs a program holds the
# expected output; a supervisor believes only the kernel; no other process can read its memory.
SEPARATION = "separation"
SUPERVISION = "supervision"
UNDUMPABLE = "undumpable"
ALWAYS = frozenset({SEPARATION, SUPERVISION, UNDUMPABLE, "rlimits", "no_new_privs"})
# A rule or default setting of the kernel itself, about which we claim nothing: an attack that only
# this stops need not succeed anywhere.
KERNEL = "kernel"


@dataclass(frozen=True)
class Attack:
    """An attack; `statuses` are the verdicts allowed where a layer of `stopped_by` is on."""

    name: str
    source: str
    stopped_by: tuple[str, ...]
    statuses: tuple[Status, ...] = (Status.RUNTIME_ERROR,)
    test: Test | CallTest | CheckTest | None = (
        None  # which the attack tries to pass without solving it
    )
    # False where success would harm the machine: then it is tried only where it is stopped.
    safe: bool = True
    limits: Limits = LIMITS

    def broke_out(self, status: Status, stdout: bytes) -> bool:
        """Return whether a run of this attack achieved what it tried."""
        if status is Status.SANDBOX_ERROR:
            return True
        return status is Status.OK if self.test else ESCAPED in stdout

    def held(self, result: Result) -> bool:
        return not self.broke_out(result.status, result.stdout) and result.status in self.statuses


def attacks(
    sources: dict[str, str],
    stopped_by: tuple[str, ...],
    *statuses: Status,
    safe: bool = True,
    limits: Limits = LIMITS,
) -> tuple[Attack, ...]:
    """Return one attack for each named source, all with the same layers and statuses."""
    allowed = statuses or (Status.RUNTIME_ERROR,)
    return tuple(
        Attack(name, source, stopped_by, allowed, safe=safe, limits=limits)
        for name, source in sources.items()
    )
