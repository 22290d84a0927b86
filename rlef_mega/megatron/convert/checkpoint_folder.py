"""Where a checkpoint's networks lie: the one place that knows the folders and the key prefixes."""

from dataclasses import dataclass
from pathlib import Path

from rlef_mega.config import ConfigError, TrainConfig, load_config
from rlef_mega.megatron.checkpoints.files import NETWORKS, fault_in, latest_checkpoint
from rlef_mega.megatron.convert.config_and_tokenizer import Role
from rlef_mega.megatron.convert.stored_network import METADATA, StoredNetwork

MODEL = "hf"  # in an imported checkpoint: config and tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights, and the Hugging Face folder that brings config and tokenizer, where it
    is known."""

    folder: Path
    model: Path | None

    def network(self, role: Role) -> StoredNetwork:
        if (self.folder / METADATA).is_file():  # of Megatron alone: one model, its names plain
            return StoredNetwork(self.folder, "")
        return StoredNetwork(self.folder / NETWORKS, prefix(role))


def prefix(role: Role) -> str:
    return f"{role}."


def find_checkpoint(path: Path, step: int | None, model: Path | None = None) -> Checkpoint:
    """Of a run directory, the newest good checkpoint or that of `step`; or the folder itself. Its
    config and tokenizer are those of `model`, if given. ConfigError if it is neither."""
    if (path / "config.toml").is_file():
        folder = path / "checkpoints"
        found = latest_checkpoint(folder) if step is None else folder / f"step_{step:06d}"
        if found is None:
            raise ConfigError(f"no checkpoint in {folder}; train first")
    elif step is not None:
        raise ConfigError(f"--step chooses from a run directory, but {path} has no config.toml")
    else:
        found = path
    check_files(found)
    return Checkpoint(found, model or model_of(found))


def check_files(folder: Path) -> None:
    """Sizes as the manifest says; a folder of Megatron's alone has none."""
    fault = None if (folder / METADATA).is_file() else fault_in(folder)
    if fault is not None:
        raise ConfigError(fault)


def model_of(folder: Path) -> Path | None:
    """What an imported checkpoint carries, or what the run of a checkpoint was started from."""
    if (folder / MODEL).is_dir():
        return folder / MODEL
    recipe = folder.parent.parent / "config.toml"
    if recipe.is_file():
        return Path(load_config(recipe, [], TrainConfig).model.path)
    return None
