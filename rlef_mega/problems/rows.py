"""Rows of data set files, read one after the other: JSON Lines (also .gz and .zst), Parquet, and
JSON arrays (.json).

A row comes with its location (file and number), so that an error can name it. Files are streamed,
except arrays. Of a Parquet file, one batch of rows at a time is in memory, and only the columns
asked for are read.
"""

import gzip
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from rlef_mega.problems.literals import parse_json, to_literal
from rlef_mega.problems.splits import SPLITS
from rlef_mega.types import Problem
from rlef_sandbox import CallTest, Test

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
BATCH_ROWS = 1  # a row may have a hundred megabytes
BUFFER_BYTES = 1 << 20
REQUIRED = object()
TYPE_NAMES = {str: "a string", list: "a list", dict: "an object", int: "a whole number"}
MALFORMED = "malformed"
Result = TypeVar("Result")


class SourceOptions(BaseModel):
    """Options of a data set, given after the question mark of a source."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Words = Annotated[
    tuple[str, ...], BeforeValidator(lambda text: tuple(word for word in text.split(",") if word))
]


# Multiplies a problem's time limit, which contests choose for C++.
TimeFactor = Annotated[float, Field(gt=0, le=1000)]


class FieldError(ValueError):
    """A fault of one field; the reader adds file and row."""


# The location is "FILE, line 3", of a Parquet file "FILE, row 3", of an array "FILE, entry 3"
LocatedRow = tuple[str, Row | FieldError]


@dataclass(frozen=True)
class Drop:
    """A row that did not become a problem, or whose problem lost tests. `id` is the row's own, or
    empty."""

    location: str
    id: str
    reason: str  # one of a few, to be counted
    detail: str = ""


Read = tuple[Problem | None, tuple[Drop, ...]]  # the outcome of one row


def data_files(source: str, path: Path, split: str, remedy: str) -> list[Path]:
    """Return the file itself, or the files of a folder (and its `data`) whose names begin with the
    split.

    Raises ValueError with the remedy if there is no such path, no such file in the folder, or if
    files of several splits are in it and none was asked for.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(
            f"problem source {source!r}: there is no file or folder {str(path)!r}; {remedy}"
        )
    folders = [folder for folder in (path, path / "data") if folder.is_dir()]
    found = sorted(
        file for folder in folders for file in folder.iterdir() if file.name.endswith(SUFFIXES)
    )
    chosen = [file for file in found if file.name.startswith(split)]
    if not chosen:
        names = ", ".join(sorted({file.name for file in found})[:6]) or "none"
        raise ValueError(f"{path}: no data files {split}* ({', '.join(SUFFIXES)}); found: {names}")
    splits = [name for name in SPLITS if any(file.name.startswith(name) for file in chosen)]
    if len(splits) > 1:
        raise ValueError(
            f"problem source {source!r}: {path} holds {', '.join(sorted(splits))}; "
            f"choose one, as in {source}{'&' if '?' in source else '?'}split=train"
        )
    return chosen


def read_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[LocatedRow]:
    """Yield the rows of a file with their locations.

    `columns` limits what is read of a Parquet file; rows lack the columns that the file lacks. A
    line that holds no JSON object is yielded as a FieldError.
    """
    if path.name.endswith(".parquet"):
        yield from read_parquet(path, columns)
        return
    if path.name.endswith(".json"):
        yield from read_array(path)
        return
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", parse_line(line)


def read_array(path: Path) -> Iterator[LocatedRow]:
    try:
        entries = parse_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: holds a {type(entries).__name__} instead of an array")
    for number, entry in enumerate(entries, start=1):
        yield f"{path}, entry {number}", row_of(entry)


def open_text(path: Path) -> IO[bytes] | io.BufferedIOBase:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".zst"):
        import zstandard

        reader = zstandard.ZstdDecompressor().stream_reader(
            path.open("rb"), read_across_frames=True, closefd=True
        )
        return io.BufferedReader(reader)
    return path.open("rb")


def parse_line(line: bytes) -> Row | FieldError:
    try:
        row = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return FieldError(f"not UTF-8 text ({error}); write it as UTF-8")
    except (ValueError, RecursionError) as error:
        return FieldError(f"not valid JSON ({error}); write one JSON object per line")
    return row_of(row)


def row_of(value: Any) -> Row | FieldError:
    if not isinstance(value, dict):
        return FieldError(f"a {type(value).__name__} instead of a JSON object")
    return value


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[LocatedRow]:
    with parquet_file(path) as file:
        names = file.schema_arrow.names
        wanted = [name for name in columns if name in names] if columns else names
        batches = file.iter_batches(BATCH_ROWS, columns=wanted)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row


