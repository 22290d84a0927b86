"""GPU tests at real sizes: offsets beyond 2^31, and memory within its budget.

Not yet run: no GPU was available.
"""

from dataclasses import replace

import pytest
import torch

from rlef_kernels import linear_logprob, linear_logprob_reference, linear_ppo_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
TOKENS, WIDTH, VOCABULARY = 8192, 4096, 128256
MIB = 2**20


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


def test_chunks_of_more_than_2_to_the_31_logits_are_right():
    """Rows at the end of one chunk whose logits' offsets exceed 2^31."""
    from rlef_kernels.gpu.linear_ppo_loss import linear_ppo_loss_kernels
    from rlef_kernels.gpu.plan import FUSED

    tokens = 2**31 // VOCABULARY + 300
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"generator": generator, "device": "cuda"}
    hidden = torch.randn(tokens, 64, **options).bfloat16().requires_grad_()
    weight = (torch.randn(VOCABULARY, 64, **options) / 8).bfloat16()
    target = torch.randint(VOCABULARY, (tokens,), **options)
    policy = tuple(-12 + torch.randn(3, tokens, **options))
    one_chunk = replace(FUSED, row_bytes=2**33)
    found, expected = (
        torch.autograd.grad(
            linear_ppo_loss_kernels(hidden, weight, target, policy, clip_eps=0.2, plan=plan)[0],
            hidden,
        )[0].float()
        for plan in (one_chunk, FUSED)
    )
    assert (found - expected).norm() < 5e-3 * expected.norm()


def test_the_policy_loss_does_not_wait_for_the_device():
    hidden = torch.ones(1000, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.ones(1000, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    target, numbers = torch.arange(1000, device="cuda"), torch.ones(1000, device="cuda")
    inputs = (hidden, weight, target, numbers, numbers, numbers)
    linear_ppo_loss(*inputs, clip_eps=0.2)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_ppo_loss(*inputs, clip_eps=0.2, denominator=7.0)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
