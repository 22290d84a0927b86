"""Make a test from an assert statement; its failure shows the values that were compared.

RLEF rewrites asserts to unittest calls (C.4, C.5). Here they become the comparison, and the message
that unittest would give for plain values, without importing unittest into every run.
"""

import ast

from rlef_mega.problems.literals import parse_python
from rlef_mega.types import AssertTest

# The operator of `left OP right`, and the message if it is false: unittest's, except for IsNot.
WORDS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Lt: ("<", "not less than"),
    ast.LtE: ("<=", "not less than or equal to"),
    ast.Gt: (">", "not greater than"),
    ast.GtE: (">=", "not greater than or equal to"),
    ast.In: ("in", "not found in"),
    ast.NotIn: ("not in", "unexpectedly found in"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is unexpectedly"),
}
# Shortened inside the run, because only the end of its stderr is kept.
SHOW = """\
def _show(value):
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        text = f"a value of type {type(value).__name__}, too long to show"
    return text if len(text) <= 2000 else text[:1000] + " ... " + text[-1000:]
"""


def assert_test(statement: str, entry_point: str, setup: str = "") -> AssertTest:
    """Return the test of one assert statement on `entry_point`; the code `setup` runs before it.

    Raises ValueError if the text is not exactly one assert statement.
    """
    node = parse_assert(statement)
    lines = [f"{entry_point} = candidate", *failing_comparison(node.test)]
    body = "\n".join(f"    {line}" for line in lines)
    code = "\n".join([*([setup.strip("\n")] if setup.strip() else []), SHOW])
    return AssertTest(
        entry_point, f"{code}\ndef check(candidate):\n{body}\n", statement=statement.strip()
    )


def parse_assert(statement: str) -> ast.Assert:
    try:
        body = parse_python(statement.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{statement[:80]!r} is not valid Python: {error}") from None
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise ValueError(f"{statement[:80]!r} is not one assert statement")
    return body[0]


def failing_comparison(condition: ast.expr) -> list[str]:
    """Return lines of code that raise AssertionError with the values if the condition is false."""
    match condition:
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            sign, words = WORDS[type(operator)]
            return [
                f"_left, _right = ({ast.unparse(left)}), ({ast.unparse(right)})",
                f"if not (_left {sign} _right):",
                f"    raise AssertionError(_show(_left) + ' {words} ' + _show(_right))",
            ]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            sign, words, value = "", "is not false", operand
        case _:
            sign, words, value = "not ", "is not true", condition
    return [
        f"_value = ({ast.unparse(value)})",
        f"if {sign}_value:",
        f"    raise AssertionError(_show(_value) + ' {words}')",
    ]
