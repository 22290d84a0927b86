"""LiveCodeBench (Jain et al. 2024): problems from rows of `code_generation_lite`.

A row has `question_id`, `question_content`, `starter_code`, `platform`, `difficulty`,
`contest_date`, `metadata`, `public_test_cases` (JSON as text) and `private_test_cases` (the same,
or base64 of zlib of a pickled text of it). A test is of a program (`stdin`), or of the method
`func_name` of class Solution (`functional`: arguments are JSON, one per line). Programs get the
imports, time and comparison of the benchmark's own grader (lcb_runner/evaluation/testing_util.py).
"""

import base64
import binascii
import io
import pickle
import zlib
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, NonNegativeInt

from rlef_mega.problems.literals import parse_json
from rlef_mega.problems.rows import (
    FieldError,
    Parsed,
    Read,
    Row,
    SourceOptions,
    Words,
    expect,
    read_each,
    without_enormous,
)
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import CallTest, Limits, Test

LIMITS = Limits(
    cpu_s=6.0, memory_bytes=4 << 30
)  # 6 s per test in its grader; 4 GB in a comment there
MAX_UNPACKED_BYTES = 1 << 30  # of a row's private tests
# The grader puts these imports before every program; of equal names the last import counts.
MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools "
    "operator io sys json"
)
PRELUDE = (
    "; ".join(f"from {name} import *" for name in f"{MODULES} builtins typing".split())
    + f"; import {MODULES.replace(' ', ', ')}; sys.setrecursionlimit(50000)"
    + "; sys.set_int_max_str_digits(50000)\n"
    # the grader ignores exit codes, and calls a function of a program without class Solution
    + """\
class SystemExit(SystemExit): code = 0
def exit(code=None): raise SystemExit
sys.exit = quit = exit
class Solution:
    def __getattr__(self, name): return getattr(sys.modules["solution"], name)
"""
)

Day = Annotated[date, BeforeValidator(date.fromisoformat)]


class LiveCodeBenchOptions(SourceOptions):
    """Which rows and tests to take. Rows that are left out are counted."""

    split: str = "test"  # the prefix of a folder's file names
    since: Day = date.min  # of the contest, as in 2024-08-01; both days are included
    until: Day = date.max
    difficulties: Words = ()  # easy, medium, hard; empty: all
    platforms: Words = ()  # leetcode, atcoder, codeforces; empty: all
    max_tests: NonNegativeInt = 0  # private ones; 0: all
    max_test_bytes: NonNegativeInt = 8 << 20  # of input and output together; private tests only
    checker: Literal["livecodebench", "livecodebench_floats"] = "livecodebench"


def read(files: Sequence[Path], options: LiveCodeBenchOptions, _: Path) -> Iterator[Read]:
    """Yield the outcome of each row, in order."""
    yield from read_each(files, "question_id", lambda row, path: parse(row, options))


def parse(row: Row, options: LiveCodeBenchOptions) -> Parsed:
    """Return the problem of a row, and what was dropped and why."""
    name = expect(row, "question_id", str)
    platform = expect(row, "platform", str).lower()
    difficulty = expect(row, "difficulty", str).lower()
    reason = unwanted(platform, difficulty, contest_date(row), options)
    if reason:
        return None, [(reason, "")]
    starter = expect(row, "starter_code", str, "")
    entry_point = parse_entry_point(row)
    public = parse_tests(row, "public_test_cases", entry_point)
    every = parse_tests(row, "private_test_cases", entry_point)
    private, lost = without_enormous(every, "private", options.max_test_bytes)
    if not (public or private):
        return None, [*lost, ("no tests", "")]
    content = expect(row, "question_content", str).strip()
    problem = Problem(
        id=name,
        statement=f"{content}\n\nComplete this code:\n\n{starter}" if starter.strip() else content,
        public_tests=public,
        private_tests=PrivateTests(private[: options.max_tests or None]),
        limits=LIMITS,
        checker=options.checker,
        template="codecontests",
        entry_point=entry_point,
        prelude=PRELUDE,
        family=platform,
        difficulty=difficulty,
    )
    return problem, lost


