"""`rlef export-hf` and `rlef import-hf`: plan, write with a progress bar, and verify if asked."""

from pathlib import Path

import torch

from rlef_mega.config import ConfigError
from rlef_mega.megatron.convert.checkpoint_folder import Checkpoint, find_checkpoint
from rlef_mega.megatron.convert.config_and_tokenizer import Role
from rlef_mega.megatron.convert.from_hf import plan_import
from rlef_mega.megatron.convert.resumable_folder import ResumableFolder, is_first
from rlef_mega.megatron.convert.to_hf import plan_export
from rlef_mega.megatron.convert.verify import compare_outputs, compare_weights
from rlef_mega.run.progress import ByteProgress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
) -> None:
    """Write a checkpoint as a Hugging Face folder: the one at `path`, or the run's newest one or
    that of `step`. Raises ConfigError; `out` is complete or does not exist."""
    (chosen,) = choose(role, {"policy", "critic"})
    checkpoint = find_checkpoint(path, step, model)
    plan = plan_export(
        checkpoint,
        out,
        role=chosen,
        dtype=dtype_named(dtype),
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    write(plan, checkpoint.folder)
    if verify:
        compare_weights(checkpoint, out, chosen, exported=True)
    if verify_outputs and is_first():
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
) -> None:
    """Write a Hugging Face folder as a checkpoint of weights. Raises ConfigError; `out` is complete
    or does not exist."""
    if pad_vocabulary_to_multiple < 1:
        raise ConfigError(
            f"--pad-vocabulary-to-multiple {pad_vocabulary_to_multiple}: it must be at least 1"
        )
    roles = choose(role, set(ROLES))
    plan = plan_import(
        folder,
        out,
        roles=roles,
        dtype=dtype_named(dtype),
        pad_vocabulary_to_multiple=pad_vocabulary_to_multiple,
        seed=seed,
        overwrite=overwrite,
    )
    write(plan, folder)
    if verify:
        for chosen in roles:
            compare_weights(Checkpoint(out, folder), folder, chosen, exported=False, seed=seed)
    if verify_outputs and is_first() and "policy" in roles:
        compare_outputs(out, folder, "policy")


def choose(role: str, allowed: set[str]) -> tuple[Role, ...]:
    if role not in allowed:
        raise ConfigError(f"--role {role!r}: use one of {', '.join(sorted(allowed))}")
    return ROLES[role]


def dtype_named(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise ConfigError(f"--dtype {name!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


def write(plan: ResumableFolder, source: Path) -> None:
    if plan.out.resolve() == source.resolve():
        raise ConfigError(f"{plan.out} is the source itself; choose another name")
    with ByteProgress(f"writing {plan.out}", shown=is_first()) as progress:
        plan.write(progress)
