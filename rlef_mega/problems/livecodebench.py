"""LiveCodeBench (Jain et al. 2024): rows of `code_generation_lite` to problems.

A row has `question_id`, `question_content`, `starter_code`, `platform`, `difficulty`,
`contest_date`, `metadata`, `public_test_cases` (JSON as text) and `private_test_cases` (the same,
or base64 of zlib of a pickled text of it). A test is of a program (`stdin`), or of the method
`func_name` of class Solution (`functional`: arguments are JSON, one a line). Programs are given the
imports, time and comparison of the benchmark's own grader (lcb_runner/evaluation/testing_util.py).
"""

import base64
import binascii
import io
import json
import pickle
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

from rlef_mega.problems.rows import FieldError, Lost, Parsed, Read, Row, expect, read_each
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import CallTest, Limits, Test

LIMITS = Limits(cpu_s=6.0, memory_bytes=4 << 30)  # its grader: 6 s a test, 4 GB in its comment
MOST_UNPACKED_BYTES = 1 << 30  # of a row's private tests
COLUMNS = (
    "question_id",
    "question_content",
    "starter_code",
    "platform",
    "difficulty",
    "contest_date",
    "metadata",
    "public_test_cases",
    "private_test_cases",
)
# What its grader puts before every program, with the names of each, later ones before earlier ones.
ALL_NAMES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools "
    "operator io sys json builtins typing"
)
MODULES = (
    "string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, "
    "functools, operator, io, sys, json"
)
PRELUDE = (
    "; ".join(f"from {name} import *" for name in ALL_NAMES.split())
    + f"; import {MODULES}; sys.setrecursionlimit(50000)\n"
)


@dataclass(frozen=True)
class Options:
    """What to take. Rows that are left out are counted like all others that are dropped."""

    split: str = "test"  # how the names of a folder's files begin
    since: date = date.min  # of the contest, as in 2024-08-01; both days are taken
    until: date = date.max
    difficulties: tuple[str, ...] = ()  # easy, medium, hard; none: all
    platforms: tuple[str, ...] = ()  # leetcode, atcoder, codeforces
    max_tests: int = 0  # private ones; 0: all
    max_test_bytes: int = 8 << 20  # input and output together; larger private tests are left out


def read(files: Sequence[Path], options: Options) -> Iterator[Read]:
    """What came of each row, in order."""
    yield from read_each(files, COLUMNS, lambda row: parse(row, options))


def parse(row: Row, options: Options) -> Parsed:
    """The problem, and what of the row was dropped and why."""
    name = expect(row, "question_id", str)
    platform = expect(row, "platform", str).lower()
    difficulty = expect(row, "difficulty", str).lower()
    reason = unwanted(platform, difficulty, contest_date(row), options)
    if reason:
        return None, [(reason, "")]
    starter = expect(row, "starter_code", str, "") or ""
    entry_point = parse_entry_point(row, starter)
    public = parse_tests(row, "public_test_cases", entry_point)
    every = parse_tests(row, "private_test_cases", entry_point)
    private = tuple(test for test in every if size(test) <= options.max_test_bytes)
    lost: list[Lost] = []
    if len(private) < len(every):
        detail = f"{len(every) - len(private)} private tests, of up to {max(map(size, every)):,}"
        lost = [("enormous tests (the problem is kept if it has others)", f"{detail} bytes")]
    if not (public or private):
        return None, [*lost, ("no tests", "")]
    content = expect(row, "question_content", str).strip()
    problem = Problem(
        id=name,
        statement=f"{content}\n\nComplete this code:\n\n{starter}" if starter.strip() else content,
        public_tests=public,
        private_tests=PrivateTests(private[: options.max_tests or None]),
        limits=LIMITS,
        checker="livecodebench",
        template="codecontests",
        entry_point=entry_point,
        prelude=PRELUDE,
        family=platform,
        difficulty=difficulty,
    )
    return problem, lost


