"""The two forms of packed attention that are PyTorch's SDPA: padded blocks, which GPUs without a
varlen kernel use, and a call a sequence, which CPUs use."""

import dataclasses

import torch

from rlef_mega.megatron.network.attention import PackedAttention, packed_sequences, padded_blocks

CPU = torch.device("cpu")


def test_padded_blocks_and_a_call_a_sequence_give_the_same_attention():
    lengths = [40, 39, 31, 12, 3, 1]
    torch.manual_seed(0)
    # 4 query heads, 2 key-value heads of dimension 8
    inputs = [torch.randn(sum(lengths), heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    upstream_THD = torch.randn(sum(lengths), 4, 8)
    attention = PackedAttention.__new__(PackedAttention)
    torch.nn.Module.__init__(attention)
    attention.scale = None
    packed = packed_sequences(lengths, CPU, torch.float32)
    assert packed.blocks == ()  # a CPU has no use for them
    packed = dataclasses.replace(packed, blocks=tuple(padded_blocks(lengths, CPU)))
    assert 1 < len(packed.blocks) < len(lengths)
    found = []
    for form in (attention.padded_attention, attention.attention_by_sequence):
        output_THD = form(*inputs, packed)
        assert output_THD.shape == upstream_THD.shape
        found.append((output_THD, *torch.autograd.grad(output_THD, inputs, upstream_THD)))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)
    # no token sees a later one or another sequence's
    (gradient_THD,) = torch.autograd.grad(
        attention.attention_by_sequence(*inputs, packed)[50].sum(), inputs[2]
    )
    seen = gradient_THD.abs().sum((1, 2)).nonzero().squeeze(1).tolist()
    assert seen == list(range(40, 51))
