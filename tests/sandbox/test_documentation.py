"""The pages that are written from code say what the code says."""

from pathlib import Path

from rlef_sandbox import syscall_table
from rlef_sandbox.syscalls import Action

ROOT = Path(__file__).parents[2]


def test_the_page_of_system_calls_is_the_policy() -> None:
    remedy = "run python -m rlef_sandbox.syscall_table > sandbox/SYSCALLS.md"
    assert (ROOT / "sandbox/SYSCALLS.md").read_text() == syscall_table.page(), remedy
    assert set(syscall_table.ANSWERS) == set(Action)
