"""Mutants: programs that differ from a solution in one place."""

import ast

from rlef_mega.problems.mutants import mutants


def test_a_mutant_differs_in_one_place_and_parses():
    source = "def f(xs):\n n = 0\n for x in xs:\n  if x < 3:\n   n += 2\n return n"
    found = mutants(source, 99)
    original = ast.unparse(ast.parse(source)).splitlines()
    assert len(found) == 6 and len(set(found)) == 6  # 0, <, 3, +, 2, return
    for mutant in found:
        lines = mutant.splitlines()
        assert sum(a != b for a, b in zip(lines, original, strict=True)) == 1
    assert mutants(source, 2) == found[:2]
    assert mutants("def f(): pass", 3) == ()
