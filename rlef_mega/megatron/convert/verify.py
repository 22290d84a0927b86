"""Verify that a checkpoint and a Hugging Face folder hold the same numbers: `--verify`."""

from pathlib import Path

import torch

from rlef_mega.config import ConfigError
from rlef_mega.megatron.convert.checkpoint_folder import Checkpoint
from rlef_mega.megatron.hf_names import Role, name_map, shapes_of
from rlef_mega.megatron.network.families import read_config
from rlef_mega.run.model_folder import SafetensorsFolder
from rlef_mega.run.progress import ByteProgress


def compare_weights(checkpoint: Checkpoint, folder: Path, role: Role, *, exported: bool) -> None:
    """Compare bit by bit, one tensor at a time.

    The source's numbers are first converted to the dtype that was written: the folder's if it was
    `exported`, else the checkpoint's. Raises ConfigError at the first tensor that differs.
    """
    tensors = name_map(read_config(folder), role)
    ours, theirs = checkpoint.network(role, tensors), SafetensorsFolder(folder)
    theirs.check(shapes_of(tensors))
    sizes = [torch.Size(t.shape).numel() * ours.dtype(t).itemsize for t in tensors]
    with ByteProgress(f"verifying {role}") as progress:
        for index, tensor in enumerate(tensors):
            pair = [ours.read(tensor), theirs.read(tensor.name)]
            bits = [x.to(pair[exported].dtype).contiguous().view(torch.uint8) for x in pair]
            if not torch.equal(*bits):
                raise ConfigError(
                    f"{tensor.name} differs between {checkpoint.folder} and {folder}; one of "
                    f"them is damaged or of another step"
                )
            progress(sum(sizes[: index + 1]), sum(sizes))
    print(f"verified: {len(tensors)} tensors of the {role} are equal bit by bit")
