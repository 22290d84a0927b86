"""One network's weights in a checkpoint of Megatron's torch_dist format (`checkpoints.torch_dist`),
read one tensor at a time, without Megatron.

The format is independent of layouts: a chunk is a box of the whole tensor, whichever rank wrote it.
Megatron stacks layers along a first dimension (`decoder.layers.mlp.linear_fc1.weight` is
[L, 2F, H]) or, where layers differ, numbers them in the key; both are read.
"""

import pickle
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
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
from rlef_mega.megatron.hf_names import HFTensor

LAYERS = "decoder.layers."
OWN_NAMES = {  # of norms, which Transformer Engine's layers name differently
    f"{LAYERS}self_attention.linear_qkv.layer_norm_weight": f"{LAYERS}input_layernorm.weight",
    f"{LAYERS}mlp.linear_fc1.layer_norm_weight": f"{LAYERS}pre_mlp_layernorm.weight",
}


@dataclass(frozen=True, eq=False)  # hashed by identity
class StoredParameter:
    """A parameter of one layer: a stored tensor, or index `in_stack` of one that stacks layers."""

    key: str
    entry: TensorStorageMetadata
    in_stack: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.entry.size if self.in_stack is None else self.entry.size[1:])


class StoredNetwork:
    """The weights whose keys begin with `prefix`, read under the names of `tensors`. The checkpoint
    may have more rows of embedding and head than the model's vocabulary: Megatron's padding, which
    is cut off.

    Raises ConfigError where the folder is not of this format, incomplete, damaged or of another
    model.
    """

    def __init__(self, folder: Path, prefix: str, tensors: Sequence[HFTensor]) -> None:
        self.folder, self.metadata = folder, read_metadata(folder)
        self.parameters: dict[tuple[str, int | None], StoredParameter] = {}
        for key, entry in self.metadata.state_dict_metadata.items():
            name = key.removeprefix(prefix)
            ours = key.startswith(prefix) and not name.startswith("optimizer.")
            if ours and isinstance(entry, TensorStorageMetadata):
                self.add(key, name, entry)
        if not self.parameters:
            raise ConfigError(f"{folder} holds no weights{prefix and f' under {prefix!r}'}")
        self.check(tensors)
        # queries, keys and values come from one weight and perhaps one bias
        self.parameter = lru_cache(2)(self.read_parameter)

    def add(self, key: str, name: str, entry: TensorStorageMetadata) -> None:
        """Add a stored tensor: one parameter, or one of each layer."""
        for chunk in entry.chunks:
            self.locate(key, chunk)
        number = re.match(rf"{LAYERS}(\d+)\.", name)
        name = re.sub(rf"^({LAYERS})\d+\.", r"\1", name)
        name = OWN_NAMES.get(name, name)
        if number or not name.startswith(LAYERS):
            layer = int(number[1]) if number else None
            self.parameters[name, layer] = StoredParameter(key, entry, None)
        else:
            for index in range(entry.size[0]):
                self.parameters[name, index] = StoredParameter(key, entry, index)

    def locate(self, key: str, chunk: ChunkStorageMetadata) -> tuple[Path, _StorageInfo]:
        """Find a chunk's file, and where in it the chunk is."""
        try:
            info = self.metadata.storage_data[MetadataIndex(key, chunk.offsets)]
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
        layers = len({tensor.layer for tensor in tensors} - {None})
        if held != layers:
            raise ConfigError(f"{self.folder} holds {held} layers, config.json says {layers}")
        for tensor in tensors:
            shape = self.find(tensor).shape
            with suppress(RuntimeError):  # the rows are not whole heads
                shape = tuple(tensor.part_of(torch.empty(shape, device="meta")).shape)
            if shape != tensor.shape:
                raise ConfigError(
                    f"{self.folder}: {tensor.name} would have shape {shape}, "
                    f"config.json says {tensor.shape}"
                )

    def find(self, tensor: HFTensor) -> StoredParameter:
        try:
            return self.parameters[tensor.parameter, tensor.layer]
        except KeyError:
            where = "" if tensor.layer is None else f" of layer {tensor.layer}"
            raise ConfigError(
                f"{self.folder} lacks {tensor.parameter}{where}; it belongs to another model type"
            ) from None

    def dtype(self, tensor: HFTensor) -> torch.dtype:
        return self.find(tensor).entry.properties.dtype

    def read(self, tensor: HFTensor) -> torch.Tensor:
        """Read one tensor, in the stored dtype. It may share memory with the next ones."""
        return tensor.part_of(self.parameter(self.find(tensor)))

    def read_parameter(self, stored: StoredParameter) -> torch.Tensor:
        """Read a parameter of one layer from all its chunks."""
        whole = torch.empty(stored.shape, dtype=stored.entry.properties.dtype)
        missing = whole.numel()
        for chunk in stored.entry.chunks:
            offsets, sizes = list(chunk.offsets), list(chunk.sizes)
            if stored.in_stack is not None:
                index = stored.in_stack - offsets.pop(0)
                if not 0 <= index < sizes.pop(0):
                    continue
            values = self.read_chunk(stored.key, chunk)
            if stored.in_stack is not None:
                values = values[index]
            whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = values
            missing -= values.numel()
        if missing:
            raise ConfigError(
                f"{self.folder} is incomplete: no file holds {missing} elements of {stored.key}"
            )
        return whole

    def read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        path, info = self.locate(key, chunk)
        try:
            with path.open("rb") as file:
                archive = _create_file_view(file, info.offset, info.length)
                return torch.load(archive, weights_only=True)  # type: ignore[arg-type]
        except (RuntimeError, pickle.UnpicklingError, EOFError):
            raise ConfigError(
                f"{path} is damaged: no tensor is stored at byte {info.offset}; copy it again"
            ) from None


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
