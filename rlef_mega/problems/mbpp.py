"""MBPP (Austin et al. 2021): the published `mbpp.jsonl` or `sanitized-mbpp.json` to problems.

A row has `task_id`, `text` (`prompt` in the sanitized file), `code`, `test_list` of assert
statements, and `test_setup_code` and `challenge_test_list` (or `test_imports`). The first assert is
shown, in the prompt as RLEF C.5 does and as feedback; all decide, the challenge tests too. A task
is kept only if its own solution passes its tests in the sandbox, where calls cross by value: what
needs a class of the program, or complex numbers, does not.
"""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlef_mega.problems.asserts import assert_test
from rlef_mega.problems.mutants import mutants
from rlef_mega.problems.rows import FieldError, Parsed, Read, Row, expect, read_each
from rlef_mega.types import AssertTest, PrivateTests, Problem
from rlef_sandbox import CheckTest, Limits, Sandbox, Status

LIMITS = Limits(cpu_s=10.0)  # RLEF A.2
WRONG_PROGRAMS = 2
COLUMNS = (
    "task_id",
    "text",
    "prompt",
    "code",
    "test_list",
    "test_setup_code",
    "test_imports",
    "challenge_test_list",
)
SPLITS = {  # by the tasks' numbers, as the authors and the Hugging Face copy cut them
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}


@dataclass(frozen=True)
class Options:
    """What to take, and how much of it to show."""

    split: Literal["", "prompt", "test", "validation", "train"] = ""
    public_tests: int = 1  # of `test_list`; the rest is private


def read(files: Sequence[Path], options: Options) -> Iterator[Read]:
    """What came of each task, in order; the solutions are run on the way."""
    with Sandbox(workers=1) as sandbox:
        yield from read_each(files, COLUMNS, lambda row: parse(row, options, sandbox))


def parse(row: Row, options: Options, sandbox: Sandbox) -> Parsed:
    task = expect(row, "task_id", int)
    if options.split and task not in SPLITS[options.split]:
        return None, [("left out: another split", "")]
    code = expect(row, "code", str)
    statements = texts(row, "test_list")
    if not statements:
        return None, [("no tests", "")]
    setup = "\n".join((*texts(row, "test_imports"), expect(row, "test_setup_code", str, "") or ""))
    challenges = texts(row, "challenge_test_list")
    called = functions_called(code, (*statements, *challenges, setup))
    if len(called) != 1:
        names = ", ".join(sorted(called)) or "none"
        return None, [("tests use another number of the program's names than one", names)]
    (entry_point,) = called
    try:
        tests = [assert_test(text, entry_point, setup) for text in (*statements, *challenges)]
    except ValueError as error:
        raise FieldError(f"test_list: {error}") from None
    failure = failure_of(code, tests, sandbox)
    if failure:
        return None, [("its own solution fails its tests", failure)]
    shown = options.public_tests
    problem = Problem(
        id=f"Mbpp/{task}",
        statement=expect(row, "prompt" if "prompt" in row else "text", str).strip(),
        public_tests=tuple(tests[: min(shown, len(statements))]),
        private_tests=PrivateTests(tuple(tests[min(shown, len(statements)) :])),
        limits=LIMITS,
        template="mbpp",
        entry_point=entry_point,
        family="mbpp",
        wrong_programs=mutants(code, WRONG_PROGRAMS),
    )
    return problem, []


def texts(row: Row, key: str) -> tuple[str, ...]:
    values: list[Any] = expect(row, key, list, None) or []
    if not all(isinstance(value, str) for value in values):
        raise FieldError(f"{key}: {str(values)[:80]!r} holds something else than strings")
    return tuple(values)


def functions_called(code: str, tests: Sequence[str]) -> set[str]:
    """What the code defines and the tests use. FieldError where either does not parse."""
    try:
        defined = {
            node.name
            for node in ast.parse(code).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        return {
            node.id
            for test in tests
            for node in ast.walk(ast.parse(test.strip()))
            if isinstance(node, ast.Name) and node.id in defined
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise FieldError(f"code, test_list: no Python ({error})") from None


def failure_of(code: str, tests: Sequence[AssertTest], sandbox: Sandbox) -> str:
    """How the solution fails; empty if it passes. RuntimeError where the sandbox did not run it."""
    checks = [CheckTest(test.entry_point, test.code) for test in tests]
    *_, last = sandbox.grade(code, checks, limits=LIMITS)
    said = last.stderr.decode(errors="replace").strip().rpartition("\n")[2][:200]
    if last.status is Status.SANDBOX_ERROR and "CheckTest is broken" not in said:
        raise RuntimeError(f"the sandbox failed on {tests[0].statement!r}: {said}")
    return "" if last.status is Status.OK else f"{last.status} {said}"
