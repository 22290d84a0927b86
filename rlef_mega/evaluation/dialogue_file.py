"""The dialogues of an evaluation, in an append-only file. A killed evaluation resumes from it, and
all numbers are computed from it.

The format is JSON Lines. The first line holds the settings. Every dialogue that finishes or is
dropped adds a line at once. Every start of the command adds a `session` line, and a `released` line
after it gave its SGLang servers back. A kill can truncate the last line, which is removed when
the file is next opened. The key of a dialogue is protocol, problem and number. Of two lines with
the same key the later counts, because the next session retries a dialogue that a fault dropped.
"""

import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from rlef_mega.config import ConfigError, differences
from rlef_mega.dialogues.rollout import TOO_LONG
from rlef_mega.run.directory import append_whole, lock_file

FORMAT = 1
Record = dict[str, Any]


class Key(NamedTuple):
    protocol: str
    problem_id: str
    number: int  # of the problem's dialogues, from 0


class DialogueFile:
    """A file of dialogues. Open it with `locked`, so that only this process writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settled = {key_of(r) for r in read_dialogues(path) if is_settled(r)}

    @classmethod
    @contextmanager
    def locked(cls, path: Path, asked: Record) -> Iterator[Self]:
        """Open or create a file, and keep it locked within the block. Raises ConfigError if its
        dialogues have other settings, or if another process writes to it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            try:
                lock_file(file)
            except BlockingIOError:
                raise ConfigError(
                    f"{path} is being written by another process; stop it, or choose another --name"
                ) from None
            drop_torn_line(path)
            if path.stat().st_size == 0:
                append_whole(path, json.dumps({"rlef_eval": FORMAT, "asked": asked}) + "\n")
            if other := differences(read_header(path)["asked"], asked):
                raise ConfigError(
                    f"{path} holds dialogues of another evaluation ({other}); "
                    "choose another --name, or remove the file to start over"
                )
            yield cls(path)

    def claims(self, engine: Record) -> bool:
        """Return whether the last session used this engine, and was killed before it gave the
        engine's servers back."""
        last: Record | None = None
        for line in read_lines(self.path):
            if "session" in line:
                last = line["session"]["engine"]
            elif "released" in line:
                last = None
        return last == engine

    def append(self, record: Record) -> None:
        """Append a whole line or nothing. Raises OSError if the disk is full."""
        append_whole(self.path, json.dumps(record) + "\n")
        if "protocol" in record and is_settled(record):
            self.settled.add(key_of(record))


def drop_torn_line(path: Path) -> None:
    """Remove what follows the last newline."""
    if path.stat().st_size:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
            end = content.rfind(b"\n") + 1
        os.truncate(path, end)


def read_header(path: Path) -> Record:
    with path.open(encoding="utf-8") as lines:
        try:
            header = json.loads(lines.readline())
        except ValueError:
            header = None
    if not isinstance(header, dict) or header.get("rlef_eval") != FORMAT:
        raise ConfigError(
            f"{path} is not a file of dialogues of this version; choose another --name"
        )
    return header


def read_lines(path: Path) -> Iterator[Record]:
    """Yield all lines but the first, without a truncated last line."""
    with path.open(encoding="utf-8") as lines:
        lines.readline()
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def read_dialogues(path: Path) -> Iterator[Record]:
    return (record for record in read_lines(path) if "protocol" in record)


def is_settled(record: Record) -> bool:
    """Return whether the dialogue finished, or a retry would be dropped again."""
    return record.get("dropped") in (None, TOO_LONG)


def key_of(record: Record) -> Key:
    return Key(record["protocol"], record["problem_id"], record["number"])
