"""The dialogues of an evaluation, in a file that only grows: what a killed evaluation goes on from,
and all that its numbers are computed from.

JSON Lines. The first says what was asked and of which problems; after it, one line for each
dialogue that ended or was dropped, as soon as it did, and one (`session`) for each time that work
began. A kill can cut off the last line, which is then dropped when the file is opened. A dialogue
is known by its key: protocol, problem and number. Of two lines with one key the later counts: a
dialogue that a fault dropped is tried again by the next session.
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
HOPELESS = "prompt too long"  # a drop that another try would not change
Record = dict[str, Any]


class Key(NamedTuple):
    protocol: str
    problem_id: str
    number: int  # of the problem's dialogues, from 0


class DialogueFile:
    """Open for writing by this process alone; a context manager."""

    def __init__(self, path: Path, asked: Record, problems: list[Record]) -> None:
        """ConfigError where the file holds dialogues of something else, or is in use."""
        self.path = path
        if not path.exists():
            header = {"rlef_eval": FORMAT, "asked": asked, "problems": problems}
            create(path, json.dumps(header) + "\n")
        self.file = os.open(path, os.O_RDWR | os.O_APPEND)
        try:
            lock(self.file, path)
            drop_torn_line(self.file)
            refuse_other(path, read_header(path)["asked"], asked)
            self.settled = {key_of(record) for record in settled(path)}
        except BaseException:
            os.close(self.file)
            raise

    def __enter__(self) -> "DialogueFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)  # and with it the lock

    def engines(self) -> list[Record]:
        """What earlier sessions sampled with."""
        return [line["session"]["engine"] for line in read_lines(self.path) if "session" in line]

    def append(self, record: Record) -> None:
        """Whole or not at all, also where the disk is full (OSError)."""
        line = (json.dumps(record) + "\n").encode()
        whole = os.fstat(self.file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self.file, line[written:])
        except OSError:
            with suppress(OSError):
                os.ftruncate(self.file, whole)
            raise
        if "protocol" in record and is_settled(record):
            self.settled.add(key_of(record))


def create(path: Path, content: str) -> None:
    """Whole, unless another process has made it meanwhile, which may be writing to it already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(content)
    with suppress(FileExistsError):
        os.link(partial, path)
    partial.unlink()


def lock(file: int, path: Path) -> None:
    """Until it is closed, or the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{path} is being written by another process; stop it, or choose another --name"
        ) from None


def drop_torn_line(file: int) -> None:
    """What follows the last end of a line."""
    end = os.fstat(file).st_size
    while end:
        start = max(0, end - (1 << 16))
        block = os.pread(file, end - start, start)
        place = block.rfind(b"\n")
        if place >= 0:
            os.ftruncate(file, start + place + 1)
            return
        end = start


def read_header(path: Path) -> Record:
    with path.open() as lines:
        try:
            header = json.loads(lines.readline())
        except ValueError:
            header = None
    if not isinstance(header, dict) or header.get("rlef_eval") != FORMAT:
        raise ConfigError(f"{path} is no file of dialogues of this version; choose another --name")
    return header


def refuse_other(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    if other := differences(there, asked):
        raise ConfigError(
            f"{path} holds dialogues of another evaluation ({other}); "
            "choose another --name, or remove it to start anew"
        )


def read_lines(path: Path) -> Iterator[Record]:
    """All lines but the first; a torn last one is left out."""
    with path.open() as lines:
        lines.readline()
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def read_dialogues(path: Path) -> Iterator[Record]:
    return (record for record in read_lines(path) if "protocol" in record)


def settled(path: Path) -> Iterator[Record]:
    return (record for record in read_dialogues(path) if is_settled(record))


def is_settled(record: Record) -> bool:
    """It ended, or would be dropped again."""
    return record.get("dropped") in (None, HOPELESS)


def key_of(record: Record) -> Key:
    return Key(record["protocol"], record["problem_id"], record["number"])
