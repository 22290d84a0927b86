"""CodeContests (Li et al. 2022): rows in the published column shape to problems.

Read from the Parquet files of the Hugging Face copy (`deepmind/code_contests`) or from JSON Lines
with the same columns: `name`, `description`, `public_tests`, `private_tests`, `generated_tests`
(each {"input": [...], "output": [...]}), `time_limit` ({"seconds", "nanos"} or null),
`memory_limit_bytes`, `input_file`, `output_file`, `source`, `cf_rating`, `cf_tags` and, if wrong
programs are asked for, `incorrect_solutions`. Private and generated tests together decide the
reward; public ones are shown.
"""

import ast
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlef_mega.problems.rows import FieldError, Lost, Parsed, Read, class_names, expect, read_each
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import Limits, Test

DEFAULT_TIME_S = 10.0  # RLEF A.2, as is the memory
DEFAULT_MEMORY_BYTES = 1 << 30
LEAST_MEMORY_BYTES = 64 << 20  # below it CPython itself has little room

COLUMNS = (
    "name",
    "description",
    "public_tests",
    "private_tests",
    "generated_tests",
    "time_limit",
    "memory_limit_bytes",
    "input_file",
    "output_file",
    "source",
    "cf_rating",
    "cf_tags",
)
# `source` is a number, and the Hugging Face copy numbers the last two otherwise than the proto.
SOURCES = {
    "hub": ("unknown", "codechef", "codeforces", "hackerearth", "codejam", "atcoder", "aizu"),
    "proto": ("unknown", "codechef", "codeforces", "hackerearth", "codejam", "", "atcoder", "aizu"),
}
PYTHON3 = 3  # of `language`, in both
WRONG_PROGRAM_CHARACTERS = 4000
RATING_CLASS = 400

# Words by which statements say that several outputs are right; then one expected output is too few.
MULTIPLE_ANSWERS = re.compile(
    r"any (one )?of (them|these|those)|(print|output|find|report|return) any\b"
    r"|(multiple|several|more than one)( \w+){0,3} "
    r"(solution|answer|way|output|option)s?"
    r"|any (valid|correct|suitable|appropriate|order|solution|answer)"
    r"|in (any|arbitrary) order",
    re.IGNORECASE,
)
IMAGE = re.compile(r"<image>|<img\b|!\[[^\]]*\]\(")


@dataclass(frozen=True)
class Options:
    """What to take. Rows that are left out are counted like all others that are dropped."""

    split: str = ""  # train, valid or test: how the names of a folder's files begin
    sources: tuple[str, ...] = ()  # codeforces, atcoder, ...; none: all
    min_rating: int = 0  # of Codeforces; those without rating are left out if one is given
    max_rating: int = 0
    without: tuple[str, ...] = ()  # tags: "image", "multiple answers", or one of Codeforces'
    max_tests: int = 0  # of private and generated tests, in this order; 0: all
    max_test_bytes: int = 8 << 20  # input and output together; larger tests are left out
    wrong_programs: int = 0  # of the shortest incorrect Python 3 solutions, for random feedback
    enums: Literal["hub", "proto"] = "hub"


def read(files: Sequence[Path], options: Options) -> Iterator[Read]:
    """What came of each row, in order."""
    columns = (*COLUMNS, *(("incorrect_solutions",) if options.wrong_programs else ()))
    seen: dict[str, set[bytes]] = {}
    for path in files:  # a file's own names for the numbers come before ours
        names = tuple(name.removesuffix("_source").lower() for name in class_names_of(path))
        names = names or SOURCES[options.enums]
        yield from read_each(
            [path], columns, functools.partial(parse, options=options, source_names=names), seen
        )


def class_names_of(path: Path) -> tuple[str, ...]:
    return class_names(path, "source")


def parse(row: dict[str, Any], options: Options, source_names: Sequence[str]) -> Parsed:
    """The problem, and what of the row was dropped and why."""
    name, statement = expect(row, "name", str), expect(row, "description", str)
    public, private, generated = (
        parse_tests(row, f"{kind}_tests") for kind in ("public", "private", "generated")
    )
    if not (public or private or generated):
        return None, [("no tests", "")]
    if row.get("input_file") or row.get("output_file"):
        files = f"{row.get('input_file')!r}, {row.get('output_file')!r}"
        return None, [("reads or writes a file instead of standard input and output", files)]
    source = parse_source(row, source_names, options)
    tags = (*texts(row, "cf_tags"), *flags(statement))
    reason = unwanted(source, expect(row, "cf_rating", int, None) or 0, tags, options)
    if reason:
        return None, [(reason, "")]
    public, lost = drop_enormous(public, "public", options)
    hidden, lost_hidden = drop_enormous((*private, *generated), "private or generated", options)
    lost = [*lost, *lost_hidden]
    if not (public or hidden):
        return None, [*lost, ("no tests", "all of them are enormous")]
    problem = Problem(
        id=name,
        statement=statement,
        public_tests=public,
        private_tests=PrivateTests(hidden[: options.max_tests or None]),
        limits=parse_limits(row),
        checker="codecontests",  # its own rule: reference outputs differ in case, or as 20.0
        template="codecontests",
        family="codecontests" if source == "unknown" else source,
        difficulty=rated(expect(row, "cf_rating", int, None) or 0),
        tags=tags,
        wrong_programs=wrong_programs(row, options.wrong_programs),
    )
    return problem, lost


