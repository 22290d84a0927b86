"""`logits_logprob` against float64 truth, with masked words, and with its gradient written in
place."""

import pytest
import torch

from rlef_kernels import linear_logprob, logits_logprob, logits_logprob_reference


def truth(logits, target, temperature=1.0):
    logprobs_TV = torch.log_softmax(logits.double() / temperature, dim=-1)
    entropy_T = torch.special.entr(logprobs_TV.exp()).sum(-1)
    return logprobs_TV.gather(1, target[:, None])[:, 0], entropy_T


def problem(tokens, vocabulary, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    logits = (3 * torch.randn(tokens, vocabulary, generator=generator)).to(dtype)
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    return logits.requires_grad_(), target


def gradient(outputs, logits):
    ramp = torch.linspace(-1, 2, len(logits), dtype=outputs[0].dtype)
    return torch.autograd.grad((outputs[0] * ramp + 0.7 * outputs[1] * ramp.flip(0)).sum(), logits)[
        0
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 3), (0, 3), (37, 1281), (700, 997)])
def test_agrees_with_float64_truth(tokens, vocabulary, temperature):
    logits, target = problem(tokens, vocabulary)
    outputs = logits_logprob(logits, target, temperature=temperature)
    expected = truth(logits, target, temperature)
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.double(), value, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(gradient(outputs, logits), gradient(expected, logits))


def test_bf16_logits_are_reduced_in_fp32():
    logits, target = problem(20, 500, torch.bfloat16)
    outputs, expected = logits_logprob(logits, target), truth(logits, target)
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.double(), value, atol=1e-5, rtol=1e-6)
    grad = gradient(outputs, logits)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, gradient(expected, logits), atol=1e-6, rtol=8e-3)


def test_gradcheck():
    logits, target = problem(4, 6, torch.float64)
    assert torch.autograd.gradcheck(
        lambda logits: logits_logprob_reference(logits, target, temperature=0.7), logits
    )


def test_masked_words_have_no_probability_and_no_gradient():
    logits, target = problem(5, 40)
    allowed = torch.arange(0, 40, 2)
    masked = torch.full_like(logits, -torch.inf).index_copy(1, allowed, logits[:, allowed])
    masked = masked.detach().requires_grad_()
    narrow = logits[:, allowed].detach().requires_grad_()
    outputs = logits_logprob(masked, target // 2 * 2)
    expected = logits_logprob(narrow, target // 2)
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, value)
    grad = gradient(outputs, masked)
    torch.testing.assert_close(grad[:, allowed], gradient(expected, narrow))
    assert not grad[:, 1::2].any()


def test_inplace_backward_writes_the_same_gradient_over_the_logits():
    logits, target = problem(30, 70)
    expected = gradient(logits_logprob(logits, target), logits)
    memory = logits.detach().clone().requires_grad_()
    grad = gradient(logits_logprob(memory, target, inplace_backward=True), memory)
    assert torch.equal(grad, expected)
    assert grad.data_ptr() == memory.data_ptr()


def test_agrees_with_linear_logprob():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (11, 30))
    target = torch.randint(30, (11,), generator=generator)
    for a, b in zip(
        logits_logprob(hidden @ weight.t(), target, temperature=0.8),
        linear_logprob(hidden, weight, target, temperature=0.8),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"flatten it to \[T, V\]"):
        logits_logprob(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="ids from 4 to 4"):
        logits_logprob(torch.zeros(1, 4), torch.tensor([4]))
