"""One network's weights in a checkpoint of Megatron's torch_dist format (`checkpoints.torch_dist`),
read by ranges of rows, without Megatron.

The format knows no layout: a chunk is a rectangle of the whole tensor, whichever rank wrote it.
Megatron stacks layers along a first dimension (`decoder.layers.mlp.linear_fc1.weight` is
[L, 2F, H]) or, where layers differ, numbers them in the key; both are read.

A tensor here is one layer's, [rows, columns]; a vector has one column.
"""

import pickle
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
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
from rlef_mega.megatron.network.families import FUSED_NORMS

LAYERS = "decoder.layers."
# norms under the names that Transformer Engine's layers have without our map
FUSED = {f"{LAYERS}{own}": f"{LAYERS}{fused}" for own, fused in FUSED_NORMS.items()}


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


class StoredNetwork:
    """The weights whose keys begin with `prefix`. Raises ConfigError where the folder is not of
    this format, incomplete or damaged."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        self.metadata = read_metadata(folder)
        self.found = {
            key.removeprefix(prefix): entry
            for key, entry in self.metadata.state_dict_metadata.items()
            if key.startswith(prefix)
            and isinstance(entry, TensorStorageMetadata)
            and not key.removeprefix(prefix).startswith("optimizer.")
        }
        if not self.found:
            raise ConfigError(f"{folder} holds no weights under {prefix or 'their plain names'!r}")
        self.chunks = {key: self.chunks_of(key) for key in self.found}
        self.data_offsets: dict[tuple[Path, int], int] = {}
        self.fake = FakeTensorMode()  # one for all chunks: each one has caches of megabytes

    def chunks_of(self, key: str) -> dict[int, list[Chunk]]:
        """List a tensor's chunks by layer; under 0 for a tensor that is not stacked."""
        layers: dict[int, list[Chunk]] = {}
        for part in self.found[key].chunks:
            first_layer, count, chunk = self.find_chunk(key, part)
            for layer in range(count):
                moved = replace(chunk, element=layer * chunk.rows * chunk.columns)
                layers.setdefault(first_layer + layer, []).append(moved)
        return layers

    def find_chunk(self, key: str, part: ChunkStorageMetadata) -> tuple[int, int, Chunk]:
        """Returns the first layer, the number of layers, and the first layer's chunk."""
        try:
            info = self.metadata.storage_data[MetadataIndex(self.prefix + key, part.offsets)]
        except KeyError:
            raise ConfigError(
                f"{self.folder / METADATA} is damaged: it does not locate {self.prefix}{key}"
            ) from None
        path, end = self.folder / info.relative_path, info.offset + info.length
        if not path.is_file():
            raise ConfigError(f"no file {path}: {self.folder} is incomplete; copy it again")
        if end > path.stat().st_size:
            raise ConfigError(
                f"{path} is truncated: {self.prefix}{key} ends at byte {end} of "
                f"{path.stat().st_size}; copy it again"
            )
        offsets, sizes = list(part.offsets), list(part.sizes)
        first_layer, count = (offsets.pop(0), sizes.pop(0)) if is_stacked(key) else (0, 1)
        (row, column), (rows, columns) = [*offsets, 0][:2], [*sizes, 1][:2]
        chunk = Chunk(row, column, rows, columns, path, info.offset, info.length, 0)
        return first_layer, count, chunk

    def parameters(self) -> set[str]:
        """Return the names of all weights, without layer numbers and in one spelling."""
        spelled = {fused: plain for plain, fused in FUSED.items()}
        names = {re.sub(rf"^({LAYERS})\d+\.", r"\1", key) for key in self.found}
        return {spelled.get(name, name) for name in names}

    def layers(self) -> int:
        """Count the layers, by the parameter that has the most."""
        numbered = [re.match(rf"{LAYERS}(\d+)\.", key) for key in self.found]
        stacked = [entry.size[0] for key, entry in self.found.items() if is_stacked(key)]
        return max([*stacked, *(int(match[1]) + 1 for match in numbered if match)], default=0)

    def locate(self, parameter: str, layer: int | None) -> tuple[str, int]:
        """Returns the key, and the layer's index in its stack (0 if it is not stacked)."""
        for name in (parameter, FUSED.get(parameter, parameter)):
            if name in self.found:
                return name, layer or 0
            numbered = name.replace(LAYERS, f"{LAYERS}{layer}.", 1)
            if numbered in self.found:
                return numbered, 0
        where = "" if layer is None else f" of layer {layer}"
        raise ConfigError(
            f"{self.folder} lacks {self.prefix}{parameter}{where}; it is of another kind of model"
        )

    def shape(self, parameter: str, layer: int | None) -> tuple[int, ...]:
        key, _ = self.locate(parameter, layer)
        size = tuple(self.found[key].size)
        return size[1:] if is_stacked(key) else size

    def dtype(self, parameter: str, layer: int | None) -> torch.dtype:
        return self.found[self.locate(parameter, layer)[0]].properties.dtype

    def read_rows(self, parameter: str, layer: int | None, start: int, out: torch.Tensor) -> None:
        """Fill `out` [rows, columns], contiguous and of the stored dtype, from row `start` on."""
        key, index = self.locate(parameter, layer)
        missing = out.numel()
        for chunk in self.chunks[key].get(index, []):
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
                f"{self.folder} is incomplete: {missing} numbers of {self.prefix}{key} are in no "
                f"file"
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


def is_stacked(key: str) -> bool:
    return key.startswith(LAYERS) and not key[len(LAYERS)].isdigit()


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