def contest_date(row: Row) -> date:
    """As text in JSON, as a time in Parquet."""
    value = row.get("contest_date")
    if isinstance(value, datetime):
        return value.date()
    try:
        return datetime.fromisoformat(expect(row, "contest_date", str)).date()
    except ValueError as error:
        raise FieldError(f"contest_date: {str(error)[:80]}; write 2024-08-01T00:00:00") from None


def unwanted(platform: str, difficulty: str, day: date, options: Options) -> str:
    """Why the options leave a row out; empty if they do not."""
    if options.platforms and platform not in options.platforms:
        return f"left out: platform {platform}"
    if options.difficulties and difficulty not in options.difficulties:
        return f"left out: difficulty {difficulty}"
    return "" if options.since <= day <= options.until else "left out: date"


def parse_entry_point(row: Row, starter: str) -> str | None:
    """The method of class Solution, or the function; None where programs are run."""
    metadata = from_json(row.get("metadata") or "{}", "metadata")
    if not isinstance(metadata, dict):
        raise FieldError(f"metadata: a {type(metadata).__name__} instead of an object")
    name = metadata.get("func_name")
    if not name:
        return None
    return f"Solution.{name}" if "class Solution" in starter else str(name)


def parse_tests(row: Row, column: str, entry_point: str | None) -> tuple[Test | CallTest, ...]:
    if column not in row:
        raise FieldError(f"{column}: missing; it is required")
    cases = row[column]
    if isinstance(cases, str):
        cases = unpacked(cases, column)
    if not isinstance(cases, list):
        raise FieldError(f"{column}: a {type(cases).__name__} instead of a list of tests")
    return tuple(
        parse_test(case, f"{column}[{place}]", entry_point) for place, case in enumerate(cases)
    )


def parse_test(case: Any, place: str, entry_point: str | None) -> Test | CallTest:
    if not isinstance(case, dict):
        raise FieldError(f"{place}: {str(case)[:80]!r} is no object of input and output")
    given, output = expect(case, "input", str, ""), expect(case, "output", str, "")
    kind = expect(case, "testtype", str)
    if kind == "stdin":
        return Test(given, output)
    if kind != "functional":
        raise FieldError(f"{place}.testtype: {kind!r} is none of stdin and functional")
    if entry_point is None:
        raise FieldError(f"{place}: calls a function, but metadata has no func_name")
    arguments = [from_json(line, f"{place}.input") for line in given.split("\n") if line.strip()]
    return CallTest(entry_point, tuple(arguments), from_json(output, f"{place}.output"))


def size(test: Test | CallTest) -> int:
    """Bytes of input and output, of a call as Python writes them."""
    if isinstance(test, Test):
        return len(test.stdin) + len(test.expected)
    return len(repr(test.args)) + len(repr(test.expected))


def from_json(text: Any, place: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FieldError(f"{place}: not valid JSON ({error})") from None


class TextUnpickler(pickle.Unpickler):
    """Loads no class and calls no function, so that a file can run nothing here."""

    def find_class(self, module: str, name: str) -> Any:
        raise FieldError(f"private_test_cases: a pickle of more than text ({module}.{name})")


def unpacked(text: str, column: str) -> Any:
    """JSON as it is, or in base64 of zlib of a pickled str (or bytes) of it."""
    if text.lstrip().startswith("["):
        return from_json(text, column)
    try:
        inflate = zlib.decompressobj()
        raw = inflate.decompress(base64.b64decode(text, validate=True), MOST_UNPACKED_BYTES)
        if inflate.unconsumed_tail:
            raise FieldError(f"{column}: more than {MOST_UNPACKED_BYTES:,} bytes unpacked")
        held = TextUnpickler(io.BytesIO(raw)).load()
    except FieldError:
        raise
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise FieldError(f"{column}: neither JSON nor packed tests ({error})") from None
    except (ValueError, IndexError, KeyError, AttributeError, TypeError, MemoryError) as error:
        raise FieldError(f"{column}: a damaged pickle ({type(error).__name__})") from None
    if not isinstance(held, str | bytes):
        raise FieldError(f"{column}: a pickled {type(held).__name__} instead of text")
    return from_json(held if isinstance(held, str) else held.decode("utf-8", "replace"), column)