def rated(rating: int) -> str:
    """Codeforces' ratings in classes; a name sorts as its class does."""
    if not rating:
        return "unrated"
    low = rating // RATING_CLASS * RATING_CLASS
    return f"{low:04d} to {low + RATING_CLASS - 1:04d}"


def parse_source(row: dict[str, Any], names: Sequence[str], options: Options) -> str:
    """The name in lower case, of a number or of a name as the proto has it."""
    value = row.get("source")
    if value is None:
        return "unknown"
    if isinstance(value, str):
        value = value.lower().removesuffix("_source")
        if value in SOURCES["hub"]:
            return value
    elif isinstance(value, int) and 0 <= value < len(names) and names[value]:
        return names[value]
    other = "proto" if options.enums == "hub" else "hub"
    raise FieldError(
        f"source: {value!r} is none of the {options.enums} copy's; set enums={other} if the file "
        "numbers them as that does"
    )


def flags(statement: str) -> tuple[str, ...]:
    """What a reader of the counts should know: an image that is missing, and that one expected
    output may refuse right answers."""
    return (
        *(("image",) if IMAGE.search(statement) else ()),
        *(("multiple answers",) if MULTIPLE_ANSWERS.search(statement) else ()),
    )


def unwanted(source: str, rating: int, tags: Sequence[str], options: Options) -> str:
    """Why the options leave a row out; empty if they do not."""
    if options.sources and source not in options.sources:
        return f"left out: source {source}"
    if rating < options.min_rating or (options.max_rating and not 0 < rating <= options.max_rating):
        return "left out: rating"
    for tag in options.without:
        if tag in tags:
            return f"left out: {tag}"
    return ""


def drop_enormous(
    tests: Sequence[Test], kind: str, options: Options
) -> tuple[tuple[Test, ...], list[Lost]]:
    sizes = [len(test.stdin) + len(test.expected) for test in tests]
    kept = tuple(t for t, size in zip(tests, sizes, strict=True) if size <= options.max_test_bytes)
    if len(kept) == len(tests):
        return kept, []
    detail = f"{len(tests) - len(kept)} {kind} tests, of up to {max(sizes):,} bytes"
    return kept, [("enormous tests (the problem is kept if it has others)", detail)]


def wrong_programs(row: dict[str, Any], count: int) -> tuple[str, ...]:
    """The shortest incorrect solutions in Python 3."""
    if not count:
        return ()
    stored = expect(row, "incorrect_solutions", dict, None) or {}
    pairs = zip(stored.get("language") or [], stored.get("solution") or [], strict=False)
    sources = sorted(
        {str(source) for language, source in pairs if language in (PYTHON3, "PYTHON3")},
        key=lambda source: (len(source), source),
    )
    usable = (s for s in sources if len(s) <= WRONG_PROGRAM_CHARACTERS and parses(s))
    return tuple(source for source, _ in zip(usable, range(count), strict=False))


def parses(source: str) -> bool:
    try:
        return bool(ast.parse(source).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def texts(row: dict[str, Any], key: str) -> tuple[str, ...]:
    return tuple(str(text) for text in expect(row, key, list, None) or () if text)


def parse_tests(row: dict[str, Any], column: str) -> tuple[Test, ...]:
    tests = expect_column(row, column)
    inputs, outputs = (expect(tests, side, list, None) or [] for side in ("input", "output"))
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
    seconds, nanos = (expect(time_limit, unit, int, None) or 0 for unit in ("seconds", "nanos"))
    memory_bytes = expect(row, "memory_limit_bytes", int, None) or DEFAULT_MEMORY_BYTES
    try:
        return Limits(
            cpu_s=seconds + nanos / 1e9 or DEFAULT_TIME_S,
            memory_bytes=max(memory_bytes, LEAST_MEMORY_BYTES),
        )
    except ValueError as error:
        raise FieldError(f"time_limit: {error}") from None
