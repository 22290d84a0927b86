"""The ways of comparing outputs, on pairs worked by hand."""

from __future__ import annotations

import pytest

from rlef_sandbox import CHECKERS

LINES = "livecodebench livecodebench_floats"
PAIRS = [
    # expected, actual, and the checkers that accept
    (
        b"1 2\n",
        b"1 2\n",
        f"{LINES} tokens exact codecontests unordered_lines",
    ),
    (b"1 2\n", b"1  2", f"{LINES} tokens codecontests unordered_lines"),
    (b"1\n2\n", b"2\n1\n", "unordered_lines"),
    (b"a b", b"a  b", "livecodebench_floats tokens codecontests unordered_lines"),
    (b"0.5\nNo", b"0.5000001\nNo ", "livecodebench_floats tokens codecontests"),
    (b"0.5\nNo", b"0.5000001 No", "tokens codecontests"),
    (b"1_0", b"10", LINES),
    (b"inf", b"Infinity", LINES),
    (b"1\n1\n2\n", b"1\n2\n2\n", ""),
    (b"1 2", b"2 1", ""),
    (b"1 2\n3\n", b"1 2 3\n", "tokens codecontests"),
    (b" 1.50 2\r\n", b"1.5 2.0", "codecontests livecodebench livecodebench_floats"),
    (b"Yes", b"YES", "codecontests"),
    (b"0.5", b"0.5000001", "tokens codecontests livecodebench_floats"),
    (b"0.5", b"0.50002", ""),
    (b"0.5", b"0.500009", "codecontests"),
    (b"1000000000.5", b"1000000001.5", "tokens livecodebench_floats"),
    (b"1.0", b"1", f"{LINES} tokens codecontests"),
    (b"1", b"1.0", f"{LINES} codecontests"),
    (b"1e3", b"1000", f"{LINES} tokens codecontests"),
    (b"9007199254740992", b"9007199254740993", "codecontests"),
    (b"100", b"100.000001", "codecontests"),
    (b"0.5", b"nan", ""),
    (b"nan", b"0.5", ""),
    (b"0.5", b"inf", ""),
    (b"1e999", b"1e998", ""),
    (b"1.5", b"1_5e-1", LINES),
    (b"1.5", b"0x1.8p0", ""),
    (b"", b"", f"{LINES} tokens exact codecontests unordered_lines"),
    (b"", b"\n", f"{LINES} tokens codecontests unordered_lines"),
    (b"1", b"", ""),
    (b"1", b"1 1", ""),
    (
        b"\xff",
        b"\xff",
        f"{LINES} tokens exact codecontests unordered_lines",
    ),
    (b"0.5", b"\xff", ""),
]


@pytest.mark.parametrize("name", CHECKERS)
@pytest.mark.parametrize(("expected", "actual", "accepted"), PAIRS)
def test_a_pair_is_judged_as_worked_by_hand(
    name: str, expected: bytes, actual: bytes, accepted: str
) -> None:
    assert CHECKERS[name](expected, actual) is (name in accepted.split())
