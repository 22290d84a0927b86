"""Ranges of bytes of many files, read into tensors.

Nothing is mapped: a mapped page counts as resident memory of the process, a page that was read
through a system call does not.
"""

import io
import os
from pathlib import Path
from typing import IO, Self

import torch

from rlef_mega.config import ConfigError


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class ByteRanges:
    """Files of a folder, opened when first read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open_files: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.open_files.values():
            os.close(descriptor)
        self.open_files.clear()

    def descriptor(self, file: str) -> int:
        if file not in self.open_files:
            try:
                self.open_files[file] = os.open(self.folder / file, os.O_RDONLY)
            except FileNotFoundError:
                raise ConfigError(
                    f"no file {self.folder / file}: {self.folder} is incomplete; fetch it again"
                ) from None
        return self.open_files[file]

    def size(self, file: str) -> int:
        return os.fstat(self.descriptor(file)).st_size

    def read_into(self, file: str, offset: int, tensor: torch.Tensor) -> None:
        """Fill a contiguous CPU tensor. ConfigError if the file ends before."""
        target = bytes_of(tensor)
        done = 0
        while done < len(target):  # one call moves at most 2 GiB
            count = os.preadv(self.descriptor(file), [target[done:]], offset + done)
            if count == 0:
                raise ConfigError(
                    f"{self.folder / file} is truncated: it ends at byte {self.size(file)}, "
                    f"but {offset + len(target)} are expected; fetch it again"
                )
            done += count

    def range(self, file: str, offset: int, length: int) -> IO[bytes]:
        """Part of a file as a file of its own."""
        return FileRange(self.descriptor(file), offset, length)  # type: ignore[return-value]


class FileRange(io.RawIOBase):
    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self.descriptor, self.offset, self.length, self.position = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        view = memoryview(buffer)[: max(0, self.length - self.position)]
        count = os.preadv(self.descriptor, [view], self.offset + self.position)
        self.position += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = start + offset
        return self.position

    def tell(self) -> int:
        return self.position