def contest_date(row: Row) -> date:
    """Return the day of the contest: JSON holds it as text, Parquet as a time."""
    value = row.get("contest_date")
    if isinstance(value, datetime):
        return value.date()
    try:
        return datetime.fromisoformat(expect(row, "contest_date", str)).date()
    except ValueError as error:
        raise FieldError(f"contest_date: {str(error)[:80]}; write 2024-08-01T00:00:00") from None


def unwanted(platform: str, difficulty: str, day: date, options: LiveCodeBenchOptions) -> str:
    """Return why the options leave a row out; empty if they do not."""
    if options.platforms and platform not in options.platforms:
        return f"left out: platform {platform}"
    if options.difficulties and difficulty not in options.difficulties:
        return f"left out: difficulty {difficulty}"
    return "" if options.since <= day <= options.until else "left out: date"


def parse_entry_point(row: Row) -> str | None:
    """Return the method of class Solution; None if the tests run programs."""
    metadata = from_json(row.get("metadata") or "{}", "metadata")
    if not isinstance(metadata, dict):
        raise FieldError(f"metadata: a {type(metadata).__name__} instead of an object")
    return f"Solution.{metadata['func_name']}" if metadata.get("func_name") else None


def parse_tests(row: Row, column: str, entry_point: str | None) -> tuple[Test | CallTest, ...]:
    if column not in row:
        raise FieldError(f"{column}: missing; it is required")
    cases = row[column]
    if isinstance(cases, str):
        cases = unpacked(cases, column)
    if not isinstance(cases, list):
        raise FieldError(f"{column}: a {type(cases).__name__} instead of a list of tests")
    return tuple(
        parse_test(case, f"{column}[{number}]", entry_point) for number, case in enumerate(cases)
    )


def parse_test(case: Any, key: str, entry_point: str | None) -> Test | CallTest:
    if not isinstance(case, dict):
        raise FieldError(f"{key}: {str(case)[:80]!r} is not an object with input and output")
    given, output = expect(case, "input", str, ""), expect(case, "output", str, "")
    kind = expect(case, "testtype", str)
    if kind == "stdin":
        return Test(given, output)
    if kind != "functional":
        raise FieldError(f"{key}.testtype: {kind!r} is neither stdin nor functional")
    if entry_point is None:
        raise FieldError(f"{key}: calls a function, but metadata has no func_name")
    arguments = [from_json(line, f"{key}.input") for line in given.split("\n") if line.strip()]
    return CallTest(entry_point, tuple(arguments), from_json(output, f"{key}.output"))


def from_json(text: Any, key: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise FieldError(f"{key}: not valid JSON ({error})") from None


class TextUnpickler(pickle.Unpickler):
    """An unpickler that loads no class and calls no function, so that no file can run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise FieldError(
            f"private_test_cases: a pickle that holds more than text ({module}.{name})"
        )


def unpacked(text: str, column: str) -> Any:
    """Return the value of JSON text, which may be packed: pickled, zlib-compressed, in base64."""
    if text.lstrip().startswith("["):
        return from_json(text, column)
    try:
        inflate = zlib.decompressobj()
        raw = inflate.decompress(base64.b64decode(text, validate=True), MAX_UNPACKED_BYTES)
        if inflate.unconsumed_tail:
            raise FieldError(f"{column}: unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
        content = TextUnpickler(io.BytesIO(raw)).load()
    except FieldError:
        raise
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise FieldError(f"{column}: neither JSON nor packed tests ({error})") from None
    except (ValueError, IndexError, KeyError, AttributeError, TypeError, MemoryError) as error:
        raise FieldError(f"{column}: a damaged pickle ({type(error).__name__})") from None
    if not isinstance(content, str | bytes):
        raise FieldError(f"{column}: a pickled {type(content).__name__} instead of text")
    return from_json(
        content if isinstance(content, str) else content.decode("utf-8", "replace"), column
    )
