"""Whether a checkpoint and a Hugging Face folder hold the same network: the same numbers, and the
same outputs (in a process of its own, `compare_outputs`)."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from rlef_mega.config import ConfigError
from rlef_mega.megatron.checkpoints.files import NETWORKS
from rlef_mega.megatron.convert.checkpoint_folder import Checkpoint
from rlef_mega.megatron.convert.config_and_tokenizer import Role
from rlef_mega.megatron.convert.resumable_folder import is_first
from rlef_mega.megatron.convert.weights import Weights, blocks, open_folder, read_as, tensors_of
from rlef_mega.megatron.network.families import read_config
from rlef_mega.run.progress import ByteProgress
from rlef_mega.run.ranks import gather, my_share

WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun's variables


def compare_weights(
    checkpoint: Checkpoint,
    folder: Path,
    role: Role,
    *,
    exported: bool,
    seed: int = 0,
) -> None:
    """Compare bit by bit, a block of rows at a time; each process compares its share of the
    tensors.

    The source's numbers are first converted to the dtype that was written: the folder's if it was
    `exported`, else the checkpoint's. Raises ConfigError at the first tensor that differs.
    """
    tensors = tensors_of(role, read_config(folder))
    ours: Weights = checkpoint.network(role, tensors)
    theirs: Weights = open_folder(role, folder, tensors, seed)
    written = theirs if exported else ours
    sizes = {t.name: t.columns * t.shape[0] * written.dtype(t).itemsize for t in tensors}
    compared = 0
    with ByteProgress(f"verifying {role}", shown=is_first()) as progress:
        for tensor in my_share(tensors):
            dtype = written.dtype(tensor)
            for start, stop in blocks(tensor.shape[0], tensor.columns * dtype.itemsize):
                shape = (stop - start, tensor.columns)
                pair = [torch.empty(shape, dtype=dtype) for _ in range(2)]
                for side, rows in zip((ours, theirs), pair, strict=True):
                    read_as(side, tensor, start, rows)
                if not torch.equal(*(rows.view(torch.uint8) for rows in pair)):
                    raise ConfigError(
                        f"{tensor.name} differs between {checkpoint.folder} and {folder}; one of "
                        f"them is damaged or of another step"
                    )
            compared += sizes[tensor.name]
            progress(compared, sum(sizes[each.name] for each in my_share(tensors)))
    gather(None)  # all have found their share equal
    if is_first():
        print(f"verified: {len(tensors)} tensors of the {role} are equal bit by bit")


def compare_outputs(checkpoint: Path, folder: Path, role: Role) -> None:
    """Compare what both compute, in a process of its own, which is the only one of its world."""
    if not (checkpoint / NETWORKS).is_dir():
        print("outputs not compared: the checkpoint is in Megatron-LM's own form")
        return
    alone = {name: value for name, value in os.environ.items() if name not in WORLD}
    command = [sys.executable, "-P", "-m", "rlef_mega.megatron.convert.compare_outputs"]
    finished = subprocess.run(
        [*command, str(checkpoint), str(folder), role], env=alone, stderr=subprocess.PIPE, text=True
    )
    if finished.returncode:
        raise ConfigError(finished.stderr.strip().splitlines()[-1].removeprefix("error: "))
