"""Function-call problems: how values are encoded and how they compare."""

from __future__ import annotations

import enum
import math
from decimal import Decimal
from fractions import Fraction

import pytest

from rlef_sandbox import CallTest, Sandbox, Status, values

VALUES = [
    None,
    True,
    -5,
    10**50,
    0.5,
    math.inf,
    "text \u00e9 \ud800",
    b"bytes",
    [1, [2, "x"]],
    (1, (2,)),
    {"a": 1, 2: (3,)},
    {1, 2},
    frozenset({(1, 2)}),
    [Fraction(1, 3), Decimal("1.10")],
    {Fraction(1, 2): {Decimal("1e3"), Fraction(10**30, 7)}},
    {},
    {"tuple": [1]},
]


class Text(str, enum.Enum):  # noqa: UP042 - its `str` is not its value
    X = "x"


class Number(enum.IntEnum):
    SEVEN = 7


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_survives_encoding_and_matches_itself(value: object) -> None:
    assert values.decode(values.encode(value)) == value
    assert values.matches(value, values.encode(value))


@pytest.mark.parametrize(
    ("expected", "returned", "accepted"),
    [
        (1, True, True),
        (True, 1, True),
        (True, 0, False),
        (2, True, False),
        (1, 1.0, True),
        (1.0, 1, True),
        (0.1 + 0.2, 0.3, True),
        (1, 1.0000001, False),
        (0.5, math.nan, False),
        (math.nan, math.nan, True),
        (math.inf, math.inf, True),
        (math.inf, 1e308, False),
        (0.5, 10**400, False),
        ([1, 2], (1, 2), True),
        ((1, 2), [1, 2], False),
        ([1, 2], [1, 2, 3], False),
        ([1.0], [1.0000000001], True),
        ({1, 2}, {1, 3}, False),
        ({1, 2}, [1, 2], False),
        ({1}, frozenset({1}), True),
        ({"a": 0.3}, {"a": 0.1 + 0.2}, True),
        ({"a": 1}, {"b": 1}, False),
        ({1: "x"}, {True: "x"}, True),
        ({(1, 2)}, {(True, 2)}, True),
        ({(1, 2)}, {(1.0, 2)}, True),
        ({frozenset({1})}, {frozenset({1.5})}, False),
        ({0.0}, {-0.0}, True),
        ({math.nan}, {math.nan}, True),
        (0.5, Fraction(1, 2), True),
        (2, Fraction(4, 2), True),
        (10**20 + 1, Decimal(10**20 + 1), True),
        (0.5, Decimal("NaN"), False),
        ({0.5}, {Fraction(1, 2)}, True),
        (Fraction(1, 3), Fraction(2, 6), True),
        (Fraction(1, 3), 1 / 3, False),
        (1 / 3, Fraction(1, 3), True),
        (Fraction(2), 2, True),
        (Fraction(1, 2), Decimal("0.5"), False),
        (Decimal("0.5"), Decimal("0.50"), True),
        (Decimal("0.5"), 0.5, True),
        (Decimal("0.1"), 0.1, False),
        (Decimal("0.1"), Decimal("0.2"), False),
        (Decimal("NaN"), Decimal("NaN"), True),
        (Decimal("Infinity"), math.inf, True),
        (Decimal("1e9999"), Decimal("10e9998"), True),
        (5, Decimal("1e999999999"), False),
        (5, Decimal("sNaN"), False),
        ({Fraction(2), Decimal("0.5")}, {2, 0.5}, True),
        ({Fraction(1, 3)}, {Fraction(1, 3)}, True),
        ({Decimal("1e999999999")}, {Decimal("1e999999998")}, False),
        ("x", Text.X, True),
        ("Text.X", Text.X, False),
        (7, Number.SEVEN, True),
        ("1", 1, False),
        (None, False, False),
        ("", None, False),
    ],
)
def test_values_compare_as_python_does_with_a_tolerance_for_floats(
    expected: object, returned: object, accepted: bool
) -> None:
    assert values.matches(expected, values.encode(returned)) is accepted


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"{}",
        b'{"tuple": 1}',
        b'{"int": "zz"}',
        b'{"dict": [[1]]}',
        b'{"dict": [[[1], 2]]}',
        b'{"set": [[1]]}',
        b'{"bytes": 5}',
        b'{"decimal": "x"}',
        b'{"decimal": 1}',
        b'{"fraction": [1]}',
        b'{"fraction": [1, 0]}',
        b'{"fraction": [1.0, 1]}',
        b'{"fraction": [{"fraction": [1, 1]}, 1]}',
        b'{"set": [{"fraction": [true, 1]}]}',
        b'{"a": 1, "b": 2}',
        b"[" * 100_000,
        b"9" * 10_000,
        b"\xff",
        b'{"set": [{"nothing": [1]}]}',
    ],
)
@pytest.mark.parametrize("expected", [1, (1,), {1}, {1: 2}, b"x", [[1]]], ids=repr)
def test_a_malformed_value_is_a_wrong_answer(expected: object, wire: bytes) -> None:
    assert values.matches(expected, wire) is False


