"""Checkers compare a program's output with the expected one: pure functions of two byte strings.

Every checker is `(expected, actual) -> bool` and never raises. They run in the caller's process,
and `actual` is untrusted and may be megabytes long. So their time is linear in its length, and the
memory that they need beyond it is proportional to the tokens of `expected`. No pattern may
backtrack over a run of digits more than once.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal

Checker = Callable[[bytes, bytes], bool]

# Written with a point or an exponent: the problem's author printed a float.
DECIMAL = re.compile(rb"[+-]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?")
NUMBER = re.compile(rb"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
ONE_SPACE = bytes.maketrans(b"\t\v\f\r", b"   \n")
TOLERANCE = 1e-6  # absolute or relative, the customary bound of contest checkers
CODECONTESTS_TOLERANCE = 1e-5  # the bound of the published grader, exclusive


def tokens(expected: bytes, actual: bytes) -> bool:
    """Return whether the whitespace-separated tokens are equal. For an expected decimal (with a
    point or an exponent) any number within 1e-6, absolute or relative, is right. All other tokens,
    also integers, must be equal as text. NaN and infinity are not numbers here.
    """
    return _all_match(_tokens_match, expected, actual)


def _all_match(match: Checker, expected: bytes, actual: bytes) -> bool:
    """Return whether both have the same number of tokens, and each is equal or matches."""
    wanted = expected.split()
    got = actual.split(None, len(wanted))  # the last token is all the rest
    return len(wanted) == len(got) and (wanted == got or all(map(match, wanted, got)))


def _tokens_match(expected: bytes, actual: bytes) -> bool:
    if expected == actual:
        return True
    if not (DECIMAL.fullmatch(expected) and NUMBER.fullmatch(actual)):
        return False
    wanted, got = float(expected), float(actual)
    if not (math.isfinite(wanted) and math.isfinite(got)):
        return False
    return math.isclose(wanted, got, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def exact(expected: bytes, actual: bytes) -> bool:
    """Return whether the bytes are the same."""
    return expected == actual


def codecontests(expected: bytes, actual: bytes) -> bool:
    """Apply the rule published with CodeContests: lower-cased tokens, equal as text or as doubles
    less than 1e-5 apart. It accepts 9007199254740993 for ...992. It serves to compare with
    published scores.
    """
    return _all_match(_codecontests_tokens_match, expected.lower(), actual.lower())


def _codecontests_tokens_match(expected: bytes, actual: bytes) -> bool:
    if expected == actual:
        return True
    if not (NUMBER.fullmatch(expected) and NUMBER.fullmatch(actual)):
        return False
    return abs(float(expected) - float(actual)) < CODECONTESTS_TOLERANCE


def unordered_lines(expected: bytes, actual: bytes) -> bool:
    """Return whether the lines are the same in any order; blank lines and runs of spaces are
    ignored.
    """
    left = Counter(_lines(expected))
    for line in _lines(actual):
        if not left[line]:
            return False
        left[line] -= 1
    return not left.total()


def _lines(text: bytes) -> Iterator[bytes]:
    """Return the lines that are not blank, each with one space between words."""
    text = text.translate(ONE_SPACE)
    while b"  " in text:  # halves every run, without a list of millions of words
        text = text.replace(b"  ", b" ")
    return (line for line in map(bytes.strip, io.BytesIO(text)) if line)


def livecodebench(expected: bytes, actual: bytes) -> bool:
    """Apply LiveCodeBench's rule: the same number of lines, and each line, stripped, has the same
    text or exactly the same numbers: 1.0 equals 1, and 0.333 differs from 0.3333.
    """
    return _all_lines_match(_numbers_equal, expected, actual)


def livecodebench_floats(expected: bytes, actual: bytes) -> bool:
    """Compare lines as `livecodebench` does, and numbers too, but for an expected decimal (with a
    point or an exponent) any number within 1e-6, absolute or relative, is right.
    """
    return _all_lines_match(
        lambda wanted, got: _tokens_match(wanted, got) or _numbers_equal(wanted, got),
        expected,
        actual,
    )


def _all_lines_match(match: Checker, expected: bytes, actual: bytes) -> bool:
    """Return whether both have the same number of lines, and each line, stripped, has the same text
    or tokens that all match."""
    wanted = expected.strip().split(b"\n")
    got = actual.strip().split(b"\n", len(wanted))  # the last line is all the rest
    return len(wanted) == len(got) and all(
        one.strip() == other.strip()
        # words must have the same spacing, numbers need not
        or (_all_match(match, one, other) and all(map(match, one.split(), other.split())))
        for one, other in zip(wanted, got, strict=True)
    )


def _numbers_equal(expected: bytes, actual: bytes) -> bool:
    try:
        return Decimal(expected.decode()) == Decimal(actual.decode())
    except (ArithmeticError, ValueError):  # text, or an exponent of more than 18 digits
        return False


CHECKERS: dict[str, Checker] = {
    "tokens": tokens,
    "exact": exact,
    "codecontests": codecontests,
    "unordered_lines": unordered_lines,
    "livecodebench": livecodebench,
    "livecodebench_floats": livecodebench_floats,
}


def checker_named(name: str) -> Checker:
    """Return the checker called `name`. Raises ValueError if there is none."""
    if name not in CHECKERS:
        raise ValueError(f"unknown checker {name!r}; known: {', '.join(CHECKERS)}")
    return CHECKERS[name]
