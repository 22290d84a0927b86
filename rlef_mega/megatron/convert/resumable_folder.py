"""A folder whose files are written by one process or several, and which survives a kill.

Theory of operation. Every process plans the same files. Process r of n writes files r, r + n, ...
into `.OUT.partial`, beside the final folder. A file that is on the disk gets a mark: a small file
in `.OUT.partial/.done` with its size, its sha256 and what its writer returned. Process 0 waits
for the other processes' marks, writes what remains (an index, a manifest), removes the marks and
renames the folder. So a folder under its final name is complete. After a kill the same command
resumes: files that still match their marks are kept. If the source or the request has
changed, everything is written again.

Several processes are the ranks of torch.distributed's world; no weights travel between them. If one
fails, torch.distributed ends the others' waits.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rlef_mega.config import ConfigError
from rlef_mega.megatron.checkpoints.files import describe_file
from rlef_mega.megatron.checkpoints.torch_dist import ChecksummedFile
from rlef_mega.run.directory import (
    DISK_IS_FULL,
    flush_to_disk,
    replace_folder,
    write_atomically,
)
from rlef_mega.run.ranks import gather, my_share

FINISHED, REQUEST, LOCK = ".done", "order.json", "lock"
Report = Callable[[int, int], None]  # bytes written, bytes in all
FileMark = dict[str, Any]


def is_first() -> bool:
    """Whether this process is alone or the first of several."""
    return not dist.is_initialized() or dist.get_rank() == 0


@dataclass(frozen=True)
class PlannedFile:
    """A file, about how large it will be, and how to write it. What `write` returns is JSON, and
    kept in the file's mark."""

    name: str
    bytes: int
    write: Callable[[ChecksummedFile], Any]


@dataclass(frozen=True)
class ResumableFolder:
    """A folder to be written. `request` identifies source and options; a partial folder of another
    request is discarded. `finish` writes what remains when all files have their marks."""

    out: Path
    request: dict[str, Any]
    files: Sequence[PlannedFile]
    finish: Callable[[Path, dict[str, FileMark]], None]
    overwrite: bool = False

    @property
    def partial(self) -> Path:
        return self.out.with_name(f".{self.out.name}.partial")

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def write(self, report: Report) -> None:
        """Write all that is not written yet. Raises ConfigError if `out` exists, another process
        writes it, or the disk is full."""
        written, count = 0, dist.get_world_size() if dist.is_initialized() else 1

        def progress(more: int) -> None:
            nonlocal written
            written += more
            report(written * count, self.bytes)  # the other processes are about as far

        with explain_full_disk(self.partial), self.prepared() if is_first() else nullcontext():
            gather(None)  # the partial folder exists
            mine = {file.name: self.write_file(file, progress) for file in my_share(self.files)}
            marks = {name: mark for each in gather(mine) for name, mark in each.items()}
            if is_first():
                self.finish(self.partial, marks)
                shutil.rmtree(self.partial / FINISHED)
                for path in self.partial.rglob("*"):
                    flush_to_disk(path)
                replace_folder(self.partial, self.out)
            gather(None)  # the folder has its name

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Make and lock the partial folder, without files of another request."""
        if self.out.exists() and not self.overwrite:
            raise ConfigError(f"{self.out} exists; choose another name, or give --overwrite")
        (self.partial / FINISHED).mkdir(parents=True, exist_ok=True)
        with (self.partial / FINISHED / LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another process is writing {self.out}; wait for it") from None
            request, text = self.partial / FINISHED / REQUEST, json.dumps(self.request)
            if not request.is_file() or request.read_text() != text:
                for path in self.partial.rglob("*"):
                    if path.is_file() and path.name != LOCK:
                        path.unlink()
                request.write_text(text)
            self.check_room()
            yield

    def check_room(self) -> None:
        written = sum(file.bytes for file in self.files if self.mark_path(file).is_file())
        free, needed = shutil.disk_usage(self.partial).free, self.bytes - written
        if needed > free:
            raise ConfigError(
                f"{self.out} needs {needed / 1e9:,.1f} GB more, but {free / 1e9:,.1f} GB are free "
                f"on its disk; make room"
            )

    def mark_path(self, file: PlannedFile) -> Path:
        return self.partial / FINISHED / f"{file.name.replace('/', '--')}.json"

    def write_file(self, file: PlannedFile, progress: Callable[[int], None]) -> FileMark:
        """Write a file and its mark, unless the file still matches its mark."""
        path, marked = self.partial / file.name, self.mark_path(file)
        if marked.is_file():
            mark: FileMark = json.loads(marked.read_text())
            if path.is_file() and describe_file(path).items() <= mark.items():
                progress(mark["bytes"])
                return mark
            marked.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        with ChecksummedFile(path, progress) as content:
            facts = file.write(content)
            mark = {**content.to_disk(), "facts": facts}
        write_atomically(marked, json.dumps(mark))
        return mark


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Return sizes and times of a folder's files, by which a source is recognised."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = {path: path.stat() for path in files}
    return {
        str(path.relative_to(folder)): [fact.st_size, fact.st_mtime_ns]
        for path, fact in facts.items()
    }


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into a ConfigError with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        raise ConfigError(
            f"the disk is full ({error.strerror}) while writing into {folder}; make room and give "
            f"the same command again: finished files are kept"
        ) from None
