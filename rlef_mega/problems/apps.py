"""APPS (Hendrycks et al. 2021) and TACO (Li et al. 2023): problems from rows of the published JSON
Lines or Parquet files.

Both have `question`, `starter_code`, `difficulty`, `url`, and `solutions` and `input_output`, which
are JSON as text. `input_output` holds `inputs` and `outputs` of programs, or arguments and results
of the function `fn_name`. APPS has `problem_id` (`id` in the authors' files). TACO has no id, but
`source`, `time_limit` and `memory_limit` ("2.0 seconds", "256.0 megabytes").
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt

from rlef_mega.problems.codecontests import DEFAULT_TIME_S, to_limits
from rlef_mega.problems.graded_rows import SOLUTION_FAILS, grade_solution, read_graded
from rlef_mega.problems.livecodebench import PRELUDE, from_json
from rlef_mega.problems.rows import (
    FieldError,
    Parsed,
    Read,
    Row,
    SourceOptions,
    TimeFactor,
    Words,
    expect,
    read_each,
    without_enormous,
)
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import CallTest, Limits, Sandbox, Test

APPS_TIME_S = 4.0  # of a test, in its grader
AMOUNT = re.compile(r"(\d+(?:\.\d+)?) ?(milliseconds?|seconds?|kilobytes?|megabytes?|gigabytes?)")
UNITS = {"millisecond": 1e-3, "second": 1, "kilobyte": 1 << 10, "megabyte": 1 << 20}
COLUMNS = (
    "problem_id id question starter_code input_output difficulty url source time_limit memory_limit"
)


class AppsOptions(SourceOptions):
    """Which rows and tests to take. Rows that are left out are counted."""

    split: str = ""  # train or test: the prefix of a folder's file names
    difficulties: Words = ()  # introductory, ... of APPS; easy, ... of TACO; empty: all
    sources: Words = ()  # of TACO: codeforces, codechef, ...; empty: all
    public_tests: NonNegativeInt = 1  # the first tests are shown; all decide
    max_tests: NonNegativeInt = 0  # 0: all
    max_test_bytes: NonNegativeInt = 8 << 20
    time_factor: TimeFactor = 1.0
    graded_solutions: NonNegativeInt = 0  # how many of the shortest are run; one must pass


def read(files: Sequence[Path], options: AppsOptions, journal: Path) -> Iterator[Read]:
    """Yield the outcome of each row, in order; this runs solutions if the options ask for it."""
    if options.graded_solutions:
        yield from read_graded(
            files, "url", journal, lambda row, sandbox: graded(row, options, sandbox)
        )
    else:
        yield from read_each(files, "url", lambda row, _: parse(row, options), COLUMNS.split())


def graded(row: Row, options: AppsOptions, sandbox: Sandbox) -> Parsed:
    """Return the problem of a row if it has no solutions, or if one of its shortest passes."""
    problem, lost = parse(row, options)
    solutions = sorted(map(str, from_json(row.get("solutions") or "[]", "solutions")), key=len)
    if problem is None or not solutions:
        return problem, lost
    for solution in solutions[: options.graded_solutions]:
        _, failure = grade_solution(problem, solution, sandbox)
        if not failure:
            return problem, lost
    return None, [*lost, (SOLUTION_FAILS, failure)]


def parse(row: Row, options: AppsOptions) -> Parsed:
    """Return the problem of a row, and what was dropped and why."""
    question, source = expect(row, "question", str), str(row.get("source") or "apps").lower()
    difficulty = str(row.get("difficulty") or "").lower()
    for name, value, wanted in (
        ("difficulty", difficulty, options.difficulties),
        ("source", source, options.sources),
    ):
        if wanted and value not in wanted:
            return None, [(f"left out: {name} {value}", "")]
    tests, lost = without_enormous(parse_tests(row), "all", options.max_test_bytes)
    tests = tests[: options.max_tests or None]
    if not tests:
        return None, [*lost, ("no tests", "")]
    statement = question.strip()
    if starter := expect(row, "starter_code", str, None):
        statement += f"\n\nComplete this code:\n\n{starter}"
    entry_point = tests[0].entry_point if isinstance(tests[0], CallTest) else None
    problem = Problem(
        id=id_of(row, question),
        statement=statement,
        public_tests=tests[: options.public_tests],
        private_tests=PrivateTests(tests[options.public_tests :]),
        limits=parse_limits(row, options.time_factor),
        template="codecontests",
        entry_point=entry_point,
        prelude=PRELUDE,  # LiveCodeBench's grader is derived from APPS'
        family=source,
        difficulty=difficulty,
    )
    return problem, lost


def id_of(row: Row, question: str) -> str:
    number = row.get("problem_id", row.get("id"))
    if number is not None:
        return f"apps/{number}"
    return str(row.get("url") or f"taco/{hashlib.blake2b(question.encode()).hexdigest()[:12]}")


def parse_tests(row: Row) -> tuple[Test | CallTest, ...]:
    held = from_json(row.get("input_output") or "{}", "input_output")
    if not isinstance(held, dict):
        raise FieldError(f"input_output: a {type(held).__name__} instead of an object")
    inputs, outputs = (expect(held, side, list, []) for side in ("inputs", "outputs"))
    if len(inputs) != len(outputs):
        raise FieldError(f"input_output: {len(inputs)} inputs but {len(outputs)} outputs")
    if not held.get("fn_name"):
        return tuple(Test(text(i), text(o)) for i, o in zip(inputs, outputs, strict=True))
    if not all(isinstance(given, list) for given in inputs):
        raise FieldError("input_output.inputs: not lists of arguments, though there is a fn_name")
    # most rows wrap each result in a list
    if all(isinstance(output, list) and len(output) == 1 for output in outputs):
        outputs = [output[0] for output in outputs]
    return tuple(
        CallTest(f"Solution.{held['fn_name']}", tuple(map(with_numbers, given)), with_numbers(out))
        for given, out in zip(inputs, outputs, strict=True)
    )


def text(value: Any) -> bytes:
    lines = value if isinstance(value, list) else [value]
    return "\n".join(map(str, lines)).encode("utf-8", "replace")


def with_numbers(value: Any) -> Any:
    """Convert a dict's keys from digits to integers, as both graders do."""
    try:
        return {int(k): v for k, v in value.items()} if isinstance(value, dict) else value
    except ValueError:
        return value


def parse_limits(row: Row, time_factor: float) -> Limits:
    """Return the problem's own limits; without them, APPS' time or the paper's."""
    amounts: list[float] = []
    for key in ("time_limit", "memory_limit"):
        found = AMOUNT.match(str(row.get(key) or ""))
        amounts.append(float(found[1]) * UNITS.get(found[2].rstrip("s"), 1 << 30) if found else 0)
    default_s = DEFAULT_TIME_S if "time_limit" in row else APPS_TIME_S
    cpu_s = (amounts[0] or default_s) * time_factor
    return to_limits(cpu_s, int(amounts[1]), "time_limit, memory_limit")
