"""`linear_ppo_loss` against RLEF's loss of the log-probs, differentiated by autograd."""

import pytest
import torch

from rlef_kernels import linear_logprob, linear_ppo_loss, linear_ppo_loss_reference
from tests.policy_loss import policy_loss


def make_inputs(tokens, width=8, vocabulary=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_()
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    logprob = linear_logprob(hidden, weight, target)[0].detach()
    old = logprob + 0.3 * torch.randn(tokens, generator=generator)
    behaviour = logprob + 0.3 * torch.randn(tokens, generator=generator)
    return hidden, weight, target, old, behaviour, torch.randn(tokens, generator=generator)


def composed(hidden, weight, target, *policy, temperature=1.0, denominator=None):
    """Compute the loss by its definition, with clip_eps 0.2, and its metrics."""
    logprob, entropy = linear_logprob(hidden, weight, target, temperature=temperature)
    count = max(1, len(target)) if denominator is None else denominator
    loss, metrics = policy_loss(logprob, *policy, clip_eps=0.2, denominator=count)
    return loss, metrics | {"entropy": entropy.sum().detach() / count}


@pytest.mark.parametrize("denominator", [None, 90.0, torch.tensor(90.0)])
@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_agrees_with_the_loss_of_the_logprobs(tokens, denominator):
    inputs = make_inputs(tokens)
    options = {"temperature": 0.8, "denominator": denominator}
    found = linear_ppo_loss(*inputs, clip_eps=0.2, **options)
    expected = composed(*inputs, **options)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(3 * loss, inputs[:2]) for loss, _ in (found, expected)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_masked_tokens_are_ignored_even_if_their_values_are_nan():
    hidden, weight, target, *policy = make_inputs(40)
    mask = torch.arange(40) % 4 != 1
    poisoned = [tensor.masked_fill(~mask, torch.nan) for tensor in policy]
    target = target.masked_fill(~mask, -100)
    found = linear_ppo_loss(hidden, weight, target, *poisoned, clip_eps=0.2, mask_T=mask)
    expected = linear_ppo_loss(
        hidden[mask], weight, target[mask], *(tensor[mask] for tensor in policy), clip_eps=0.2
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    grads = [torch.autograd.grad(loss, (hidden, weight)) for loss, _ in (found, expected)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


def test_all_masked_is_zero_with_zero_gradients():
    inputs = make_inputs(7)
    loss, _ = linear_ppo_loss(*inputs, clip_eps=0.2, mask_T=torch.zeros(7, dtype=torch.bool))
    assert loss == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, inputs[:2]))


def test_gradcheck():
    """With behaviour log-probs so low that min(pi / pi_b, 1) is constant at 1: finite differences
    would otherwise differentiate this factor, which has a stop-gradient."""
    hidden, weight, target, old, behaviour, advantages = make_inputs(6, 3, 7, torch.float64)
    policy = (old.double(), behaviour.double() - 9, advantages.double())

    def loss(hidden, weight):
        return linear_ppo_loss_reference(
            hidden, weight, target, policy, clip_eps=0.2, temperature=0.7, chunk_tokens=2
        )[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_chunks_add_up():
    hidden, weight, target, *policy = make_inputs(50)
    whole, parts = (
        linear_ppo_loss_reference(
            hidden, weight, target, tuple(policy), clip_eps=0.2, chunk_tokens=chunk
        )
        for chunk in (50, 7)
    )
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(
        *(torch.autograd.grad(values[0], (hidden, weight)) for values in (whole, parts)),
        atol=1e-6,
        rtol=1e-5,
    )


def test_gradient_is_added_to_main_grad_and_only_for_an_upstream_gradient_of_one():
    inputs = make_inputs(30)
    (expected,) = torch.autograd.grad(linear_ppo_loss(*inputs, clip_eps=0.2)[0], inputs[1])
    weight = inputs[1]
    weight.main_grad = torch.ones_like(weight)
    weight.grad_added_to_main_grad = False
    loss, _ = linear_ppo_loss(*inputs, clip_eps=0.2, accumulate_main_grad=True)
    loss.backward()
    torch.testing.assert_close(weight.main_grad, 1 + expected)
    assert weight.grad_added_to_main_grad and not weight.grad.any()
    loss, _ = linear_ppo_loss(*inputs, clip_eps=0.2, accumulate_main_grad=True)
    with pytest.raises(ValueError, match=r"upstream gradient 2\.0"):
        (2 * loss).backward()


def test_without_gradients_nothing_is_added():
    inputs = make_inputs(30)
    inputs[1].main_grad = torch.zeros_like(inputs[1])
    with torch.no_grad():
        loss, _ = linear_ppo_loss(*inputs, clip_eps=0.2, accumulate_main_grad=True)
    assert not loss.requires_grad and not inputs[1].main_grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages_T": torch.zeros(2)}, r"advantages_T has shape \(2,\), target_T \(3,\)"),
        ({"target_T": torch.tensor([0, 1, 50])}, "ids from 0 to 50"),
        ({"mask_T": torch.ones(3)}, "mask_T is torch.float32"),
        ({"clip_eps": 0.0}, "clip_eps is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"accumulate_main_grad": True}, "main_grad"),
    ],
)
def test_bad_input_is_named(change, message):
    names = ("hidden_TD", "weight_VD", "target_T", "old_logprobs_T", "behaviour_logprobs_T")
    arguments = dict(zip((*names, "advantages_T"), make_inputs(3), strict=True)) | {"clip_eps": 0.2}
    with pytest.raises(ValueError, match=message):
        linear_ppo_loss(**(arguments | change))
