"""Wrong programs made from right ones, for supervised dialogues about functions.

A mutant differs from the solution in one comparison, operator or number, or returns nothing. Most
mutants are wrong; the sandbox decides which.
"""

import ast
from collections.abc import Iterator
from typing import Any

SWAPS: tuple[tuple[type[ast.AST], type[ast.AST]], ...] = (
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.In, ast.NotIn),
    (ast.And, ast.Or),
    (ast.Add, ast.Sub),
)
OTHER: dict[type[ast.AST], type[ast.AST]] = {
    **dict(SWAPS),
    **{after: before for before, after in SWAPS},
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}


def mutants(source: str, count: int = 2) -> tuple[str, ...]:
    """Return the first `count` distinct mutants of a solution, in the order of the syntax tree."""
    tree = ast.parse(source)
    texts = [ast.unparse(ast.fix_missing_locations(changed)) for changed in changes(tree)]
    return tuple(text for text in dict.fromkeys(texts) if text != ast.unparse(tree))[:count]


def changes(part: Any) -> Iterator[Any]:
    """Yield copies of a part of a syntax tree, each with one change."""
    if isinstance(part, list):
        for at, child in enumerate(part):
            yield from ([*part[:at], new, *part[at + 1 :]] for new in changes(child))
    elif type(part) in OTHER:
        yield OTHER[type(part)]()
    elif isinstance(part, ast.Constant):
        if isinstance(part.value, int | float) and not isinstance(part.value, bool):
            yield ast.Constant(part.value + 1)
    elif isinstance(part, ast.AST):
        fields = dict(ast.iter_fields(part))
        for name in fields:
            yield from (type(part)(**{**fields, name: new}) for new in changes(fields[name]))
        if isinstance(part, ast.Return) and part.value is not None:
            yield ast.Return(None)
