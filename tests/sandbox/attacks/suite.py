"""Every attack, and the categories they are documented in."""

from __future__ import annotations

from .attack import Attack
from .files import READING, WRITING
from .hacking import CHECKS, FUNCTIONS, PROGRAMS
from .kernel_surface import (
    ARGUMENTS,
    NEW_INTERFACES,
    OTHER_ENTRIES,
    OTHER_PROCESSES,
    THE_MACHINE,
)
from .processes import NETWORK, PROCESSES, SANDBOX_FAULTS
from .resources import CRASHES, MEMORY, OUTPUT, TIME

CATEGORIES: dict[str, tuple[Attack, ...]] = {
    "reading": READING,
    "writing": WRITING,
    "network": NETWORK,
    "processes": PROCESSES,
    "sandbox_faults": SANDBOX_FAULTS,
    "other_processes": OTHER_PROCESSES,
    "new_interfaces": NEW_INTERFACES,
    "the_machine": THE_MACHINE,
    "arguments": ARGUMENTS,
    "other_entries": OTHER_ENTRIES,
    "memory": MEMORY,
    "time": TIME,
    "output": OUTPUT,
    "crashes": CRASHES,
    "programs": PROGRAMS,
    "functions": FUNCTIONS,
    "checks": CHECKS,
}
ATTACKS = {
    f"{category}.{attack.name}": attack
    for category, attacks in CATEGORIES.items()
    for attack in attacks
}
SLOW = ("memory", "time", "output", "crashes")
# These call x86-64 system-call numbers.
X86 = ("other_processes", "new_interfaces", "the_machine", "arguments", "other_entries")
