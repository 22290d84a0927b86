"""Wrong programs made from right ones, for supervised dialogues about functions.

A mutant differs from the solution in one comparison, operator or number, or returns nothing. Most
mutants are wrong; the sandbox decides which.
"""

import ast
import itertools

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


class ChangeOne(ast.NodeTransformer):
    """Changes the node with this number, counting changeable nodes in the order of the walk."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.changed = False

    def here(self) -> bool:
        """Count one changeable node. Returns whether it is the one to change."""
        self.left -= 1
        self.changed |= self.left == -1
        return self.left == -1

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        value = node.value
        if isinstance(value, int | float) and not isinstance(value, bool) and self.here():
            return ast.Constant(value + 1)
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        if node.value is not None and self.here():
            return ast.Return(None)
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if type(node) in OTHER and self.here():
            return OTHER[type(node)]()
        return super().generic_visit(node)


def mutants(source: str, count: int = 2) -> tuple[str, ...]:
    """Return the first `count` distinct mutants of a solution, in the order of the walk."""
    original = ast.unparse(ast.parse(source))
    found: list[str] = []
    for number in itertools.count():
        change = ChangeOne(number)
        mutant = ast.unparse(ast.fix_missing_locations(change.visit(ast.parse(source))))
        if not change.changed or len(found) == count:
            break
        if mutant != original and mutant not in found:
            found.append(mutant)
    return tuple(found)
