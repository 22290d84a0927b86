"""The run directory. The main files that a run writes:

    config.toml  inputs.json  manifest.json  changes.jsonl  metrics.jsonl  eval/*.json
    episodes/step_*.jsonl.zst  checkpoints/  report.html

metrics.jsonl has one line per step. A killed run may have written lines beyond its last checkpoint;
`resume` removes them, so that the file reads as if the run had never stopped. A full disk does not
stop a run: lines of metrics wait for free space, and the step's episodes, which the run never reads
back, are skipped.
"""

import errno
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

import zstandard

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
REMEDIES = {
    errno.EEXIST: "a file has the name of this folder; move it, or choose another folder",
    errno.ENOTDIR: "a file has the name of a folder; move it, or choose another folder",
    errno.EISDIR: "this is a folder; give a file",
    errno.ENOENT: "check the name; if it is a new folder, it cannot be created there",
    errno.EACCES: "give this user access to it, or choose another path",
    errno.EPERM: "give this user access to it, or choose another path",
    errno.EROFS: "choose a path on a file system that can be written",
    errno.ENOSPC: "free space, or choose a path on another file system",
    errno.EDQUOT: "free space, or choose a path on another file system",
}
PHASE = "phase: "  # begins the note of an error that names the phase in which it was raised


class Clock:
    """Measures the phases of a step in seconds, and calls `note` as each phase begins and ends."""

    def __init__(self, note: Callable[[str], None] | None = None) -> None:
        self.note = note or (lambda text: None)
        self.times: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begun = time.perf_counter()
        self.note(f"{phase} begins")
        try:
            yield
        except Exception as error:
            error.add_note(f"{PHASE}{phase}")
            raise
        self.note(f"{phase} ended")
        self.times[phase] = self.times.get(phase, 0.0) + time.perf_counter() - begun

    def lap(self) -> dict[str, float]:
        """End the step and start the next. Returns its phases and, under `step`, its whole time."""
        now = time.perf_counter()
        times, self.times = {**self.times, "step": now - self.started}, {}
        self.started = now
        return {phase: round(seconds, 4) for phase, seconds in times.items()}


class RunDirectory:
    """The folder of one run, written by its rank 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.stop_request = path / "stop"
        self.held_lock: TextIO | None = None
        self.waiting: list[str] = []  # lines that a full disk did not take yet

    def lock(self) -> None:
        """Lock the folder until this process ends.

        Raises RuntimeError if another process holds the lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - open until the process ends
        try:
            lock_file(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise RuntimeError(
                f"{self.path} is in use by process {holder}; stop it or choose another run.dir"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self.held_lock = file

    def refuse_if_locked(self) -> None:
        """Raise RuntimeError if another process holds the lock; does not keep it."""
        self.lock()
        assert self.held_lock is not None
        self.held_lock.close()

    def note_progress(self, text: str) -> None:
        """Write the current phase into the file `progress`.

        A watchdog treats a run whose file is old as hung, so on a full disk the file is touched.
        """
        path = self.path / "progress"
        try:
            path.write_text(text + "\n")
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            path.touch()

    def resume(self, step: int) -> None:
        """Remove the metrics that were recorded after this step."""
        lines = [line for line in self.read_metrics() if line["step"] <= step]
        write_atomically(self.metrics_path, "".join(json.dumps(line) + "\n" for line in lines))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the recorded steps, without a last line that a kill cut short."""
        if not self.metrics_path.exists():
            return []
        records = []
        for line in self.metrics_path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; on a full disk, keep it for the next call."""
        self.waiting.append(json.dumps(record) + "\n")
        with warn_if_disk_is_full(f"{len(self.waiting)} lines of {self.metrics_path} wait"):
            append_whole(self.metrics_path, "".join(self.waiting))
            self.waiting.clear()

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.path / name, json.dumps(content, indent=1) + "\n")

    def write_episodes(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Write a compressed file with a line of JSON for each episode; on a full disk, skip it."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        with warn_if_disk_is_full(f"{self.path / name} is skipped"):
            write_atomically(self.path / name, zstandard.compress(text.encode()))


def lock_file(file: IO[Any]) -> None:
    """Lock a file for this process. Raises BlockingIOError if another process holds the lock, and
    RuntimeError if the lock fails otherwise. Warns if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        about = (
            f"{file.name} cannot be locked: {error.strerror}. Two processes could write it at once"
        )
        if error.errno in NO_LOCKS:  # Lustre without `-o flock`
            print(f"WARNING: {about}; start only one", file=sys.stderr, flush=True)
            return
        raise RuntimeError(
            f"{about}; choose a folder on a file system with locks (Lustre: mount it with flock)"
        ) from None


def explain_error(error: Exception) -> str:
    """Return an error's message; for one of the file system, the path, the reason and a remedy."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    remedy = REMEDIES.get(error.errno or 0, "choose another path")
    return f"{os.fsdecode(error.filename)}: {error.strerror}: {remedy}"


@contextmanager
def warn_if_disk_is_full(consequence: str) -> Iterator[None]:
    """Turn the error of a full disk into a warning that names its consequence."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        print(f"WARNING: {error}: {consequence}", file=sys.stderr, flush=True)


def append_whole(path: Path, text: str) -> None:
    """Append all of the text or nothing. Raises OSError if the disk is full."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        if path.exists():
            os.truncate(path, before)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


@contextmanager
def folder_written_whole(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield a new folder beside `path` to write into. When the block ends, it is renamed to `path`
    and replaces what was there; an error or a kill before that leaves `path` as it was. Without
    `flush`, a power failure may leave it incomplete."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if flush:
        for file in partial.rglob("*"):
            flush_to_disk(file)
    replace_folder(partial, path)


def replace_folder(finished: Path, path: Path) -> None:
    """Rename a finished folder to `path`. A folder that had the name is moved away first and
    deleted last."""
    before = path.with_name(f".{path.name}.before")
    if path.exists():  # else `before` may be all that a killed process left
        shutil.rmtree(before, ignore_errors=True)
        path.rename(before)
    finished.rename(path)
    flush_to_disk(path.parent)
    shutil.rmtree(before, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Flush a file's content, or a folder's list of names. Only then does it survive a power
    failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
