"""`linear_kl` in Triton against float64 truth, fused and with cuBLAS."""

from dataclasses import replace

import pytest
import torch

from rlef_kernels.gpu.linear_kl import linear_kl_kernels
from rlef_kernels.gpu.plan import CUBLAS, FUSED

PLANS = {"fused": FUSED, "cublas": CUBLAS}


def make_inputs(device, tokens, width, ref_width, vocabulary, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, width), (vocabulary, width), (tokens, ref_width), (vocabulary, ref_width))
    hidden, weight, ref_hidden, ref_weight = (
        (torch.randn(shape, generator=generator) * (0.3 if i % 2 else 1)).to(device, dtype)
        for i, shape in enumerate(shapes)
    )
    return hidden.requires_grad_(), weight.requires_grad_(), ref_hidden, ref_weight


def gradients(kl, inputs):
    ramp = torch.linspace(-1, 2, len(kl), dtype=kl.dtype, device=kl.device)
    return torch.autograd.grad((kl * ramp).sum(), inputs)


def truth(hidden, weight, ref_hidden, ref_weight, temperature=1.0):
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    logprobs = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    ref = torch.log_softmax(ref_hidden.double() @ ref_weight.double().t() / temperature, dim=-1)
    kl = torch.nn.functional.kl_div(ref, logprobs, reduction="none", log_target=True).sum(-1)
    return kl.detach(), gradients(kl, (hidden, weight))


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("way", PLANS)
@pytest.mark.parametrize(
    ("tokens", "width", "ref_width", "vocabulary", "temperature"),
    [(1, 8, 8, 30, 1.0), (70, 72, 40, 1000, 1.0), (128, 64, 64, 256, 0.6), (9, 24, 16, 1025, 1.3)],
)
def test_agrees_with_float64_truth(device, way, tokens, width, ref_width, vocabulary, temperature):
    inputs = make_inputs(device, tokens, width, ref_width, vocabulary)
    kl = linear_kl_kernels(*inputs, temperature=temperature, plan=PLANS[way])
    expected, expected_grads = truth(*inputs, temperature)
    assert kl.dtype == torch.float32
    assert (kl.double() - expected).abs().max() < 1e-4
    for found, value in zip(gradients(kl, inputs[:2]), expected_grads, strict=True):
        # a single token's rounding errors, up to 2e-3 each in bf16, do not average out
        assert error(found, value) < (3e-3 if tokens > 1 else 6e-3)


@pytest.mark.parametrize("way", PLANS)
def test_blocks_do_not_change_the_result(device, way):
    inputs = make_inputs(device, 140, 16, 16, 300)
    small = replace(
        PLANS[way],
        partials_bytes=1,
        logits_bytes=1,
        gradient_bytes=2 * 64 * 256,
        gradient_tokens=64,
    )
    whole, parts = (linear_kl_kernels(*inputs, plan=plan) for plan in (PLANS[way], small))
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)
    both = (gradients(kl, inputs[:2]) for kl in (whole, parts))
    for one, other in zip(*both, strict=True):
        assert error(other, one.double()) < 3e-3


@pytest.mark.parametrize("way", PLANS)
def test_a_model_has_no_divergence_from_itself(device, way):
    hidden, weight, *_ = make_inputs(device, 20, 16, 16, 300)
    kl = linear_kl_kernels(hidden, weight, hidden.detach(), weight.detach(), plan=PLANS[way])
    assert kl.abs().max() < 1e-5
    grad_hidden, _ = gradients(kl, (hidden, weight))
    assert grad_hidden.abs().max() < 1e-5  # a minimum


@pytest.mark.parametrize("way", PLANS)
def test_extreme_logits_stay_finite(device, way):
    hidden = torch.zeros(2, 8, device=device, dtype=torch.bfloat16)
    hidden[:, 0] = torch.tensor([1.0, -1.0])
    weight = torch.zeros(3, 8, device=device, dtype=torch.bfloat16)
    weight[:, 0] = torch.tensor([1e4, -1e4, 0.0])
    kl = linear_kl_kernels(hidden, weight, -hidden, weight, plan=PLANS[way])
    torch.testing.assert_close(kl, torch.full((2,), 2e4, device=device), rtol=2e-3, atol=0)


def test_tokens_without_a_gradient_change_nothing_and_fp32_widths_may_be_odd(device):
    inputs = make_inputs(device, 30, 17, 9, 200, torch.float32)
    used = torch.arange(30, device=device) % 3 == 0
    found = torch.autograd.grad((linear_kl_kernels(*inputs) * used).sum(), inputs[:2])
    few = [inputs[0].detach()[used].requires_grad_(), inputs[1], inputs[2][used], inputs[3]]
    expected = torch.autograd.grad(linear_kl_kernels(*few).sum(), few[:2])
    torch.testing.assert_close(found[0][used], expected[0])
    assert not found[0][~used].any()
    torch.testing.assert_close(found[1], expected[1])


def test_result_is_bitwise_repeatable(device):
    runs = []
    for _ in range(2):
        inputs = make_inputs(device, 70, 40, 24, 600)
        kl = linear_kl_kernels(*inputs)
        runs.append((kl, *gradients(kl, inputs[:2])))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_no_tokens_give_empty_outputs_and_zero_gradients(device):
    inputs = make_inputs(device, 0, 8, 8, 20)
    kl = linear_kl_kernels(*inputs)
    grads = gradients(kl, inputs[:2])
    assert kl.shape == (0,) and grads[0].shape == (0, 8) and not grads[1].any()
