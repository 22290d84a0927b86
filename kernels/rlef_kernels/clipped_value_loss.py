"""The clipped value loss of RLEF, over masked values.

    L = 1/2 sum_t m_t max((V - G)^2, (clip(V, V_old - alpha, V_old + alpha) - G)^2) / denominator
    (RLEF A.1)

Source: Gehring et al., arXiv 2410.02089. About 10 N FLOPs and 16 N bytes, which PyTorch
differentiates itself; on NVIDIA GPUs one launch (`rlef_kernels.gpu.clipped_value_loss`).

Shape suffixes: N values, one a turn (or one a response token).
"""

import torch

from rlef_kernels.dispatch import uses_kernels
from rlef_kernels.ppo_policy_loss import Metrics, check_same_shape
from rlef_kernels.vocab_parallel import compute_dtype


def clipped_value_loss_reference(
    values_N: torch.Tensor,
    old_values_N: torch.Tensor,
    returns_N: torch.Tensor,
    *,
    clip_alpha: float,
    mask_N: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """`clipped_value_loss` in plain PyTorch, for any device."""
    mask_N = torch.ones_like(values_N, dtype=torch.bool) if mask_N is None else mask_N
    count = mask_N.sum().clamp(min=1) if denominator is None else denominator
    # masked first: what stands at masked values, NaN included, reaches neither loss nor gradient
    values_N = torch.where(mask_N, values_N.to(compute_dtype(values_N)), 0)
    old_values_N = torch.where(mask_N, old_values_N, 0)
    returns_N = torch.where(mask_N, returns_N, 0)
    clipped_N = torch.clamp(values_N, old_values_N - clip_alpha, old_values_N + clip_alpha)
    errors_N = torch.maximum((values_N - returns_N).square(), (clipped_N - returns_N).square())
    loss = 0.5 * errors_N.sum() / count
    with torch.no_grad():
        moved_N = (values_N - old_values_N).abs() > clip_alpha
        metrics = {"value_loss": loss.detach(), "value_clip_fraction": moved_N.sum() / count}
    return loss, metrics


def clipped_value_loss(
    values_N: torch.Tensor,
    old_values_N: torch.Tensor,
    returns_N: torch.Tensor,
    *,
    clip_alpha: float,
    mask_N: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """(loss, metrics), fp32; differentiable with respect to values_N only. No host synchronisation.

    `denominator` is a count over the whole update, so that losses and metrics add up over micro-
    batches and ranks; by default the unmasked values of this call.

    Raises ValueError for shapes that differ, a mask that is not bool, clip_alpha <= 0.
    """
    tensors = {"old_values_N": old_values_N, "returns_N": returns_N, "mask_N": mask_N}
    check_same_shape("values_N", values_N, tensors)
    if not clip_alpha > 0:
        raise ValueError(f"clip_alpha is {clip_alpha}, must be above 0 (RLEF: 0.2)")
    if uses_kernels(values_N, old_values_N, returns_N):
        from rlef_kernels.gpu.clipped_value_loss import clipped_value_loss_kernels as compute
    else:
        compute = clipped_value_loss_reference
    return compute(
        values_N,
        old_values_N.detach(),
        returns_N.detach(),
        clip_alpha=clip_alpha,
        mask_N=mask_N,
        denominator=denominator,
    )
