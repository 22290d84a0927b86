"""`advantage_scan` against the recurrence written as a loop, and on an example worked by hand."""

from itertools import pairwise

import pytest
import torch

from rlef_kernels import advantage_scan


def loop(rewards, values, bounds, gamma, lam):
    """The definition, backwards through each sequence."""
    advantages = torch.zeros(len(rewards), dtype=torch.float64)
    for start, end in pairwise(bounds):
        following = next_value = 0.0
        for step in reversed(range(start, end)):
            delta = rewards[step] + gamma * next_value - values[step]
            following = delta + gamma * lam * following
            next_value = values[step]
            advantages[step] = following
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize(
    "bounds", [[0, 1], [0, 3, 3, 4, 9], [0, 1, 2, 3], [0, 100, 117], [0, 64, 128], [0]]
)
def test_agrees_with_the_loop(bounds, gamma, lam):
    generator = torch.Generator().manual_seed(len(bounds))
    rewards, values = torch.randn(2, bounds[-1], generator=generator, dtype=torch.float64)
    advantages, returns = advantage_scan(
        rewards, values, torch.tensor(bounds, dtype=torch.int32), gamma=gamma, lam=lam
    )
    expected = loop(rewards, values, bounds, gamma, lam)
    torch.testing.assert_close(advantages.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns.double(), expected + values, atol=1e-5, rtol=1e-5)


def test_with_gamma_and_lambda_one_the_return_is_the_sum_of_rewards_to_go():
    """RLEF A.1: two dialogues, rewards (0, -0.2, 1) and (-1): to go 0.8, 0.8, 1 and -1."""
    rewards, values = torch.tensor([0, -0.2, 1, -1]), torch.tensor([0.5, 0.1, -0.3, 0.2])
    advantages, returns = advantage_scan(rewards, values, torch.tensor([0, 3, 4]))
    torch.testing.assert_close(returns, torch.tensor([0.8, 0.8, 1.0, -1.0]))
    torch.testing.assert_close(advantages, torch.tensor([0.3, 0.7, 1.3, -1.2]))


@pytest.mark.parametrize("bounds", [[0, 2], [1, 3], [0, 2, 1, 3]])
def test_bounds_that_do_not_cover_the_steps_are_refused(bounds):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of steps, 3"):
        advantage_scan(torch.zeros(3), torch.zeros(3), torch.tensor(bounds))


def test_a_discount_above_one_is_refused():
    with pytest.raises(ValueError, match=r"gamma is 1.5, must be in \[0, 1\]"):
        advantage_scan(torch.zeros(1), torch.zeros(1), torch.tensor([0, 1]), gamma=1.5)
