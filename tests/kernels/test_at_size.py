"""On a GPU only: sizes of real use, where offsets pass 2^31 and memory counts; and that the losses
never wait for the device.

Not yet run: no GPU has been at hand.
"""

import pytest
import torch

from rlef_kernels import (
    advantage_scan,
    clipped_value_loss,
    linear_logprob,
    linear_logprob_reference,
    logits_logprob,
    ppo_policy_loss,
)

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


def test_losses_and_advantages_do_not_wait_for_the_device():
    numbers = torch.ones(1000, device="cuda")
    leaf = numbers.clone().requires_grad_()
    mask, bounds = numbers > 0, torch.tensor([0, 400, 1000], device="cuda")
    ppo_policy_loss(leaf, numbers, numbers, numbers, clip_eps=0.2, mask_T=mask)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = ppo_policy_loss(leaf, numbers, numbers, numbers, clip_eps=0.2, mask_T=mask)
        value, _ = clipped_value_loss(leaf, numbers, numbers, clip_alpha=0.2, denominator=7.0)
        (loss + value).backward()
        advantage_scan(numbers, numbers, bounds)
    finally:
        torch.cuda.set_sync_debug_mode("default")
