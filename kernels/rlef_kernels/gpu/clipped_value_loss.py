"""`clipped_value_loss` on a GPU: loss, gradient and metrics in one launch; the equations are in
`rlef_kernels.clipped_value_loss`.

One program walks over all values and sums in a fixed order. About 15 N FLOPs, 12 to 13 N bytes read
and 4 N written.

Shape suffixes: N values; B values of a step.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from rlef_kernels.gpu.ppo_policy_loss import STEP, larger, load_or_zero, smaller
from rlef_kernels.vocab_parallel import SavedForBackward


@triton.jit
def clipped_value_loss_kernel(
    values_ptr,
    old_values_ptr,
    returns_ptr,
    mask_ptr,
    denominator_ptr,
    out_ptr,
    gradient_ptr,
    num_values,
    denominator,
    clip_alpha,
    B: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """out: loss, clip fraction, 1 / denominator (given as to the policy loss)."""
    loss_B, clipped_B = tl.zeros((B,), tl.float32), tl.zeros((B,), tl.float32)
    count_B = tl.zeros((B,), tl.float32)
    for first in range(0, num_values, B):
        at_B = first + tl.arange(0, B)
        inside_B = at_B < num_values
        if mask_ptr is not None:
            inside_B &= tl.load(mask_ptr + at_B, mask=inside_B, other=0).to(tl.int1)
        value_B = load_or_zero(values_ptr, at_B, inside_B)
        old_B = load_or_zero(old_values_ptr, at_B, inside_B)
        return_B = load_or_zero(returns_ptr, at_B, inside_B)
        error_B = value_B - return_B
        limited_B = smaller(larger(value_B, old_B - clip_alpha), old_B + clip_alpha)
        clipped_error_B = limited_B - return_B
        squared_B, clipped_squared_B = error_B * error_B, clipped_error_B * clipped_error_B
        # where the clipped error is the larger one, the loss does not depend on the value
        gradient_B = tl.where(squared_B < clipped_squared_B, 0.0, error_B)
        tl.store(gradient_ptr + at_B, gradient_B, mask=at_B < num_values)
        loss_B += 0.5 * larger(squared_B, clipped_squared_B)
        clipped_B += tl.where(tl.abs(value_B - old_B) > clip_alpha, 1.0, 0.0)
        count_B += inside_B.to(tl.float32)
    if denominator_ptr is not None:
        scale = 1 / tl.load(denominator_ptr).to(tl.float32)
    elif COUNTS:
        scale = 1 / tl.maximum(tl.sum(count_B, 0), 1.0)
    else:
        scale = 1 / denominator
    tl.store(out_ptr, tl.sum(loss_B, 0) * scale)
    tl.store(out_ptr + 1, tl.sum(clipped_B, 0) * scale)
    tl.store(out_ptr + 2, scale)


class ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: SavedForBackward,
        values_N: torch.Tensor,
        old_values_N: torch.Tensor,
        returns_N: torch.Tensor,
        clip_alpha: float,
        mask_N: torch.Tensor | None,
        denominator: float | torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        on_device = isinstance(denominator, torch.Tensor)
        out = torch.empty(3, device=values_N.device)
        gradient_N = torch.empty(values_N.shape, device=values_N.device)
        tensors = (values_N, old_values_N, returns_N, mask_N)
        clipped_value_loss_kernel[(1,)](
            *(None if tensor is None else tensor.contiguous() for tensor in tensors),
            denominator if on_device else None,
            out,
            gradient_N,
            values_N.shape[0],
            1.0 if on_device or denominator is None else float(denominator),
            clip_alpha,
            B=STEP,
            COUNTS=denominator is None,
            num_warps=8,
            enable_fp_fusion=True,
        )
        ctx.save_for_backward(out, gradient_N)
        ctx.mark_non_differentiable(out)
        return out[0].clone(), out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: SavedForBackward, grad_loss: torch.Tensor, grad_out: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        out, gradient_N = ctx.saved_tensors
        return gradient_N * (grad_loss * out[-1]), None, None, None, None, None


def clipped_value_loss_kernels(
    values_N: torch.Tensor,
    old_values_N: torch.Tensor,
    returns_N: torch.Tensor,
    *,
    clip_alpha: float,
    mask_N: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, out = ValueLoss.apply(values_N, old_values_N, returns_N, clip_alpha, mask_N, denominator)
    return loss, {"value_loss": out[0], "value_clip_fraction": out[1]}
