"""The policy loss in Triton against the PyTorch form that defines it."""

import pytest
import torch

from rlef_kernels.gpu.ppo_policy_loss import policy_loss
from rlef_kernels.ppo_policy_loss import METRICS, policy_loss_reference


def make_inputs(device, tokens):
    """Return log-probs, entropies, and (old log-probs, behaviour log-probs, advantages)."""
    generator = torch.Generator().manual_seed(tokens)
    logprobs = -torch.rand(tokens, generator=generator)
    noise = [0.3 * torch.randn(tokens, generator=generator) for _ in range(2)]
    advantages = torch.randn(tokens, generator=generator)
    entropy = torch.rand(tokens, generator=generator)
    tensors = (logprobs, entropy, logprobs + noise[0], logprobs + noise[1], advantages)
    logprobs, entropy, *policy = (tensor.to(device) for tensor in tensors)
    return logprobs, entropy, tuple(policy)


@pytest.mark.parametrize("denominator", [900.0, torch.tensor(900)])
@pytest.mark.parametrize("tokens", [0, 1, 2500])
def test_agrees_with_its_definition(device, tokens, denominator):
    inputs = make_inputs(device, tokens)
    if isinstance(denominator, torch.Tensor):
        denominator = denominator.to(device)
    options = {"clip_eps": 0.2, "denominator": denominator}
    found, expected = policy_loss(*inputs, **options), policy_loss_reference(*inputs, **options)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_small_steps_have_an_exact_kl(device):
    """exp(x) - 1 - x in fp32 loses all digits for x = 1e-4; k3 is x^2 / 2 there."""
    logprobs = torch.zeros(100, device=device)
    policy = (logprobs + 1e-4, logprobs + 1e-4, logprobs)
    metrics, _ = policy_loss(logprobs, logprobs, policy, clip_eps=0.2, denominator=100)
    found = metrics[METRICS.index("approx_kl")].item()
    torch.testing.assert_close(found, 5e-9, rtol=1e-3, atol=0)


@pytest.mark.parametrize("poisoned", ["logprobs", "old", "behaviour", "advantages"])
def test_nan_in_any_input_reaches_the_loss(device, poisoned):
    logprobs, entropy, policy = make_inputs(device, 30)
    names = ("logprobs", "old", "behaviour", "advantages")
    dict(zip(names, (logprobs, *policy), strict=True))[poisoned][7] = torch.nan
    metrics, _ = policy_loss(logprobs, entropy, policy, clip_eps=0.2, denominator=30)
    assert metrics[0].isnan()
