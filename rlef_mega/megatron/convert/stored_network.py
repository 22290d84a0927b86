"""One network's weights in a checkpoint of Megatron's torch_dist format (`checkpoints.torch_dist`),
read by ranges of rows, without Megatron.

The format knows no layout: a chunk is a rectangle of the whole tensor, whichever rank wrote it.
Megatron stacks layers along a first dimension (`decoder.layers.mlp.linear_fc1.weight` is
[L, 2F, H]) or, where layers differ, numbers them in the key; both are read.
"""

import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from rlef_mega.config import ConfigError
from rlef_mega.megatron.checkpoints.torch_dist import METADATA
from rlef_mega.megatron.convert.safetensors_files import read_into
from rlef_mega.megatron.hf_names import EMBEDDING, HEAD, HFTensor
from rlef_mega.megatron.network.families import FUSED_NORMS

LAYERS = "decoder.layers."
# norms under the names that Transformer Engine's layers have without our map
OWN_NAMES = {f"{LAYERS}{fused}": f"{LAYERS}{own}" for own, fused in FUSED_NORMS.items()}


@dataclass(frozen=True)
class Chunk:
    """A rectangle of one layer's tensor, in the archive at `offset` of a file. `element` counts the
    numbers before it there.
    """

    row: int
    column: int
    rows: int
    columns: int
    path: Path
    offset: int
    length: int
    element: int


