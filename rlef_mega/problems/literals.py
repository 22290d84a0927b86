"""Values as text in problem files and in programs: Python literals and JSON.

`int` and `repr` refuse integers of more than 4,300 decimal digits, a limit for untrusted text.
Problems have longer ones.
"""

import ast
import io
import json
import re
import tokenize
from decimal import Decimal
from typing import Any

from rlef_sandbox.code_check import fault_of
from rlef_sandbox.values import MOST_EQUAL_HASHES, refuse_collisions

MAX_DIGITS = 4300  # that `int` and `repr` convert
MOST_DIGITS = 50_000  # read here, as in LiveCodeBench's grader; the time is quadratic
PARSED_CHARACTERS = 64 << 10
F_STRING = re.compile(r"""\b[rR]?[fF][rR]?['"]""")
LONG_INTEGER = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")


def to_literal(value: object) -> str:
    """Return plain data as a Python literal. Long integers are written in hexadecimal."""
    try:
        return repr(value)
    except ValueError:  # it is, or contains, a long integer
        pass
    if isinstance(value, int):
        return hex(value)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{to_literal(k)}: {to_literal(v)}' for k, v in value.items())}}}"
    assert isinstance(value, list | tuple | set), type(value)
    brackets = {list: "[]", tuple: "()", set: "{}"}[type(value)]
    return brackets[0] + "".join(f"{to_literal(item)}, " for item in value) + brackets[1]


def python_literal(text: str) -> Any:
    """Evaluate a Python literal as `ast.literal_eval` does, but also the names `inf` and `nan`, and
    integers of more than `MAX_DIGITS` digits.

    Raises the errors of `ast.literal_eval`, mostly ValueError and SyntaxError, for any other text.
    """
    if LONG_INTEGER.search(text):
        text = with_short_integers(text)
    tree = parse_python(text.strip(), mode="eval")
    if "inf" in text or "nan" in text:
        tree = NotFinite().visit(tree)
    for node in ast.walk(tree) if "{" in text else ():
        members = getattr(node, "elts" if isinstance(node, ast.Set) else "keys", ())
        if len(members) > MOST_EQUAL_HASHES:
            refuse_collisions([ast.literal_eval(member) for member in members])
    return ast.literal_eval(tree)


def parse_python(text: str, mode: str = "exec") -> Any:
    """Parse the Python code of a data set. Raises the errors of `ast.parse`.

    Until Python 3.12 an f-string with many fields takes quadratic time, so long code with
    one is first compiled in a child process with limits.
    """
    may_be_slow = len(text) > PARSED_CHARACTERS and F_STRING.search(text)
    if may_be_slow and (fault := fault_of(text.encode())):
        raise ValueError(fault)
    return ast.parse(text, mode=mode)


def with_short_integers(text: str) -> str:
    """Return the source with its long integers in hexadecimal, and without its own spacing."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text.strip()).readline))
    except tokenize.TokenError as error:
        raise ValueError(str(error)) from None
    return tokenize.untokenize(
        (kind, hex(integer(word)) if LONG_INTEGER.fullmatch(word[: MAX_DIGITS + 1]) else word)
        for kind, word, *_ in tokens
    )


class NotFinite(ast.NodeTransformer):
    """Replaces the names inf and nan with floats."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float(node.id)) if node.id in ("inf", "nan") else node


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError or RecursionError if it is malformed."""
    return json.loads(text, parse_int=integer)


def integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits; at most {MOST_DIGITS:,} are read")
    return int(digits) if len(digits) <= MAX_DIGITS else int(Decimal(digits))
