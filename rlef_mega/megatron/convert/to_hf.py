"""A network of a checkpoint to a Hugging Face folder: `rlef export-hf`."""

import json
from pathlib import Path
from typing import Any

import torch

from rlef_mega.config import ConfigError
from rlef_mega.megatron.checkpoints.torch_dist import ChecksummedFile
from rlef_mega.megatron.convert.checkpoint_folder import Checkpoint
from rlef_mega.megatron.convert.config_and_tokenizer import Role, copy_companions
from rlef_mega.megatron.convert.resumable_folder import (
    FileMark,
    PlannedFile,
    ResumableFolder,
    fingerprint,
)
from rlef_mega.megatron.convert.safetensors_files import (
    MAX_SHARD_SIZE,
    Shard,
    StoredTensor,
    bytes_of,
    plan_shards,
    write_index,
)
from rlef_mega.megatron.convert.weights import (
    BLOCK_BYTES,
    blocks,
    read_as,
    tensors_of,
)
from rlef_mega.megatron.network.families import read_config


def plan_export(
    checkpoint: Checkpoint,
    out: Path,
    *,
    role: Role = "policy",
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> ResumableFolder:
    """Plan the files of the folder. `dtype` None keeps the checkpoint's; a value head is fp32 in
    any. Raises ConfigError where the checkpoint does not fit the model's config."""
    model = checkpoint.model
    if model is None:
        raise ConfigError(
            f"{checkpoint.folder} does not name its model; give --model, the Hugging Face folder "
            f"with its config and tokenizer"
        )
    tensors = tensors_of(role, read_config(model))
    weights = checkpoint.network(role, tensors)
    dtype = dtype or weights.dtype(tensors[0])
    stored = [StoredTensor(t.name, t.shape, t.dtype or dtype) for t in tensors]
    shards = plan_shards(stored, max_shard_size)
    by_name = {tensor.name: tensor for tensor in tensors}

    def planned(shard: Shard) -> PlannedFile:
        def write(file: ChecksummedFile) -> None:
            file.write(shard.header)
            # reused: freed blocks of many sizes would leave holes in the heap
            room = torch.empty(
                max(BLOCK_BYTES, *(t.row_bytes for t in shard.tensors)), dtype=torch.uint8
            )
            for each in shard.tensors:
                for start, stop in blocks(each.shape[0], each.row_bytes):
                    block = room[: (stop - start) * each.row_bytes]
                    rows = block.view(each.dtype).view(stop - start, -1)
                    read_as(weights, by_name[each.name], start, rows)
                    file.write(bytes_of(block))
                    file.raise_fault()

        return PlannedFile(shard.file, shard.bytes, write)

    def finish(folder: Path, marks: dict[str, FileMark]) -> None:
        write_index(folder, shards)
        copy_companions(model, folder, role=role, dtype=dtype)

    request: dict[str, Any] = {
        "export": [role, str(dtype), str(max_shard_size)],
        "checkpoint": fingerprint(checkpoint.folder),
        "config": json.loads((model / "config.json").read_text()),
    }
    return ResumableFolder(out, request, [planned(s) for s in shards], finish, overwrite)
