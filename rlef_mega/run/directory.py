"""The run directory: what a run leaves behind, and what a resumed run finds.

    config.toml  manifest.json  metrics.jsonl  eval/*.json  episodes/step_*.jsonl.zst  checkpoints/
    report.html

metrics.jsonl has one line a step. A run that was killed may have written lines beyond its last
checkpoint: `resume` cuts them off, so that the file reads as if the run had never stopped. A full
disk does not stop a run: lines wait for room, and a step's episodes, which nothing reads back, are
left out.
"""

import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import zstandard

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Clock:
    """Seconds by phase of a step; what no phase claims is the difference to `step`. `note` is told
    of each phase as it begins and ends."""

    def __init__(self, note: Callable[[str], None] | None = None) -> None:
        self.note = note or (lambda text: None)
        self.times: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begun = time.perf_counter()
        self.note(f"{phase} begins")
        yield
        self.note(f"{phase} ended")
        self.times[phase] = self.times.get(phase, 0.0) + time.perf_counter() - begun

    def lap(self) -> dict[str, float]:
        """End the step: its phases, and under `step` all of its wall time. Starts the next."""
        now = time.perf_counter()
        times, self.times = {**self.times, "step": now - self.started}, {}
        self.started = now
        return {phase: round(seconds, 4) for phase, seconds in times.items()}


class RunDirectory:
    """Written by one process of a run; `lock` keeps a second run out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.stop_request = path / "stop"
        self.lock_file: TextIO | None = None
        self.waiting: list[str] = []  # lines for which the disk had no room

    def lock(self) -> None:
        """Raises RuntimeError if another live process works in this directory. The lock ends with
        the process."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock_file = open(self.path / ".lock", "a+")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock_file.seek(0)
            holder = self.lock_file.read().strip() or "unknown"
            raise RuntimeError(
                f"{self.path} is in use by process {holder}; stop it or choose another run.dir"
            ) from None
        self.lock_file.truncate(0)
        self.lock_file.write(str(os.getpid()))
        self.lock_file.flush()

    def note_progress(self, text: str) -> None:
        """What the run does now. The file's age tells a watchdog that it hangs, so a disk without
        room for the text must not make it look so."""
        path = self.path / "progress"
        try:
            path.write_text(text + "\n")
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            path.touch()

    def resume(self, step: int) -> None:
        """Forget what was recorded after this step."""
        lines = [line for line in self.read_metrics() if line["step"] <= step]
        write_atomically(self.metrics_path, "".join(json.dumps(line) + "\n" for line in lines))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The recorded steps; a last line that was cut off by a kill is left out."""
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
        self.waiting.append(json.dumps(record) + "\n")
        whole = self.metrics_path.stat().st_size if self.metrics_path.exists() else 0
        with room_or_warning(f"{len(self.waiting)} lines of {self.metrics_path} wait for room"):
            try:
                with open(self.metrics_path, "a") as file:
                    file.write("".join(self.waiting))
            except OSError:
                if self.metrics_path.exists():
                    os.truncate(self.metrics_path, whole)
                raise
            self.waiting.clear()

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.path / name, json.dumps(content, indent=1) + "\n")

    def write_episodes(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        with room_or_warning(f"{self.path / name} is left out"):
            write_atomically(self.path / name, zstandard.compress(text.encode()))


@contextmanager
def room_or_warning(consequence: str) -> Iterator[None]:
    """A full disk is said, and what follows from it; the run goes on."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        print(f"WARNING: {error}: {consequence}", file=sys.stderr, flush=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """A reader sees the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)
