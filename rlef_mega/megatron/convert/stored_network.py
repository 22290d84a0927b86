"""One network's weights in a folder of Megatron's torch_dist format, read by ranges of rows,
without Megatron.

The format is PyTorch's distributed checkpoint (DCP): `.metadata` lists every tensor by its key and
global shape, cut into chunks, and where in the `*.distcp` files each chunk lies, as an archive of
`torch.save`. It knows no layout: a chunk is a rectangle of the whole tensor, whichever rank wrote
it. Megatron stacks layers along a first dimension (`decoder.layers.mlp.linear_fc1.weight` is
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

from rlef_mega.config import ConfigError
from rlef_mega.megatron.convert.byte_ranges import ByteRanges
from rlef_mega.megatron.network.families import FUSED_NORMS

METADATA = ".metadata"
LAYERS = "decoder.layers."
# norms under the names that Transformer Engine's layers have without our map
FUSED = {f"{LAYERS}{own}": f"{LAYERS}{fused}" for own, fused in FUSED_NORMS.items()}


@dataclass(frozen=True)
class Chunk:
    """A rectangle of one layer's tensor, in the archive at `offset` of `file`; `element` is the
    place of its first number there.
    """

    row: int
    column: int
    rows: int
    columns: int
    file: str
    offset: int
    length: int
    element: int


class StoredNetwork:
    """The weights whose keys begin with `prefix`. Raises ConfigError where the folder is not of
    this format, incomplete or damaged."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        self.files = ByteRanges(folder)
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
        self.data_offsets: dict[Chunk, int] = {}
        self.fake = FakeTensorMode()

    def chunks_of(self, key: str) -> dict[int, list[Chunk]]:
        """By layer; under 0 for what is not stacked."""
        layers: dict[int, list[Chunk]] = {}
        for part in self.found[key].chunks:
            first_layer, count, chunk = self.place(key, part)
            for layer in range(count):
                element = layer * chunk.rows * chunk.columns
                moved = replace(chunk, element=element)
                layers.setdefault(first_layer + layer, []).append(moved)
        return layers

    def place(self, key: str, part: ChunkStorageMetadata) -> tuple[int, int, Chunk]:
        """First layer, number of layers, and where the chunk of the first one lies."""
        try:
            info = self.metadata.storage_data[MetadataIndex(self.prefix + key, part.offsets)]
        except KeyError:
            raise ConfigError(
                f"{self.folder / METADATA} is damaged: it does not place {self.prefix}{key}"
            ) from None
        end, size = info.offset + info.length, self.files.size(info.relative_path)
        if end > size:
            raise ConfigError(
                f"{self.folder / info.relative_path} is truncated: {self.prefix}{key} ends at "
                f"byte {end} of {size}"
            )
        offsets, sizes = list(part.offsets), list(part.sizes)
        first_layer, count = (offsets.pop(0), sizes.pop(0)) if is_stacked(key) else (0, 1)
        (row, column), (rows, columns) = [*offsets, 0][:2], [*sizes, 1][:2]
        chunk = Chunk(row, column, rows, columns, info.relative_path, info.offset, info.length, 0)
        return first_layer, count, chunk

    def parameters(self) -> set[str]:
        """Names of all weights, without the numbers of layers and in one spelling."""
        spelled = {fused: plain for plain, fused in FUSED.items()}
        names = {re.sub(rf"^({LAYERS})\d+\.", r"\1", key) for key in self.found}
        return {spelled.get(name, name) for name in names}

    def layers(self) -> int:
        """How many layers there are, by the parameter that has most."""
        numbered = [re.match(rf"{LAYERS}(\d+)\.", key) for key in self.found]
        stacked = [entry.size[0] for key, entry in self.found.items() if is_stacked(key)]
        return max([*stacked, *(int(match[1]) + 1 for match in numbered if match)], default=0)

    def locate(self, parameter: str, layer: int | None) -> tuple[str, int]:
        """The key, and the layer's place in its stack; 0 where nothing is stacked."""
        for name in (parameter, FUSED.get(parameter, parameter)):
            if name in self.found:
                return name, layer or 0 if is_stacked(name) else 0
            numbered = name.replace(LAYERS, f"{LAYERS}{layer}.", 1)
            if numbered in self.found:
                return numbered, 0
        where = f" of layer {layer}" if parameter.startswith(LAYERS) else ""
        raise ConfigError(
            f"{self.folder} lacks {self.prefix}{parameter}{where}; it belongs to another kind of "
            f"model"
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
            offset = self.data_offset(chunk, out.dtype) + element * out.dtype.itemsize
            self.files.read_into(chunk.file, offset, piece)
            if not whole_rows:  # of a tensor-parallel rank
                target[:, chunk.column : chunk.column + chunk.columns] = piece
            missing -= piece.numel()
        if missing:
            raise ConfigError(
                f"{self.folder} is incomplete: {missing} numbers of {self.prefix}{key} are in no "
                f"file"
            )

    def data_offset(self, chunk: Chunk, dtype: torch.dtype) -> int:
        """Where in its file the archive of a chunk has the numbers. `torch.load` finds the place
        without reading them when it makes fake tensors."""
        if chunk not in self.data_offsets:
            archive = self.files.range(chunk.file, chunk.offset, chunk.length)
            try:
                with self.fake:
                    tensor = torch.load(archive, weights_only=True)
                place = tensor.untyped_storage()._checkpoint_offset
            except (RuntimeError, pickle.UnpicklingError, EOFError):
                raise ConfigError(
                    f"{self.folder / chunk.file} is damaged: no tensor is stored at byte "
                    f"{chunk.offset}"
                ) from None
            numbers = chunk.rows * chunk.columns
            whole = tensor.is_contiguous() and tensor.storage_offset() == 0
            assert tensor.dtype == dtype and whole and tensor.numel() % numbers == 0, chunk
            self.data_offsets[chunk] = chunk.offset + place
        return self.data_offsets[chunk]


def is_stacked(key: str) -> bool:
    return key.startswith(LAYERS) and not key[len(LAYERS)].isdigit()


def read_metadata(folder: Path) -> Metadata:
    path = folder / METADATA
    if not path.is_file():
        raise ConfigError(f"no file {path}: not a checkpoint of Megatron's torch_dist format")
    try:
        metadata = pickle.loads(path.read_bytes())
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise ConfigError(f"{path} is damaged ({error})") from None
    assert isinstance(metadata, Metadata)
    return metadata
