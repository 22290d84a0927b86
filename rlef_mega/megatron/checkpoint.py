"""Checkpoints: a run can be killed at any moment and goes on where it was, with the same numbers.

Theory of operation. All ranks call `save_checkpoint` and `load_checkpoint` together. Each writes
its part of every network (Megatron's dist_checkpointing, torch_dist format) into `step_000010.tmp`;
then the ranks checksum all files between them, rank 0 writes the list of files, sizes and checksums
as `manifest.json`, last, and renames the folder. So a folder without `.tmp` is complete, unless
something damaged it afterwards: then the manifest tells. Saving happens inside the process: no
helper processes, which would import the main module again.

    step_000010/manifest.json  meta.json  rng.pt  policy/  critic/
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed import checkpoint as torch_checkpoint

from rlef_mega.config import ConfigError
from rlef_mega.megatron.cpu_shim import calls_megatron
from rlef_mega.megatron.model import PackedLlama
from rlef_mega.megatron.parallel import Ranks
from rlef_mega.megatron.trained_model import TrainedModel

MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step_(\d+)")
# Gathers the spread optimizer state to the shapes of the parameters: such a checkpoint loads in any
# layout.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


class Checkpointable(Protocol):
    """A learner: networks under their names, on these ranks."""

    ranks: Ranks

    @property
    def trained(self) -> dict[str, TrainedModel]: ...


class InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's own strategy forks writers and spawns a manager for their results; this one writes
    in the process, to the same format.
    """

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_checkpoint(
    folder: Path, learner: Checkpointable, *, step: int, state: dict[str, Any]
) -> Path:
    """Write `folder/step_000010`. `state` is small and JSON: data order, weight version.
    Collective.
    """
    final = folder / f"step_{step:06d}"
    temporary = final.with_suffix(".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while saving
        for name in learner.trained:
            (temporary / name).mkdir(parents=True)
    dist.barrier()  # world: the folders are there
    for name, model in learner.trained.items():
        save_model(temporary / name, model)
    generators: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(generators, random_state())  # world: each rank's generators
    if dist.get_rank() == 0:
        torch.save(generators, temporary / "rng.pt")
        updates = {name: model.updates for name, model in learner.trained.items()}
        meta = {"step": step, "updates": updates, "state": state}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    dist.barrier()  # world: all files are written
    checksums = shared_checksums(temporary, files_below(temporary))
    if dist.get_rank() == 0:
        write_manifest(temporary, checksums)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    dist.barrier()  # world: the checkpoint is there under its name
    return final


def load_checkpoint(path: Path, learner: Checkpointable) -> tuple[int, dict[str, Any]]:
    """Bring the learner back to what it was: (step, state). Collective.

    Raises ConfigError, on every rank, for a checkpoint that is missing, incomplete or damaged.
    """
    manifest = read_manifest(path)
    check_sizes(path, manifest)
    checksums = shared_checksums(path, sorted(manifest))
    for file, expected in manifest.items():
        if checksums[file] != expected["sha256"]:
            raise ConfigError(damaged(path, file, "its checksum differs from the manifest's"))
    meta = json.loads((path / "meta.json").read_text())
    if set(meta["updates"]) != set(learner.trained):
        raise ConfigError(
            f"{path} holds {sorted(meta['updates'])}, this run trains {sorted(learner.trained)}; "
            f"it belongs to another kind of run"
        )
    for name, model in learner.trained.items():
        load_model(path / name, model)
        model.updates = meta["updates"][name]
    generators = torch.load(path / "rng.pt", weights_only=True)
    if len(generators) == dist.get_world_size():  # in another layout ranks keep the seed's
        restore_random_state(generators[dist.get_rank()])
    return meta["step"], meta["state"]


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None. A damaged one is passed over with a warning."""
    for path in reversed(steps_in(folder)):
        try:
            check_sizes(path, read_manifest(path))
        except ConfigError as error:
            warnings.warn(f"{error}; falling back to the one before", stacklevel=2)
        else:
            return path
    return None


def prune(folder: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints. Any rank may call it; rank 0 acts."""
    if dist.get_rank() == 0:
        for path in steps_in(folder)[:-keep]:
            shutil.rmtree(path)


def steps_in(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


# ------------------------------------------------------------------------------------ networks


def metadata(ranks: Ranks) -> dict[str, Any]:
    return SHARDING | {"dp_cp_group": ranks.groups.dp_cp}


@calls_megatron
def save_model(folder: Path, model: TrainedModel) -> None:
    options = metadata(model.ranks)
    make_adam_state(spread_optimizer(model).optimizer)
    weights = model_state(model.chunks, options)
    optimizer = model.optimizer.sharded_state_dict(weights, metadata=options)
    dist_checkpointing.save(
        {"model": weights, "optimizer": optimizer},
        str(folder),
        InProcessSave("torch_dist", 1),
        content_metadata=SHARDING,
    )


@calls_megatron
def load_model(folder: Path, model: TrainedModel) -> None:
    options = metadata(model.ranks)
    make_adam_state(spread_optimizer(model).optimizer)
    weights = model_state(model.chunks, options)
    optimizer = model.optimizer.sharded_state_dict(weights, is_loading=True, metadata=options)
    loaded = dist_checkpointing.load(
        {"model": weights, "optimizer": optimizer}, str(folder), TorchDistLoadShardedStrategy()
    )
    load_state(model.chunks, loaded["model"])
    load_spread_optimizer(spread_optimizer(model), loaded["optimizer"])


@calls_megatron
def load_weights(folder: Path, chunks: list[PackedLlama], ranks: Ranks) -> None:
    """One network's weights alone, saved in any layout, into a module of this one. Collective."""
    weights = model_state(chunks, metadata(ranks))
    loaded = dist_checkpointing.load(
        {"model": weights}, str(folder), TorchDistLoadShardedStrategy()
    )
    load_state(chunks, loaded["model"])


def model_state(chunks: list[PackedLlama], options: dict[str, Any]) -> dict[str, Any]:
    """Each chunk under its number; the sharded keys name layers of the whole network."""
    return {
        str(number): chunk.sharded_state_dict(metadata=options)
        for number, chunk in enumerate(chunks)
    }


def load_state(chunks: list[PackedLlama], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[str(number)])


def spread_optimizer(model: TrainedModel) -> DistributedOptimizer:
    (optimizer,) = model.optimizer.chained_optimizers  # a dense model has one
    return optimizer


def make_adam_state(inner: torch.optim.Optimizer) -> None:
    """Adam makes its state at its first step, but Megatron's distributed optimizer saves and loads
    only what is there. A policy that has waited for its critic has made no step yet.
    """
    for group in inner.param_groups:
        for parameter in group["params"]:
            if inner.state[parameter]:
                continue
            for moment in ("exp_avg", "exp_avg_sq"):
                inner.state[parameter][moment] = torch.zeros_like(parameter)
            if isinstance(inner, torch.optim.AdamW):  # fused optimizers count in their groups
                inner.state[parameter]["step"] = torch.tensor(0.0)


def load_spread_optimizer(optimizer: DistributedOptimizer, loaded: dict[str, Any]) -> None:
    """In two parts, around two faults that megatron-core 0.16 has with torch's AdamW: it looks for
    `step` among the tensors of each parameter, and it gives all parameters one shared `step`, which
    each would then increment.
    """
    tensors = loaded.pop("param_state")
    loaded.pop("param_state_sharding_type")
    optimizer.load_state_dict(loaded)  # groups and step
    state = optimizer.optimizer.state
    steps = {parameter: entry.pop("step", None) for parameter, entry in state.items()}
    optimizer.load_parameter_state_from_fully_reshardable(tensors)
    for parameter, step in steps.items():
        if step is not None:  # fused optimizers keep it in their groups
            state[parameter]["step"] = step.clone()


def random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


# ------------------------------------------------------------------------------------ manifest


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def shared_checksums(folder: Path, files: list[str]) -> dict[str, str]:
    """sha256 of every file, on every rank; each rank reads its share of the files."""
    mine = {}
    for file in files[dist.get_rank() :: dist.get_world_size()]:
        with (folder / file).open("rb") as stream:
            mine[file] = hashlib.file_digest(stream, "sha256").hexdigest()
    shares: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(shares, mine)  # world: the union of the shares
    return {file: checksum for share in shares for file, checksum in share.items()}


def write_manifest(folder: Path, checksums: dict[str, str]) -> None:
    """The last file of a checkpoint, flushed to the disk before the folder gets its name."""
    manifest = {
        file: {"bytes": (folder / file).stat().st_size, "sha256": checksums[file]}
        for file in sorted(checksums)
    }
    with (folder / MANIFEST).open("w") as stream:
        json.dump(manifest, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_dir():
        raise ConfigError(f"no checkpoint {path}; name a step_* folder of the run's checkpoints")
    try:
        return json.loads((path / MANIFEST).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        raise ConfigError(damaged(path, MANIFEST, "it is missing or truncated")) from None


def check_sizes(path: Path, manifest: dict[str, dict[str, Any]]) -> None:
    for file, expected in manifest.items():
        if not (path / file).is_file():
            raise ConfigError(damaged(path, file, "it is missing"))
        size = (path / file).stat().st_size
        if size != expected["bytes"]:
            raise ConfigError(damaged(path, file, f"{size} bytes, not {expected['bytes']}"))


def damaged(path: Path, file: str, what: str) -> str:
    return f"checkpoint {path} is damaged at {file}: {what}; delete the folder or name an older one"
