"""A folder written in parts by one process or several, that can be killed and goes on.

Theory of operation. Every process plans the same parts. Process r of n writes parts r, r + n, ...
into `.OUT.partial`, beside the final folder. A part that is on the disk gets a mark, a small file
in `.OUT.partial/.done` with the part's size and sha256 and whatever else its writer wants
remembered. Process 0 waits for the others' marks, writes what remains (an index, a manifest),
takes the marks away and gives the folder its name. So a folder under its final name is complete.
A conversion that was killed is started again by the same command: marks whose files are still what
they say are kept. If the source or what is asked for has changed, everything is written anew.

Several processes meet through torch.distributed, started by torchrun or with its environment
variables; the parts themselves never travel. A process that fails ends the others' waiting.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from rlef_mega.config import ConfigError
from rlef_mega.megatron.checkpoints.files import flush_to_disk

DONE, ORDER, LOCK = ".done", "order.json", "lock"
LOOK_EVERY_S = 0.5
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Report = Callable[[int, int], None]  # bytes done, bytes in all
Mark = dict[str, Any]


@dataclass(frozen=True)
class Processes:
    """This process among those that convert together."""

    rank: int = 0
    count: int = 1

    def gather(self, mine: object) -> list[Any]:
        """Everyone's, on every process. World: all ranks call it."""
        if self.count == 1:
            return [mine]
        if not dist.is_initialized():
            dist.init_process_group("gloo", rank=self.rank, world_size=self.count)
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, mine)
        return everyone


class PartFile:
    """What writers of a part need of a file. Its checksum is computed on another thread while the
    same bytes are written. A failed write is kept for `raise_fault`: torch's archive writer would
    end the process over it.
    """

    def __init__(self, path: Path, progress: "Progress") -> None:
        self.file, self.progress = path.open("wb"), progress
        self.digest, self.hasher = hashlib.sha256(), ThreadPoolExecutor(1)
        self.position = 0
        self.fault: OSError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hasher.shutdown()
        with suppress(OSError):  # a full disk has been told by `raise_fault`
            self.file.close()

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        hashing = self.hasher.submit(self.digest.update, view)
        if self.fault is None:
            try:
                self.file.write(view)
            except OSError as error:
                self.fault = error
        hashing.result()
        self.position += len(view)
        self.progress.advance()
        return len(view)

    def raise_fault(self) -> None:
        if self.fault is not None:
            raise self.fault

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        """Once, by `to_disk`."""

    def to_disk(self) -> None:
        """So that a mark never says more than is there."""
        self.raise_fault()
        self.file.flush()
        os.fsync(self.file.fileno())


@dataclass(frozen=True)
class Part:
    """A file, about how large it will be, and how to write it; what `write` returns is JSON, and
    kept in the mark."""

    file: str
    bytes: int
    write: Callable[[PartFile], Any]


@dataclass(frozen=True)
class Job:
    """`order` says what is asked for of which source; a partial folder of another is discarded."""

    out: Path
    order: dict[str, Any]
    parts: Sequence[Part]
    finish: Callable[[Path, dict[str, Mark]], None]
    overwrite: bool = False

    @property
    def partial(self) -> Path:
        return self.out.with_name(f".{self.out.name}.partial")

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def run(self, processes: Processes, report: Report) -> None:
        """Raises ConfigError if `out` is there, or in use, or the disk is full."""
        leads = processes.rank == 0
        with explain_full_disk(self.partial), self.prepared() if leads else nullcontext():
            processes.gather(None)  # the folder is there
            progress = Progress(self, report if leads else silent)
            mine = {
                part.file: self.write(part, progress)
                for part in self.parts[processes.rank :: processes.count]
            }
            marks = {file: mark for each in processes.gather(mine) for file, mark in each.items()}
            progress.look()
            if leads:
                self.finish(self.partial, marks)
                shutil.rmtree(self.partial / DONE)
                put_in_place(self.partial, self.out)
            processes.gather(None)  # it has its name

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The partial folder, locked, with nothing in it of another order."""
        refuse_existing(self.out, overwrite=self.overwrite)
        (self.partial / DONE).mkdir(parents=True, exist_ok=True)
        with (self.partial / DONE / LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another process is writing {self.out}; wait for it") from None
            order, text = self.partial / DONE / ORDER, json.dumps(self.order, sort_keys=True)
            if not order.is_file() or order.read_text() != text:
                for path in self.partial.rglob("*"):
                    if path.is_file() and path.name != LOCK:
                        path.unlink()
                order.write_text(text)
            self.check_room()
            yield

    def check_room(self) -> None:
        there = sum(part.bytes for part in self.parts if self.mark_path(part).is_file())
        free, needed = shutil.disk_usage(self.partial).free, self.bytes - there
        if needed > free:
            raise ConfigError(
                f"{self.out} needs {gigabytes(needed)} more, but {gigabytes(free)} are free on its "
                f"disk; make room"
            )

    def mark_path(self, part: Part) -> Path:
        return self.partial / DONE / f"{part.file.replace('/', '--')}.json"

    def write(self, part: Part, progress: "Progress") -> Mark:
        path, marked = self.partial / part.file, self.mark_path(part)
        if marked.is_file():
            mark: Mark = json.loads(marked.read_text())
            if is_as_marked(path, mark):
                progress.advance()
                return mark
            marked.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        with PartFile(path, progress) as file:
            facts = part.write(file)
            file.to_disk()
        mark = {"bytes": file.position, "sha256": file.digest.hexdigest(), "facts": facts}
        unnamed = marked.with_suffix(".tmp")
        unnamed.write_text(json.dumps(mark))
        unnamed.rename(marked)
        return mark


class Progress:
    """Bytes in the folder, of all processes; looked at twice a second."""

    def __init__(self, job: Job, report: Report) -> None:
        self.job, self.report = job, report
        self.reported = 0.0

    def advance(self) -> None:
        if time.monotonic() - self.reported > LOOK_EVERY_S:
            self.look()

    def look(self) -> None:
        self.reported = time.monotonic()
        files = [self.job.partial / part.file for part in self.job.parts]
        sizes = [path.stat().st_size for path in files if path.is_file()]
        self.report(sum(sizes), self.job.bytes)


def silent(done: int, total: int) -> None:
    """No progress is shown."""


def is_as_marked(path: Path, mark: Mark) -> bool:
    if not path.is_file() or path.stat().st_size != mark["bytes"]:
        return False
    return sha256(path) == mark["sha256"]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Sizes and times of a folder's files: what a source is known by."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = {path: path.stat() for path in files}
    return {
        str(path.relative_to(folder)): [fact.st_size, fact.st_mtime_ns]
        for path, fact in facts.items()
    }


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; choose another name, or give --overwrite")


def put_in_place(finished: Path, out: Path) -> None:
    """Rename, so that the name is never on half of anything; what had the name is removed last."""
    before = out.with_name(f".{out.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if out.exists():
        out.rename(before)
    for path in finished.rglob("*"):
        flush_to_disk(path)
    finished.rename(out)
    flush_to_disk(out.parent)
    shutil.rmtree(before, ignore_errors=True)


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Says what a full disk means here: nothing is lost."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise ConfigError(
            f"the disk is full ({error.strerror}) while writing into {folder}; make room and give "
            f"the same command again: finished files are kept"
        ) from None


def gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
