"""Wrong programs out of right ones, where a data set has solutions but no incorrect ones: what
random feedback is made from (RLEF C.2).

A mutant differs from the solution in one comparison, operator or number, or returns nothing. Most
are wrong; which are is for the sandbox to say.
"""

import ast
import itertools

OTHER: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}


class ChangeOne(ast.NodeTransformer):
    """Changes the place of this number, in the order of the walk."""

    def __init__(self, place: int) -> None:
        self.left = place
        self.changed = False

    def here(self) -> bool:
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


def mutants(source: str, count: int) -> tuple[str, ...]:
    """The first `count` of a solution that parses, in the order of its places, without
    repetition."""
    original = ast.unparse(ast.parse(source))
    found: list[str] = []
    for place in itertools.count():
        change = ChangeOne(place)
        mutant = ast.unparse(ast.fix_missing_locations(change.visit(ast.parse(source))))
        if not change.changed or len(found) == count:
            return tuple(found)
        if mutant != original and mutant not in found:
            found.append(mutant)
    raise AssertionError("unreachable")
