"""The losses on examples worked by hand, their masks, and how they add up over micro-batches."""

import math

import pytest
import torch

from rlef_kernels import (
    clipped_value_loss,
    clipped_value_loss_reference,
    ppo_policy_loss,
    ppo_policy_loss_reference,
)

LOG2 = math.log(2)


def test_policy_loss_worked_by_hand():
    """Four tokens, eps 0.2; pi / pi_old and pi / pi_b from the columns.

    1. ratio 2, behaviour ratio 1, A = 1:    min(2, 1.2) = 1.2
    2. ratio 2, behaviour ratio 1/2, A = 1:  r = 1, min(1, 1) = 1
    3. ratio 1/2, behaviour ratio 1/2 -> r = 1/4, A = -1: min(-0.25, -0.8) = -0.8
    4. ratio 1, behaviour ratio 2, truncated to 1, A = 3: 3
    Sum 4.4, over 4 tokens, negated: -1.1. Gradients: clipped tokens 1 and 3 none; r A / 4
    elsewhere.
    """
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    old = torch.tensor([-1 - LOG2, -1 - LOG2, -1 + LOG2, -1])
    behaviour = torch.tensor([-1, -1 + LOG2, -1 + LOG2, -1 - LOG2])
    advantages = torch.tensor([1.0, 1.0, -1.0, 3.0])
    loss, metrics = ppo_policy_loss(logprobs, old, behaviour, advantages, clip_eps=0.2)
    torch.testing.assert_close(loss, torch.tensor(-1.1))
    (grad,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(grad, torch.tensor([0.0, -0.25, 0.0, -0.75]))
    expected = {
        "policy_loss": -1.1,
        "ratio": (2 + 1 + 0.25 + 1) / 4,
        "clip_fraction": 0.5,
        "behaviour_factor": (1 + 0.5 + 0.5 + 1) / 4,
        "approx_kl_k1": -(LOG2 + LOG2 - LOG2) / 4,
        "approx_kl": ((1 - LOG2) * 2 + (LOG2 - 0.5)) / 4,
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected)


def policy_problem(tokens):
    generator = torch.Generator().manual_seed(1)
    logprobs = -torch.rand(tokens, generator=generator)
    noise = [0.3 * torch.randn(tokens, generator=generator) for _ in range(2)]
    advantages = torch.randn(tokens, generator=generator)
    return logprobs, logprobs + noise[0], logprobs + noise[1], advantages


def test_masked_tokens_do_not_exist_even_when_they_are_nan():
    inputs = policy_problem(10)
    mask = torch.arange(10) % 3 != 0
    entropy = torch.rand(10)
    poisoned = [tensor.masked_fill(~mask, torch.nan) for tensor in inputs]
    poisoned[0].requires_grad_()
    kept = [tensor[mask] for tensor in inputs]
    kept[0].requires_grad_()
    loss, metrics = ppo_policy_loss(
        *poisoned, clip_eps=0.2, mask_T=mask, entropy_T=entropy.masked_fill(~mask, torch.nan)
    )
    expected, expected_metrics = ppo_policy_loss(*kept, clip_eps=0.2, entropy_T=entropy[mask])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics, expected_metrics)
    (grad,) = torch.autograd.grad(loss, poisoned[0])
    torch.testing.assert_close(grad[mask], torch.autograd.grad(expected, kept[0])[0])
    assert not grad[~mask].any()


def test_all_masked_is_zero_with_zero_gradient():
    inputs = policy_problem(4)
    inputs[0].requires_grad_()
    loss, _ = ppo_policy_loss(*inputs, clip_eps=0.2, mask_T=torch.zeros(4, dtype=torch.bool))
    assert loss == 0 and not torch.autograd.grad(loss, inputs[0])[0].any()


def test_losses_and_metrics_of_micro_batches_add_up():
    inputs = policy_problem(9)
    whole, whole_metrics = ppo_policy_loss(*inputs, clip_eps=0.2)
    parts = [
        ppo_policy_loss(*(tensor[rows] for tensor in inputs), clip_eps=0.2, denominator=9)
        for rows in (slice(0, 4), slice(4, 9))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    for name, value in whole_metrics.items():
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], value)


def test_value_loss_worked_by_hand():
    """alpha 0.2. 1. V 1, old 0, G 1: max(0, (0.2 - 1)^2) = 0.64, from the clip: no gradient.
    2. V 0.1, old 0, G 1: (0.1 - 1)^2 = 0.81. 3. V 1, old 0, G -1: max(4, 1.44) = 4.
    Half of the mean: (0.64 + 0.81 + 4) / 6."""
    values = torch.tensor([1.0, 0.1, 1.0], requires_grad=True)
    loss, metrics = clipped_value_loss(
        values, torch.zeros(3), torch.tensor([1.0, 1.0, -1.0]), clip_alpha=0.2
    )
    torch.testing.assert_close(loss, torch.tensor(5.45 / 6))
    (grad,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(grad, torch.tensor([0.0, -0.9 / 3, 2 / 3]))
    torch.testing.assert_close(metrics["value_clip_fraction"], torch.tensor(2 / 3))


def test_masked_values_do_not_exist_even_when_they_are_nan():
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(8, generator=generator) for _ in range(3)]
    mask = torch.tensor([True, False] * 4)
    poisoned = [tensor.masked_fill(~mask, torch.nan) for tensor in inputs]
    poisoned[0].requires_grad_()
    loss, _ = clipped_value_loss(*poisoned, clip_alpha=0.2, mask_N=mask)
    expected, _ = clipped_value_loss(*(tensor[mask] for tensor in inputs), clip_alpha=0.2)
    torch.testing.assert_close(loss, expected)
    assert not torch.autograd.grad(loss, poisoned[0])[0][~mask].any()


def test_gradcheck_of_the_references():
    logprobs, old, _, advantages = (tensor.double() for tensor in policy_problem(6))
    # far less likely under the behaviour policy: the factor under stop_grad is constantly 1,
    # which finite differences would otherwise see move
    behaviour = logprobs - 1
    assert torch.autograd.gradcheck(
        lambda logprobs: ppo_policy_loss_reference(
            logprobs, old, behaviour, advantages, clip_eps=0.2
        )[0],
        logprobs.requires_grad_(),
    )
    values = torch.tensor([0.5, -0.3, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda values: clipped_value_loss_reference(
            values, torch.zeros(3).double(), torch.ones(3).double(), clip_alpha=0.2
        )[0],
        values,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages_T": torch.zeros(2)}, r"advantages_T has shape \(2,\), logprobs_T \(3,\)"),
        ({"mask_T": torch.ones(3)}, "convert it to torch.bool"),
        ({"clip_eps": 0.0}, "clip_eps is 0.0"),
    ],
)
def test_bad_input_is_named(change, message):
    names = ("logprobs_T", "old_logprobs_T", "behaviour_logprobs_T", "advantages_T")
    arguments = {name: torch.zeros(3) for name in names} | {"clip_eps": 0.2}
    with pytest.raises(ValueError, match=message):
        ppo_policy_loss(**(arguments | change))
