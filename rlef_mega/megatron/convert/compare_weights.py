"""Whether a checkpoint and a Hugging Face folder hold the same numbers."""

from pathlib import Path

import torch

from rlef_mega.config import ConfigError
from rlef_mega.megatron.convert.checkpoint_folder import Checkpoint
from rlef_mega.megatron.convert.config_and_tokenizer import Role
from rlef_mega.megatron.convert.resumable_folder import Processes
from rlef_mega.megatron.convert.weights import (
    CheckpointWeights,
    Weights,
    blocks,
    columns,
    open_folder,
    read_as,
    tensors_of,
)
from rlef_mega.megatron.network.families import read_config
from rlef_mega.run.progress import ByteProgress


def compare_weights(
    checkpoint: Checkpoint,
    folder: Path,
    role: Role,
    *,
    exported: bool,
    processes: Processes,
    seed: int = 0,
) -> None:
    """Compare bit by bit, a block of rows at a time; each process compares its share of the
    tensors.

    The source's numbers are first converted to the dtype that was written: the folder's if it was
    `exported`, else the checkpoint's. Raises ConfigError at the first tensor that differs.
    """
    tensors = tensors_of(role, read_config(folder))
    ours: Weights = CheckpointWeights(checkpoint.network(role), tensors)
    theirs: Weights = open_folder(role, folder, tensors, seed)
    mine = tensors[processes.rank :: processes.count]
    written = theirs if exported else ours
    sizes = [columns(t) * t.shape[0] * written.dtype(t).itemsize for t in mine]
    compared = 0
    with ByteProgress(f"verifying {role}", shown=processes.rank == 0) as progress:
        for tensor, size in zip(mine, sizes, strict=True):
            dtype = written.dtype(tensor)
            for start, stop in blocks(tensor.shape[0], columns(tensor) * dtype.itemsize):
                shape = (stop - start, columns(tensor))
                pair = [torch.empty(shape, dtype=dtype) for _ in range(2)]
                for side, rows in zip((ours, theirs), pair, strict=True):
                    read_as(side, tensor, start, rows)
                if not torch.equal(*(rows.view(torch.uint8) for rows in pair)):
                    raise ConfigError(
                        f"{tensor.name} differs between {checkpoint.folder} and {folder}; one of "
                        f"them is damaged or of another step"
                    )
            compared += size
            progress(compared * processes.count, sum(sizes) * processes.count)
    processes.gather(None)  # all have found their share equal
    if processes.rank == 0:
        print(f"verified: {len(tensors)} tensors of the {role} are equal bit by bit")
