"""Models with random weights in the shapes that benchmarks need; speed does not depend on weights.

A slice is a model's own embedding, head and layers, but only as many layers as fit the device.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlef_mega.config import ConfigError, SFTConfig, find_recipe, load_config
from rlef_mega.flops import LLAMA_31_8B, LLAMA_31_70B, LlamaShape

SHAPES = {"llama31_8b": LLAMA_31_8B, "llama31_70b": LLAMA_31_70B}
LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Bytes a parameter on the device. Trained in bfloat16: weight 2, fp32 gradient, main copy and two
# moments 4 each. In fp32 the main copy is the weight. The peer holds bfloat16 gradients besides.
TRAINED = {torch.bfloat16: 18, torch.float32: 16}
PEER = {torch.bfloat16: 20, torch.float32: 16}
RESERVE_BYTES = 8 * 10**9  # for logits, workspaces and the allocator's fragments
MOST_OF_MEMORY = 0.97


def find_shape(recipe: str) -> LlamaShape:
    """Return the published shape that the recipe's name stands for, or the demo's."""
    name = Path(recipe).stem
    if name in SHAPES:
        return SHAPES[name]
    if name != "demo":
        raise ConfigError(
            f"no shape is known for {recipe!r}: use one of {', '.join((*SHAPES, 'demo'))}"
        )
    base = load_config(find_recipe("demo_base"), [], SFTConfig)
    return LlamaShape(
        layers=base.num_layers,
        hidden=base.hidden_size,
        ffn=base.ffn_hidden_size,
        heads=base.num_attention_heads,
        key_value_heads=base.num_key_value_heads,
        head_dim=base.hidden_size // base.num_attention_heads,
        vocabulary=base.vocab_size,
    )


def layers_that_fit(shape: LlamaShape, memory: int, dtype: torch.dtype, tokens: int) -> int:
    """Return the most layers with which both parts of the benchmark fit `memory` bytes: policy,
    critic and reference; and the policy beside a peer's. Raises ConfigError if not even one fits.
    """
    budget = MOST_OF_MEMORY * memory - min(RESERVE_BYTES, memory / 8)
    for layers in range(shape.layers, 0, -1):
        need = bytes_needed(shape.with_layers(layers), dtype, tokens)
        if need <= budget:
            return layers
    raise ConfigError(
        f"one layer with embedding and head needs {need / 1e9:.0f} GB, of {memory / 1e9:.0f} "
        "GB here; choose a smaller recipe, or give --layers to try nevertheless"
    )


def bytes_needed(shape: LlamaShape, dtype: torch.dtype, tokens: int) -> float:
    policy, critic = shape.parameters, shape.parameters - shape.table_parameters
    trained = TRAINED[dtype]
    three = trained * (policy + critic) + dtype.itemsize * policy
    beside = (trained + PEER[dtype]) * policy
    return max(three, beside) + activation_bytes(shape, dtype, tokens)


def activation_bytes(shape: LlamaShape, dtype: torch.dtype, tokens: int) -> int:
    """Return what backward needs without recomputation: the inputs and outputs of norms and
    projections, queries, keys and values before and after RoPE, about 12 numbers of the hidden
    size, and 4 of the feed-forward size."""
    return dtype.itemsize * tokens * shape.layers * (12 * shape.hidden + 4 * shape.ffn)


def write_model(
    folder: Path,
    shape: LlamaShape,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> None:
    """Write a Hugging Face folder with random weights; `settings` are more of its config. Raises
    ConfigError if the disk is full."""
    size = shape.parameters * dtype.itemsize
    folder.mkdir(parents=True)
    if shutil.disk_usage(folder).free < size + 10**9:
        raise ConfigError(f"{folder} has no room for {size / 1e9:.0f} GB; set TMPDIR elsewhere")
    config = LlamaConfig(
        **shape.hf_settings(),
        rms_norm_eps=1e-5,
        dtype=str(dtype).removeprefix("torch."),
        **settings,
    )
    if shape.vocabulary == LLAMA_31_8B.vocabulary:
        config.rope_parameters, config.max_position_embeddings = LLAMA_31_ROPE, 131072
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.save_pretrained(folder)
