"""The weights of one role, read under their Hugging Face names from either side.

A checkpoint and a Hugging Face folder answer the same request, rows `start` to `stop` of a tensor.
So conversion is copying, and verification is comparing. A checkpoint may have more rows of
embedding and head than `vocab_size`: Megatron's padding, which is never read.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from rlef_mega.config import ConfigError
from rlef_mega.megatron.convert.config_and_tokenizer import Role
from rlef_mega.megatron.convert.safetensors_files import SafetensorsFolder
from rlef_mega.megatron.convert.stored_network import StoredNetwork
from rlef_mega.megatron.hf_names import (
    EMBEDDING,
    HEAD,
    VALUE_HEAD,
    HFTensor,
    critic_map,
    name_map,
)
from rlef_mega.megatron.network.families import DenseConfig

# Read at once. Below 32 MiB glibc keeps freed memory for the next block; above, the kernel would
# clear new pages for every block.
BLOCK_BYTES = 16 * 2**20
IGNORED = "rotary_emb.inv_freq"  # old conversions store it


class Weights(Protocol):
    def dtype(self, tensor: HFTensor) -> torch.dtype: ...

    def read(self, tensor: HFTensor, start: int, out: torch.Tensor) -> None:
        """Fill `out` [rows, columns], contiguous and of the stored dtype, from row `start` on."""


def read_as(weights: Weights, tensor: HFTensor, start: int, out: torch.Tensor) -> None:
    """Fill `out` [rows, columns], contiguous and of any dtype, with rows from `start` on."""
    found = out
    if out.dtype != weights.dtype(tensor):
        found = torch.empty_like(out, dtype=weights.dtype(tensor))
    weights.read(tensor, start, found)
    if found is not out:
        out.copy_(found)


def tensors_of(role: Role, config: DenseConfig) -> list[HFTensor]:
    return name_map(config) if role == "policy" else critic_map(config)


def columns(tensor: HFTensor) -> int:
    return torch.Size(tensor.shape[1:]).numel()


def blocks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Divide rows into ranges of about BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class CheckpointWeights:
    """A network in a checkpoint. Raises ConfigError if it lacks a tensor, or has one that the model
    does not have."""

    def __init__(self, network: StoredNetwork, tensors: Sequence[HFTensor]) -> None:
        self.network = network
        known = {tensor.parameter for tensor in tensors}
        if unknown := network.parameters() - known:
            raise ConfigError(
                f"{network.folder} has {len(unknown)} parameter(s) that the model does not know: "
                f"{', '.join(sorted(unknown)[:5])}; give the model's own config with --model"
            )
        layers = max(tensor.layer or 0 for tensor in tensors) + 1
        if network.layers() != layers:
            raise ConfigError(
                f"{network.folder} holds {network.layers()} layers, config.json says {layers}"
            )
        for tensor in tensors:
            self.check_shape(tensor)

    def check_shape(self, tensor: HFTensor) -> None:
        rows, *rest = self.network.shape(tensor.parameter, layer_of(tensor))
        if tensor.rows is not None:
            rows = sum(count for _, count in tensor.rows.runs(rows))
        padded = tensor.name in (EMBEDDING, HEAD) and rows >= tensor.shape[0]
        if (not padded and rows != tensor.shape[0]) or tuple(rest) != tensor.shape[1:]:
            raise ConfigError(
                f"{self.network.folder}: {tensor.name} would have shape {(rows, *rest)}, "
                f"config.json says {tensor.shape}"
            )

    def dtype(self, tensor: HFTensor) -> torch.dtype:
        return self.network.dtype(tensor.parameter, layer_of(tensor))

    def read(self, tensor: HFTensor, start: int, out: torch.Tensor) -> None:
        parameter, layer, stop = tensor.parameter, layer_of(tensor), start + len(out)
        packed_rows = self.network.shape(parameter, layer)[0]
        for packed, row, count in runs(tensor, packed_rows):
            first, last = max(start, row), min(stop, row + count)
            if first < last:
                target = out[first - start : last - start]
                self.network.read_rows(parameter, layer, packed + first - row, target)


def layer_of(tensor: HFTensor) -> int | None:
    return tensor.layer if tensor.layer is not None and tensor.layer >= 0 else None


def runs(tensor: HFTensor, packed_rows: int) -> Iterator[tuple[int, int, int]]:
    """Yields (first row in the parameter, first row of the tensor, number of rows)."""
    row = 0
    found = tensor.rows.runs(packed_rows) if tensor.rows else [(0, tensor.shape[0])]
    for packed, count in found:
        yield packed, row, count
        row += count


class FolderWeights:
    """A Hugging Face folder. `drawn` holds the value head of a critic that is made from a language
    model. Raises ConfigError if the folder does not fit the tensors."""

    def __init__(
        self,
        folder: SafetensorsFolder,
        tensors: Sequence[HFTensor],
        drawn: Mapping[str, torch.Tensor],
    ) -> None:
        self.folder, self.drawn = folder, drawn
        check_tensors(folder, [tensor for tensor in tensors if tensor.name not in drawn])

    def dtype(self, tensor: HFTensor) -> torch.dtype:
        if tensor.name in self.drawn:
            return self.drawn[tensor.name].dtype
        return self.folder.tensors[tensor.name].dtype

    def read(self, tensor: HFTensor, start: int, out: torch.Tensor) -> None:
        if tensor.name in self.drawn:
            out.copy_(self.drawn[tensor.name].view(tensor.shape[0], -1)[start : start + len(out)])
        else:
            self.folder.read_rows(tensor.name, start, out)


def check_tensors(folder: SafetensorsFolder, tensors: Sequence[HFTensor]) -> None:
    """Raises ConfigError if the folder lacks a tensor, has one that the model does not have, or one
    of another shape. A language model's head is allowed: a tied one may be stored all the same, and
    a critic does not read it.
    """
    found, expected = folder.tensors, {tensor.name for tensor in tensors}
    unknown = {n for n in found.keys() - expected - {HEAD} if not n.endswith(IGNORED)}
    for what, names in (("lacks", expected - found.keys()), ("has unknown", unknown)):
        if names:
            some = ", ".join(sorted(names)[:5])
            raise ConfigError(
                f"{folder.folder} {what} {len(names)} tensor(s): {some}; the weights must be those "
                f"of its config.json"
            )
    for tensor in tensors:
        if found[tensor.name].shape != tensor.shape:
            raise ConfigError(
                f"{folder.folder}: {tensor.name} has shape {found[tensor.name].shape}, config.json "
                f"says {tensor.shape}"
            )


def open_folder(role: Role, folder: Path, tensors: Sequence[HFTensor], seed: int) -> FolderWeights:
    """Open the role's weights in a Hugging Face folder. A critic from a language model gets a value
    head drawn from `seed`.
    """
    found = SafetensorsFolder(folder)
    has_value_head = f"{VALUE_HEAD}.weight" in found.tensors
    if role == "policy" and has_value_head:
        raise ConfigError(f"{folder} is a critic (it has {VALUE_HEAD}.weight); give --role critic")
    if role == "policy" or has_value_head:
        return FolderWeights(found, tensors, {})
    from rlef_mega.megatron.network.packed_llama import draw_value_head

    weight, bias = draw_value_head(tensors[0].shape[1], seed)
    drawn = {f"{VALUE_HEAD}.weight": weight, f"{VALUE_HEAD}.bias": bias}
    return FolderWeights(found, tensors, drawn)
