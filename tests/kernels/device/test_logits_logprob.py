"""`logits_logprob` in Triton against float64 truth and the PyTorch form."""

import pytest
import torch

from rlef_kernels import logits_logprob_reference
from rlef_kernels.gpu.logits_logprob import logits_logprob_kernels


def problem(device, tokens, vocabulary, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    logits = (3 * torch.randn(tokens, vocabulary, generator=generator)).to(device, dtype)
    target = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    return logits.requires_grad_(), target


def gradient(outputs, logits):
    ramp = torch.linspace(-1, 2, len(logits), dtype=outputs[0].dtype, device=logits.device)
    loss = (outputs[0] * ramp + 0.7 * outputs[1] * ramp.flip(0)).sum()
    return torch.autograd.grad(loss, logits)[0]


def truth(logits, target, temperature):
    logits = logits.detach().double().requires_grad_()
    logprobs_TV = torch.log_softmax(logits / temperature, dim=-1)
    entropy_T = torch.special.entr(logprobs_TV.exp()).sum(-1)
    outputs = logprobs_TV.gather(1, target[:, None])[:, 0], entropy_T
    return [tensor.detach() for tensor in outputs], gradient(outputs, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "vocabulary", "temperature"),
    [(1, 3, 1.0), (37, 1281, 0.5), (5, 2048, 1.0), (70, 100, 2.0)],
)
def test_agrees_with_float64_truth(device, tokens, vocabulary, temperature, dtype):
    logits, target = problem(device, tokens, vocabulary, dtype)
    outputs = logits_logprob_kernels(logits, target, temperature=temperature)
    expected, expected_grad = truth(logits, target, temperature)
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.double(), value, atol=1e-5, rtol=1e-6)
    found = gradient(outputs, logits)
    assert found.dtype == dtype
    rounding = 4e-3 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected_grad, atol=1e-6, rtol=rounding)


def test_rows_may_be_padded(device):
    """A view of wider logits, as padded vocabularies give."""
    logits, target = problem(device, 9, 300)
    wide = torch.full((9, 320), torch.nan, device=device)
    wide[:, :300] = logits.detach()
    outputs = logits_logprob_kernels(wide[:, :300], target)
    for output, value in zip(outputs, logits_logprob_kernels(logits, target), strict=True):
        assert torch.equal(output, value)


def test_masked_words_have_no_probability_and_no_gradient(device):
    logits, target = problem(device, 5, 2500)
    allowed = torch.arange(0, 2500, 2, device=device)
    masked = torch.full_like(logits, -torch.inf)
    masked[:, allowed] = logits.detach()[:, allowed]
    masked[:, :1024] = -torch.inf  # a whole tile
    masked = masked.detach().requires_grad_()
    target = target.clamp(min=1024) // 2 * 2
    outputs = logits_logprob_kernels(masked, target)
    expected = logits_logprob_reference(masked, target)
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, value, atol=1e-5, rtol=1e-5)
    grad = gradient(outputs, masked)
    torch.testing.assert_close(grad, gradient(expected, masked), atol=1e-6, rtol=1e-4)
    assert not grad[:, 1::2].any() and not grad[:, :1024].any()


def test_nan_is_not_hidden(device):
    logits, target = problem(device, 5, 1300)
    logits.data[2, 1100] = torch.nan
    outputs = logits_logprob_kernels(logits, target)
    for output in outputs:
        assert output.isnan().nonzero().tolist() == [[2]]
    assert gradient(outputs, logits)[2].isnan().all()


def test_inplace_backward_writes_the_same_gradient_over_the_logits(device):
    logits, target = problem(device, 30, 1070, torch.bfloat16)
    expected = gradient(logits_logprob_kernels(logits, target), logits)
    memory = logits.detach().clone().requires_grad_()
    grad = gradient(logits_logprob_kernels(memory, target, inplace_backward=True), memory)
    assert torch.equal(grad, expected)
    assert grad.data_ptr() == memory.data_ptr()


def test_no_tokens_give_empty_outputs(device):
    logits, target = problem(device, 0, 30)
    outputs = logits_logprob_kernels(logits, target)
    assert outputs[0].shape == (0,) and gradient(outputs, logits).shape == (0, 30)
