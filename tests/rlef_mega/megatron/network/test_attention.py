"""Packed attention with one SDPA call per sequence, as on CPUs."""

import torch

from rlef_mega.megatron.network.attention import attention_by_sequence, packed_sequences


def test_packed_attention_is_dense_attention_with_a_block_mask() -> None:
    lengths = [9, 8, 3, 5, 1]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(26, 4, 8, generator=generator)
    key, value = (torch.randn(26, 2, 8, generator=generator) for _ in range(2))
    packed = packed_sequences(lengths, torch.device("cpu"))
    output = attention_by_sequence(query, key, value, packed)
    owner = torch.arange(5).repeat_interleave(torch.tensor(lengths))
    allowed = (owner[:, None] == owner) & torch.ones(26, 26).tril().bool()
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (query, key, value)), attn_mask=allowed, enable_gqa=True
    )
    torch.testing.assert_close(output, dense[0].transpose(0, 1), rtol=0, atol=1e-6)
