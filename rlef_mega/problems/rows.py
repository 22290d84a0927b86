"""Rows of data set files, one after the other: JSON Lines (also .gz and .zst), Parquet, and a JSON
array in a file of its own (.json).

A row comes with its place (file and number), so that whatever is wrong with it can be named. Files
are streamed, but for the array: of a Parquet file one batch of some rows is in memory, and only the
columns asked for are read.
"""

import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from rlef_mega.types import Problem

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
BATCH_ROWS = 1  # a row may have a hundred megabytes
BUFFER_BYTES = 1 << 20
REQUIRED = object()


class FieldError(ValueError):
    """What is wrong with one field; the reader adds file and row."""


@dataclass(frozen=True)
class Place:
    """Where a row stands. Numbers count from 1: lines of a text file, rows of a Parquet file,
    entries of an array."""

    file: str
    number: int
    unit: Literal["line", "row", "entry"] = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


@dataclass(frozen=True)
class Drop:
    """A row that became no problem, or one that lost tests (`id` is then still a problem's)."""

    place: str
    id: str
    reason: str  # one of few, to be counted
    detail: str = ""


@dataclass(frozen=True)
class Read:
    """What came of one row."""

    problem: Problem | None
    drops: tuple[Drop, ...] = ()


MALFORMED = "malformed"


def malformed(place: Place, error: object, id: str = "") -> Read:
    return Read(None, (Drop(str(place), id, MALFORMED, str(error)),))


def data_files(path: Path, split: str = "") -> list[Path]:
    """The file itself; or those of a folder (and its `data`) whose names begin with the split.

    ValueError, with what there is, if there are none.
    """
    if path.is_file():
        return [path]
    folders = [folder for folder in (path, path / "data") if folder.is_dir()]
    found = sorted(
        file for folder in folders for file in folder.iterdir() if file.name.endswith(SUFFIXES)
    )
    chosen = [file for file in found if file.name.startswith(split)]
    if not chosen:
        there = ", ".join(sorted({file.name for file in found})[:6]) or "none"
        wanted = f"{split}*" if split else "*"
        raise ValueError(f"{path}: no data files {wanted} ({', '.join(SUFFIXES)}); found: {there}")
    return chosen


def read_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[Place, Row | FieldError]]:
    """Rows with their places. `columns` limits what is read of a Parquet file; those that it lacks
    are missing from the rows. A line that is no object is a FieldError in its place."""
    if path.name.endswith(".parquet"):
        yield from read_parquet(path, columns)
        return
    if path.name.endswith(".json"):
        yield from read_array(path)
        return
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Place(str(path), number), parse_line(line)


def read_array(path: Path) -> Iterator[tuple[Place, Row | FieldError]]:
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: a {type(entries).__name__} instead of an array of problems")
    for number, entry in enumerate(entries, start=1):
        yield Place(str(path), number, "entry"), row_of(entry)


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
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return FieldError(f"not UTF-8 text ({error}); write it as UTF-8")
    except (ValueError, RecursionError) as error:
        return FieldError(f"not valid JSON ({error}); write one whole object a line")
    return row_of(row)


def row_of(value: Any) -> Row | FieldError:
    if not isinstance(value, dict):
        return FieldError(f"a {type(value).__name__} instead of a JSON object")
    return value


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[Place, Row | FieldError]]:
    file = parquet_file(path)
    with file:
        names = file.schema_arrow.names
        wanted = [name for name in columns if name in names] if columns else names
        number = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
            for place in range(batch.num_rows):  # a row at a time: texts are Python's only then
                number += 1
                row = batch.slice(place, 1).to_pylist()[0]
                yield Place(str(path), number, "row"), row


def parquet_file(path: Path) -> Any:
    """An open `pyarrow.parquet.ParquetFile`. ValueError where that cannot be."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path}: Parquet needs pyarrow: pip install 'rlef-mega[data]'") from None
    try:
        # Without a buffer, or with pre_buffer, whole columns of a row group would be held; and the
        # default pool keeps what was freed.
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())
        return pyarrow.parquet.ParquetFile(
            path, memory_map=False, pre_buffer=False, buffer_size=BUFFER_BYTES
        )
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: no Parquet file, or a damaged one ({error})") from None


def class_names(path: Path, column: str) -> tuple[str, ...]:
    """The names of an enumerated column, as `datasets` writes them into a Parquet file's schema;
    none where it does not say."""
    if not path.name.endswith(".parquet"):
        return ()
    with parquet_file(path) as file:
        stored = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        feature = json.loads(stored)["info"]["features"][column]
        return tuple(feature["names"])
    except (ValueError, KeyError, TypeError):
        return ()


def expect(row: Row, key: str, kind: type, default: Any = REQUIRED) -> Any:
    """The value of a key, of this JSON type."""
    if key not in row:
        if default is REQUIRED:
            raise FieldError(f"{key}: missing; it is required")
        return default
    value = row[key]
    if not isinstance(value, kind) and not (value is None and default is None):
        raise FieldError(f"{key}: {repr(value)[:80]} is no {getattr(kind, '__name__', kind)}")
    if isinstance(value, str):
        refuse_broken_text(value, key)
    if default is REQUIRED and not value:
        raise FieldError(f"{key}: empty; it is required")
    return value


def refuse_broken_text(text: str, key: str) -> None:
    """Half of a surrogate pair, which JSON may hold, is no text: nothing can encode it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldError(f"{key}: no valid text ({error})") from None


Lost = tuple[str, str]  # reason and detail
Parsed = tuple[Problem | None, list[Lost]]


def read_each(
    files: Iterable[Path],
    columns: Sequence[str],
    parse: Callable[[Row], Parsed],
    seen: dict[str, set[bytes]] | None = None,
) -> Iterator[Read]:
    """What `parse` makes of each row of the files, with its place.

    A row that repeats another's id is dropped where the statement is the same too; else its id gets
    a number (CodeContests: "names could agree between different sources"). `seen` is what was read
    before: ids, and digests of their statements.
    """
    seen = {} if seen is None else seen
    for path in files:
        for place, row in read_rows(path, columns):
            name = "" if isinstance(row, FieldError) else str(row.get(columns[0], ""))
            try:
                if isinstance(row, FieldError):
                    raise row
                problem, lost = parse(row)
            except FieldError as error:
                yield malformed(place, error, name)
                continue
            if problem is not None:
                digest = hashlib.blake2b(problem.statement.encode("utf-8", "replace")).digest()
                others = seen.setdefault(problem.id, set())
                if digest in others:
                    problem, lost = None, [("repeats another row", "same id and statement")]
                elif others:
                    problem = replace(problem, id=f"{problem.id} ({len(others) + 1})")
                others.add(digest)
            drops = tuple(Drop(str(place), name, reason, detail) for reason, detail in lost)
            yield Read(problem, drops)
