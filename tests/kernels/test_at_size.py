"""On a GPU only: sizes of real use, where offsets pass 2^31 and memory counts.

Not yet run: no GPU has been at hand.
"""

import pytest
import torch

from rlef_kernels import linear_logprob, linear_logprob_reference, logits_logprob

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
TOKENS, WIDTH, VOCABULARY = 8192, 4096, 128256
MIB = 2**20


def test_logits_of_more_than_2_to_the_31_entries_are_read_to_the_end():
    tokens = 2**31 // VOCABULARY + 100
    logits = torch.zeros(tokens, VOCABULARY, dtype=torch.bfloat16, device="cuda")
    logits[-1, -1] = 20
    target = torch.full((tokens,), VOCABULARY - 1, device="cuda")
    logprob, _ = logits_logprob(logits, target)
    expected = torch.tensor([0.0, 20.0], dtype=torch.float64)
    expected -= torch.tensor([VOCABULARY, VOCABULARY - 1 + expected[1].exp()]).log()
    torch.testing.assert_close(logprob[[0, -1]].cpu().double(), expected, atol=1e-4, rtol=0)


def test_the_8b_head_agrees_with_pytorch_within_its_memory():
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"generator": generator, "device": "cuda"}
    hidden = torch.randn(TOKENS, WIDTH, **options).bfloat16().requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, **options) / WIDTH**0.5).bfloat16().requires_grad_()
    weight.main_grad = torch.zeros(VOCABULARY, WIDTH, device="cuda")
    target = torch.randint(VOCABULARY, (TOKENS,), **options)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = linear_logprob(hidden, weight, target, accumulate_main_grad=True)
    assert torch.cuda.max_memory_allocated() - before <= 64 * MIB
    torch.cuda.reset_peak_memory_stats()
    (outputs[0].sum() + outputs[1].sum()).backward()
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * 1024 * MIB
    few = slice(TOKENS - 300, TOKENS)
    part = hidden.detach()[few].requires_grad_()
    expected = linear_logprob_reference(part, weight.detach(), target[few])
    for output, value in zip(outputs, expected, strict=False):
        torch.testing.assert_close(output[few], value, atol=1e-4, rtol=0)
    (grad,) = torch.autograd.grad(expected[0].sum() + expected[1].sum(), part)
    assert (hidden.grad[few] - grad).float().norm() < 5e-3 * grad.float().norm()