def parquet_file(path: Path) -> Any:
    """Open a `pyarrow.parquet.ParquetFile`. Raises ValueError if that fails."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path}: Parquet needs pyarrow: pip install 'rlef-mega[data]'") from None
    try:
        # Without a buffer, or with pre_buffer, whole columns of a row group would be in memory;
        # the default pool does not return freed memory to the system.
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())
        return pyarrow.parquet.ParquetFile(
            path, memory_map=False, pre_buffer=False, buffer_size=BUFFER_BYTES
        )
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file, or damaged ({error})") from None


def expect(row: Row, key: str, kind: Any, default: Any = REQUIRED) -> Any:
    """Return the value of a key. Raises FieldError if it has another type, or is required and
    missing or empty."""
    if key not in row:
        if default is REQUIRED:
            raise FieldError(f"{key}: missing; it is required")
        return default
    value = row[key]
    if not isinstance(value, kind) and not (value is None and default is None):
        raise FieldError(f"{key}: {repr(value)[:80]} is not {TYPE_NAMES.get(kind, 'a number')}")
    if isinstance(value, str):
        refuse_broken_text(value, key)
    if default is REQUIRED and not value:
        raise FieldError(f"{key}: empty; it is required")
    return value


def expect_strings(row: Row, key: str) -> tuple[str, ...]:
    """Return a list of strings, empty if the key is missing or null."""
    values = expect(row, key, list, None) or []
    if not all(isinstance(value, str) for value in values):
        raise FieldError(f"{key}: {repr(values)[:80]} is not a list of strings")
    for value in values:
        refuse_broken_text(value, key)
    return tuple(values)


def refuse_broken_text(text: str, key: str) -> None:
    """Raise FieldError for half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldError(f"{key}: not valid text ({error})") from None


def unless_too_deep(parse: Callable[..., Result], row: Row | FieldError, *others: Any) -> Result:
    """Return `parse(row)`. Raises FieldError if the row is nested too deep for Python's recursion,
    or if it could not be read: then `row` is that error.
    """
    if isinstance(row, FieldError):
        raise row
    try:
        return parse(row, *others)
    except RecursionError:
        raise FieldError("code or values are nested too deep; simplify them") from None


Lost = tuple[str, str]  # reason and detail
Parsed = tuple[Problem | None, list[Lost]]


def without_enormous(
    tests: Sequence[Any], kind: str, max_bytes: int
) -> tuple[tuple[Any, ...], list[Lost]]:
    """Return the tests of at most `max_bytes`, and how many others were left out."""
    sizes = [size(test) for test in tests]
    kept = tuple(test for test, size in zip(tests, sizes, strict=True) if size <= max_bytes)
    if len(kept) == len(tests):
        return kept, []
    detail = f"{len(tests) - len(kept)} {kind} tests, of up to {max(sizes):,} bytes"
    return kept, [("enormous tests (the problem is kept if it has others)", detail)]


def size(test: Test | CallTest) -> int:
    """Return the bytes of input and output; of a call, the characters of their Python literals."""
    if isinstance(test, Test):
        return len(test.stdin) + len(test.expected)
    return len(to_literal(test.args)) + len(to_literal(test.expected))


def read_each(
    files: Iterable[Path],
    id_key: str,
    parse: Callable[[Row, Path], Parsed],
    columns: Sequence[str] = (),
) -> Iterator[Read]:
    """Yield the result of `parse` for each row of the files.

    A row that repeats the id of another is dropped if the statement is the same too; otherwise its
    id gets a number (CodeContests: "names could agree between different sources").
    """
    seen: dict[str, set[bytes]] = {}  # digests of statements by id
    for path in files:
        for location, row in read_rows(path, columns):
            name = "" if isinstance(row, FieldError) else str(row.get(id_key, ""))
            try:
                problem, lost = unless_too_deep(parse, row, path)
            except FieldError as error:
                problem, lost = None, [(MALFORMED, str(error))]
            if problem is not None:
                digest = hashlib.blake2b(problem.statement.encode("utf-8", "replace")).digest()
                others = seen.setdefault(problem.id, set())
                if digest in others:
                    problem, lost = None, [("repeats another row", "same id and statement")]
                elif others:
                    problem = replace(problem, id=f"{problem.id} ({len(others) + 1})")
                others.add(digest)
            yield problem, tuple(Drop(location, name, reason, detail) for reason, detail in lost)
