"""`rlef export-hf` and `rlef import-hf`: plan, write with a progress bar, and verify if asked."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from rlef_mega.config import ConfigError
from rlef_mega.megatron.checkpoints.files import NETWORKS
from rlef_mega.megatron.convert.checkpoint_folder import Checkpoint, find_checkpoint
from rlef_mega.megatron.convert.compare_weights import compare_weights
from rlef_mega.megatron.convert.config_and_tokenizer import Role
from rlef_mega.megatron.convert.from_hf import Import, plan_import
from rlef_mega.megatron.convert.resumable_folder import Processes, ResumableFolder
from rlef_mega.megatron.convert.to_hf import Export, plan_export
from rlef_mega.run.progress import ByteProgress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun's variables
ROLES: dict[str, tuple[Role, ...]] = {
    "policy": ("policy",),
    "critic": ("critic",),
    "both": ("policy", "critic"),
}


def export_checkpoint(
    path: Path,
    out: Path,
    *,
    role: str = "policy",
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    step: int | None = None,
    model: Path | None = None,
    overwrite: bool = False,
    verify: bool = False,
    verify_outputs: bool = False,
    processes: Processes = Processes(),  # noqa: B008 - frozen
) -> None:
    """Write a checkpoint as a Hugging Face folder: the one at `path`, or the run's newest one or
    that of `step`. Raises ConfigError; `out` is complete or does not exist."""
    (chosen,) = choose(role, {"policy", "critic"})
    checkpoint = find_checkpoint(path, step, model)
    wanted = Export(chosen, dtype_named(dtype), max_shard_size)
    write(plan_export(checkpoint, out, wanted, overwrite=overwrite), checkpoint.folder, processes)
    if verify:
        compare_weights(checkpoint, out, chosen, exported=True, processes=processes)
    if verify_outputs and processes.rank == 0:
        compare_outputs(checkpoint.folder, out, chosen)


def import_folder(
    folder: Path,
    out: Path,
    *,
    role: str = "policy",
    dtype: str | None = None,
    pad_vocabulary_to_multiple: int = 1,
    seed: int = 0,
    overwrite: bool = False,
    verify: bool = False,
    verify_outputs: bool = False,
    processes: Processes = Processes(),  # noqa: B008 - frozen
) -> None:
    """Write a Hugging Face folder as a checkpoint of weights. Raises ConfigError; `out` is complete
    or does not exist."""
    if pad_vocabulary_to_multiple < 1:
        raise ConfigError(
            f"--pad-vocabulary-to-multiple {pad_vocabulary_to_multiple}: it must be at least 1"
        )
    roles = choose(role, set(ROLES))
    wanted = Import(roles, dtype_named(dtype), pad_vocabulary_to_multiple, seed)
    write(plan_import(folder, out, wanted, overwrite=overwrite), folder, processes)
    if verify:
        for chosen in roles:
            compare_weights(
                Checkpoint(out, folder),
                folder,
                chosen,
                exported=False,
                processes=processes,
                seed=seed,
            )
    if verify_outputs and processes.rank == 0 and "policy" in roles:
        compare_outputs(out, folder, "policy")


def choose(role: str, allowed: set[str]) -> tuple[Role, ...]:
    if role not in allowed:
        raise ConfigError(f"--role {role!r}: use one of {', '.join(sorted(allowed))}")
    return ROLES[role]


def dtype_named(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ConfigError(f"--dtype {name!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


def write(plan: ResumableFolder, source: Path, processes: Processes) -> None:
    if plan.out.resolve() == source.resolve():
        raise ConfigError(f"{plan.out} is the source itself; choose another name")
    with ByteProgress(f"writing {plan.out}", shown=processes.rank == 0) as progress:
        plan.write(processes, progress)


def compare_outputs(checkpoint: Path, folder: Path, role: Role) -> None:
    """Compare what both compute, in a process of its own, which is the only one of its world."""
    if not (checkpoint / NETWORKS).is_dir():
        print("outputs not compared: the checkpoint is in Megatron-LM's own form")
        return
    alone = {name: value for name, value in os.environ.items() if name not in WORLD}
    command = [sys.executable, "-m", "rlef_mega.megatron.convert.compare_outputs"]
    finished = subprocess.run(
        [*command, str(checkpoint), str(folder), role], env=alone, stderr=subprocess.PIPE, text=True
    )
    if finished.returncode:
        raise ConfigError(finished.stderr.strip().splitlines()[-1].removeprefix("error: "))
