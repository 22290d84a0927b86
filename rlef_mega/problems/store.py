"""Many problems on disk, read one at a time: our own JSONL, each line a Zstandard frame of its own.

CodeContests' training set has gigabytes of tests, and a step needs only those of its own problems.
A store is written once, from a stream, and found by a key computed from its source. Only the lines'
offsets are in memory. `zstdcat` prints a store as JSONL.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import overload

import zstandard

from rlef_mega.problems.jsonl import parse_problem, to_row
from rlef_mega.problems.rows import Drop, Read
from rlef_mega.run.inputs import sampled
from rlef_mega.types import Problem

FORMAT = 8  # part of every key: raise it when a reader's output for the same row changes
WHOLE_BYTES = 64 << 20  # of larger files only size, modification time and both ends count
END_BYTES = 1 << 20


class ProblemStore(Sequence[Problem]):
    """The problems of a store, each read on access, and the rows dropped when it was written."""

    def __init__(self, index: Path) -> None:
        about = json.loads(index.read_text(encoding="utf-8"))
        self.offsets: list[int] = about["offsets"]
        self.number_of = {name: number for number, name in enumerate(about["ids"])}
        self.drops = tuple(Drop(**drop) for drop in about["drops"])
        self.file = index.with_suffix(".jsonl.zst").open("rb")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start, end = self.offsets[number : number + 2]
        frame = os.pread(self.file.fileno(), end - start, start)  # threads share no file position
        row = json.loads(zstandard.ZstdDecompressor().decompress(frame))
        return parse_problem(row, compiled=False)

    def __iter__(self) -> Iterator[Problem]:
        return (self[number] for number in range(len(self)))


def cache_folder() -> Path:
    """Return the folder of stores: in RLEF_CACHE, or else in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RLEF_CACHE") or Path(root) / "rlef-mega") / "problems"


def stored(
    source: str, files: Sequence[Path], read: Callable[[Path], Iterable[Read]], folder: Path
) -> ProblemStore:
    """Return the problems of a source as they are stored in `folder`. If these files have not been
    stored yet, read and write them first.

    `read` gets the path of a journal, in which it may record its progress, to survive a kill.
    """
    index = folder / f"{digest_of(source, files)}.json"
    if not index.is_file():
        journal = index.with_suffix(".journal")
        write_store(read(journal), index)
        journal.unlink(missing_ok=True)
    return ProblemStore(index)


def digest_of(source: str, files: Sequence[Path]) -> str:
    """Return a digest of the format, a source's name and its files' content."""
    digest = hashlib.blake2b(repr((FORMAT, source)).encode(), digest_size=16)
    for path in files:
        state = path.stat()
        with path.open("rb") as file:
            digest.update(repr((path.name, state.st_size)).encode())
            if state.st_size <= WHOLE_BYTES:
                digest.update(file.read())
                continue
            digest.update(repr(state.st_mtime_ns).encode() + file.read(END_BYTES))
            file.seek(-END_BYTES, os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()


def digest_of_problems(problems: Sequence[Problem]) -> str:
    """Return a digest of problems as they are trained on, whatever file they came from and whenever
    their store was written."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(problems, ProblemStore):
        digest.update(repr(problems.offsets).encode())
        contents = sampled(Path(problems.file.name))
    else:
        rows = (to_row(problem) for problem in problems)
        contents = (json.dumps(row, sort_keys=True).encode() for row in rows)
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def write_store(outcomes: Iterable[Read], index: Path) -> None:
    """Write the store, with one problem in memory at a time.

    The index is written last: if it exists, the store is complete.
    """
    index.parent.mkdir(parents=True, exist_ok=True)
    ids: list[str] = []
    offsets: list[int] = [0]
    drops: list[Drop] = []
    compressor = zstandard.ZstdCompressor(level=3)
    with tempfile.NamedTemporaryFile(dir=index.parent, suffix=".part", delete=False) as data:
        try:
            for problem, dropped in outcomes:
                drops += dropped
                if problem is not None:
                    ids.append(problem.id)
                    line = json.dumps(to_row(problem)) + "\n"
                    offsets.append(offsets[-1] + data.write(compressor.compress(line.encode())))
            data.flush()
            os.replace(data.name, index.with_suffix(".jsonl.zst"))
        except BaseException:
            os.unlink(data.name)
            raise
    about = {"ids": ids, "offsets": offsets, "drops": [asdict(drop) for drop in drops]}
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=index.parent, suffix=".part", delete=False
    ) as file:
        json.dump(about, file)
    os.replace(file.name, index)
