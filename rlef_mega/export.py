"""A run's newest checkpoint to a Hugging Face folder, in one process whatever the layout it was
trained with."""

from pathlib import Path

import torch

from rlef_mega.config import ConfigError, ParallelConfig, TrainConfig, load_config
from rlef_mega.megatron import checkpoint, parallel
from rlef_mega.megatron.hf_weights import export_hf


def export_checkpoint(run: Path, out: Path) -> None:
    """ConfigError where `run` is no run directory or has no good checkpoint; `out` appears whole or
    not at all."""
    recipe = run / "config.toml"
    if not recipe.is_file():
        raise ConfigError(f"no file {recipe}: give a run directory, as named by run.dir")
    newest = checkpoint.latest_checkpoint(run / "checkpoints")
    if newest is None:
        raise ConfigError(f"no checkpoint in {run / 'checkpoints'}; train first")
    config = load_config(recipe, [], TrainConfig)
    ranks = parallel.initialize(ParallelConfig(), seed=config.run.seed)
    source = Path(config.model.path)
    policy = checkpoint.load_policy(newest, source, ranks, dtype=config.model.dtype)
    export_hf(policy, source, out, getattr(torch, config.model.dtype))
    parallel.shutdown(ranks)
