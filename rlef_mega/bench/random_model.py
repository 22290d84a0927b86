"""Models with random weights in the shapes that benchmarks need; speed does not depend on weights.

A slice is a model's own embedding, head and layers, but only as many layers as fit the device.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlef_mega.config import ConfigError, SFTConfig, TrainConfig, find_recipe, load_config
from rlef_mega.flops import LlamaShape
from rlef_mega.plan.planned_run import PlannedRun
from rlef_mega.preflight import model_shape
from rlef_mega.run.hub import CONFIG, find_model

MOST_OF_MEMORY = 0.9  # the rest: the context, workspaces and the allocator's fragments
POSITIONS = 8192  # of the models, unless stated


def find_shape(config: TrainConfig) -> LlamaShape:
    """Return the shape of the recipe's model: as stated, or from its config, which is fetched if it
    is on the hub. Without either, return the demo's."""
    stated = config.model.shape is not None
    model = find_model(config.model.path, files=CONFIG, fetch=not stated)
    if stated or (model / "config.json").is_file():
        return model_shape(config)
    return LlamaShape(**load_config(find_recipe("demo_base"), [], SFTConfig).sizes())


def layers_that_fit(config: TrainConfig, shape: LlamaShape, memory: int, *, beside: int = 0) -> int:
    """Return the largest number of layers with which policy, critic and reference fit `memory`
    bytes (by `rlef_mega/plan`), with nothing offloaded and `beside` more bytes per parameter.
    Raises ConfigError if not even one fits."""
    run, usable = replace(PlannedRun.of(config, shape), offloads=False), MOST_OF_MEMORY * memory
    for layers in range(shape.layers, 0, -1):
        cut = shape.with_layers(layers)
        [rank] = replace(run, shape=cut).memory()
        need = rank.total + beside * cut.parameters
        if need <= usable:
            return layers
    raise ConfigError(
        f"one layer with embedding and head needs {need / 1e9:.0f} GB, and {usable / 1e9:.0f} "
        "GB are usable here; choose a smaller recipe, or give --layers to try anyway"
    )


def write_model(
    folder: Path,
    shape: LlamaShape,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> None:
    """Write a Hugging Face folder with random weights; `settings` go into its config. Raises
    ConfigError if the disk is full."""
    size = shape.parameters * dtype.itemsize
    folder.mkdir(parents=True)
    if shutil.disk_usage(folder).free < size + 10**9:
        raise ConfigError(
            f"{folder} has no room for {size / 1e9:.0f} GB; set TMPDIR to a larger disk"
        )
    config = LlamaConfig(
        **shape.hf_settings(),
        rms_norm_eps=1e-5,
        dtype=str(dtype).removeprefix("torch."),
        **{"max_position_embeddings": POSITIONS, **settings},
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="5GB")  # as `rlef export-hf` writes it
