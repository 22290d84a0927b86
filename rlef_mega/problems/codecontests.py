"""CodeContests (Li et al. 2022): problems from rows with the published columns.

The rows come from the Parquet files of the Hugging Face copy (`deepmind/code_contests`) or from
JSON Lines with the same columns: `name`, `description`, `public_tests`, `private_tests`,
`generated_tests` (each {"input": [...], "output": [...]}), `time_limit` ({"seconds", "nanos"} or
null), `memory_limit_bytes`, `input_file`, `output_file`, `source`, `cf_rating` and `cf_tags`.
Public tests are shown, private and generated tests are not; all of them decide the reward.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt

from rlef_mega.problems.rows import (
    FieldError,
    Parsed,
    Read,
    Row,
    SourceOptions,
    TimeFactor,
    Words,
    expect,
    expect_strings,
    parquet_file,
    read_each,
    without_enormous,
)
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import Limits, Test

DEFAULT_TIME_S = 10.0  # RLEF A.2, as is the memory
DEFAULT_MEMORY_BYTES = 1 << 30
LEAST_MEMORY_BYTES = 64 << 20  # CPython itself needs most of that

COLUMNS = (
    "name description public_tests private_tests generated_tests time_limit memory_limit_bytes "
    "input_file output_file source cf_rating cf_tags"
)
# `source` is a number. The Hugging Face copy and the proto number the last two differently.
SOURCES = {
    "hub": ("unknown", "codechef", "codeforces", "hackerearth", "codejam", "atcoder", "aizu"),
    "proto": ("unknown", "codechef", "codeforces", "hackerearth", "codejam", "", "atcoder", "aizu"),
}
RATING_CLASS = 400

# Tags of statements that match. "image": they have lost an image. "multiple answers": they allow
# several outputs, and the one expected output refuses the others.
STATEMENT_TAGS = {
    "image": re.compile(r"<image>|<img\b|!\[[^\]]*\]\("),
    "multiple answers": re.compile(
        r"any (one )?of (them|these|those)|(print|output|find|report|return) any\b"
        r"|(multiple|several|more than one)( \w+){0,3} "
        r"(solution|answer|way|output|option)s?"
        r"|any (valid|correct|suitable|appropriate|order|solution|answer)"
        r"|in (any|arbitrary) order",
        re.IGNORECASE,
    ),
}


class CodeContestsOptions(SourceOptions):
    """Which rows and tests to take. Rows that are left out are counted."""

    split: str = ""  # train, valid or test: the prefix of a folder's file names
    sources: Words = ()  # codeforces, atcoder, ...; empty: all
    min_rating: NonNegativeInt = 0  # of Codeforces; a bound leaves out problems without a rating
    max_rating: NonNegativeInt = 0
    without: Words = ()  # tags: "image", "multiple answers", or one of Codeforces'
    max_tests: NonNegativeInt = 0  # of private and generated tests, in this order; 0: all
    max_test_bytes: NonNegativeInt = 8 << 20  # of input and output together
    enums: Literal["hub", "proto"] = "hub"
    time_factor: TimeFactor = 1.0


def download(source: str, repository: str, split: str) -> Path:
    """Download a data set into the hub's own cache. Returns its folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            repository, repo_type="dataset", allow_patterns=f"data/{split}*.parquet"
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"problem source {source!r}: there is no folder {repository!r}, and downloading it "
            f"failed ({type(error).__name__}); download data/*.parquet and name their folder"
        ) from None
    return Path(found)


def read(files: Sequence[Path], options: CodeContestsOptions, _: Path) -> Iterator[Read]:
    """Yield the outcome of each row, in order."""
    names = {path: source_names(path) or SOURCES[options.enums] for path in files}
    yield from read_each(
        files, "name", lambda row, path: parse(row, options, names[path]), COLUMNS.split()
    )


def source_names(path: Path) -> tuple[str, ...]:
    """Return the file's own names for the numbers of `source`, which `datasets` writes into a
    Parquet file's schema; empty if it has none. They take precedence over ours."""
    if not path.name.endswith(".parquet"):
        return ()
    with parquet_file(path) as file:
        stored = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(stored)["info"]["features"]["source"]["names"]
        return tuple(name.removesuffix("_source").lower() for name in names)
    except (ValueError, KeyError, TypeError):
        return ()


