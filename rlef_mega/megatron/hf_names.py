"""The map between the names of tensors in Hugging Face checkpoints
(`model.layers.3.self_attn.q_proj.weight`) and Megatron's parameters.

`name_map` lists every tensor of a checkpoint in Hugging Face's order: its full shape, the dimension
along which tensor parallelism splits it, the Megatron parameter that holds it, and in which rows.
Megatron packs queries, keys and values by key-value group, [q..q k v] per group, and gate above up
in one matrix. In a live stage a tensor is a *view* of its parameter: loading writes through it,
publishing reads from it. Loading, publication and conversion use only this map.

Legend: G key-value groups of this rank, D head dimension, H hidden size.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from rlef_mega.flops import LlamaShape
from rlef_mega.megatron.network.families import DenseConfig, family_of
from rlef_mega.megatron.network.stages import Stages
from rlef_mega.run.model_folder import EMBEDDING, HEAD

if TYPE_CHECKING:  # converting files needs the names, not Megatron
    from rlef_mega.megatron.network.packed_llama import PackedLlama

Role = Literal["policy", "critic"]
VALUE_HEAD = "score"  # as in Hugging Face's LlamaForTokenClassification


@dataclass(frozen=True)
class PackedRows:
    """The rows of a packed parameter that make up one tensor. The parameter is viewed as [blocks,
    pieces, piece_rows]; the tensor is the pieces first:last of each block. One of `blocks` and
    `piece_rows` is -1, and follows from the parameter's size.
    """

    blocks: int
    pieces: int
    piece_rows: int
    first: int
    last: int

    def view(self, packed: torch.Tensor) -> torch.Tensor:
        shape = (self.blocks, self.pieces, self.piece_rows, *packed.shape[1:])
        return packed.view(shape)[:, self.first : self.last]


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a Hugging Face checkpoint. `parameter` is the Megatron parameter's name without
    the layer's number; our own checkpoints have it under this key, after `policy.` or `critic.`.
    """

    name: str
    shape: tuple[int, ...]
    split_dim: int | None  # None: the same on every tensor-parallel rank
    parameter: str
    layer: int | None = None  # None: the embedding, the final norm or the head
    rows: PackedRows | None = None  # None: all of them
    dtype: torch.dtype | None = None  # None: the network's

    def part_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """View or copy the tensor out of the whole Megatron parameter, without the rows that pad a
        vocabulary. Raises RuntimeError if the parameter's rows are not whole heads."""
        if self.rows:
            return self.rows.view(parameter).reshape(-1, *parameter.shape[1:])
        return parameter[: self.shape[0]] if self.name in (EMBEDDING, HEAD) else parameter

    def view(self, model: "PackedLlama") -> torch.Tensor:
        """View this rank's part of the tensor in a stage that holds it; with `rows`, as [blocks,
        pieces, rows, ...]."""
        name = self.parameter.rpartition("layers.")[2]
        module: torch.nn.Module = model
        if self.layer is not None:
            layers = model.decoder.layers
            module = layers[self.layer - layers[0].layer_number + 1]
        found = module.get_parameter(name)
        return self.rows.view(found) if self.rows else found

    def local_shape(self, tensor_parallel_size: int) -> torch.Size:
        shape = list(self.shape)
        if self.split_dim is not None:
            shape[self.split_dim] //= tensor_parallel_size
        return torch.Size(shape)


def shapes_of(tensors: Sequence[HFTensor]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in tensors}


def name_map(config: DenseConfig, role: Role = "policy") -> list[HFTensor]:
    """List every tensor of a language model, without a head that is tied to the embedding, or of a
    critic: a token-classification model whose one label is the value."""
    vocabulary, hidden = (config.vocab_size, config.hidden_size), config.hidden_size
    tensors = [HFTensor(EMBEDDING, vocabulary, 0, "embedding.word_embeddings.weight")]
    for layer in range(config.num_hidden_layers):
        tensors += layer_map(config, layer)
    norm = HFTensor("model.norm.weight", (hidden,), None, "decoder.final_layernorm.weight")
    tensors.append(norm)
    if role == "critic":
        fp32 = torch.float32
        tensors += [
            HFTensor(f"{VALUE_HEAD}.weight", (1, hidden), None, "output_layer.weight", dtype=fp32),
            HFTensor(f"{VALUE_HEAD}.bias", (1,), None, "output_layer.bias", dtype=fp32),
        ]
    elif not config.tie_word_embeddings:
        tensors.append(HFTensor(HEAD, vocabulary, 0, "output_layer.weight"))
    return tensors


def layer_map(config: DenseConfig, layer: int) -> list[HFTensor]:
    model, family = LlamaShape.of(config), family_of(config)
    hidden, ffn, width = model.hidden, model.ffn, model.head_dim
    queries, keys = model.heads * width, model.key_value_heads * width
    group = model.heads // model.key_value_heads
    # heads of a weight [G, group + 2, D, H] or of a bias [G, group + 2, D]
    heads = functools.partial(PackedRows, -1, group + 2, width)
    gate, up = PackedRows(1, 2, -1, 0, 1), PackedRows(1, 2, -1, 1, 2)  # halves
    tensors: list[HFTensor] = []

    def add(
        name: str,
        shape: tuple[int, ...],
        split: int | None,
        parameter: str,
        rows: PackedRows | None = None,
    ) -> None:
        full_name, key = f"model.layers.{layer}.{name}", f"decoder.layers.{parameter}"
        tensors.append(HFTensor(full_name, shape, split, key, layer, rows))

    qkv, fc1 = "self_attention.linear_qkv", "mlp.linear_fc1.weight"
    for name, size, rows in (
        ("self_attn.q_proj", queries, heads(0, group)),
        ("self_attn.k_proj", keys, heads(group, group + 1)),
        ("self_attn.v_proj", keys, heads(group + 1, group + 2)),
    ):
        add(f"{name}.weight", (size, hidden), 0, f"{qkv}.weight", rows)
        if family.qkv_bias:
            add(f"{name}.bias", (size,), 0, f"{qkv}.bias", rows)
    add("self_attn.o_proj.weight", (hidden, queries), 1, "self_attention.linear_proj.weight")
    if family.qk_norm:
        add("self_attn.q_norm.weight", (width,), None, "self_attention.q_layernorm.weight")
        add("self_attn.k_norm.weight", (width,), None, "self_attention.k_layernorm.weight")
    add("mlp.gate_proj.weight", (ffn, hidden), 0, fc1, gate)
    add("mlp.up_proj.weight", (ffn, hidden), 0, fc1, up)
    add("mlp.down_proj.weight", (hidden, ffn), 1, "mlp.linear_fc2.weight")
    add("input_layernorm.weight", (hidden,), None, "input_layernorm.weight")
    add("post_attention_layernorm.weight", (hidden,), None, "pre_mlp_layernorm.weight")
    return tensors


def stage_of(tensor: HFTensor, stages: Stages) -> int:
    """Return the pipeline stage that holds this tensor."""
    if tensor.layer is not None:
        return stages.of_layer(tensor.layer)
    return 0 if tensor.name == EMBEDDING else stages.last
