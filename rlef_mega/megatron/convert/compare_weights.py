"""Whether a checkpoint and a Hugging Face folder hold the same numbers."""

from pathlib import Path

import torch

from rlef_mega.config import ConfigError
from rlef_mega.megatron.convert.checkpoint_folder import Checkpoint
from rlef_mega.megatron.convert.config_and_tokenizer import Role
from rlef_mega.megatron.convert.resumable_folder import Processes, Report
from rlef_mega.megatron.convert.weights import (
    CheckpointWeights,
    blocks,
    columns,
    open_folder,
    read,
    tensors_of,
)
from rlef_mega.megatron.network.families import read_config


def compare_tensors(
    checkpoint: Checkpoint,
    folder: Path,
    role: Role,
    *,
    exported: bool,
    processes: Processes,
    report: Report,
    seed: int = 0,
) -> int:
    """Bit by bit, a block of rows at a time; returns how many tensors a role has. Each process
    compares its share of them.

    The source's numbers are first brought to the type that was written: the folder's if it was
    `exported`, else the checkpoint's. Raises ConfigError at the first tensor that differs.
    """
    tensors = tensors_of(role, read_config(folder))
    ours = CheckpointWeights(checkpoint.network(role), tensors)
    theirs = open_folder(role, folder, tensors, seed)
    mine = tensors[processes.rank :: processes.count]
    written = theirs if exported else ours
    sizes = [columns(t) * t.shape[0] * written.dtype(t).itemsize for t in mine]
    done = 0
    for tensor, size in zip(mine, sizes, strict=True):
        dtype = written.dtype(tensor)
        for start, stop in blocks(tensor.shape[0], columns(tensor) * dtype.itemsize):
            pair = [read(side, tensor, start, stop, dtype) for side in (ours, theirs)]
            if not torch.equal(*(rows.view(torch.uint8) for rows in pair)):
                raise ConfigError(
                    f"{tensor.name} differs between {checkpoint.folder} and {folder}; one of them "
                    f"is damaged or of another step"
                )
        done += size
        report(done * processes.count, sum(sizes) * processes.count)
    processes.gather(None)  # all have found their share equal
    return len(tensors)
