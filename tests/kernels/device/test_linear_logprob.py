"""`linear_logprob` in Triton against float64 truth, fused and with cuBLAS."""

from dataclasses import replace

import pytest
import torch

from rlef_kernels.gpu.linear_logprob import linear_logprob_kernels
from rlef_kernels.gpu.plan import CUBLAS, FUSED, choose_plan

PLANS = {"fused": FUSED, "cublas": CUBLAS}


def truth(hidden, weight, target, temperature=1.0):
    """Compute (log-prob, entropy) and the `gradients` of their sum, in float64."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    logprobs_TV = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    outputs = logprobs_TV.gather(1, target[:, None])[:, 0], entropy_T
    return [tensor.detach() for tensor in outputs], gradients(outputs, (hidden, weight))


def make_inputs(device, tokens, width, vocabulary, dtype=torch.bfloat16, scale=0.3):
    generator = torch.Generator().manual_seed(tokens * 31 + vocabulary)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype)
    weight = (scale * torch.randn(vocabulary, width, generator=generator)).to(device, dtype)
    target = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    return hidden.requires_grad_(), weight.requires_grad_(), target


def gradients(outputs, inputs):
    """Differentiate with a different upstream gradient for each token and each output."""
    logprob, entropy = outputs
    ramp = torch.linspace(-1, 2, len(logprob), dtype=logprob.dtype, device=logprob.device)
    return torch.autograd.grad((logprob * ramp + 0.7 * entropy * ramp.flip(0)).sum(), inputs)


def error(found, expected):
    """Return the relative error in the Frobenius norm."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("way", PLANS)
@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary", "temperature"),
    [
        (1, 8, 5, 1.0),  # one token, less than a tile in every direction
        (70, 72, 1000, 1.0),  # ragged in all three
        (128, 64, 512, 0.6),  # whole tiles
        (33, 24, 257, 1.3),  # one column in the last tile
        (7, 16, 1, 1.0),  # a vocabulary of one: log-prob and entropy are 0
    ],
)
def test_agrees_with_float64_truth(device, way, tokens, width, vocabulary, temperature):
    hidden, weight, target = make_inputs(device, tokens, width, vocabulary)
    plan = PLANS[way]
    outputs = linear_logprob_kernels(hidden, weight, target, temperature=temperature, plan=plan)
    expected, expected_grads = truth(hidden, weight, target, temperature)
    for output, value in zip(outputs, expected, strict=True):
        assert output.dtype == torch.float32
        assert (output.double() - value).abs().max() < 1e-4
    if vocabulary == 1:
        return  # all gradients are 0
    for found, value in zip(gradients(outputs, (hidden, weight)), expected_grads, strict=True):
        assert found.dtype == torch.bfloat16
        # a single token's rounding errors, up to 2e-3 each in bf16, do not average out
        assert error(found, value) < (3e-3 if tokens > 1 else 6e-3)


@pytest.mark.parametrize("way", PLANS)
def test_error_is_no_worse_than_pytorch_in_bf16(device, way):
    hidden, weight, target = make_inputs(device, 64, 128, 700)
    outputs = linear_logprob_kernels(hidden, weight, target, plan=PLANS[way])
    expected, expected_grads = truth(hidden, weight, target)
    logprobs_TV = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
    naive = (
        logprobs_TV.gather(1, target[:, None])[:, 0],
        -(logprobs_TV.exp() * logprobs_TV).sum(-1),
    )
    for found, plain, value in zip(outputs, naive, expected, strict=True):
        assert error(found, value) < error(plain, value) / 10  # its logits are rounded to bf16
    for found, plain, value in zip(
        *(gradients(outs, (hidden, weight)) for outs in (outputs, naive)),
        expected_grads,
        strict=True,
    ):
        assert error(found, value) < 1.05 * error(plain, value)


@pytest.mark.parametrize("way", PLANS)
def test_blocks_do_not_change_the_result(device, way):
    """Small budgets: several chunks of tokens, and with cuBLAS several parts of the columns."""
    hidden, weight, target = make_inputs(device, 100, 40, 600)
    few = {"row_bytes": 2 * 32 * 1024, "logits_bytes": 4 * 64 * 256}
    small = replace(PLANS[way], partials_bytes=12 * 3 * 40, **few)
    whole, parts = (
        linear_logprob_kernels(hidden, weight, target, plan=plan) for plan in (PLANS[way], small)
    )
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    for one, other in zip(
        gradients(whole, (hidden, weight)), gradients(parts, (hidden, weight)), strict=True
    ):
        assert error(other, one) < 3e-3


