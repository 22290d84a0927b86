"""A tiny Llama for tests."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(vocabulary: int, *, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """Return a Llama of two layers with random weights, whose outputs are far from uniform, so that
    faults show. `options` are fields of its LlamaConfig."""
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
