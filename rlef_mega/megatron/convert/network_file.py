"""Weights written in Megatron's torch_dist format, chunk by chunk (`stored_network` describes it).

The chunks are ours to choose: ranges of rows of at most `CHUNK_BYTES`, gathered in files of at most
`FILE_BYTES`. Megatron cuts out of them what each rank of a layout needs.
"""

import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from rlef_mega.megatron.convert.resumable_folder import PartFile
from rlef_mega.megatron.convert.stored_network import METADATA

CHUNK_BYTES = 16 * 2**20  # glibc's limit, as in `weights`
FILE_BYTES = 4 * 2**30
COMMON, VERSIONS = "common.pt", "metadata.json"
DCP_VERSION = "1.0.0"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
Place = tuple[int, int]  # offset and length


@dataclass(frozen=True)
class Parameter:
    """A whole Megatron parameter of one layer (None: outside of the layers), under its full key."""

    key: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def columns(self) -> int:
        return torch.Size(self.shape[1:]).numel()


@dataclass(frozen=True)
class Piece:
    """A range of a parameter's rows: one chunk."""

    parameter: Parameter
    row: int
    rows: int

    @property
    def bytes(self) -> int:
        return self.rows * self.parameter.columns * self.parameter.dtype.itemsize

    def in_stack(self, layers: int) -> tuple[torch.Size, ChunkStorageMetadata]:
        """The whole size, and this part of it, with the layers' dimension where there is one."""
        whole, rest = self.parameter.shape, self.parameter.shape[1:]
        offsets, sizes = (self.row, *(0 for _ in rest)), (self.rows, *rest)
        if self.parameter.layer is not None:
            whole = (layers, *whole)
            offsets, sizes = (self.parameter.layer, *offsets), (1, *sizes)
        return torch.Size(whole), ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def cut(parameters: Iterable[Parameter]) -> list[list[Piece]]:
    """The pieces of each file, in order."""
    files: list[list[Piece]] = [[]]
    filled = 0
    for parameter in parameters:
        rows = max(1, CHUNK_BYTES // (parameter.columns * parameter.dtype.itemsize))
        for row in range(0, parameter.shape[0], rows):
            piece = Piece(parameter, row, min(rows, parameter.shape[0] - row))
            if files[-1] and filled + piece.bytes > FILE_BYTES:
                files.append([])
                filled = 0
            files[-1].append(piece)
            filled += piece.bytes
    return files


def append(file: PartFile, numbers: torch.Tensor) -> Place:
    start = file.tell()
    torch.save(numbers, file)  # type: ignore[arg-type]
    file.raise_fault()
    return start, file.tell() - start


class MetadataOfFiles:
    """What `.metadata` says of the files, collected file by file."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.entries: dict[str, TensorStorageMetadata] = {}
        self.places: dict[MetadataIndex, _StorageInfo] = {}

    def add_piece(self, piece: Piece, file: str, place: Place) -> None:
        key = piece.parameter.key
        size, chunk = piece.in_stack(self.layers)
        properties = TensorProperties(dtype=piece.parameter.dtype)
        entry = self.entries.setdefault(key, TensorStorageMetadata(properties, size, []))
        entry.chunks.append(chunk)
        self.places[MetadataIndex(key, chunk.offsets)] = _StorageInfo(file, *place)

    def write(self, folder: Path) -> None:
        """`.metadata`, and the two small files that Megatron wants beside it."""
        metadata = Metadata(dict(self.entries), storage_data=self.places, version=DCP_VERSION)
        (folder / METADATA).write_bytes(pickle.dumps(metadata))
        (folder / VERSIONS).write_text(json.dumps(FORMAT) + "\n")
        torch.save({"content_metadata": {}}, folder / COMMON)
