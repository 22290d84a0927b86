"""Values passed between processes: generated ones, and wire forms that our encoder never writes."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlef_sandbox import values

floats = st.floats() | st.sampled_from([0.0, -0.0, 1.0, 1e308, math.inf])
integers = st.integers() | st.integers(-2, 2) | st.integers(2**62, 2**65)
texts = st.text(st.characters(exclude_categories=())) | st.sampled_from(["", "true", "\ud800"])
atoms = st.none() | st.booleans() | integers | floats | texts | st.binary(max_size=8)
# No NaN as a key or a member: in Python two NaNs are two different keys.
key_atoms = atoms.filter(lambda value: not (isinstance(value, float) and math.isnan(value)))
keys = st.recursive(
    key_atoms,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
plain = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(keys, max_size=4)
        | st.frozensets(keys, max_size=4)
    ),
    max_leaves=12,
)
# Wire forms as an attacker writes them: tags known and not, bodies of the wrong type.
tags = st.sampled_from(["int", "bytes", "tuple", "set", "frozenset", "dict", "list", "float", "x"])
wires = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["0x1", "-0x0", "zz", "00ff", "1_0", " 1"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(tags, inner, min_size=1, max_size=1)
        | st.dictionaries(tags, inner, max_size=2)
        | st.lists(st.lists(inner, min_size=2, max_size=2), max_size=3).map(lambda p: {"dict": p})
    ),
    max_leaves=10,
)


def same(expected: object, actual: object) -> bool:
    """Return whether the documented rule accepts one Python value for another."""
    if expected is None or actual is None:
        return expected is actual
    if isinstance(expected, float) and isinstance(actual, int | float):
        if math.isnan(expected):
            return math.isnan(actual)
        try:
            return math.isclose(expected, actual, rel_tol=1e-6, abs_tol=1e-6)
        except OverflowError:
            return False
    if isinstance(expected, int):
        return isinstance(actual, int | float) and expected == actual
    if isinstance(expected, list):
        return isinstance(actual, list | tuple) and all_same(expected, actual)
    if isinstance(expected, set | frozenset):
        if not isinstance(actual, set | frozenset):
            return False
        return sorted(map(exactly, expected)) == sorted(map(exactly, actual))
    if type(expected) is not type(actual):
        return False
    if isinstance(expected, tuple):
        return all_same(expected, actual)
    if isinstance(expected, dict):
        wanted = {exactly(key): value for key, value in expected.items()}
        got = {exactly(key): value for key, value in actual.items()}
        return wanted.keys() == got.keys() and all(same(wanted[k], got[k]) for k in wanted)
    return expected == actual


def all_same(expected, actual) -> bool:  # type: ignore[no-untyped-def]
    return len(expected) == len(actual) and all(map(same, expected, actual))


def exactly(key: object) -> str:
    """Return a text that is the same for two keys if Python calls them equal, or both are NaN, also
    inside tuples and frozensets."""
    if isinstance(key, frozenset):
        return f"frozenset({sorted(map(exactly, key))})"
    if isinstance(key, tuple):
        return f"tuple({list(map(exactly, key))})"
    if isinstance(key, int | float):
        return f"number({Fraction(key) if math.isfinite(key) else key})"
    return f"{type(key).__name__}({key!r})"


def types_of(value: object) -> object:
    if isinstance(value, dict):
        return "dict", [(types_of(k), types_of(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [types_of(item) for item in value]
    return type(value).__name__


@given(plain)
@settings(max_examples=100, deadline=None)
def test_a_value_comes_back_as_it_went(value: object) -> None:
    back = values.decode(values.encode(value))
    assert repr(back) == repr(value) or back == value
    assert types_of(back) == types_of(value)


@given(plain)
@settings(max_examples=100, deadline=None)
def test_a_value_matches_itself(value: object) -> None:
    assert values.matches(value, values.encode(value))


@given(plain, plain)
@settings(max_examples=150, deadline=None)
def test_two_values_match_where_the_rule_says_so(expected: object, actual: object) -> None:
    assert values.matches(expected, values.encode(actual)) is same(expected, actual)


@given(plain, st.data())
@settings(max_examples=100, deadline=None)
def test_a_value_close_to_the_expected_one_is_judged_by_the_rule(
    expected: object, data: st.DataObject
) -> None:
    """One leaf is another, a number is slightly different, or a list is a tuple."""
    actual = mutated(expected, data)
    assert values.matches(expected, values.encode(actual)) is same(expected, actual)


def mutated(value: object, data: st.DataObject) -> object:
    if isinstance(value, list | tuple) and value:
        index = data.draw(st.integers(0, len(value) - 1))
        items = [*value]
        items[index] = mutated(items[index], data)
        return data.draw(st.sampled_from([list, tuple]))(items)
    if isinstance(value, dict) and value:
        key = data.draw(st.sampled_from(sorted(value, key=repr)))
        return {**value, key: mutated(value[key], data)}
    if isinstance(value, float):
        return value + data.draw(st.sampled_from([0.0, 1e-7, 1e-3, value * 1e-7]))
    if isinstance(value, int):
        return data.draw(st.sampled_from([float(value % 1000), value + 1, bool(value % 2), value]))
    return data.draw(atoms)


@given(plain, st.binary(max_size=40) | wires.map(lambda wire: json.dumps(wire).encode()))
@settings(max_examples=150, deadline=None)
def test_a_hostile_wire_form_is_judged_and_never_passes_as_another_value(
    expected: object, wire: bytes
) -> None:
    if values.matches(expected, wire):
        assert same(expected, values.decode(wire))


@given(st.binary(max_size=60) | wires.map(lambda wire: json.dumps(wire).encode()))
@settings(max_examples=150, deadline=None)
def test_a_malformed_wire_form_is_a_value_error(wire: bytes) -> None:
    with contextlib.suppress(ValueError):
        values.parse(wire)


@given(wires, st.integers(0, 200), st.binary(max_size=3))
@settings(max_examples=100, deadline=None)
def test_a_wire_form_with_bytes_replaced_is_judged(wire: object, place: int, patch: bytes) -> None:
    text = json.dumps(wire).encode()
    place %= len(text)
    assert values.matches([1], text[:place] + patch + text[place + 1 :]) in (True, False)


M = 2**61 - 1  # Python hashes an integer modulo this
EXPECTED = {frozenset(range(5000)), (1, 2)}
MANY = 40_000
HOSTILE = {
    "brackets": b"[" * 10**6,
    "objects": b'{"tuple":[' * 10**5,
    "brackets_in_strings": b'["' + b"[" * 10**6 + b'"]',
    "quotes": b'"\\"' * 10**5 + b"[" * 1000,
    "backslashes": b"[" * 1000 + b'"' + b"\\" * 10**6,
    "strings_left_open": b'"["' * 10**5,
    "a_long_integer": b"9" * 10**6,
    "a_long_float": b"0." + b"9" * 10**6,
    "a_long_hexadecimal": b'{"int":"' + b"f" * 10**6 + b'"}',
    "colliding_members": json.dumps({"set": [{"int": hex(i * M)} for i in range(MANY)]}).encode(),
    "colliding_members_within": json.dumps(
        {"set": [{"frozenset": [{"int": hex(i * M)} for i in range(MANY)]}] * 2}
    ).encode(),
    "colliding_keys": json.dumps(
        {"dict": [[{"int": hex(i * M)}, 1] for i in range(MANY)]}
    ).encode(),
    "colliding_floats": json.dumps({"set": [2.0**61 * i for i in range(MANY)]}).encode(),
    "tuples_of_tuples": b'{"set":[' + b'{"tuple":[' * 200 + b"]}" * 200 + b"]}",
    "equal_members": json.dumps({"set": [1] * MANY}).encode(),
    "zeros": b'{"set":[' + b"0," * MANY + b"0]}",
}


@pytest.mark.parametrize("wire", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_wire_form_takes_no_quadratic_time(wire: bytes) -> None:
    """Against values long enough that the wire form is not refused by its length alone."""
    for expected in ({*range(MANY)}, {n: n for n in range(MANY)}, EXPECTED, "x" * 20_000):
        started = time.process_time()
        assert values.matches(expected, wire) is False
        assert time.process_time() - started < 5


def test_a_long_answer_to_a_short_question_costs_no_memory() -> None:
    """Parsed, these 16 MB would be a gigabyte."""
    wire = b"[" + b"[]," * (5 << 20) + b"[]]"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert values.matches([[]], wire) is False
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_deep_nesting_crashes_no_process_with_a_high_recursion_limit() -> None:
    """In a process of its own, which the parser of the standard library would crash."""
    script = (
        "import sys; sys.setrecursionlimit(10**6)\n"
        "from rlef_sandbox import values\n"
        "for wire in (b'[' * 10**6, b'{\"tuple\":[' * 10**5, b'[' * 10**6 + b']' * 10**6):\n"
        "    assert values.matches([[1]], wire) is False\n"
        "    try: values.parse(wire)\n"
        "    except ValueError: continue\n"
        "    raise AssertionError(wire[:9])"
    )
    path = str(Path(values.__file__).parents[1])
    ended = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": path}, check=False)
    assert ended.returncode == 0
