"""A Llama for tests that want some model."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(vocabulary: int, *, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """Two layers, weights of the seed, far from uniform, so that a mistake shows; `options` are the
    config's."""
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(shape | options))).eval()
