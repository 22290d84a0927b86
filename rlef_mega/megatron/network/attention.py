"""Packed causal attention for Megatron's layers: sequences end to end, no token sees another
sequence.

Megatron's own DotProductAttention refuses packed sequences and stores the s x s scores. This one
calls the varlen kernel that `attention_kernel` names or, if that names none (always on a CPU and in
fp32), PyTorch's SDPA once per sequence.

Shape suffixes: T packed tokens, H query heads of this rank, K key-value heads of this rank, D head
dimension, E half of it, S sequences.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from rlef_mega.megatron.network.accelerations import FLASH_ATTN, TORCH_VARLEN, attention_kernel
from rlef_mega.megatron.network.rotary import Rotation


@dataclass(kw_only=True)
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed micro-batch, with the lengths on the host and the rotation
    of positions.
    """

    lengths: list[int]
    rotation: Rotation

    @property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Return the arguments of varlen kernels: cu_seqlens of queries and of keys, and the length
        of the longest sequence, of queries and of keys."""
        starts, longest = self.cu_seqlens_q, max(self.lengths)
        assert starts is not None
        return starts, starts, longest, longest


def packed_sequences(lengths: list[int], device: torch.device) -> PackedSequences:
    """Describe sequences of these lengths, end to end."""
    cu_seqlens = to_device(torch.tensor([0, *lengths]).cumsum(0).int(), device)
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
        rotation=Rotation(to_device(positions_T, device)),
    )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to the device without waiting for it. From pageable memory, CUDA would wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class PackedAttention(MegatronModule):
    """Attention within each sequence of a packed batch. Megatron makes one for each layer, as its
    `core_attention`, with more arguments than it needs."""

    def __init__(self, config: TransformerConfig, **unused: object) -> None:
        super().__init__(config=config)
        self.frequencies_E = torch.empty(0)  # the model's, given once it is built

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *unused: object,
        packed_seq_params: PackedSequences,
        **options: object,
    ) -> torch.Tensor:
        """Attend from [T, H, D] to [T, K, D]. Returns [T, H * D]."""
        query, key = (packed_seq_params.rotation(x, self.frequencies_E) for x in (query, key))
        # a view would keep all of the packed queries, keys and values for the backward pass
        value = value.contiguous()
        kernel = attention_kernel(query.device.type, query.dtype)
        if kernel == FLASH_ATTN:
            output_THD = flash_attention(query, key, value, packed_seq_params)
        elif kernel == TORCH_VARLEN:
            output_THD = torch_varlen(query, key, value, packed_seq_params)
        else:
            output_THD = attention_by_sequence(query, key, value, packed_seq_params)
        return output_THD.flatten(1)


def flash_attention(query, key, value, packed: PackedSequences) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(query, key, value, *packed.bounds, causal=True)


def torch_varlen(query, key, value, packed: PackedSequences) -> torch.Tensor:
    """Call PyTorch's kernel by its signature: 2.10 has no grouped heads, 2.11 takes them as they
    are, and from 2.12 on they are an option."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    if "window_size" in known:
        options["window_size"] = (-1, 0)  # causal
    else:
        options["is_causal"] = True
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    output_THD = varlen_attn(query, key, value, *packed.bounds, **options)
    assert isinstance(output_THD, torch.Tensor)  # a tuple only with `return_aux`
    return output_THD


def attention_by_sequence(query, key, value, packed: PackedSequences) -> torch.Tensor:
    parts = (tensor.transpose(0, 1).split(packed.lengths, 1) for tensor in (query, key, value))
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            q_HTD[None], k_KTD[None], v_KTD[None], is_causal=True, enable_gqa=True
        )
        for q_HTD, k_KTD, v_KTD in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)
