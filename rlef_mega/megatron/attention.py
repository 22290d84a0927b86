"""Packed causal attention for Megatron's layers: sequences end to end, no token sees another sequence.

Megatron's own DotProductAttention refuses packed sequences and stores the s x s scores. This one calls the varlen
kernel that `parallel.attention_kernel` names; without a GPU it pads to [sequences, heads, longest, head_dim] and makes one
causal SDPA call, which is exact: padding comes last, so no real token attends to it.

Shape suffixes: T packed tokens, H query heads of this rank, K key-value heads of this rank, D head dimension, S sequences,
L tokens of the longest sequence.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from rlef_mega.megatron.parallel import attention_kernel


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed micro-batch, and where each token lies in the padded layout."""

    padded_rows_T: torch.Tensor | None = None  # into S * L; only where attention is padded


def packed_sequences(
    lengths: list[int], device: torch.device, dtype: torch.dtype
) -> PackedSequences:
    """The description of sequences of these lengths, end to end, for a model of this dtype."""
    longest = max(lengths)
    lengths_S = torch.tensor(lengths)
    cu_seqlens = F.pad(lengths_S.cumsum(0), (1, 0)).int()
    padded_rows_T = None
    if attention_kernel(device.type, dtype) == "sdpa":
        skipped_S = torch.arange(len(lengths)) * longest - cu_seqlens[:-1]
        padded_rows_T = torch.arange(int(cu_seqlens[-1])) + skipped_S.repeat_interleave(lengths_S)
        padded_rows_T = padded_rows_T.to(device)
    on_device = cu_seqlens.to(device, non_blocking=True)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        # RoPE reads these, and reads them on the host: a device tensor would stall the GPU twice a layer
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        padded_rows_T=padded_rows_T,
    )


class PackedAttention(MegatronModule):
    """The `core_attention` of our layers; the constructor's arguments are Megatron's."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: object,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        """[T, H, D], [T, K, D], [T, K, D] to [T, H * D]."""
        assert packed_seq_params is not None, "our batches are always packed"
        kernel = attention_kernel(query.device.type, query.dtype)
        if kernel == "flash-attn":
            output_THD = self.flash_attention(query, key, value, packed_seq_params)
        elif kernel == "torch-varlen":
            output_THD = self.torch_varlen(query, key, value, packed_seq_params)
        else:
            output_THD = self.padded_attention(query, key, value, packed_seq_params)
        return output_THD.flatten(1)

    def flash_attention(self, query, key, value, packed: PackedSequences) -> torch.Tensor:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            query,
            key,
            value,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            softmax_scale=self.scale,
            causal=True,
        )

    def torch_varlen(self, query, key, value, packed: PackedSequences) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(
            query,
            key,
            value,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.scale,
            window_size=(-1, 0),  # causal
            enable_gqa=True,
        )

    def padded_attention(self, query, key, value, packed: PackedSequences) -> torch.Tensor:
        rows_T, longest = packed.padded_rows_T, packed.max_seqlen_q
        sequences = packed.cu_seqlens_q.numel() - 1

        def pad(packed_THD: torch.Tensor) -> torch.Tensor:
            padded = packed_THD.new_zeros(sequences * longest, *packed_THD.shape[1:])
            padded = padded.index_copy(0, rows_T, packed_THD)
            return padded.unflatten(0, (sequences, longest)).transpose(1, 2)  # [S, H, L, D]

        output_SHLD = F.scaled_dot_product_attention(
            pad(query), pad(key), pad(value), is_causal=True, scale=self.scale, enable_gqa=True
        )
        return output_SHLD.transpose(1, 2).flatten(0, 1)[rows_T]
