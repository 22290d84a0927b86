"""The policy loss on an example worked by hand. test_linear_ppo_loss.py compares it with the
paper's formula, differentiated by PyTorch."""

import math

import pytest
import torch

from rlef_kernels.ppo_policy_loss import METRICS, policy_loss

LOG2 = math.log(2)


def test_policy_loss_worked_by_hand():
    """Four tokens, eps 0.2; pi / pi_old and pi / pi_b from the columns.

    1. ratio 2, behaviour ratio 1, A = 1:    min(2, 1.2) = 1.2
    2. ratio 2, behaviour ratio 1/2, A = 1:  r = 1, min(1, 1) = 1
    3. ratio 1/2, behaviour ratio 1/2 -> r = 1/4, A = -1: min(-0.25, -0.8) = -0.8
    4. ratio 1, behaviour ratio 2, truncated to 1, A = 3: 3
    Sum 4.4, over 4 tokens, negated: -1.1. Gradients: 0 for the clipped tokens 1 and 3; -r A / 4
    elsewhere.
    """
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    old = torch.tensor([-1 - LOG2, -1 - LOG2, -1 + LOG2, -1])
    behaviour = torch.tensor([-1, -1 + LOG2, -1 + LOG2, -1 - LOG2])
    advantages, entropy = torch.tensor([1.0, 1.0, -1.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    metrics, gradient = policy_loss(
        logprobs, entropy, (old, behaviour, advantages), clip_eps=0.2, denominator=4
    )
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.25, 0.0, -0.75]))
    expected = {
        "policy_loss": -1.1,
        "ratio": (2 + 1 + 0.25 + 1) / 4,
        "clip_fraction": 0.5,
        "behaviour_factor": (1 + 0.5 + 0.5 + 1) / 4,
        "approx_kl": ((1 - LOG2) * 2 + (LOG2 - 0.5)) / 4,
        "entropy": 2.5,
    }
    assert dict(zip(METRICS, metrics.tolist(), strict=True)) == pytest.approx(expected)


def test_small_steps_have_an_exact_kl():
    """exp(x) - 1 - x in fp32 loses all digits for x = 1e-4; k3 is x^2 / 2 there."""
    logprobs = torch.zeros(100)
    policy = (logprobs + 1e-4, logprobs + 1e-4, logprobs)
    metrics, _ = policy_loss(logprobs, logprobs, policy, clip_eps=0.2, denominator=100)
    found = metrics[METRICS.index("approx_kl")].item()
    torch.testing.assert_close(found, 5e-9, rtol=1e-3, atol=0)


@pytest.mark.parametrize("poisoned", range(4))
def test_nan_in_any_input_reaches_the_loss(poisoned):
    entropy, *numbers = -torch.rand(5, 30)
    numbers[poisoned][7] = torch.nan
    logprobs, *policy = numbers
    metrics, _ = policy_loss(logprobs, entropy, tuple(policy), clip_eps=0.2, denominator=30)
    assert metrics[0].isnan()
