"""Judging what a program printed against what was expected: pure functions of two byte strings.

Every checker is `(expected, actual) -> bool`, never raises, and takes time linear in its input.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable

Checker = Callable[[bytes, bytes], bool]

# Written with a point or an exponent: the problem's author printed a float.
DECIMAL = re.compile(rb"[+-]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?")
NUMBER = re.compile(rb"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
TOLERANCE = 1e-6  # absolute or relative, the customary bound of contest checkers
CODECONTESTS_TOLERANCE = 1e-5  # the bound of the published grader, exclusive


def tokens(expected: bytes, actual: bytes) -> bool:
    """Equal whitespace-separated tokens. Where the expected token is a decimal (it has a point or
    an exponent), any number within 1e-6, absolute or relative, does; all else, integers
    included, must be equal as text. NaN and infinity are no numbers here.
    """
    expected_tokens, actual_tokens = expected.split(), actual.split()
    if expected_tokens == actual_tokens:
        return True
    return len(expected_tokens) == len(actual_tokens) and all(
        map(_tokens_match, expected_tokens, actual_tokens)
    )


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
    expected_tokens, actual_tokens = expected.lower().split(), actual.lower().split()
    if expected_tokens == actual_tokens:
        return True
    return len(expected_tokens) == len(actual_tokens) and all(
        map(_codecontests_tokens_match, expected_tokens, actual_tokens)
    )


def _codecontests_tokens_match(expected: bytes, actual: bytes) -> bool:
    if expected == actual:
        return True
    if not (NUMBER.fullmatch(expected) and NUMBER.fullmatch(actual)):
        return False
    return abs(float(expected) - float(actual)) < CODECONTESTS_TOLERANCE


def unordered_lines(expected: bytes, actual: bytes) -> bool:
    """The same lines in any order, as often each; blank lines and runs of spaces do not count."""
    return _lines(expected) == _lines(actual)


def _lines(text: bytes) -> Counter[bytes]:
    return Counter(b" ".join(line.split()) for line in text.splitlines() if line.strip())


CHECKERS: dict[str, Checker] = {
    "tokens": tokens,
    "exact": exact,
    "codecontests": codecontests,
    "unordered_lines": unordered_lines,
}


def checker_named(name: str) -> Checker:
    """The checker called `name`. ValueError, naming the known ones, if there is none."""
    if name not in CHECKERS:
        raise ValueError(f"unknown checker {name!r}; known: {', '.join(CHECKERS)}")
    return CHECKERS[name]
