"""CodeContests (Li et al. 2022): rows in the published column shape, as JSON Lines, to problems.

Columns read: `name`, `description`, `public_tests`, `private_tests`, `generated_tests` (each
{"input": [...], "output": [...]}), `time_limit` ({"seconds", "nanos"} or null),
`memory_limit_bytes`, `input_file`, `output_file`, `cf_tags`. Others (solutions, ratings) are passed
over. Private and generated tests together decide the reward; public ones are shown.
`datasets.load_dataset("deepmind/code_contests", split=...).to_json(FILE)` writes such a file.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from rlef_mega.problems.jsonl import FieldError, expect, read_rows
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import Limits, Test

DEFAULT_TIME_S = 10.0  # RLEF A.2, as is the memory
DEFAULT_MEMORY_BYTES = 1 << 30
LEAST_MEMORY_BYTES = 64 << 20  # below it CPython itself has little room


def read_codecontests(path: str | Path) -> tuple[list[Problem], Counter[str]]:
    """Problems in the order of the file, and how many were dropped for which reason."""
    problems: list[Problem] = []
    drops: Counter[str] = Counter()
    line_of: dict[str, int] = {}
    for number, row in read_rows(Path(path)):
        try:
            outcome = parse_row(row)
        except FieldError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if isinstance(outcome, str):
            drops[outcome] += 1
            continue
        if outcome.id in line_of:
            raise ValueError(
                f"{path}, line {number}: name: {outcome.id!r} is also that of line "
                f"{line_of[outcome.id]}; remove one"
            )
        line_of[outcome.id] = number
        problems.append(outcome)
    if not problems:
        raise ValueError(
            f"{path}: holds no problem that can be graded ({dict(drops) or 'no rows'})"
        )
    return problems, drops


def parse_row(row: dict[str, Any]) -> Problem | str:
    """The problem, or why it is dropped."""
    public = parse_tests(row, "public_tests")
    private = parse_tests(row, "private_tests") + parse_tests(row, "generated_tests")
    if not public and not private:
        return "no tests"
    if row.get("input_file") or row.get("output_file"):
        return "reads or writes a file instead of standard input and output"
    return Problem(
        id=expect(row, "name", str),
        statement=expect(row, "description", str),
        public_tests=public,
        private_tests=PrivateTests(private),
        limits=parse_limits(row),
        checker="codecontests",  # its own rule: reference outputs differ in case, or as 20.0
        template="codecontests",
        family="codecontests",
        tags=tuple(tag for tag in expect(row, "cf_tags", list, []) if tag),
    )


def parse_tests(row: dict[str, Any], column: str) -> tuple[Test, ...]:
    tests = expect_column(row, column)
    inputs, outputs = (expect(tests, side, list, []) for side in ("input", "output"))
    if len(inputs) != len(outputs):
        raise FieldError(f"{column}: {len(inputs)} inputs but {len(outputs)} outputs")
    for text in (*inputs, *outputs):
        if not isinstance(text, str):
            raise FieldError(f"{column}: {text!r} is no string")
    return tuple(map(Test, inputs, outputs))


def expect_column(row: dict[str, Any], column: str) -> dict[str, Any]:
    if column not in row:
        raise FieldError(
            f"{column}: missing; the published columns public_tests, private_tests and "
            "generated_tests are needed"
        )
    if not isinstance(row[column], dict):
        raise FieldError(f"{column}: {str(row[column])[:80]!r} is no object of input and output")
    return row[column]


def parse_limits(row: dict[str, Any]) -> Limits:
    """The problem's own limits where given (0 and null: not given)."""
    time_limit = expect(row, "time_limit", dict, None) or {}
    seconds, nanos = (expect(time_limit, unit, int, 0) for unit in ("seconds", "nanos"))
    memory_bytes = expect(row, "memory_limit_bytes", int, None) or DEFAULT_MEMORY_BYTES
    try:
        return Limits(
            cpu_s=seconds + nanos / 1e9 or DEFAULT_TIME_S,
            memory_bytes=max(memory_bytes, LEAST_MEMORY_BYTES),
        )
    except ValueError as error:
        raise FieldError(f"time_limit: {error}") from None
