"""A run's newest checkpoint to a Hugging Face folder, in one process whatever layout trained it."""

from pathlib import Path

import torch

from rlef_mega.config import ConfigError, ParallelConfig, TrainConfig, load_config
from rlef_mega.megatron import checkpoint, parallel
from rlef_mega.megatron.hf_weights import export_hf, iter_hf_weights
from rlef_mega.megatron.learner import StartingPoint


def export_checkpoint(run: Path, out: Path) -> None:
    """ConfigError if `run` is no run directory or has no good checkpoint; `out` is whole or not
    there."""
    recipe = run / "config.toml"
    if not recipe.is_file():
        raise ConfigError(f"no file {recipe}: give a run directory, as named by run.dir")
    newest = checkpoint.latest_checkpoint(run / "checkpoints")
    if newest is None:
        raise ConfigError(f"no checkpoint in {run / 'checkpoints'}; train first")
    config = load_config(recipe, [], TrainConfig)
    alone = ParallelConfig(processes_per_node=1)
    ranks = parallel.initialize(alone, seed=config.run.seed)
    source, dtype = Path(config.model.path), getattr(torch, config.model.dtype)
    policy = StartingPoint(ranks, source, dtype, recompute="none").policy()
    checkpoint.load_weights(newest / "policy", policy, ranks)
    export_hf(iter_hf_weights(policy, ranks), source, out, dtype)
    parallel.shutdown(ranks)
