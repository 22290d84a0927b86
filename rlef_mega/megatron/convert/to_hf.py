"""Convert a checkpoint's network to a Hugging Face folder: `rlef export-hf`."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from rlef_mega.config import ConfigError, read_json
from rlef_mega.megatron.convert.checkpoint_folder import Checkpoint, find_checkpoint
from rlef_mega.megatron.convert.config_and_tokenizer import copy_companions
from rlef_mega.megatron.convert.resumable_folder import PlannedFile, ResumableFolder, file_stats
from rlef_mega.megatron.convert.verify import compare_weights
from rlef_mega.megatron.hf_names import Role, name_map
from rlef_mega.megatron.network.families import read_config
from rlef_mega.run.model_folder import INDEX

PATTERN = "model{suffix}.safetensors"
MAX_SHARD_SIZE = "5GB"  # of one file, Hugging Face's default for hosting


def export_checkpoint(
    path: Path,
    out: Path,
    *,
    role: Role = "policy",
    dtype: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    step: int | None = None,
    model: Path | None = None,
    overwrite: bool = False,
    verify: bool = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder: `path` itself or, if that is a run directory,
    its newest checkpoint or that of `step`. `dtype` None keeps the checkpoint's; a value head is
    always fp32. Raises ConfigError; `out` is complete or does not exist."""
    checkpoint = find_checkpoint(path, step, model)
    plan = plan_export(
        checkpoint, out, role, getattr(torch, dtype) if dtype else None, max_shard_size
    )
    plan.write(source=checkpoint.folder, overwrite=overwrite)
    if verify:
        compare_weights(checkpoint, out, role, exported=True)


def plan_export(
    checkpoint: Checkpoint, out: Path, role: Role, dtype: torch.dtype | None, max_shard_size: str
) -> ResumableFolder:
    """Plan the files of the folder, each of which is in memory while it is written. Raises
    ConfigError where the checkpoint does not fit the model's config."""
    model = checkpoint.model
    if model is None:
        raise ConfigError(
            f"{checkpoint.folder} does not name its model; give --model, the Hugging Face folder "
            f"with its config and tokenizer"
        )
    tensors = name_map(read_config(model), role)
    weights = checkpoint.network(role, tensors)
    dtype = dtype or weights.dtype(tensors[0])
    empty = {t.name: torch.empty(t.shape, dtype=t.dtype or dtype, device="meta") for t in tensors}
    try:
        split = split_torch_state_dict_into_shards(
            empty, filename_pattern=PATTERN, max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ConfigError(f"--max-shard-size {max_shard_size!r}: {error}") from None

    def write(names: list[str], path: Path) -> None:
        # copies: safetensors refuses tensors that share memory
        state = {
            tensor.name: weights.read(tensor).to(empty[tensor.name].dtype, copy=True)
            for tensor in tensors
            if tensor.name in names
        }
        save_file(state, path, metadata={"format": "pt"})

    def finish(folder: Path, _: dict[str, Any]) -> None:
        if split.is_sharded:
            numbers = {"total_parameters": sum(each.numel() for each in empty.values())}
            index = {"metadata": numbers | split.metadata, "weight_map": split.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        copy_companions(model, folder, role=role, dtype=dtype)

    request: dict[str, Any] = {
        "export": [role, str(dtype), str(max_shard_size)],
        "checkpoint": file_stats(checkpoint.folder),
        "config": read_json(model / "config.json"),
    }
    files = [
        PlannedFile(file, sum(empty[n].nbytes for n in names), functools.partial(write, names))
        for file, names in split.filename_to_tensors.items()
    ]
    return ResumableFolder(out, request, files, finish)
