"""The one name map between Hugging Face checkpoints and Megatron stages, for Llama.

`name_map` lists every tensor of a checkpoint in Hugging Face's order: its full shape, the dimension
along which tensor parallelism splits it, and how to find it in a Megatron stage. What it finds is a
*view* of a Megatron parameter, so that loading writes through it and publishing reads from it.
Megatron packs queries, keys and values by key-value group, [q..q k v] a group, and gate over up in
one matrix; both are views too.

Legend: G key-value groups of this rank, D head dimension, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from rlef_mega.megatron.model import PackedLlama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

View = Callable[[PackedLlama], torch.Tensor]


@dataclass(frozen=True)
class HFTensor:
    """One tensor of the checkpoint. `layer` is None for the embedding, -1 for what follows the last
    layer.
    """

    name: str
    shape: tuple[int, ...]
    split_dim: int | None  # None: the same on every tensor-parallel rank
    layer: int | None
    view: View

    def local_shape(self, tensor_parallel_size: int) -> list[int]:
        shape = list(self.shape)
        if self.split_dim is not None:
            shape[self.split_dim] //= tensor_parallel_size
        return shape


def name_map(config: LlamaConfig) -> list[HFTensor]:
    """Every tensor of the checkpoint. A tied head has no entry: it is the embedding."""
    vocabulary = (config.vocab_size, config.hidden_size)
    tensors = [
        HFTensor(EMBEDDING, vocabulary, 0, None, lambda m: m.embedding.word_embeddings.weight)
    ]
    for layer in range(config.num_hidden_layers):
        tensors += layer_map(config, layer)
    norm: View = lambda m: m.decoder.final_layernorm.weight  # noqa: E731
    tensors.append(HFTensor("model.norm.weight", (config.hidden_size,), None, -1, norm))
    if not config.tie_word_embeddings:
        tensors.append(HFTensor(HEAD, vocabulary, 0, -1, lambda m: m.output_layer.weight))
    return tensors


def layer_map(config: LlamaConfig, layer: int) -> list[HFTensor]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    head_dim, key_heads = config.head_dim, config.num_key_value_heads
    assert head_dim is not None and key_heads is not None, "LlamaConfig fills them in"
    queries, keys = config.num_attention_heads * head_dim, key_heads * head_dim
    group = config.num_attention_heads // key_heads

    def block(model: PackedLlama):
        return model.decoder.layers[layer - model.decoder.layers[0].layer_number + 1]

    def attention(part: slice) -> View:
        def view(model: PackedLlama) -> torch.Tensor:
            packed = block(model).self_attention.linear_qkv.weight
            return packed.view(-1, group + 2, head_dim, hidden)[:, part]  # [G, part, D, H]

        return view

    def feed_forward(half: int) -> View:
        return lambda model: block(model).mlp.linear_fc1.weight.chunk(2)[half]

    rows: list[tuple[str, tuple[int, ...], int | None, View]] = [
        ("input_layernorm", (hidden,), None, lambda m: block(m).input_layernorm.weight),
        ("self_attn.q_proj", (queries, hidden), 0, attention(slice(0, group))),
        ("self_attn.k_proj", (keys, hidden), 0, attention(slice(group, group + 1))),
        ("self_attn.v_proj", (keys, hidden), 0, attention(slice(group + 1, group + 2))),
        (
            "self_attn.o_proj",
            (hidden, queries),
            1,
            lambda m: block(m).self_attention.linear_proj.weight,
        ),
        ("post_attention_layernorm", (hidden,), None, lambda m: block(m).pre_mlp_layernorm.weight),
        ("mlp.gate_proj", (ffn, hidden), 0, feed_forward(0)),
        ("mlp.up_proj", (ffn, hidden), 0, feed_forward(1)),
        ("mlp.down_proj", (hidden, ffn), 1, lambda m: block(m).mlp.linear_fc2.weight),
    ]
    return [
        HFTensor(f"model.layers.{layer}.{name}.weight", shape, split, layer, view)
        for name, shape, split, view in rows
    ]


def stage_of(tensor: HFTensor, config: LlamaConfig, stages: int) -> int:
    """Layers are dealt to pipeline stages evenly, in order (`check_layout` has seen to it that they
    divide).
    """
    if tensor.layer is None:
        return 0
    if tensor.layer < 0:
        return stages - 1
    return tensor.layer // (config.num_hidden_layers // stages)
