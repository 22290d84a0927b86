"""What programs find in place of parts of the standard library that a layer would refuse.

The zygote puts these there before it forks. They are conveniences: no layer relies on them.
"""

from __future__ import annotations

import builtins
import io
import mmap
import os
import sys
import threading
import types
from typing import Any

STREAMS = ("/dev/stdin", "/dev/stdout", "/dev/stderr")  # no layer lets a program open these


def install() -> None:
    builtins.open = io.open = open_file
    mmap.mmap = Mapping  # type: ignore[misc]
    sys.modules["_multiprocessing"] = module = types.ModuleType("_multiprocessing")
    module.__dict__.update(SemLock=Semaphore, sem_unlink=os.unlink)


class Null(io.RawIOBase):
    """Replaces the null device, so that no layer has to let a program open a file for writing."""

    name, mode = os.devnull, "rb+"

    def readable(self) -> bool:
        return True

    writable = readable

    def readinto(self, buffer: object) -> int:
        return 0

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes


def open_file(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
    """Open like `open`, but with `Null` for the null device, and duplicates of the streams."""
    path = os.fsdecode(file) if isinstance(file, str | bytes | os.PathLike) else ""
    if path in STREAMS:
        file = os.dup(STREAMS.index(path))
    if path != os.devnull:
        return io_open(file, mode, *arguments, **keywords)
    stream: Any = io.BufferedReader(Null()) if "r" in mode else io.BufferedWriter(Null())
    if "+" in mode:
        stream = io.BufferedRWPair(Null(), Null())
    return stream if "b" in mode else io.TextIOWrapper(stream, "utf-8", keywords.get("errors"))


io_open = io.open
open_file.__name__ = open_file.__qualname__ = "open"


class Mapping(mmap.mmap):
    """Maps anonymous memory privately, which makes no difference within one process: shared memory
    is refused, since it can stay allocated without counting as resident.
    """

    def __new__(
        cls, fileno: int, length: int, flags: int = mmap.MAP_SHARED, *others: Any, **named: Any
    ) -> Mapping:
        if fileno == -1 and named.get("access"):
            named["access"] = mmap.ACCESS_COPY
        elif fileno == -1 and flags & mmap.MAP_SHARED:
            flags ^= mmap.MAP_SHARED | mmap.MAP_PRIVATE
        return super().__new__(cls, fileno, length, flags, *others, **named)


Mapping.__name__ = Mapping.__qualname__ = "mmap"
Mapping.__module__ = "mmap"


class Semaphore(threading.Semaphore):
    """Replaces the semaphore of `multiprocessing`, which would be a file. Its thread pools need it
    too. All its users are threads of one process.
    """

    SEM_VALUE_MAX = 2**31 - 1
    RECURSIVE = 0
    handle, name = 0, None

    def __init__(self, kind: int, value: int, maxvalue: int, name: str, unlink: bool) -> None:
        super().__init__(value)
        self.kind, self.maxvalue = kind, maxvalue
        self._holds, self._holder = 0, 0

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        if self.kind == self.RECURSIVE and self._is_mine():
            self._holds += 1
            return True
        taken = super().acquire(block, max(0, timeout) if block and timeout is not None else None)
        if taken:
            self._holds, self._holder = self._holds + 1, threading.get_ident()
        return taken

    __enter__ = acquire

    def release(self) -> None:  # type: ignore[override]
        if self.kind == self.RECURSIVE and not self._is_mine():
            raise AssertionError("attempt to release recursive lock not owned by thread")
        if self.kind != self.RECURSIVE and self._get_value() >= self.maxvalue:
            raise ValueError("semaphore or lock released too many times")
        self._holds -= 1
        if self.kind != self.RECURSIVE or self._holds == 0:
            super().release()

    def _is_mine(self) -> bool:
        return self._holds > 0 and self._holder == threading.get_ident()

    def _count(self) -> int:
        return self._holds

    def _get_value(self) -> int:
        return self._value

    def _is_zero(self) -> bool:
        return self._get_value() == 0
