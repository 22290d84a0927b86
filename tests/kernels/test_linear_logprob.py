"""`linear_logprob` against float64 truth, and its memory.

Tolerances are slightly above the error of fp32 PyTorch on the same problem: for logits of size z,
an fp32 matrix product has an error of about z * 1e-6.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlef_kernels import linear_logprob, linear_logprob_reference


def truth(hidden, weight, target, temperature=1.0):
    """Compute the definition in float64, with all logits stored."""
    logprobs_TV = torch.log_softmax(hidden.double() @ weight.double().t() / temperature, dim=-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    return logprobs_TV.gather(1, target[:, None])[:, 0], entropy_T


def make_inputs(tokens, width, vocabulary, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(tokens * 31 + vocabulary)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (scale * torch.randn(vocabulary, width, generator=generator)).to(dtype)
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), target


def gradients(outputs, inputs):
    """Differentiate with a different upstream gradient for each token and each output."""
    logprob, entropy = outputs
    ramp = torch.linspace(-1, 2, len(logprob), dtype=logprob.dtype)
    return torch.autograd.grad((logprob * ramp + 0.7 * entropy * ramp.flip(0)).sum(), inputs)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary", "chunk"),
    [
        (1, 8, 5, None),  # one token
        (7, 3, 1, 2),  # a vocabulary of one: log-prob and entropy are 0
        (13, 17, 1280, 5),  # the last chunk is ragged; more columns than tokens
        (129, 33, 257, 64),  # no size is a multiple of another
        (64, 16, 640, 64),  # exactly one chunk
    ],
)
def test_agrees_with_float64_truth_forward_and_backward(
    tokens, width, vocabulary, chunk, temperature
):
    hidden, weight, target = make_inputs(tokens, width, vocabulary)
    outputs = linear_logprob_reference(
        hidden, weight, target, temperature=temperature, chunk_tokens=chunk
    )
    expected = truth(hidden, weight, target, temperature)
    for output, value in zip(outputs, expected, strict=True):
        assert output.dtype == torch.float32
        torch.testing.assert_close(output.double(), value, atol=2e-5, rtol=1e-6)
    for grad, value in zip(
        gradients(outputs, (hidden, weight)), gradients(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(grad, value, atol=2e-5 * max(1, tokens**0.5), rtol=1e-4)


def test_bf16_inputs_are_accumulated_in_fp32():
    hidden, weight, target = make_inputs(50, 64, 1000, dtype=torch.bfloat16, scale=0.5)
    outputs = linear_logprob(hidden, weight, target)
    expected = truth(hidden, weight, target)
    for output, value in zip(outputs, expected, strict=True):
        assert output.dtype == torch.float32
        torch.testing.assert_close(output.double(), value, atol=1e-4, rtol=0)
    for grad, value in zip(
        gradients(outputs, (hidden, weight)), gradients(expected, (hidden, weight)), strict=True
    ):
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - value.double()).norm() < 4e-3 * value.double().norm()


@pytest.mark.parametrize("uses", ["logprob", "entropy", "both"])
def test_gradcheck(uses):
    hidden, weight, target = make_inputs(5, 4, 7, dtype=torch.float64)

    def function(hidden, weight):
        logprob, entropy = linear_logprob_reference(
            hidden, weight, target, temperature=0.7, chunk_tokens=2
        )
        return {"logprob": logprob, "entropy": entropy, "both": logprob * entropy}[uses]

    assert torch.autograd.gradcheck(function, (hidden, weight))


def test_extreme_logits_stay_finite_and_right():
    weight = torch.tensor([[1e4], [-1e4], [9.999e3], [0.0]], requires_grad=True)
    hidden = torch.tensor([[1.0], [-1.0], [1.0], [0.0]], requires_grad=True)
    target = torch.tensor([0, 1, 1, 3])
    outputs = linear_logprob(hidden, weight, target)
    expected = truth(hidden, weight, target)
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.double(), value, atol=1e-4, rtol=1e-6)
    for grad, value in zip(
        gradients(outputs, (hidden, weight)), gradients(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(grad, value, atol=1e-2, rtol=1e-4)


def test_identical_logits_have_the_log_of_the_vocabulary_as_entropy():
    hidden = torch.ones(3, 4, requires_grad=True)
    weight = torch.full((11, 4), 2500.0, requires_grad=True)
    logprob, entropy = linear_logprob(hidden, weight, torch.tensor([0, 5, 10]))
    torch.testing.assert_close(entropy, torch.full((3,), 11.0).log())
    torch.testing.assert_close(logprob, -entropy)
    (grad,) = torch.autograd.grad(entropy.sum(), hidden)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=2e-3, rtol=0)  # at its maximum


def test_no_tokens_give_empty_outputs_and_zero_gradients():
    hidden = torch.zeros(0, 4, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    logprob, entropy = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64))
    assert logprob.shape == entropy.shape == (0,)
    grad_hidden, grad_weight = torch.autograd.grad(logprob.sum() + entropy.sum(), (hidden, weight))
    assert grad_hidden.shape == (0, 4) and not grad_weight.any()


def test_result_is_bitwise_repeatable():
    first, second = (
        gradients(linear_logprob(*inputs), inputs[:2])
        for inputs in (make_inputs(40, 16, 300), make_inputs(40, 16, 300))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor created under it."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_logits_are_never_stored_whole():
    tokens, width, vocabulary, chunk = 1000, 4, 500, 50
    hidden, weight, target = make_inputs(tokens, width, vocabulary)
    with LargestTensor() as naive:
        truth(hidden, weight, target)
    with LargestTensor() as chunked:
        outputs = linear_logprob_reference(hidden, weight, target, chunk_tokens=chunk)
        gradients(outputs, (hidden, weight))
    assert naive.elements == tokens * vocabulary, "the probe sees the logits of the naive form"
    assert chunked.elements <= chunk * vocabulary


def test_gradient_is_added_to_main_grad_on_request():
    hidden, weight, target = make_inputs(9, 6, 20)
    (expected,) = torch.autograd.grad(linear_logprob(hidden, weight, target)[0].sum(), weight)
    weight.main_grad = torch.ones_like(weight)
    weight.grad_added_to_main_grad = False
    linear_logprob(hidden, weight, target, accumulate_main_grad=True)[0].sum().backward()
    torch.testing.assert_close(weight.main_grad, 1 + expected.detach())
    assert weight.grad_added_to_main_grad and not weight.grad.any()


def test_masked_tokens_get_zeros_whatever_their_targets():
    hidden, weight, target = make_inputs(12, 6, 20)
    mask = torch.arange(12) % 4 != 1
    outputs = linear_logprob(hidden, weight, target.masked_fill(~mask, -100), mask_T=mask)
    expected = linear_logprob(hidden[mask], weight, target[mask])
    for output, value in zip(outputs, expected, strict=True):
        assert torch.equal(output[mask], value) and not output[~mask].any()
    grad_hidden, grad_weight = gradients(outputs, (hidden, weight))
    assert not grad_hidden[~mask].any() and grad_hidden[mask].all() and grad_weight.all()


def test_all_masked_is_zero_with_zero_gradients():
    hidden, weight, target = make_inputs(5, 6, 20)
    outputs = linear_logprob(hidden, weight, target, mask_T=torch.zeros(5, dtype=torch.bool))
    assert not any(output.any() for output in outputs)
    assert not any(grad.any() for grad in gradients(outputs, (hidden, weight)))


def test_tokens_without_a_gradient_cost_nothing_and_change_nothing():
    hidden, weight, target = make_inputs(60, 8, 500)
    used = torch.arange(60) % 3 == 0
    few = hidden.detach()[used].requires_grad_()
    whole, part = (
        linear_logprob_reference(h, weight, t) for h, t in [(hidden, target), (few, target[used])]
    )
    with LargestTensor() as largest:
        grads = torch.autograd.grad((whole[0] * used).sum(), (hidden, weight))
    assert largest.elements <= 20 * 500 + 500
    expected = torch.autograd.grad(part[0].sum(), (few, weight))
    assert torch.equal(grads[0][used], expected[0]) and not grads[0][~used].any()
    assert torch.equal(grads[1], expected[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_T": torch.tensor([0, 20])}, r"ids from 0 to 20, outside \[0, 20\)"),
        ({"target_T": torch.tensor([0, -100])}, r"ids from -100 to 0"),
        ({"target_T": torch.tensor([0])}, r"shape \(1,\), expected \(2,\)"),
        ({"target_T": torch.tensor([0.0, 1.0])}, "convert it to torch.int64"),
        ({"hidden_TD": torch.ones(2, 5)}, "same width"),
        ({"hidden_TD": torch.ones(2, 1, 6)}, "two matrices"),
        ({"mask_T": torch.ones(2)}, "mask_T is torch.float32"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"accumulate_main_grad": True}, "main_grad"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "hidden_TD": torch.ones(2, 6),
        "weight_VD": torch.ones(20, 6),
        "target_T": torch.tensor([0, 1]),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(arguments | change))
