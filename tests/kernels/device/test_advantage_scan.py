"""`advantage_scan` in Triton against the recurrence in float64."""

from itertools import pairwise

import pytest
import torch

from rlef_kernels.gpu.advantage_scan import advantage_scan_kernels


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
    "bounds",
    [[0, 1], [0, 3, 3, 4, 9], [0, 600, 617], [0, 512, 1024], [0, 1100], [0]],
    ids=["one step", "turns", "ragged", "whole scans", "carried twice", "no sequence"],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_agrees_with_the_loop(device, bounds, gamma, lam, dtype):
    generator = torch.Generator().manual_seed(len(bounds))
    rewards, values = torch.randn(2, bounds[-1], generator=generator)
    found = advantage_scan_kernels(
        rewards.to(device),
        values.to(device),
        torch.tensor(bounds, dtype=dtype, device=device),
        gamma=gamma,
        lam=lam,
    )
    expected = loop(rewards.double(), values.double(), bounds, gamma, lam)
    torch.testing.assert_close(found[0].cpu().double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1].cpu().double(), expected + values, atol=1e-4, rtol=1e-4)
