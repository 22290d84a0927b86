"""The checkers on generated pairs of outputs, compared with naive versions of their rules."""

from __future__ import annotations

import time
from decimal import Decimal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlef_sandbox import CHECKERS

WHITESPACE = b" \t\n\r\x0b\x0c"
DIGITS = b"0123456789"

numbers = st.one_of(
    st.integers().map(str),
    st.integers(-5, 5).map(lambda n: f"{n}.0"),
    st.floats(allow_nan=True, allow_infinity=True).map(repr),
    st.floats(-100, 100).map(lambda x: f"{x:.6f}"),
    st.floats(-100, 100).map(lambda x: f"{x:.3e}"),
    st.sampled_from(["1", "01", "+1", "-0", "1.", ".5", ".", "e5", "1e5", "1E+05", "1e", "1_0"]),
    st.sampled_from(
        ["nan", "inf", "-inf", "Infinity", "1e999", "-1e999", "0x10", "1e-999", "1.5.2"]
    ),
).map(str.encode)
words = st.one_of(
    numbers,
    st.sampled_from([b"YES", b"Yes", b"no", b"\xff", b"\xc2\xa0", b"\0", "\u0661".encode()]),
    st.binary(min_size=1, max_size=4),
)
gaps = st.text("".join(map(chr, WHITESPACE)), min_size=1, max_size=2).map(str.encode)
outputs = st.lists(st.tuples(words, gaps), max_size=6).map(
    lambda pairs: b"".join(word + gap for word, gap in pairs)
)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Draw two outputs, often almost the same."""
    expected = draw(outputs)
    if draw(st.booleans()):
        return expected, draw(outputs)
    tokens = expected.split()
    for index in range(len(tokens)):
        match draw(st.integers(0, 5)):
            case 0:
                tokens[index] = draw(words)
            case 1:
                tokens[index] = tokens[index].swapcase()
            case 2 if is_number(tokens[index]):
                nudge = draw(st.sampled_from([1e-7, 9e-7, 1.1e-6, 9e-6, 1.1e-5, 1e-3]))
                tokens[index] = repr(float(tokens[index]) + nudge).encode()
    return expected, draw(gaps).join(
        draw(st.permutations(tokens)) if draw(st.booleans()) else tokens
    )


def split(text: bytes) -> list[bytes]:
    """Split at the six ASCII whitespace characters, one byte at a time."""
    found: list[bytes] = []
    word = b""
    for byte in text:
        if byte in WHITESPACE:
            found += [word] * bool(word)
            word = b""
        else:
            word += bytes([byte])
    return found + [word] * bool(word)


def is_number(token: bytes) -> bool:
    """Return whether this is [sign] digits with at most one point among them [e [sign] digits]."""
    mantissa, has_exponent, exponent = token.lower().partition(b"e")
    if has_exponent and not (exponent[exponent[:1] in (b"+", b"-") :]).isdigit():
        return False
    whole, _, fraction = mantissa[mantissa[:1] in (b"+", b"-") :].partition(b".")
    digits = whole + fraction
    return bool(digits) and all(byte in DIGITS for byte in digits)


def is_decimal(token: bytes) -> bool:
    return is_number(token) and (b"." in token or b"e" in token.lower())


def near(expected: bytes, actual: bytes, tolerance: Decimal) -> bool:
    """Return whether two numbers, finite as doubles, are within the tolerance, absolute or
    relative, in exact arithmetic."""
    if any(abs(float(token)) == float("inf") for token in (expected, actual)):
        return False
    wanted, got = Decimal(expected.decode()), Decimal(actual.decode())
    return abs(wanted - got) <= tolerance * max(1, abs(wanted), abs(got))


def tokens_rule(expected: bytes, actual: bytes, tolerance: str) -> bool:
    wanted, got = split(expected), split(actual)
    return len(wanted) == len(got) and all(
        w == g or (is_decimal(w) and is_number(g) and near(w, g, Decimal(tolerance)))
        for w, g in zip(wanted, got, strict=True)
    )


def codecontests_rule(expected: bytes, actual: bytes) -> bool:
    wanted, got = split(expected.lower()), split(actual.lower())
    return len(wanted) == len(got) and all(
        w == g or (is_number(w) and is_number(g) and abs(float(w) - float(g)) < 1e-5)
        for w, g in zip(wanted, got, strict=True)
    )


def lines_rule(expected: bytes, actual: bytes) -> bool:
    def lines(text: bytes) -> list[list[bytes]]:
        parts = text.replace(b"\r", b"\n").split(b"\n")
        return sorted(found for found in map(split, parts) if found)

    return lines(expected) == lines(actual)


@given(pairs())
@example((b"1.0", b"1."))
@example((b"1e999", b"1e999"))
@example((b"0.5", b"nan"))
@settings(max_examples=150, deadline=None)
def test_tokens_accepts_what_its_rule_does(pair: tuple[bytes, bytes]) -> None:
    accepted = CHECKERS["tokens"](*pair)
    # Exact arithmetic and doubles may differ by their rounding, at the very bound.
    if accepted:
        assert tokens_rule(*pair, tolerance="1.000000001e-6")
    else:
        assert not tokens_rule(*pair, tolerance="0.999999999e-6")


@given(pairs())
@settings(max_examples=100, deadline=None)
def test_codecontests_accepts_what_its_rule_does(pair: tuple[bytes, bytes]) -> None:
    assert CHECKERS["codecontests"](*pair) is codecontests_rule(*pair)


@given(pairs())
@settings(max_examples=100, deadline=None)
def test_unordered_lines_accepts_what_its_rule_does(pair: tuple[bytes, bytes]) -> None:
    assert CHECKERS["unordered_lines"](*pair) is lines_rule(*pair)


@given(st.binary(), st.binary())
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_judged(expected: bytes, actual: bytes) -> None:
    for check in CHECKERS.values():
        assert check(expected, actual) in (True, False)
        assert check(actual, actual) is True
    assert CHECKERS["exact"](expected, actual) is (expected == actual)


@given(pairs())
@settings(max_examples=100, deadline=None)
def test_equal_outputs_pass_and_two_rules_are_symmetric(
    pair: tuple[bytes, bytes],
) -> None:
    """Two of the rules do not depend on which of the outputs is the expected one."""
    expected, actual = pair
    for name in ("codecontests", "unordered_lines"):
        assert CHECKERS[name](expected, actual) is CHECKERS[name](actual, expected)
    if expected.split() == actual.split():
        assert CHECKERS["tokens"](expected, actual)
        assert CHECKERS["codecontests"](expected, actual)


BYTES = 2_000_000
HOSTILE = {
    "digits_then_a_letter": b"1" * BYTES + b"x",
    "digits": b"1" * BYTES,
    "digits_after_a_point": b"0." + b"1" * BYTES + b"x",
    "zeros_after_a_point": b"0." + b"0" * BYTES + b"1",
    "exponents": b"1e" * (BYTES // 2),
    "a_long_exponent": b"1e" + b"9" * BYTES,
    "a_long_negative_exponent": b"1e-" + b"9" * BYTES,
    "points": b"." * BYTES,
    "signs": b"+-" * (BYTES // 2),
    "spaces": b" " * BYTES + b"1.5",
    "tabs_and_spaces": b" \t" * (BYTES // 2),
    "blank_lines": b"\n\r" * (BYTES // 2),
    "words": b"1 " * (BYTES // 2),
    "lines": b"1\n" * (BYTES // 2),
    "different_lines": b"\n".join(b"%d" % n for n in range(BYTES // 8)),
}


@pytest.mark.parametrize("actual", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("expected", [b"1.5", b"1.5 " * 1000, b"1\n" * 1000], ids=["1", "n", "l"])
@pytest.mark.parametrize("name", CHECKERS)
def test_hostile_output_takes_no_quadratic_time(name: str, expected: bytes, actual: bytes) -> None:
    """Quadratic would be hours. What is linear takes hundredths of a second, far from the bound."""
    started = time.process_time()
    assert not CHECKERS[name](expected, actual) or actual.split() == expected.split()
    assert time.process_time() - started < 5
