"""`linear_score` in Triton against float64 truth, fused and with cuBLAS."""

from dataclasses import replace

import pytest
import torch

from rlef_kernels.gpu.linear_logprob import linear_logprob_kernels
from rlef_kernels.gpu.linear_score import linear_score_kernels
from rlef_kernels.gpu.plan import CUBLAS, FUSED
from tests.kernels import score_inputs

PLANS = {"fused": FUSED, "cublas": CUBLAS}


def make_inputs(device, *sizes, dtype=torch.bfloat16):
    return score_inputs.make_inputs(*sizes, device, dtype, scale=0.3)


@pytest.mark.parametrize("way", PLANS)
@pytest.mark.parametrize(
    ("tokens", "width", "ref_width", "vocabulary", "temperature"),
    [(1, 8, 8, 30, 1.0), (70, 72, 40, 1000, 1.0), (128, 64, 64, 256, 0.6), (9, 24, 16, 1025, 1.3)],
)
def test_agrees_with_float64_truth(device, way, tokens, width, ref_width, vocabulary, temperature):
    inputs = make_inputs(device, tokens, width, ref_width, vocabulary)
    found = linear_score_kernels(*inputs, temperature=temperature, plan=PLANS[way])
    for values, expected in zip(found, score_inputs.truth(*inputs, temperature), strict=True):
        assert values.dtype == torch.float32
        assert (values.double() - expected).abs().max() < 1e-4


@pytest.mark.parametrize("way", PLANS)
def test_log_probs_and_entropy_are_those_of_linear_logprob(device, way):
    hidden, weight, ref_hidden, ref_weight, target = make_inputs(device, 70, 40, 24, 600)
    inputs = (hidden, weight, ref_hidden, ref_weight, target)
    found = linear_score_kernels(*inputs, temperature=0.7, plan=PLANS[way])
    options = {"temperature": 0.7, "plan": PLANS[way]}
    logprob, entropy = linear_logprob_kernels(hidden, weight, target, **options)
    ref_logprob, _ = linear_logprob_kernels(ref_hidden, ref_weight, target, **options)
    for values, expected in zip(found[:3], (logprob, ref_logprob, entropy), strict=True):
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", PLANS)
def test_blocks_do_not_change_the_result(device, way):
    inputs = make_inputs(device, 140, 16, 16, 300)
    small = replace(PLANS[way], partials_bytes=1, logits_bytes=1)
    whole, parts = (linear_score_kernels(*inputs, plan=plan) for plan in (PLANS[way], small))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", PLANS)
def test_a_model_has_no_divergence_from_itself(device, way):
    hidden, weight, *_, target = make_inputs(device, 20, 16, 16, 300)
    found = linear_score_kernels(hidden, weight, hidden, weight, target, plan=PLANS[way])
    assert found.kl_T.abs().max() < 1e-5
    assert torch.equal(found.logprob_T, found.ref_logprob_T)


@pytest.mark.parametrize("way", PLANS)
def test_extreme_logits_stay_finite(device, way):
    hidden = torch.zeros(2, 8, device=device, dtype=torch.bfloat16)
    hidden[:, 0] = torch.tensor([1.0, -1.0])
    weight = torch.zeros(3, 8, device=device, dtype=torch.bfloat16)
    weight[:, 0] = torch.tensor([1e4, -1e4, 0.0])
    target = torch.zeros(2, dtype=torch.int64, device=device)
    found = linear_score_kernels(hidden, weight, -hidden, weight, target, plan=PLANS[way])
    for values, expected in zip(
        found, ([0.0, -2e4], [-2e4, 0.0], [0.0, 0.0], [2e4, 2e4]), strict=True
    ):
        torch.testing.assert_close(values, values.new_tensor(expected), rtol=2e-3, atol=0)


def test_fp32_widths_may_be_odd_and_the_result_is_bitwise_repeatable(device):
    inputs = make_inputs(device, 30, 17, 9, 200, dtype=torch.float32)
    one, other = (linear_score_kernels(*inputs) for _ in range(2))
    for values, again, expected in zip(one, other, score_inputs.truth(*inputs), strict=True):
        assert torch.equal(values, again)
        assert (values.double() - expected).abs().max() < 1e-4


def test_no_tokens_give_empty_outputs(device):
    found = linear_score_kernels(*make_inputs(device, 0, 8, 8, 20))
    assert [values.shape for values in found] == [(0,)] * 4