def test_a_function_gets_its_arguments_and_its_result_is_judged(sandbox: Sandbox) -> None:
    source = "def solve(a, b): return [a, tuple(b), {'k': a}]"
    (result,) = sandbox.grade(source, [CallTest("solve", (1, [2]), [1, (2,), {"k": 1}])])
    assert (result.status, result.returned) == (Status.OK, "[1, (2,), {'k': 1}]")


def test_fractions_and_decimals_cross_as_what_they_are(sandbox: Sandbox) -> None:
    given = (Fraction(1, 3), Decimal("0.10"))
    source = "def f(a, b): return [a / 2, b / 3, type(a).__name__, type(b).__name__, str(b)]"
    expected = [Fraction(1, 6), Decimal("0.10") / 3, "Fraction", "Decimal", "0.10"]
    (result,) = sandbox.grade(source, [CallTest("f", given, expected)])
    assert result.status is Status.OK, result


def test_a_method_is_called_on_a_fresh_object(sandbox: Sandbox) -> None:
    source = "class Solution:\n    def twice(self, n): return 2 * n"
    tests = [CallTest("Solution.twice", (2,), 4), CallTest("Solution.twice", (3,), 6)]
    assert [r.status for r in sandbox.grade(source, tests)] == [Status.OK] * 2


def test_a_wrong_return_is_shown(sandbox: Sandbox) -> None:
    (result,) = sandbox.grade("def f(): return {'a': 1}", [CallTest("f", (), 2)])
    assert (result.status, result.returned) == (Status.WRONG_ANSWER, "{'a': 1}")


@pytest.mark.parametrize(
    "source",
    ["def f(): raise ValueError('x')", "def g(): pass", "def f(n): pass", "f = 5", "exit(1)"],
)
def test_a_call_that_fails_is_a_runtime_error(sandbox: Sandbox, source: str) -> None:
    (result,) = sandbox.grade(source, [CallTest("f", (), None)])
    assert result.status is Status.RUNTIME_ERROR
    assert "rlef_sandbox" not in result.stderr.decode()


def test_the_main_guard_does_not_run_where_a_function_is_called(sandbox: Sandbox) -> None:
    source = "def f(): return 1\nif __name__ == '__main__': raise SystemExit(1)"
    assert sandbox.grade(source, [CallTest("f", (), 1)])[0].status is Status.OK


def test_arguments_that_are_not_plain_data_are_refused(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match=r"CallTest\.args of f"):
        sandbox.grade("def f(x): pass", [CallTest("f", (object(),), 1)])
    assert sandbox.run("print(1)").status is Status.OK


def test_an_integer_too_long_to_print_is_judged(sandbox: Sandbox) -> None:
    """An input of HumanEval+ has such an answer."""
    (result,) = sandbox.grade("def f(): return 10 ** 5000", [CallTest("f", (), 10**5000)])
    assert result.status is Status.OK
