"""Layers made of Transformer Engine's modules: norm and product in one, attention by flash-attn or
cuDNN as Transformer Engine chooses.

Imported only if `accelerations` chose it. Built from megatron-core's wrappers and tested with
stand-ins for them; never run on a GPU.
"""

from dataclasses import replace

import torch
from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from rlef_mega.megatron.network.attention import PackedSequences, rotated
from rlef_mega.megatron.network.families import FUSED_NORMS


class PackedTEAttention(TEDotProductAttention):
    frequencies_E: torch.Tensor  # the model's, given once it is built

    def forward(self, query, key, value, attention_mask, *args, packed_seq_params, **options):
        assert isinstance(packed_seq_params, PackedSequences), "our batches are always packed"
        query, key = rotated(query, key, packed_seq_params, self.frequencies_E)
        return super().forward(
            query, key, value, attention_mask, *args, packed_seq_params=packed_seq_params, **options
        )


def with_transformer_engine(spec: ModuleSpec) -> ModuleSpec:
    """Return the same layer made of Transformer Engine's modules."""
    layer = spec.submodules
    attention, feed_forward = layer.self_attention.submodules, layer.mlp.submodules

    def norm(local: type) -> type:
        return IdentityOp if local is IdentityOp else TENorm

    return replace(
        spec,
        submodules=replace(
            layer,
            input_layernorm=IdentityOp,
            self_attention=replace(
                layer.self_attention,
                submodules=replace(
                    attention,
                    linear_qkv=TELayerNormColumnParallelLinear,
                    core_attention=PackedTEAttention,
                    linear_proj=TERowParallelLinear,
                    q_layernorm=norm(attention.q_layernorm),
                    k_layernorm=norm(attention.k_layernorm),
                ),
            ),
            pre_mlp_layernorm=IdentityOp,
            mlp=replace(
                layer.mlp,
                submodules=replace(
                    feed_forward,
                    linear_fc1=TELayerNormColumnParallelLinear,
                    linear_fc2=TERowParallelLinear,
                ),
            ),
            # checkpoints have the names of separate norms: a run resumes with or without the engine
            sharded_state_dict_keys_map={fused: own for own, fused in FUSED_NORMS.items()},
        ),
    )