@dataclass(frozen=True)
class StoredParameter:
    """A parameter of one layer, [rows, columns]; a vector has one column."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk]


class StoredNetwork:
    """The weights whose keys begin with `prefix`, read under the names of `tensors`. The checkpoint
    may have more rows of embedding and head than the model's vocabulary: Megatron's padding, which
    is never read.

    Raises ConfigError where the folder is not of this format, incomplete, damaged or of another
    model.
    """

    def __init__(self, folder: Path, prefix: str, tensors: Sequence[HFTensor]) -> None:
        self.folder, self.metadata = folder, read_metadata(folder)
        self.parameters: dict[tuple[str, int | None], StoredParameter] = {}
        self.data_offsets: dict[tuple[Path, int], int] = {}
        self.fake = FakeTensorMode()  # one for all chunks: each one has caches of megabytes
        for key, entry in self.metadata.state_dict_metadata.items():
            name = key.removeprefix(prefix)
            ours = key.startswith(prefix) and not name.startswith("optimizer.")
            if ours and isinstance(entry, TensorStorageMetadata):
                self.add(key, name, entry)
        if not self.parameters:
            raise ConfigError(f"{folder} holds no weights under {prefix or 'their plain names'!r}")
        self.check(tensors)

    def add(self, key: str, name: str, entry: TensorStorageMetadata) -> None:
        """Add a stored tensor: one parameter, or one of each layer."""
        size, number = list(entry.size), re.match(rf"{LAYERS}(\d+)\.", name)
        stacked = name.startswith(LAYERS) and not number
        layers: Sequence[int | None] = [int(number[1]) if number else None]
        if stacked:
            layers = range(size.pop(0))
        name = re.sub(rf"^({LAYERS})\d+\.", r"\1", name)
        chunks: list[list[Chunk]] = [[] for _ in layers]
        for part in entry.chunks:
            path, info = self.locate(key, part)
            offsets, sizes = list(part.offsets), list(part.sizes)
            first, count = (offsets.pop(0), sizes.pop(0)) if stacked else (0, 1)
            (row, column), (rows, columns) = [*offsets, 0][:2], [*sizes, 1][:2]
            for index in range(count):
                element = index * rows * columns
                chunks[first + index].append(
                    Chunk(row, column, rows, columns, path, info.offset, info.length, element)
                )
        for layer, found in zip(layers, chunks, strict=True):
            self.parameters[OWN_NAMES.get(name, name), layer] = StoredParameter(
                key, tuple(size), entry.properties.dtype, found
            )

    def locate(self, key: str, part: ChunkStorageMetadata) -> tuple[Path, _StorageInfo]:
        """Find a chunk's file, and where in it the chunk is."""
        try:
            info = self.metadata.storage_data[MetadataIndex(key, part.offsets)]
        except KeyError:
            raise ConfigError(
                f"{self.folder / METADATA} is damaged: it does not locate {key}"
            ) from None
        path, end = self.folder / info.relative_path, info.offset + info.length
        if not path.is_file():
            raise ConfigError(f"no file {path}: {self.folder} is incomplete; copy it again")
        if end > path.stat().st_size:
            raise ConfigError(
                f"{path} is truncated: {key} ends at byte {end} of {path.stat().st_size}; copy it "
                f"again"
            )
        return path, info

    def check(self, tensors: Sequence[HFTensor]) -> None:
        """Raise ConfigError if the checkpoint lacks a tensor, has one that the model does not
        have, or one of another shape."""
        unknown = {name for name, _ in self.parameters} - {tensor.parameter for tensor in tensors}
        if unknown:
            raise ConfigError(
                f"{self.folder} has {len(unknown)} parameter(s) that the model does not know: "
                f"{', '.join(sorted(unknown)[:5])}; give the model's own config with --model"
            )
        held = len({layer for _, layer in self.parameters} - {None})
        layers = len({tensor.own_layer for tensor in tensors} - {None})
        if held != layers:
            raise ConfigError(f"{self.folder} holds {held} layers, config.json says {layers}")
        for tensor in tensors:
            rows, *rest = self.find(tensor).shape
            if tensor.rows is not None:
                rows = sum(count for _, _, count in tensor.runs(rows))
            padded = tensor.name in (EMBEDDING, HEAD) and rows >= tensor.shape[0]
            if (not padded and rows != tensor.shape[0]) or tuple(rest) != tensor.shape[1:]:
                raise ConfigError(
                    f"{self.folder}: {tensor.name} would have shape {(rows, *rest)}, "
                    f"config.json says {tensor.shape}"
                )

    def find(self, tensor: HFTensor) -> StoredParameter:
        try:
            return self.parameters[tensor.parameter, tensor.own_layer]
        except KeyError:
            where = "" if tensor.own_layer is None else f" of layer {tensor.own_layer}"
            raise ConfigError(
                f"{self.folder} lacks {tensor.parameter}{where}; it is of another kind of model"
            ) from None

    def dtype(self, tensor: HFTensor) -> torch.dtype:
        return self.find(tensor).dtype

    def read(self, tensor: HFTensor, start: int, out: torch.Tensor) -> None:
        """Fill `out` [rows, columns], contiguous and of the stored dtype, from row `start` on."""
        stored = self.find(tensor)
        for packed, row, count in tensor.runs(stored.shape[0]):
            first, last = max(start, row), min(start + len(out), row + count)
            if first < last:
                self.read_rows(stored, packed + first - row, out[first - start : last - start])

    def read_rows(self, stored: StoredParameter, start: int, out: torch.Tensor) -> None:
        """Fill `out` with rows of a parameter."""
        missing = out.numel()
        for chunk in stored.chunks:
            first = max(start, chunk.row)
            last = min(start + out.shape[0], chunk.row + chunk.rows)
            if first >= last:
                continue
            target = out[first - start : last - start]
            whole_rows = chunk.columns == out.shape[1]
            piece = target if whole_rows else target.new_empty(last - first, chunk.columns)
            element = chunk.element + (first - chunk.row) * chunk.columns
            offset = self.data_offset(chunk) + element * out.dtype.itemsize
            read_into(chunk.path, offset, piece)
            if not whole_rows:  # a chunk of a tensor-parallel rank
                target[:, chunk.column : chunk.column + chunk.columns] = piece
            missing -= piece.numel()
        if missing:
            raise ConfigError(
                f"{self.folder} is incomplete: {missing} numbers of {stored.key} are in no file"
            )

    def data_offset(self, chunk: Chunk) -> int:
        """Find where in its file the archive of a chunk has the numbers. `torch.load` finds it
        without reading them when it makes fake tensors.
        """
        known = chunk.path, chunk.offset
        if known not in self.data_offsets:
            try:
                with chunk.path.open("rb") as file, self.fake:
                    archive = _create_file_view(file, chunk.offset, chunk.length)
                    tensor = torch.load(archive, weights_only=True)  # type: ignore[arg-type]
                start = tensor.untyped_storage()._checkpoint_offset
            except (RuntimeError, pickle.UnpicklingError, EOFError):
                raise ConfigError(
                    f"{chunk.path} is damaged: no tensor is stored at byte {chunk.offset}; copy it "
                    f"again"
                ) from None
            assert tensor.is_contiguous() and tensor.storage_offset() == 0, chunk
            self.data_offsets[known] = chunk.offset + start
        return self.data_offsets[known]


def read_metadata(folder: Path) -> Metadata:
    path = folder / METADATA
    if not path.is_file():
        raise ConfigError(f"no file {path}: not a checkpoint of Megatron's torch_dist format")
    try:
        metadata = pickle.loads(path.read_bytes())
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise ConfigError(f"{path} is damaged ({error}); copy it again") from None
    assert isinstance(metadata, Metadata)
    return metadata
