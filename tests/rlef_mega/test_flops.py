"""The count of FLOPs against others' published figures, and by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from rlef_mega.flops import (
    LLAMA_31_8B,
    LLAMA_31_70B,
    LLAMA_31_405B,
    LlamaShape,
    forward_flops,
    recomputed_flops,
    training_flops,
)

SMALL = LlamaShape(
    layers=2, hidden=48, ffn=64, heads=6, key_value_heads=2, head_dim=8, vocabulary=96
)


def config(shape: LlamaShape) -> LlamaConfig:
    return LlamaConfig(**shape.hf_settings())


@pytest.mark.parametrize(
    ("shape", "tokens_per_s", "teraflops"),
    [
        # Megatron-Bridge, performance summary, container 25.09, DGX-GB200, sequences of 8,192;
        # docs.nvidia.com/nemo/megatron-bridge/latest/performance-summary.html
        (LLAMA_31_8B, 31357, 1614),
        (LLAMA_31_70B, 3986, 1791),
        # the same page, container 26.02, DGX-GB300
        (LLAMA_31_70B, 7002, 3147),
    ],
)
def test_flops_per_token_are_those_that_nvidia_publishes(shape, tokens_per_s, teraflops):
    per_token = training_flops(shape, [8192]) / 8192
    assert per_token * tokens_per_s / 1e12 == pytest.approx(teraflops, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "tokens_per_s", "teraflops"),
    [
        # NeMo, performance summary, containers 24.12 (DGX-H100) and 25.07 (DGX-GB200), sequences of
        # 8,192; docs.nvidia.com/nemo-framework/user-guide
        (LLAMA_31_8B, 12273, 711),
        (LLAMA_31_70B, 1524, 734),
        (LLAMA_31_405B, 706, 1854),
    ],
)
def test_with_the_whole_square_of_attention_they_are_those_of_older_tables(
    shape, tokens_per_s, teraflops
):
    causal_half = 6 * shape.layers * shape.heads * shape.head_dim * 8192
    per_token = training_flops(shape, [8192]) / 8192 + causal_half
    assert per_token * tokens_per_s / 1e12 == pytest.approx(teraflops, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "billions"), [(LLAMA_31_8B, 8.03), (LLAMA_31_70B, 70.6), (LLAMA_31_405B, 405.9)]
)
def test_parameters_add_up_to_hugging_faces(shape, billions):
    with torch.device("meta"):
        model = LlamaForCausalLM(config(shape.with_layers(2)))
    assert sum(p.numel() for p in model.parameters()) == shape.with_layers(2).parameters
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=1e-3)  # as the model cards say


def test_flops_are_those_that_torch_counts_in_hugging_faces_model():
    """Eager attention computes the whole square, so the causal half is added."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(SMALL))
    model.config._attn_implementation = "eager"
    token_ids = torch.randint(SMALL.vocabulary, (3, 40))
    with FlopCounterMode(display=False) as counter:
        model(token_ids).logits.sum().backward()
    lengths = [40] * 3
    attention = SMALL.layers * SMALL.heads * SMALL.head_dim
    causal_half = 6 * attention * sum(s * s for s in lengths)
    expected = training_flops(SMALL, lengths) + causal_half
    # torch also counts RoPE's outer products of positions and frequencies
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


def test_sequences_count_one_by_one_and_the_head_where_it_reads():
    lengths, reads = [7, 30, 12], [2, 30, 0]
    assert LlamaShape.of(config(SMALL)) == SMALL
    assert training_flops(SMALL, lengths, sum(reads)) == sum(map(SMALL.flops, lengths, reads))
    assert training_flops(SMALL, lengths) == sum(map(SMALL.flops, lengths, lengths))
    without_head = training_flops(SMALL, lengths, 0)
    assert training_flops(SMALL, lengths, 10) - without_head == 6 * 10 * 96 * 48


def test_recomputation_is_counted_separately():
    lengths = [5, 9]
    assert recomputed_flops(SMALL, lengths, "none") == 0
    assert recomputed_flops(SMALL, lengths, "selective") == 2 * 14 * 2 * 3 * 48 * 64
    assert recomputed_flops(SMALL, lengths, "full") == forward_flops(SMALL, lengths, 0)
    with pytest.raises(ValueError, match="use none, selective or full"):
        recomputed_flops(SMALL, lengths, "some")
