"""`linear_ppo_loss` in Triton against the same loss in float64."""

from dataclasses import replace

import pytest
import torch

from rlef_kernels import linear_ppo_loss_reference
from rlef_kernels.gpu.linear_logprob import linear_logprob_kernels
from rlef_kernels.gpu.linear_ppo_loss import linear_ppo_loss_kernels
from rlef_kernels.gpu.plan import CUBLAS, FUSED

PLANS = {"fused": FUSED, "cublas": CUBLAS}


def make_inputs(device, tokens, width, vocabulary, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(tokens * 31 + vocabulary)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype)
    weight = (0.3 * torch.randn(vocabulary, width, generator=generator)).to(device, dtype)
    target = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    logprob = linear_logprob_kernels(hidden, weight, target, temperature=0.9)[0]
    noise = [0.3 * torch.randn(tokens, generator=generator).to(device) for _ in range(2)]
    advantages = torch.randn(tokens, generator=generator).to(device)
    policy = (logprob + noise[0], logprob + noise[1], advantages)
    return hidden.requires_grad_(), weight.requires_grad_(), target, policy


def truth(hidden, weight, target, policy, **options):
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    policy = tuple(tensor.double() for tensor in policy)
    values = linear_ppo_loss_reference(hidden, weight, target, policy, **options)
    return values.detach(), torch.autograd.grad(values[0], (hidden, weight))


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("way", PLANS)
@pytest.mark.parametrize("rows", [None, 40], ids=["one chunk", "several"])
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(70, 72, 1000), (128, 64, 512)])
def test_agrees_with_float64_truth(device, way, rows, tokens, width, vocabulary):
    hidden, weight, target, policy = make_inputs(device, tokens, width, vocabulary)
    plan = PLANS[way]
    if rows is not None:
        padded = -(-vocabulary // plan.tile_columns) * plan.tile_columns
        plan = replace(plan, row_bytes=rows * padded * 2)
    options = {"clip_eps": 0.2, "temperature": 0.9, "denominator": 100.0}
    weight.main_grad = torch.ones(weight.shape, device=device)
    values = linear_ppo_loss_kernels(
        hidden, weight, target, policy, accumulate_main_grad=True, plan=plan, **options
    )
    expected, (expected_hidden, expected_weight) = truth(hidden, weight, target, policy, **options)
    torch.testing.assert_close(values.detach().double(), expected, atol=1e-5, rtol=1e-4)
    (grad_hidden,) = torch.autograd.grad(values[0], hidden)
    assert error(grad_hidden, expected_hidden) < 3e-3
    assert error(weight.main_grad - 1, expected_weight) < 3e-3


@pytest.mark.parametrize("way", PLANS)
@pytest.mark.parametrize("rows", [None, 30], ids=["one chunk", "several"])
def test_without_main_grad_the_gradient_is_returned(device, way, rows):
    hidden, weight, target, policy = make_inputs(device, 70, 40, 600)
    plan = PLANS[way] if rows is None else replace(PLANS[way], row_bytes=rows * 1024 * 2)
    options = {"clip_eps": 0.2, "temperature": 0.9}
    values = linear_ppo_loss_kernels(hidden, weight, target, policy, plan=plan, **options)
    expected, expected_grads = truth(hidden, weight, target, policy, **options)
    torch.testing.assert_close(values.detach().double(), expected, atol=1e-5, rtol=1e-4)
    grads = torch.autograd.grad(2 * values[0], (hidden, weight))
    for found, value in zip(grads, expected_grads, strict=True):
        assert found.dtype == torch.bfloat16
        assert error(found, 2 * value) < 3e-3


@pytest.mark.parametrize("way", PLANS)
def test_a_confident_policy_has_correct_gradients(device, way):
    """Logits so large that storing one in bf16 has an error of 0.1 or more."""
    hidden, weight, target, policy = make_inputs(device, 60, 64, 700)
    hidden = (6 * hidden.detach()).requires_grad_()
    logprob = linear_logprob_kernels(hidden, weight, target)[0].detach()
    policy = (logprob + 0.1, logprob, policy[2])
    values = linear_ppo_loss_kernels(hidden, weight, target, policy, clip_eps=0.2, plan=PLANS[way])
    expected, expected_grads = truth(hidden, weight, target, policy, clip_eps=0.2)
    torch.testing.assert_close(values.detach().double(), expected, atol=1e-4, rtol=1e-4)
    grads = torch.autograd.grad(values[0], (hidden, weight))
    for found, value in zip(grads, expected_grads, strict=True):
        assert error(found, value) < 3e-3


def test_result_is_bitwise_repeatable(device):
    runs = []
    for _ in range(2):
        hidden, weight, target, policy = make_inputs(device, 70, 40, 600)
        values = linear_ppo_loss_kernels(hidden, weight, target, policy, clip_eps=0.2)
        runs.append((values, *torch.autograd.grad(values[0], (hidden, weight))))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_no_tokens_and_no_gradients(device):
    hidden, weight, target, policy = make_inputs(device, 0, 8, 20)
    values = linear_ppo_loss_kernels(hidden, weight, target, policy, clip_eps=0.2)
    grads = torch.autograd.grad(values[0], (hidden, weight))
    assert not values.any() and grads[0].shape == (0, 8) and not grads[1].any()
    hidden, weight, target, policy = make_inputs(device, 9, 8, 20)
    with torch.no_grad():
        values = linear_ppo_loss_kernels(hidden, weight, target, policy, clip_eps=0.2)
    expected, _ = truth(hidden, weight, target, policy, clip_eps=0.2)
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=1e-4)
