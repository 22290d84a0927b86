"""The weights of one role, read under their Hugging Face names from either side.

A checkpoint (`StoredNetwork`) and a Hugging Face folder (`SafetensorsFolder`) answer the same
request, rows `start` to `stop` of a tensor. So conversion is copying, and verification is
comparing.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from rlef_mega.config import ConfigError
from rlef_mega.megatron.convert.config_and_tokenizer import Role
from rlef_mega.megatron.convert.safetensors_files import SafetensorsFolder, StoredTensor
from rlef_mega.megatron.hf_names import VALUE_HEAD, HFTensor, critic_map, name_map
from rlef_mega.megatron.network.families import DenseConfig

# Read at once. Below 32 MiB glibc keeps freed memory for the next block; above, the kernel would
# clear new pages for every block.
BLOCK_BYTES = 16 * 2**20


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


def blocks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Divide rows into ranges of about BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def open_folder(
    role: Role, folder: Path, tensors: Sequence[HFTensor], seed: int
) -> SafetensorsFolder:
    """Open the role's weights in a Hugging Face folder. A critic from a language model gets a value
    head drawn from `seed`. Raises ConfigError if the folder does not fit the tensors.
    """
    found = SafetensorsFolder(folder)
    weight, bias = (f"{VALUE_HEAD}.{part}" for part in ("weight", "bias"))
    if role == "policy" and weight in found.tensors:
        raise ConfigError(f"{folder} is a critic (it has {weight}); give --role critic")
    if role == "critic" and weight not in found.tensors:
        from rlef_mega.megatron.network.packed_llama import draw_value_head

        drawn = draw_value_head(tensors[0].shape[1], seed)
        for name, value in zip((weight, bias), drawn, strict=True):
            found.tensors[name] = StoredTensor(name, tuple(value.shape), value.dtype, drawn=value)
    found.check(tensors)
    return found