@pytest.mark.parametrize("way", PLANS)
def test_extreme_logits_stay_finite_and_right(device, way):
    """+-1e4, and a neighbour 64 below (bf16 has no nearer one)."""
    weight = torch.zeros(4, 8, device=device, dtype=torch.bfloat16)
    weight[:, 0] = torch.tensor([1e4, -1e4, 9.92e3, 0.0])
    hidden = torch.zeros(4, 8, device=device, dtype=torch.bfloat16)
    hidden[:, 0] = torch.tensor([1.0, -1.0, 1.0, 0.0])
    hidden.requires_grad_(), weight.requires_grad_()
    target = torch.tensor([0, 1, 1, 3], device=device)
    outputs = linear_logprob_kernels(hidden, weight, target, plan=PLANS[way])
    expected, expected_grads = truth(hidden, weight, target)
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.double(), value, atol=1e-4, rtol=1e-6)
    for found, value in zip(gradients(outputs, (hidden, weight)), expected_grads, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), value.double(), atol=0.2, rtol=1e-2)


@pytest.mark.parametrize("way", PLANS)
def test_identical_logits_have_the_log_of_the_vocabulary_as_entropy(device, way):
    hidden = torch.ones(3, 8, device=device, dtype=torch.bfloat16)
    weight = torch.full((300, 8), 1250.0, device=device, dtype=torch.bfloat16)
    target = torch.tensor([0, 255, 299], device=device)
    logprob, entropy = linear_logprob_kernels(hidden, weight, target, plan=PLANS[way])
    expected = torch.full((3,), 300.0, device=device).log()
    torch.testing.assert_close(entropy, expected)
    torch.testing.assert_close(logprob, -expected)


@pytest.mark.parametrize("way", PLANS)
def test_result_is_bitwise_repeatable(device, way):
    runs = []
    for _ in range(2):
        hidden, weight, target = make_inputs(device, 70, 72, 600)
        outputs = linear_logprob_kernels(hidden, weight, target, plan=PLANS[way])
        runs.append((*outputs, *gradients(outputs, (hidden, weight))))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("way", PLANS)
def test_nan_is_not_hidden(device, way):
    hidden, weight, target = make_inputs(device, 5, 8, 300)
    hidden.data[2, 3] = torch.nan
    outputs = linear_logprob_kernels(hidden, weight, target, plan=PLANS[way])
    for output in outputs:
        assert output.isnan().nonzero().tolist() == [[2]]
    grad, _ = gradients(outputs, (hidden, weight))
    assert grad[2].isnan().all() and grad[:2].isfinite().all()


def test_tokens_without_a_gradient_change_nothing(device):
    hidden, weight, target = make_inputs(device, 60, 24, 300)
    logprob, _ = linear_logprob_kernels(hidden, weight, target)
    used = torch.arange(60, device=device) % 3 == 0
    found = torch.autograd.grad((logprob * used).sum(), (hidden, weight))
    few = hidden.detach()[used].requires_grad_()
    logprob, _ = linear_logprob_kernels(few, weight, target[used])
    expected = torch.autograd.grad(logprob.sum(), (few, weight))
    assert torch.equal(found[0][used], expected[0]) and not found[0][~used].any()
    assert torch.equal(found[1], expected[1])


def test_no_tokens_give_empty_outputs_and_zero_gradients(device):
    hidden, weight, target = make_inputs(device, 0, 8, 20)
    logprob, entropy = linear_logprob_kernels(hidden, weight, target)
    grads = torch.autograd.grad(logprob.sum() + entropy.sum(), (hidden, weight))
    assert grads[0].shape == (0, 8) and not grads[1].any()


def test_gradient_is_added_to_fp32_main_grad(device):
    hidden, weight, target = make_inputs(device, 40, 16, 300)
    logprob, _ = linear_logprob_kernels(hidden, weight, target)
    (expected,) = torch.autograd.grad(logprob.sum(), weight)
    weight.main_grad = torch.ones(weight.shape, device=device)
    weight.grad_added_to_main_grad = False
    linear_logprob_kernels(hidden, weight, target, accumulate_main_grad=True)[0].sum().backward()
    assert error(weight.main_grad - 1, expected) < 3e-3
    assert weight.grad_added_to_main_grad and not weight.grad.any()


@pytest.mark.parametrize("width", [17, 32])
def test_fp32_inputs_and_odd_widths_use_cublas(device, width):
    hidden, weight, target = make_inputs(device, 20, width, 90, torch.float32)
    assert not choose_plan(hidden, weight).fused
    outputs = linear_logprob_kernels(hidden, weight, target)
    expected, expected_grads = truth(hidden, weight, target)
    for found, value in zip(
        (*outputs, *gradients(outputs, (hidden, weight))),
        (*expected, *expected_grads),
        strict=True,
    ):
        torch.testing.assert_close(found.double(), value.double(), atol=2e-5, rtol=1e-4)


def test_bf16_rows_without_16_byte_alignment_use_cublas(device):
    """17 columns: rows of 34 bytes."""
    hidden, weight, target = make_inputs(device, 40, 17, 300)
    assert not choose_plan(hidden, weight).fused
    outputs = linear_logprob_kernels(hidden, weight, target)
    expected, expected_grads = truth(hidden, weight, target)
    for output, value in zip(outputs, expected, strict=True):
        assert (output.double() - value).abs().max() < 1e-4
    for found, value in zip(gradients(outputs, (hidden, weight)), expected_grads, strict=True):
        assert error(found, value) < 3e-3
