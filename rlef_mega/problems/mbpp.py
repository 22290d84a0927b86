"""MBPP (Austin et al. 2021): problems from the published `mbpp.jsonl` or `sanitized-mbpp.json`.

A row has `task_id`, `text` (`prompt` in the sanitized file), `code`, `test_list` of assert
statements, and `test_setup_code` and `challenge_test_list` (or `test_imports`). The first assert is
shown, in the prompt (RLEF C.5) and as feedback; all decide, including the challenge tests. A task
is kept only if its own solution passes its tests in the sandbox, where arguments and results are
passed by value: tests that need a class of the program, or complex numbers, fail there.
"""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt

from rlef_mega.problems.asserts import assert_test
from rlef_mega.problems.graded_rows import SOLUTION_FAILS, grade_solution, read_graded
from rlef_mega.problems.literals import parse_python
from rlef_mega.problems.rows import (
    FieldError,
    Parsed,
    Read,
    Row,
    SourceOptions,
    expect,
    expect_strings,
)
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import Limits, Sandbox

LIMITS = Limits(cpu_s=10.0)  # RLEF A.2
TASKS = {  # numbers of each split, as the authors and the Hugging Face copy have them
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}


class MBPPOptions(SourceOptions):
    """Which tasks to take, and how many of their tests to show."""

    split: Literal["prompt", "test", "validation", "train"] | None = None
    public_tests: NonNegativeInt = 1  # of `test_list`; the rest is private


def read(files: Sequence[Path], options: MBPPOptions, journal: Path) -> Iterator[Read]:
    """Yield the outcome of each task, in order; this runs the tasks' own solutions."""
    yield from read_graded(
        files, "task_id", journal, lambda row, sandbox: parse(row, options, sandbox)
    )


def parse(row: Row, options: MBPPOptions, sandbox: Sandbox) -> Parsed:
    """Return the problem of a task, or None and why it was dropped."""
    task = expect(row, "task_id", int)
    if options.split and task not in TASKS[options.split]:
        return None, [("left out: another split", "")]
    code = expect(row, "code", str)
    statements = expect_strings(row, "test_list")
    if not statements:
        return None, [("no tests", "")]
    setup = "\n".join(
        (*expect_strings(row, "test_imports"), expect(row, "test_setup_code", str, ""))
    )
    challenges = expect_strings(row, "challenge_test_list")
    called = functions_called(code, (*statements, *challenges, setup))
    if len(called) != 1:
        names = ", ".join(sorted(called)) or "none"
        return None, [("tests do not use exactly one name of the program", names)]
    (entry_point,) = called
    try:
        tests = [assert_test(text, entry_point, setup) for text in (*statements, *challenges)]
    except ValueError as error:
        raise FieldError(f"test_list: {error}") from None
    shown = min(options.public_tests, len(statements))
    problem = Problem(
        id=f"Mbpp/{task}",
        statement=expect(row, "prompt" if "prompt" in row else "text", str).strip(),
        public_tests=tuple(tests[:shown]),
        private_tests=PrivateTests(tuple(tests[shown:])),
        limits=LIMITS,
        template="mbpp",
        entry_point=entry_point,
        family="mbpp",
    )
    _, failure = grade_solution(problem, code, sandbox)
    return (None, [(SOLUTION_FAILS, failure)]) if failure else (problem, [])


def functions_called(code: str, tests: Sequence[str]) -> set[str]:
    """Return the names that the code defines and the tests use. Raises FieldError if either is not
    valid Python."""
    try:
        defined = {
            node.name
            for node in parse_python(code).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        return {
            node.id
            for test in tests
            for node in ast.walk(parse_python(test.strip()))
            if isinstance(node, ast.Name) and node.id in defined
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise FieldError(f"code, test_list: not valid Python ({error})") from None