def parse(row: Row, options: CodeContestsOptions, names: Sequence[str]) -> Parsed:
    """Return the problem of a row, and what was dropped and why."""
    name, statement = expect(row, "name", str), expect(row, "description", str)
    public, private, generated = (
        parse_tests(row, f"{kind}_tests") for kind in ("public", "private", "generated")
    )
    if not (public or private or generated):
        return None, [("no tests", "")]
    if row.get("input_file") or row.get("output_file"):
        files = f"{row.get('input_file')!r}, {row.get('output_file')!r}"
        return None, [("reads or writes a file instead of standard input and output", files)]
    source = parse_source(row, names, options)
    flags = (tag for tag, pattern in STATEMENT_TAGS.items() if pattern.search(statement))
    tags = (*filter(None, expect_strings(row, "cf_tags")), *flags)
    rating = expect(row, "cf_rating", int, None) or 0
    reason = unwanted(source, rating, tags, options)
    if reason:
        return None, [(reason, "")]
    public, lost = without_enormous(public, "public", options.max_test_bytes)
    hidden, lost_hidden = without_enormous(
        (*private, *generated), "private or generated", options.max_test_bytes
    )
    lost = [*lost, *lost_hidden]
    if not (public or hidden):
        return None, [*lost, ("no tests", "all of them are enormous")]
    problem = Problem(
        id=name,
        statement=statement,
        public_tests=public,
        private_tests=PrivateTests(hidden[: options.max_tests or None]),
        limits=parse_limits(row, options.time_factor),
        checker="codecontests",  # its own rule: case and number format may differ
        template="codecontests",
        family="codecontests" if source == "unknown" else source,
        difficulty=rated(rating),
        tags=tags,
    )
    return problem, lost


def rated(rating: int) -> str:
    """Return the class of a Codeforces rating, named so that names sort by rating."""
    if not rating:
        return "unrated"
    low = rating // RATING_CLASS * RATING_CLASS
    return f"{low:04d} to {low + RATING_CLASS - 1:04d}"


def parse_source(row: Row, names: Sequence[str], options: CodeContestsOptions) -> str:
    """Return the source's name in lower case, from a number or from the proto's name."""
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
        f"source: {value!r} is not a source of the {options.enums} copy; set enums={other} if the "
        "file uses that numbering"
    )


def unwanted(source: str, rating: int, tags: Sequence[str], options: CodeContestsOptions) -> str:
    """Return why the options leave a row out; empty if they do not."""
    if options.sources and source not in options.sources:
        return f"left out: source {source}"
    if rating < options.min_rating or (options.max_rating and not 0 < rating <= options.max_rating):
        return "left out: rating"
    for tag in options.without:
        if tag in tags:
            return f"left out: {tag}"
    return ""


def parse_tests(row: Row, column: str) -> tuple[Test, ...]:
    tests = expect(row, column, dict)
    try:
        inputs, outputs = (expect_strings(tests, side) for side in ("input", "output"))
    except FieldError as error:
        raise FieldError(f"{column}.{error}") from None
    if len(inputs) != len(outputs):
        raise FieldError(f"{column}: {len(inputs)} inputs but {len(outputs)} outputs")
    return tuple(Test(i.encode(), o.encode()) for i, o in zip(inputs, outputs, strict=True))


def parse_limits(row: Row, time_factor: float) -> Limits:
    """Return the problem's own limits; the paper's where a limit is 0, null or missing."""
    time_limit = expect(row, "time_limit", dict, None) or {}
    seconds, nanos = (expect(time_limit, unit, int, None) or 0 for unit in ("seconds", "nanos"))
    cpu_s = (seconds + nanos / 1e9 or DEFAULT_TIME_S) * time_factor
    return to_limits(cpu_s, expect(row, "memory_limit_bytes", int, None) or 0, "time_limit")


def to_limits(cpu_s: float, memory_bytes: int, fields: str) -> Limits:
    """Return limits. Memory is at least what CPython needs; 0 stands for the paper's."""
    memory_bytes = max(memory_bytes or DEFAULT_MEMORY_BYTES, LEAST_MEMORY_BYTES)
    try:
        return Limits(cpu_s=cpu_s, memory_bytes=memory_bytes)
    except ValueError as error:
        raise FieldError(f"{fields}: {error}") from None
