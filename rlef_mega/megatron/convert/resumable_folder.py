"""A folder of planned files, which survives a kill.

Theory of operation. The files are written into `.OUT.partial`, beside the final folder, one after
the other. A finished file gets a mark, a small file in `.OUT.partial/.done`, with its size, its
modification time and what its writer returned. When all have one, the rest is written (an index, a
manifest), the marks are removed and the folder is renamed. So a folder under its final name is
complete. After a kill the same command resumes: files that still match their marks are kept. If the
source or the request has changed, everything is written again.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlef_mega.config import ConfigError
from rlef_mega.run.directory import (
    DISK_IS_FULL,
    flush_to_disk,
    lock_file,
    replace_folder,
    write_atomically,
)
from rlef_mega.run.progress import ByteProgress

FINISHED, REQUEST, LOCK = ".done", "order.json", "lock"


@dataclass(frozen=True)
class PlannedFile:
    """A file, about how large it will be, and how to write it. What `write` returns is JSON, and
    kept in the file's mark."""

    name: str
    bytes: int
    write: Callable[[Path], Any]


@dataclass(frozen=True)
class ResumableFolder:
    """A folder to be written. `request` identifies source and options; a partial folder of another
    request is discarded. `finish` writes what remains, given what each file's writer returned."""

    out: Path
    request: dict[str, Any]
    files: Sequence[PlannedFile]
    finish: Callable[[Path, dict[str, Any]], None]

    @property
    def partial(self) -> Path:
        return self.out.with_name(f".{self.out.name}.partial")

    def write(self, *, source: Path, overwrite: bool) -> None:
        """Write all that is not written yet, with a progress bar. Raises ConfigError if `out` is
        the source, exists and is not to be overwritten, is being written by another process, or if
        the disk is full."""
        if self.out.resolve() == source.resolve():
            raise ConfigError(f"{self.out} is the source itself; choose another name")
        if self.out.exists() and not overwrite:
            raise ConfigError(f"{self.out} exists; choose another name, or give --overwrite")
        bar = ByteProgress(f"writing {self.out}")
        with bar, explain_full_disk(self.partial), self.prepared():
            written, total, facts = 0, sum(file.bytes for file in self.files), {}
            for file in self.files:
                facts[file.name] = self.write_file(file)
                written += file.bytes
                bar(written, total)
            self.finish(self.partial, facts)
            shutil.rmtree(self.partial / FINISHED)
            for path in self.partial.rglob("*"):
                flush_to_disk(path)
            replace_folder(self.partial, self.out)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Make and lock the partial folder, without files of another request."""
        (self.partial / FINISHED).mkdir(parents=True, exist_ok=True)
        with (self.partial / FINISHED / LOCK).open("a") as lock:
            try:
                lock_file(lock)
            except BlockingIOError:
                raise ConfigError(f"another process is writing {self.out}; wait for it") from None
            request, text = self.partial / FINISHED / REQUEST, json.dumps(self.request)
            if not request.is_file() or request.read_text() != text:
                for path in self.partial.rglob("*"):
                    if path.is_file() and path.name != LOCK:
                        path.unlink()
                request.write_text(text)
            needed = sum(file.bytes for file in self.files if not self.mark_path(file).is_file())
            free = shutil.disk_usage(self.partial).free
            if needed > free:
                raise ConfigError(
                    f"{self.out} needs {needed / 1e9:,.1f} GB more, but {free / 1e9:,.1f} GB are "
                    f"free on its disk; free space"
                )
            yield

    def mark_path(self, file: PlannedFile) -> Path:
        return self.partial / FINISHED / f"{file.name.replace('/', '--')}.json"

    def write_file(self, file: PlannedFile) -> Any:
        """Write a file and its mark, unless the file still matches its mark. Returns what its
        writer returned."""
        path, marked = self.partial / file.name, self.mark_path(file)
        if marked.is_file():
            mark = json.loads(marked.read_text())
            if path.is_file() and size_and_time(path) == mark["file"]:
                return mark["facts"]
            marked.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = file.write(path)
        flush_to_disk(path)
        write_atomically(marked, json.dumps({"file": size_and_time(path), "facts": facts}))
        return facts


def size_and_time(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]


def file_stats(folder: Path) -> dict[str, list[int]]:
    """Return sizes and times of a folder's files, by which a source is recognised."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): size_and_time(path) for path in files}


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into a ConfigError with the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors has the system's error in its message only
        full = [f"os error {number})" in str(error) for number in DISK_IS_FULL]
        if getattr(error, "errno", None) not in DISK_IS_FULL and not any(full):
            raise
        raise ConfigError(
            f"the disk is full ({error}) while writing into {folder}; free space and give the same "
            f"command again: finished files are kept"
        ) from None
