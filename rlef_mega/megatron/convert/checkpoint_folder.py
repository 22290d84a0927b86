"""Find a checkpoint, and in it each network: its folder and the prefix of its keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlef_mega.config import ConfigError, TrainConfig, load_config
from rlef_mega.megatron.checkpoints.files import NETWORKS, fault_in, latest_checkpoint
from rlef_mega.megatron.checkpoints.torch_dist import METADATA
from rlef_mega.megatron.convert.stored_network import StoredNetwork
from rlef_mega.megatron.hf_names import HFTensor, Role
from rlef_mega.run.hub import find_model

MODEL = "hf"  # in an imported checkpoint: config and tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights, and the Hugging Face folder with its config and tokenizer, if that is
    known."""

    folder: Path
    model: Path | None

    def network(self, role: Role, tensors: Sequence[HFTensor]) -> StoredNetwork:
        if (self.folder / METADATA).is_file():  # Megatron-LM's: one model, plain names
            return StoredNetwork(self.folder, "", tensors)
        return StoredNetwork(self.folder / NETWORKS, f"{role}.", tensors)


def find_checkpoint(path: Path, step: int | None, model: Path | None = None) -> Checkpoint:
    """Find the newest good checkpoint of a run directory, or that of `step`; or take `path` itself
    as a checkpoint. Its config and tokenizer are those of `model`, if given. Raises ConfigError if
    `path` is neither."""
    if (path / "config.toml").is_file():
        folder = path / "checkpoints"
        found = latest_checkpoint(folder) if step is None else folder / f"step_{step:06d}"
        if found is None:
            raise ConfigError(f"no checkpoint in {folder}; train first")
    elif step is not None:
        raise ConfigError(f"--step chooses from a run directory, but {path} has no config.toml")
    else:
        found = path
    # a folder of Megatron-LM's has no manifest
    if not (found / METADATA).is_file() and (fault := fault_in(found)) is not None:
        raise ConfigError(fault)
    return Checkpoint(found, find_model(model) if model else model_of(found))


def model_of(folder: Path) -> Path | None:
    """Find the folder that an imported checkpoint carries, or that its run started from."""
    if (folder / MODEL).is_dir():
        return folder / MODEL
    recipe = folder.parent.parent / "config.toml"
    if recipe.is_file():
        return find_model(load_config(recipe, [], TrainConfig).model.path)
    return None
