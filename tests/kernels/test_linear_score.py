"""`linear_score` against float64 truth, numbers worked by hand, and `linear_logprob`."""

import math

import pytest
import torch

from rlef_kernels import linear_logprob, linear_score, linear_score_reference
from tests.kernels.score_inputs import make_inputs, truth


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("tokens", "width", "ref_width", "vocabulary", "chunk"),
    [(1, 4, 4, 3, None), (0, 4, 4, 3, None), (33, 17, 9, 257, 8), (65, 8, 8, 1280, 64)],
)
def test_agrees_with_float64_truth(tokens, width, ref_width, vocabulary, chunk, temperature):
    inputs = make_inputs(tokens, width, ref_width, vocabulary)
    found = linear_score_reference(*inputs, temperature=temperature, chunk_tokens=chunk)
    for values, expected in zip(found, truth(*inputs, temperature), strict=True):
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), expected, atol=2e-5, rtol=2e-6)


def test_numbers_worked_by_hand():
    """p = (1/2, 1/4, 1/4) and q = (1/4, 1/4, 1/2), whose target is the first entry."""
    head, ones = torch.eye(3), torch.ones(1, 3)
    policy, reference = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[1.0, 1, 2]]).log()
    found = linear_score(policy, head, reference, head, torch.tensor([0]))
    log2 = math.log(2)
    # KL: 1/2 log 2 + 1/4 log 1 - 1/4 log 2; entropy: 1/2 log 2 + 2/4 log 4
    expected = (-log2, -2 * log2, 1.5 * log2, 0.25 * log2)
    torch.testing.assert_close(torch.cat(found), torch.tensor(expected))
    # at temperature 1/2, p ~ (4, 1, 1) / 6; a uniform reference has KL = log 3 - entropy
    found = linear_score(policy, head, ones, head, torch.tensor([1]), temperature=0.5)
    entropy = math.log(6) - 4 / 6 * math.log(4)
    expected = (-math.log(6), -math.log(3), entropy, math.log(3) - entropy)
    torch.testing.assert_close(torch.cat(found), torch.tensor(expected))


def test_the_exact_kl_is_the_expectation_of_the_sampled_one():
    """By enumeration: the log-ratio of each possible target, weighted with its probability."""
    *models, _ = make_inputs(6, 8, 5, 11)
    everything = [
        linear_score(*models, torch.full((6,), token), temperature=0.8) for token in range(11)
    ]
    sampled = sum(
        found.logprob_T.exp() * (found.logprob_T - found.ref_logprob_T) for found in everything
    )
    for found in everything:
        torch.testing.assert_close(found.kl_T, sampled, atol=1e-5, rtol=1e-5)


def test_log_probs_and_entropy_are_those_of_linear_logprob():
    hidden, weight, ref_hidden, ref_weight, target = make_inputs(33, 17, 9, 257)
    found = linear_score(hidden, weight, ref_hidden, ref_weight, target, temperature=0.7)
    policy = linear_logprob(hidden, weight, target, temperature=0.7)
    reference = linear_logprob(ref_hidden, ref_weight, target, temperature=0.7)
    for values, expected in zip(found[:3], (policy[0], reference[0], policy[1]), strict=True):
        assert torch.equal(values, expected)


def test_a_model_has_no_divergence_from_itself():
    hidden, weight, *_, target = make_inputs(20, 16, 16, 300)
    assert linear_score(hidden, weight, hidden, weight, target).kl_T.abs().max() < 1e-5


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1.0], [-1.0]])
    weight = torch.tensor([[1e4], [-1e4], [0.0]])
    found = linear_score(hidden, weight, -hidden, weight, torch.tensor([0, 0]))
    torch.testing.assert_close(found.kl_T, torch.full((2,), 2e4))
    torch.testing.assert_close(found.logprob_T, torch.tensor([0.0, -2e4]))
    torch.testing.assert_close(found.ref_logprob_T, torch.tensor([-2e4, 0.0]))


def test_bad_input_is_named():
    hidden, weight, ref_hidden, ref_weight, target = make_inputs(5, 4, 4, 7)
    with pytest.raises(ValueError, match="7 vocabulary entries, the reference 5 and 6"):
        linear_score(hidden, weight, ref_hidden, ref_weight[:6], target)
    with pytest.raises(ValueError, match="no gradients; call it under"):
        linear_score(hidden.requires_grad_(), weight, ref_hidden, ref_weight, target)
    with torch.no_grad():
        linear_score(hidden, weight, ref_hidden, ref_weight, target)
        with pytest.raises(ValueError, match="same width"):
            linear_score(hidden, weight, ref_hidden[:, :3], ref_weight, target)
        with pytest.raises(ValueError, match="outside"):
            linear_score(hidden, weight, ref_hidden, ref_weight, target + 7)
