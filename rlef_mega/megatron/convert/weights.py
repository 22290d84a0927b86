"""The weights of one role, read under their Hugging Face names from either side.

Both sides answer the same question, so that converting is copying and verifying is comparing:
rows `start` to `stop` of this tensor. What a checkpoint has beyond `vocab_size` rows of embedding
and head is Megatron's padding, and never asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

# Read at once. Below 32 MiB glibc keeps freed memory for the next block; above, every block would
# be pages that the kernel clears anew.
BLOCK_BYTES = 16 * 2**20
IGNORED = "rotary_emb.inv_freq"  # old conversions store it


class Weights(Protocol):
    def dtype(self, tensor: HFTensor) -> torch.dtype: ...

    def read(self, tensor: HFTensor, start: int, out: torch.Tensor) -> None:
        """Fill `out` [rows, columns], contiguous and of any dtype, with rows from `start` on."""


def read(
    weights: Weights, tensor: HFTensor, start: int, stop: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Rows of a tensor, [stop - start, columns]; of the stored dtype if no other is given."""
    out = torch.empty(stop - start, columns(tensor), dtype=dtype or weights.dtype(tensor))
    weights.read(tensor, start, out)
    return out


def tensors_of(role: Role, config: DenseConfig) -> list[HFTensor]:
    return name_map(config) if role == "policy" else critic_map(config)


def columns(tensor: HFTensor) -> int:
    return torch.Size(tensor.shape[1:]).numel()


def blocks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


@dataclass(frozen=True)
class CheckpointWeights:
    """A network in a checkpoint. Raises ConfigError if it lacks a tensor or has one that the model
    does not know."""

    network: StoredNetwork
    tensors: Sequence[HFTensor]

    def __post_init__(self) -> None:
        network = self.network
        known = {tensor.parameter for tensor in self.tensors}
        if unknown := network.parameters() - known:
            raise ConfigError(
                f"{network.folder} has {len(unknown)} parameter(s) that the model does not know: "
                f"{', '.join(sorted(unknown)[:5])}; give the model's own config with --model"
            )
        layers = max(tensor.layer or 0 for tensor in self.tensors) + 1
        if network.layers() != layers:
            raise ConfigError(
                f"{network.folder} holds {network.layers()} layers, config.json says {layers}"
            )
        for tensor in self.tensors:
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
        if out.dtype != self.dtype(tensor):
            out.copy_(read(self, tensor, start, start + len(out)))
            return
        stop = start + len(out)
        packed_rows = self.network.shape(tensor.parameter, layer_of(tensor))[0]
        for packed, row, count in runs(tensor, packed_rows):
            first, last = max(start, row), min(stop, row + count)
            if first < last:
                self.network.read_rows(
                    tensor.parameter,
                    layer_of(tensor),
                    packed + first - row,
                    out[first - start : last - start],
                )


def layer_of(tensor: HFTensor) -> int | None:
    return tensor.layer if tensor.layer is not None and tensor.layer >= 0 else None


def runs(tensor: HFTensor, packed_rows: int) -> Iterator[tuple[int, int, int]]:
    """(first row in the parameter, first row of the tensor, number of rows)."""
    if tensor.rows is None:
        yield 0, 0, tensor.shape[0]
        return
    row = 0
    for packed, count in tensor.rows.runs(packed_rows):
        yield packed, row, count
        row += count


@dataclass(frozen=True)
class FolderWeights:
    """A Hugging Face folder. Raises ConfigError if it lacks a tensor, has one that the model does
    not know, or one of another shape."""

    folder: SafetensorsFolder
    tensors: Sequence[HFTensor]

    def __post_init__(self) -> None:
        found, where = self.folder.tensors, self.folder.folder
        expected = {tensor.name for tensor in self.tensors}
        # a tied head may be stored all the same; a critic leaves the head of a language model
        unknown = {n for n in set(found) - expected - {HEAD} if not n.endswith(IGNORED)}
        for what, names in (("lacks", expected - set(found)), ("has unknown", unknown)):
            if names:
                some = ", ".join(sorted(names)[:5])
                raise ConfigError(
                    f"{where} {what} {len(names)} tensor(s): {some}; it must fit its config.json"
                )
        for tensor in self.tensors:
            if found[tensor.name].shape != tensor.shape:
                raise ConfigError(
                    f"{where}: {tensor.name} has shape {found[tensor.name].shape}, config.json "
                    f"says {tensor.shape}"
                )

    def dtype(self, tensor: HFTensor) -> torch.dtype:
        return self.folder.tensors[tensor.name].dtype

    def read(self, tensor: HFTensor, start: int, out: torch.Tensor) -> None:
        if out.dtype != self.dtype(tensor):
            out.copy_(read(self, tensor, start, start + len(out)))
        else:
            self.folder.read_rows(tensor.name, start, out)


@dataclass(frozen=True)
class DrawnValueHead:
    """A language model's trunk with the head that a new critic is given."""

    trunk: FolderWeights
    head: dict[str, torch.Tensor]

    def dtype(self, tensor: HFTensor) -> torch.dtype:
        return torch.float32 if tensor.name in self.head else self.trunk.dtype(tensor)

    def read(self, tensor: HFTensor, start: int, out: torch.Tensor) -> None:
        if tensor.name in self.head:
            out.copy_(self.head[tensor.name].view(tensor.shape[0], -1)[start : start + len(out)])
        else:
            self.trunk.read(tensor, start, out)


def open_folder(role: Role, folder: Path, tensors: Sequence[HFTensor], seed: int) -> Weights:
    """The role's weights in a Hugging Face folder; for a critic from a language model, its value
    head is drawn."""
    found = SafetensorsFolder(folder)
    has_value_head = f"{VALUE_HEAD}.weight" in found.tensors
    if role == "critic" and not has_value_head:
        from rlef_mega.megatron.network.packed_llama import draw_value_head

        trunk = [tensor for tensor in tensors if not tensor.name.startswith(VALUE_HEAD)]
        weight, bias = draw_value_head(trunk[0].shape[1], seed)
        head = {f"{VALUE_HEAD}.weight": weight, f"{VALUE_HEAD}.bias": bias}
        return DrawnValueHead(FolderWeights(found, trunk), head)
    if role == "policy" and has_value_head:
        raise ConfigError(f"{folder} is a critic (it has {VALUE_HEAD}.weight); give --role critic")
    return FolderWeights(found, tensors)
