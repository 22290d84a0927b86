"""Packed causal attention for Megatron's layers: sequences end to end, no token sees another
sequence.

Megatron's own DotProductAttention refuses packed sequences and stores the s x s scores. This one
calls the varlen kernel that `attention_kernel` names. A GPU without one pads neighbours of similar
length to [sequences, heads, longest, head_dim] and makes one causal SDPA call a block, which is
exact: padding comes last, so no real token attends to it. A CPU, where a call costs little and
copies much, makes a call a sequence.

Shape suffixes: T packed tokens, H query heads of this rank, K key-value heads of this rank, D head
dimension, S sequences, L tokens of the longest sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from rlef_mega.megatron.network.accelerations import attention_kernel, varlen_options
from rlef_mega.megatron.network.rotary import Rotation

# Sequences share a padded block while they are at least this fraction of its longest. SDPA's work
# grows with the square of the padded length: at 0.75 at most 44% of it is lost, and a micro-batch
# of sorted lengths makes a handful of calls.
BLOCK_FRACTION = 0.75


@dataclass(frozen=True)
class PaddedBlock:
    """Neighbouring sequences of similar length: tokens start:end, and their rows in [S * L]."""

    start: int
    end: int
    sequences: int
    longest: int
    rows_T: torch.Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a packed micro-batch; the lengths on the host, the positions'
    rotation, and the padded layout if attention pads.
    """

    lengths: tuple[int, ...] = ()
    rotation: Rotation | None = None
    blocks: tuple[PaddedBlock, ...] = ()


def packed_sequences(
    lengths: list[int], device: torch.device, dtype: torch.dtype
) -> PackedSequences:
    """The description of sequences of these lengths, end to end, for a model of this dtype."""
    ends_S = torch.tensor(lengths).cumsum(0)
    starts_S = ends_S - torch.tensor(lengths)
    positions_T = torch.arange(sum(lengths)) - starts_S.repeat_interleave(torch.tensor(lengths))
    on_device = torch.nn.functional.pad(ends_S, (1, 0)).int().to(device, non_blocking=True)
    pads = device.type == "cuda" and attention_kernel(device.type, dtype) == "sdpa"
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=tuple(lengths),
        rotation=Rotation(positions_T.to(device, non_blocking=True)),
        blocks=tuple(padded_blocks(lengths, device)) if pads else (),
    )


def padded_blocks(lengths: list[int], device: torch.device) -> Iterator[PaddedBlock]:
    """Cut the sequences, in order, into blocks of similar length."""
    first = start = 0
    while first < len(lengths):
        longest, last = lengths[first], first
        while last < len(lengths) and BLOCK_FRACTION * longest <= lengths[last] <= longest:
            last += 1
        lengths_S = torch.tensor(lengths[first:last])
        starts_S = lengths_S.cumsum(0) - lengths_S
        tokens = int(lengths_S.sum())
        skipped_S = torch.arange(last - first) * longest - starts_S
        rows_T = torch.arange(tokens) + skipped_S.repeat_interleave(lengths_S)
        yield PaddedBlock(start, start + tokens, last - first, longest, rows_T.to(device))
        first, start = last, start + tokens


def rotated(
    query_THD: torch.Tensor,
    key_TKD: torch.Tensor,
    packed: PackedSequences,
    frequencies_E: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with their positions."""
    assert packed.rotation is not None and frequencies_E is not None
    return packed.rotation(query_THD, frequencies_E), packed.rotation(key_TKD, frequencies_E)


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
        self.frequencies_E: torch.Tensor | None = None  # the model's, given once it is built

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
        query, key = rotated(query, key, packed_seq_params, self.frequencies_E)
        kernel = attention_kernel(query.device.type, query.dtype)
        if kernel == "flash-attn":
            output_THD = self.flash_attention(query, key, value, packed_seq_params)
        elif kernel == "torch-varlen":
            output_THD = self.torch_varlen(query, key, value, packed_seq_params)
        elif query.device.type == "cuda":
            output_THD = self.padded_attention(query, key, value, packed_seq_params)
        else:
            output_THD = self.attention_by_sequence(query, key, value, packed_seq_params)
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

        options = varlen_options(varlen_attn)
        if "enable_gqa" not in options:
            group = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        if self.scale is not None:  # PyTorch 2.10 knows its own default only
            options["scale"] = self.scale
        output_THD = varlen_attn(
            query,
            key,
            value,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            **options,
        )
        assert isinstance(output_THD, torch.Tensor)  # a pair only where more is asked for
        return output_THD

    def padded_attention(self, query, key, value, packed: PackedSequences) -> torch.Tensor:
        outputs = []
        for block in packed.blocks:

            def pad(packed_THD: torch.Tensor, block: PaddedBlock = block) -> torch.Tensor:
                shape = (block.sequences * block.longest, *packed_THD.shape[1:])
                part_THD = packed_THD[block.start : block.end]
                padded = packed_THD.new_zeros(shape).index_copy(0, block.rows_T, part_THD)
                return padded.unflatten(0, (block.sequences, block.longest)).transpose(1, 2)

            output_SHLD = torch.nn.functional.scaled_dot_product_attention(
                pad(query), pad(key), pad(value), is_causal=True, scale=self.scale, enable_gqa=True
            )
            outputs.append(output_SHLD.transpose(1, 2).flatten(0, 1)[block.rows_T])
        return torch.cat(outputs)

    def attention_by_sequence(self, query, key, value, packed: PackedSequences) -> torch.Tensor:
        lengths = list(packed.lengths)
        parts = (tensor.transpose(0, 1).split(lengths, 1) for tensor in (query, key, value))
        outputs = [
            torch.nn.functional.scaled_dot_product_attention(
                q_HSD[None],
                k_KSD[None],
                v_KSD[None],
                is_causal=True,
                scale=self.scale,
                enable_gqa=True,
            )
            for q_HSD, k_KSD, v_KSD in zip(*parts, strict=True)
        ]
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)
