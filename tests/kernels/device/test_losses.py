"""The losses in Triton against the PyTorch forms that define them: values, gradients, metrics."""

import pytest
import torch

from rlef_kernels import clipped_value_loss_reference, ppo_policy_loss_reference
from rlef_kernels.gpu.clipped_value_loss import clipped_value_loss_kernels
from rlef_kernels.gpu.ppo_policy_loss import ppo_policy_loss_kernels


def policy_problem(device, tokens):
    generator = torch.Generator().manual_seed(tokens)
    logprobs = -torch.rand(tokens, generator=generator)
    noise = [0.3 * torch.randn(tokens, generator=generator) for _ in range(2)]
    tensors = logprobs, logprobs + noise[0], logprobs + noise[1]
    advantages = torch.randn(tokens, generator=generator)
    mask = torch.rand(tokens, generator=generator) < 0.7
    entropy = torch.rand(tokens, generator=generator)
    return [tensor.to(device) for tensor in (*tensors, advantages, mask, entropy)]


def value_problem(device, values):
    generator = torch.Generator().manual_seed(values)
    tensors = [torch.randn(values, generator=generator) for _ in range(3)]
    tensors.append(torch.rand(values, generator=generator) < 0.7)
    return [tensor.to(device) for tensor in tensors]


def check(found, expected, inputs):
    """(loss, metrics) and the gradient of 3 times the loss."""
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=1e-5)
    assert list(found[1]) == list(expected[1])
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=1e-5, msg=name)
    grads = [torch.autograd.grad(3 * loss, inputs)[0] for loss, _ in (found, expected)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("denominator", [None, 900.0, torch.tensor(900.0)])
@pytest.mark.parametrize("tokens", [0, 1, 1000, 2500])
def test_policy_loss_agrees_with_its_definition(device, tokens, denominator):
    *inputs, mask, entropy = policy_problem(device, tokens)
    inputs[0].requires_grad_()
    if isinstance(denominator, torch.Tensor):
        denominator = denominator.to(device)
    options = {"clip_eps": 0.2, "mask_T": mask, "entropy_T": entropy, "denominator": denominator}
    found = ppo_policy_loss_kernels(*inputs, **options)
    check(found, ppo_policy_loss_reference(*inputs, **options), inputs[0])
    found = ppo_policy_loss_kernels(*inputs, clip_eps=0.2)
    check(found, ppo_policy_loss_reference(*inputs, clip_eps=0.2), inputs[0])


def test_small_steps_have_an_exact_kl(device):
    """exp(x) - 1 - x in fp32 loses all digits for x = 1e-4; k3 is x^2 / 2 there."""
    logprobs = torch.zeros(100, device=device)
    old = torch.full((100,), 1e-4, device=device)
    _, metrics = ppo_policy_loss_kernels(logprobs, old, old, logprobs, clip_eps=0.2)
    torch.testing.assert_close(metrics["approx_kl"].item(), 5e-9, rtol=1e-3, atol=0)


def test_masked_tokens_do_not_exist_even_when_they_are_nan(device):
    *inputs, mask, entropy = policy_problem(device, 300)
    poisoned = [tensor.masked_fill(~mask, torch.nan) for tensor in (*inputs, entropy)]
    poisoned[0].requires_grad_()
    kept = [tensor[mask] for tensor in inputs]
    kept[0].requires_grad_()
    loss, metrics = ppo_policy_loss_kernels(
        *poisoned[:4], clip_eps=0.2, mask_T=mask, entropy_T=poisoned[4]
    )
    expected, expected_metrics = ppo_policy_loss_kernels(
        *kept, clip_eps=0.2, entropy_T=entropy[mask]
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics, expected_metrics)
    (grad,) = torch.autograd.grad(loss, poisoned[0])
    torch.testing.assert_close(grad[mask], torch.autograd.grad(expected, kept[0])[0])
    assert not grad[~mask].any()


def test_all_masked_is_zero_with_zero_gradient(device):
    *inputs, mask, _ = policy_problem(device, 50)
    inputs[0].requires_grad_()
    loss, _ = ppo_policy_loss_kernels(*inputs, clip_eps=0.2, mask_T=torch.zeros_like(mask))
    assert loss == 0 and not torch.autograd.grad(loss, inputs[0])[0].any()


@pytest.mark.parametrize("denominator", [None, 50.0, torch.tensor(50)])
@pytest.mark.parametrize("values", [0, 1, 1500])
def test_value_loss_agrees_with_its_definition(device, values, denominator):
    *inputs, mask = value_problem(device, values)
    inputs[0].requires_grad_()
    if isinstance(denominator, torch.Tensor):
        denominator = denominator.to(device)
    options = {"clip_alpha": 0.2, "mask_N": mask, "denominator": denominator}
    found = clipped_value_loss_kernels(*inputs, **options)
    check(found, clipped_value_loss_reference(*inputs, **options), inputs[0])
    found = clipped_value_loss_kernels(*inputs, clip_alpha=0.2)
    check(found, clipped_value_loss_reference(*inputs, clip_alpha=0.2), inputs[0])


@pytest.mark.parametrize("place", range(4))
def test_nan_in_any_input_reaches_the_policy_loss(device, place):
    *inputs, _, _ = policy_problem(device, 30)
    inputs[place][7] = torch.nan
    loss, _ = ppo_policy_loss_kernels(*inputs, clip_eps=0.2)
    assert loss.isnan()


@pytest.mark.parametrize("place", range(3))
def test_nan_in_any_input_reaches_the_value_loss(device, place):
    *inputs, _ = value_problem(device, 30)
    inputs[place][7] = torch.nan
    loss, _ = clipped_value_loss_kernels(*inputs, clip_alpha=0.2)
    assert loss.isnan()


def test_losses_are_bitwise_repeatable(device):
    *inputs, mask, _ = policy_problem(device, 5000)
    first, second = (ppo_policy_loss_kernels(*inputs, clip_eps=0.2, mask_T=mask) for _ in range(2))
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
