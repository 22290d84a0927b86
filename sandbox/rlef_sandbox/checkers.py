"""Judging what a program printed against what was expected: pure functions of two byte strings.

Every checker is `(expected, actual) -> bool` and never raises. Of `actual`, which is untrusted and
may be megabytes long, it takes linear time, and memory beyond it only as `expected` has tokens: it
runs in the process that trains. No pattern may backtrack over a run of digits more than once.
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
    """Equal whitespace-separated tokens. Where the expected token is a decimal (it has a point or
    an exponent), any number within 1e-6, absolute or relative, does; all else, integers
    included, must be equal as text. NaN and infinity are no numbers here.
    """
    return _all_match(_tokens_match, expected, actual)


def _all_match(match: Checker, expected: bytes, actual: bytes) -> bool:
    """Whether there are as many tokens in both, and each matches."""
    wanted = expected.split()
    got = actual.split(None, len(wanted))  # one more at most, which is all the rest
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
    """The same bytes."""
    return expected == actual


def codecontests(expected: bytes, actual: bytes) -> bool:
    """The rule published with CodeContests: lower-cased tokens, equal as text or as doubles less
    than 1e-5 apart. It takes 9007199254740993 for ...992; kept to compare with published scores.
    """
    return _all_match(_codecontests_tokens_match, expected.lower(), actual.lower())


def _codecontests_tokens_match(expected: bytes, actual: bytes) -> bool:
    if expected == actual:
        return True
    if not (NUMBER.fullmatch(expected) and NUMBER.fullmatch(actual)):
        return False
    return abs(float(expected) - float(actual)) < CODECONTESTS_TOLERANCE


def unordered_lines(expected: bytes, actual: bytes) -> bool:
    """The same lines in any order, as often each; blank lines and runs of spaces do not count."""
    left = Counter(_lines(expected))
    for line in _lines(actual):
        if not left[line]:
            return False
        left[line] -= 1
    return not left.total()


def _lines(text: bytes) -> Iterator[bytes]:
    """The lines that are not blank, each with its words one space apart."""
    text = text.translate(ONE_SPACE)
    while b"  " in text:  # halves every run: no list of millions of words
        text = text.replace(b"  ", b" ")
    return (line for line in map(bytes.strip, io.BytesIO(text)) if line)


def livecodebench(expected: bytes, actual: bytes) -> bool:
    """LiveCodeBench's rule: as many lines, each, without the space around it, the same text or the
    same numbers, exactly: 1.0 is 1, and 0.333 is not 0.3333.
    """
    wanted = expected.strip().split(b"\n")
    got = actual.strip().split(b"\n", len(wanted))  # one more at most, which is all the rest
    return len(wanted) == len(got) and all(map(_number_lines_match, wanted, got))


def _number_lines_match(expected: bytes, actual: bytes) -> bool:
    return expected.strip() == actual.strip() or _all_match(_numbers_equal, expected, actual)


def _numbers_equal(expected: bytes, actual: bytes) -> bool:
    if not (NUMBER.fullmatch(expected) and NUMBER.fullmatch(actual)):
        return False
    try:
        return Decimal(expected.decode()) == Decimal(actual.decode())
    except ArithmeticError:  # an exponent of more than 18 digits
        return False


CHECKERS: dict[str, Checker] = {
    "tokens": tokens,
    "exact": exact,
    "codecontests": codecontests,
    "unordered_lines": unordered_lines,
    "livecodebench": livecodebench,
}


def checker_named(name: str) -> Checker:
    """The checker called `name`. ValueError, naming the known ones, if there is none."""
    if name not in CHECKERS:
        raise ValueError(f"unknown checker {name!r}; known: {', '.join(CHECKERS)}")
    return CHECKERS[name]
