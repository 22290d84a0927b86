"""`ppo_policy_loss` on a GPU: loss, gradient and metrics in one launch; the equations are in
`rlef_kernels.ppo_policy_loss`.

One program walks over all tokens and sums in a fixed order: deterministic without a second launch.
About 30 T FLOPs, 21 to 25 T bytes read and 4 T written, by a single multiprocessor: meant for the
10^3 to 10^5 tokens of a micro-batch, where launching is what takes time.

Shape suffixes: T tokens of a packed batch; B tokens of a step.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from rlef_kernels.vocab_parallel import SavedForBackward

# The places of the output vector; the last one is 1 / denominator.
METRICS = (
    "policy_loss",
    "ratio",
    "clip_fraction",
    "behaviour_factor",
    "approx_kl_k1",
    "approx_kl",
    "entropy",
)
STEP = 1024


@triton.jit
def exp_minus_one_minus(x):
    """exp(x) - 1 - x, by its series near 0, where the difference would cancel."""
    series = x * x * 0.5 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1 - x)


@triton.jit
def smaller(x, y):
    """The hardware's own minimum drops a NaN, and with it the news that something went wrong."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_or_zero(pointer, at, inside):
    # a masked token may hold anything, NaN included: it is never read
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def ppo_policy_loss_kernel(
    logprobs_ptr,
    old_logprobs_ptr,
    behaviour_logprobs_ptr,
    advantages_ptr,
    mask_ptr,
    entropy_ptr,
    denominator_ptr,
    out_ptr,
    gradient_ptr,
    num_tokens,
    denominator,
    clip_eps,
    B: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """The denominator: at `denominator_ptr`, or `denominator`, or (COUNTS) the unmasked tokens."""
    loss_B, ratio_B = tl.zeros((B,), tl.float32), tl.zeros((B,), tl.float32)
    clipped_B, factor_B = tl.zeros((B,), tl.float32), tl.zeros((B,), tl.float32)
    k1_B, k3_B = tl.zeros((B,), tl.float32), tl.zeros((B,), tl.float32)
    entropy_B, count_B = tl.zeros((B,), tl.float32), tl.zeros((B,), tl.float32)
    for first in range(0, num_tokens, B):
        at_B = first + tl.arange(0, B)
        inside_B = at_B < num_tokens
        if mask_ptr is not None:
            inside_B &= tl.load(mask_ptr + at_B, mask=inside_B, other=0).to(tl.int1)
        ones_B = inside_B.to(tl.float32)
        log_probs_B = load_or_zero(logprobs_ptr, at_B, inside_B)
        advantage_B = load_or_zero(advantages_ptr, at_B, inside_B)
        log_ratio_B = log_probs_B - load_or_zero(old_logprobs_ptr, at_B, inside_B)
        behaviour_B = log_probs_B - load_or_zero(behaviour_logprobs_ptr, at_B, inside_B)
        truncated_B = tl.exp(smaller(behaviour_B, 0.0))
        r_B = tl.exp(log_ratio_B) * truncated_B
        surrogate_B = r_B * advantage_B
        limit_B = smaller(larger(r_B, 1 - clip_eps), 1 + clip_eps) * advantage_B
        # where the clipped term is the smaller one, nothing depends on the policy
        gradient_B = tl.where(surrogate_B > limit_B, 0.0, -surrogate_B)
        tl.store(gradient_ptr + at_B, gradient_B, mask=at_B < num_tokens)
        loss_B -= smaller(surrogate_B, limit_B)
        ratio_B += r_B * ones_B
        clipped_B += tl.where(tl.abs(r_B - 1) > clip_eps, ones_B, 0.0)
        factor_B += truncated_B * ones_B
        k1_B -= log_ratio_B
        k3_B += exp_minus_one_minus(log_ratio_B)
        if entropy_ptr is not None:
            entropy_B += load_or_zero(entropy_ptr, at_B, inside_B)
        count_B += ones_B
    if denominator_ptr is not None:
        scale = 1 / tl.load(denominator_ptr).to(tl.float32)
    elif COUNTS:
        scale = 1 / tl.maximum(tl.sum(count_B, 0), 1.0)
    else:
        scale = 1 / denominator
    tl.store(out_ptr, tl.sum(loss_B, 0) * scale)
    tl.store(out_ptr + 1, tl.sum(ratio_B, 0) * scale)
    tl.store(out_ptr + 2, tl.sum(clipped_B, 0) * scale)
    tl.store(out_ptr + 3, tl.sum(factor_B, 0) * scale)
    tl.store(out_ptr + 4, tl.sum(k1_B, 0) * scale)
    tl.store(out_ptr + 5, tl.sum(k3_B, 0) * scale)
    tl.store(out_ptr + 6, tl.sum(entropy_B, 0) * scale)
    tl.store(out_ptr + 7, scale)


def launch_policy_loss(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    behaviour_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    clip_eps: float,
    mask_T: torch.Tensor | None,
    entropy_T: torch.Tensor | None,
    denominator: float | torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, gradient_T): METRICS and 1 / denominator; the gradient of loss times denominator."""
    tensors = (logprobs_T, old_logprobs_T, behaviour_logprobs_T, advantages_T, mask_T, entropy_T)
    on_device = isinstance(denominator, torch.Tensor)
    out = torch.empty(len(METRICS) + 1, device=logprobs_T.device)
    gradient_T = torch.empty(logprobs_T.shape, device=logprobs_T.device)
    ppo_policy_loss_kernel[(1,)](
        *(None if tensor is None else tensor.contiguous() for tensor in tensors),
        denominator if on_device else None,
        out,
        gradient_T,
        logprobs_T.shape[0],
        1.0 if on_device or denominator is None else float(denominator),
        clip_eps,
        B=STEP,
        COUNTS=denominator is None,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return out, gradient_T


class PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: SavedForBackward,
        logprobs_T: torch.Tensor,
        others: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        clip_eps: float,
        mask_T: torch.Tensor | None,
        entropy_T: torch.Tensor | None,
        denominator: float | torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, gradient_T = launch_policy_loss(
            logprobs_T,
            *others,
            clip_eps=clip_eps,
            mask_T=mask_T,
            entropy_T=entropy_T,
            denominator=denominator,
        )
        ctx.save_for_backward(out, gradient_T)
        ctx.mark_non_differentiable(out)
        return out[0].clone(), out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: SavedForBackward, grad_loss: torch.Tensor, grad_out: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        out, gradient_T = ctx.saved_tensors
        return gradient_T * (grad_loss * out[-1]), None, None, None, None, None


def ppo_policy_loss_kernels(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    behaviour_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    clip_eps: float,
    mask_T: torch.Tensor | None = None,
    entropy_T: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    others = (old_logprobs_T, behaviour_logprobs_T, advantages_T)
    loss, out = PolicyLoss.apply(logprobs_T, others, clip_eps, mask_T, entropy_T, denominator)
    metrics = dict(zip(METRICS, out.unbind()[:-1], strict=True))
    if entropy_T is None:
        del metrics["entropy"]
    return loss, metrics
