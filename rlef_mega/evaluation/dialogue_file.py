"""The dialogues of an evaluation, in an append-only file. A killed evaluation resumes from it, and
all numbers are computed from it.

The format is JSON Lines. The first line holds the settings and the problems. Every dialogue that
finishes or is dropped adds a line at once, and every start of the command adds a `session` line. A
kill can truncate the last line, which is removed when the file is next opened. The key of a
dialogue is protocol, problem and number. Of two lines with the same key the later counts, because
the next session retries a dialogue that a fault dropped.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rlef_mega.config import ConfigError, differences

FORMAT = 1
PERMANENT = "prompt too long"  # a drop that a retry would not change
Record = dict[str, Any]


class Key(NamedTuple):
    protocol: str
    problem_id: str
    number: int  # of the problem's dialogues, from 0


class DialogueFile:
    """A file of dialogues, locked for writing by this process; a context manager."""

    def __init__(self, path: Path, asked: Record, problems: list[Record]) -> None:
        """Open or create the file. Raises ConfigError if its dialogues have other settings, or if
        another process writes to it."""
        self.path = path
        if not path.exists():
            header = {"rlef_eval": FORMAT, "asked": asked, "problems": problems}
            create(path, json.dumps(header) + "\n")
        self.file = os.open(path, os.O_RDWR | os.O_APPEND)
        try:
            lock(self.file, path)
            drop_torn_line(self.file)
            refuse_other(path, read_header(path)["asked"], asked)
            self.settled = {key_of(r) for r in read_dialogues(path) if is_settled(r)}
        except BaseException:
            os.close(self.file)
            raise

    def __enter__(self) -> "DialogueFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)  # releases the lock

    def engines(self) -> list[Record]:
        """Return the engines of earlier sessions."""
        return [line["session"]["engine"] for line in read_lines(self.path) if "session" in line]

    def append(self, record: Record) -> None:
        """Append a whole line or nothing. Raises OSError if the disk is full."""
        line = (json.dumps(record) + "\n").encode()
        size = os.fstat(self.file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self.file, line[written:])
        except OSError:
            with suppress(OSError):
                os.ftruncate(self.file, size)
            raise
        if "protocol" in record and is_settled(record):
            self.settled.add(key_of(record))


def create(path: Path, content: str) -> None:
    """Create the file with its content at once, unless another process has created it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(content)
    with suppress(FileExistsError):
        os.link(partial, path)
    partial.unlink()


def lock(file: int, path: Path) -> None:
    """Lock the file until it is closed or the process ends. Raises ConfigError if it is locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{path} is being written by another process; stop it, or choose another --name"
        ) from None


def drop_torn_line(file: int) -> None:
    """Remove what follows the last newline."""
    end = os.fstat(file).st_size
    while end:
        start = max(0, end - (1 << 16))
        block = os.pread(file, end - start, start)
        newline = block.rfind(b"\n")
        if newline >= 0:
            os.ftruncate(file, start + newline + 1)
            return
        end = start


def read_header(path: Path) -> Record:
    with path.open() as lines:
        try:
            header = json.loads(lines.readline())
        except ValueError:
            header = None
    if not isinstance(header, dict) or header.get("rlef_eval") != FORMAT:
        raise ConfigError(
            f"{path} is not a file of dialogues of this version; choose another --name"
        )
    return header


def refuse_other(path: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    if other := differences(found, asked):
        raise ConfigError(
            f"{path} holds dialogues of another evaluation ({other}); "
            "choose another --name, or remove the file to start over"
        )


def read_lines(path: Path) -> Iterator[Record]:
    """Yield all lines but the first, without a truncated last line."""
    with path.open() as lines:
        lines.readline()
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def read_dialogues(path: Path) -> Iterator[Record]:
    return (record for record in read_lines(path) if "protocol" in record)


def is_settled(record: Record) -> bool:
    """Return whether the dialogue finished, or a retry would be dropped again."""
    return record.get("dropped") in (None, PERMANENT)


def key_of(record: Record) -> Key:
    return Key(record["protocol"], record["problem_id"], record["number"])
