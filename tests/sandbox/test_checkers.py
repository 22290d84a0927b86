"""The ways of comparing outputs, on pairs worked by hand."""

from __future__ import annotations

import pytest

from rlef_sandbox import CHECKERS

PAIRS = [
    # expected, actual, and the checkers that accept
    (b"1 2\n", b"1 2\n", "livecodebench tokens exact codecontests unordered_lines"),
    (b"1 2\n", b"1  2", "livecodebench tokens codecontests unordered_lines"),
    (b"1\n2\n", b"2\n1\n", "unordered_lines"),
    (b"1\n1\n2\n", b"1\n2\n2\n", ""),
    (b"1 2", b"2 1", ""),
    (b"1 2\n3\n", b"1 2 3\n", "tokens codecontests"),
    (b" 1.50 2\r\n", b"1.5 2.0", "codecontests livecodebench"),
    (b"Yes", b"YES", "codecontests"),
    (b"0.5", b"0.5000001", "tokens codecontests"),
    (b"0.5", b"0.50002", ""),
    (b"0.5", b"0.500009", "codecontests"),
    (b"1000000000.5", b"1000000001.5", "tokens"),
    (b"1.0", b"1", "livecodebench tokens codecontests"),
    (b"1", b"1.0", "livecodebench codecontests"),
    (b"1e3", b"1000", "livecodebench tokens codecontests"),
    (b"9007199254740992", b"9007199254740993", "codecontests"),
    (b"100", b"100.000001", "codecontests"),
    (b"0.5", b"nan", ""),
    (b"nan", b"0.5", ""),
    (b"0.5", b"inf", ""),
    (b"1e999", b"1e998", ""),
    (b"1.5", b"1_5e-1", ""),
    (b"1.5", b"0x1.8p0", ""),
    (b"", b"", "livecodebench tokens exact codecontests unordered_lines"),
    (b"", b"\n", "livecodebench tokens codecontests unordered_lines"),
    (b"1", b"", ""),
    (b"1", b"1 1", ""),
    (b"\xff", b"\xff", "livecodebench tokens exact codecontests unordered_lines"),
    (b"0.5", b"\xff", ""),
]


@pytest.mark.parametrize("name", CHECKERS)
@pytest.mark.parametrize(("expected", "actual", "accepted"), PAIRS)
def test_a_pair_is_judged_as_worked_by_hand(
    name: str, expected: bytes, actual: bytes, accepted: str
) -> None:
    assert CHECKERS[name](expected, actual) is (name in accepted.split())
