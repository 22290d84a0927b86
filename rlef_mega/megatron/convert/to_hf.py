"""A network of a checkpoint to a Hugging Face folder: `rlef export-hf`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlef_mega.config import ConfigError
from rlef_mega.megatron.convert.byte_ranges import bytes_of
from rlef_mega.megatron.convert.checkpoint_folder import Checkpoint
from rlef_mega.megatron.convert.config_and_tokenizer import Role, copy_companions
from rlef_mega.megatron.convert.resumable_folder import Job, Mark, Part, PartFile, fingerprint
from rlef_mega.megatron.convert.safetensors_files import (
    MAX_SHARD_SIZE,
    Shard,
    Stored,
    plan_shards,
    write_index,
)
from rlef_mega.megatron.convert.weights import (
    BLOCK_BYTES,
    CheckpointWeights,
    Weights,
    blocks,
    tensors_of,
)
from rlef_mega.megatron.hf_names import HFTensor
from rlef_mega.megatron.network.families import read_config


@dataclass(frozen=True)
class Export:
    """What to write: `dtype` None keeps the checkpoint's; a value head is fp32 in any."""

    role: Role = "policy"
    dtype: torch.dtype | None = None
    max_shard_size: str | int = MAX_SHARD_SIZE


def plan_export(
    checkpoint: Checkpoint, out: Path, wanted: Export, *, overwrite: bool = False
) -> Job:
    """The files of the folder and how each is written. Raises ConfigError where the checkpoint does
    not fit the model's config."""
    model = checkpoint.model
    if model is None:
        raise ConfigError(
            f"{checkpoint.folder} says nothing of its model; give --model, the Hugging Face folder "
            f"with its config and tokenizer"
        )
    tensors = tensors_of(wanted.role, read_config(model))
    weights = CheckpointWeights(checkpoint.network(wanted.role), tensors)
    dtype = wanted.dtype or weights.dtype(tensors[0])
    stored = [Stored(t.name, t.shape, t.dtype or dtype) for t in tensors]
    shards = plan_shards(stored, wanted.max_shard_size)
    by_name = {tensor.name: tensor for tensor in tensors}

    def part(shard: Shard) -> Part:
        return Part(
            shard.file, shard.bytes, lambda file: write_shard(file, shard, weights, by_name)
        )

    def finish(folder: Path, marks: dict[str, Mark]) -> None:
        write_index(folder, shards)
        copy_companions(model, folder, role=wanted.role, dtype=dtype)

    order: dict[str, Any] = {
        "export": [wanted.role, str(dtype), str(wanted.max_shard_size)],
        "checkpoint": fingerprint(checkpoint.folder),
        "config": json.loads((model / "config.json").read_text()),
    }
    return Job(out, order, [part(shard) for shard in shards], finish, overwrite)


def write_shard(
    file: PartFile, shard: Shard, weights: Weights, by_name: dict[str, HFTensor]
) -> None:
    file.write(shard.header)
    largest = max(max(BLOCK_BYTES, stored.row_bytes) for stored in shard.tensors)
    room = torch.empty(largest, dtype=torch.uint8)  # fresh memory a block would cost page faults
    for stored in shard.tensors:
        tensor = by_name[stored.name]
        for start, stop in blocks(tensor.shape[0], stored.row_bytes):
            block = room[: (stop - start) * stored.row_bytes]
            weights.read(tensor, start, block.view(stored.dtype).view(stop - start, -1))
            file.write(bytes_of(block))
            file.raise_fault()
