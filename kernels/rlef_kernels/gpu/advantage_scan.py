"""`advantage_scan` on a GPU; the recurrence is in `rlef_kernels.advantage_scan`.

One program a sequence, from its end to its start in steps of B, each an associative scan whose last
result is carried to the next. About 10 N log2(B) FLOPs; 8 N bytes read and 8 N written.

Shape suffixes: N steps of all sequences, in order; B steps of a scan.
"""

import torch
import triton
import triton.language as tl

STEP = 512


@triton.jit
def compose(factor, total, next_factor, next_total):
    """A -> total + factor A of the steps further back, after that of the ones before them."""
    return factor * next_factor, next_total + next_factor * total


@triton.jit
def advantage_scan_kernel(
    rewards_ptr,
    values_ptr,
    cu_seqlens_ptr,
    advantages_ptr,
    returns_ptr,
    gamma,
    lam,
    B: tl.constexpr,
):
    start = tl.load(cu_seqlens_ptr + tl.program_id(0)).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + tl.program_id(0) + 1).to(tl.int64)
    carried = 0.0  # the advantage of the first step of the part that is done
    for done in range(0, end - start, B):
        # backwards: place 0 is the last step that is not done
        step_B = end - 1 - done - tl.arange(0, B)
        inside_B = step_B >= start
        goes_on_B = inside_B & (step_B + 1 < end)
        reward_B = tl.load(rewards_ptr + step_B, mask=inside_B, other=0.0).to(tl.float32)
        value_B = tl.load(values_ptr + step_B, mask=inside_B, other=0.0).to(tl.float32)
        next_value_B = tl.load(values_ptr + step_B + 1, mask=goes_on_B, other=0.0).to(tl.float32)
        delta_B = reward_B + gamma * next_value_B - value_B
        factor_B = tl.where(goes_on_B, gamma * lam, 0.0)
        product_B, total_B = tl.associative_scan((factor_B, delta_B), 0, compose)
        advantage_B = total_B + product_B * carried
        tl.store(advantages_ptr + step_B, advantage_B, mask=inside_B)
        tl.store(returns_ptr + step_B, advantage_B + value_B, mask=inside_B)
        carried = tl.sum(tl.where(tl.arange(0, B) == B - 1, advantage_B, 0.0), 0)


def advantage_scan_kernels(
    rewards_N: torch.Tensor,
    values_N: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    advantages_N = torch.empty(rewards_N.shape, device=rewards_N.device)
    returns_N = torch.empty_like(advantages_N)
    sequences = cu_seqlens.shape[0] - 1
    if sequences:
        advantage_scan_kernel[(sequences,)](
            rewards_N.contiguous(),
            values_N.contiguous(),
            cu_seqlens.contiguous(),
            advantages_N,
            returns_N,
            gamma,
            lam,
            B=STEP,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return advantages_N, returns_N
