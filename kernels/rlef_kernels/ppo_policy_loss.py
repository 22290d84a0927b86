"""The clipped policy loss of RLEF, with its truncated importance factor, over masked tokens.

    r_k = pi / pi_old * stop_grad(min(pi / pi_b, 1))                                   (RLEF A.1)
    L   = - sum_k m_k min(r_k A_k, clip(r_k, 1 - eps, 1 + eps) A_k) / denominator

Source: Gehring et al., arXiv 2410.02089.  About 20 T FLOPs and 20 T bytes: here a handful of
elementwise passes, which PyTorch differentiates itself; on NVIDIA GPUs one launch
(`rlef_kernels.gpu.ppo_policy_loss`).

Shape suffixes: T tokens of a packed batch.
"""

import torch

from rlef_kernels.dispatch import uses_kernels
from rlef_kernels.main_grad import check_upstream_is_one, stand_in_gradient
from rlef_kernels.vocab_parallel import SavedForBackward, compute_dtype

Metrics = dict[str, torch.Tensor]


def ppo_policy_loss_reference(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    behaviour_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    clip_eps: float,
    mask_T: torch.Tensor | None = None,
    entropy_T: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """`ppo_policy_loss` in plain PyTorch, for any device."""
    mask_T = torch.ones_like(logprobs_T, dtype=torch.bool) if mask_T is None else mask_T
    count = mask_T.sum().clamp(min=1) if denominator is None else denominator
    logprobs_T = logprobs_T.to(compute_dtype(logprobs_T))
    # masked before exp: a NaN at a masked token reaches neither loss nor gradient
    log_ratio_T = torch.where(mask_T, logprobs_T - old_logprobs_T, 0)
    behaviour_log_ratio_T = torch.where(mask_T, logprobs_T.detach() - behaviour_logprobs_T, 0)
    advantages_T = torch.where(mask_T, advantages_T, 0)
    behaviour_factor_T = behaviour_log_ratio_T.clamp(max=0).exp()
    ratio_T = log_ratio_T.exp() * behaviour_factor_T
    clipped_T = ratio_T.clamp(1 - clip_eps, 1 + clip_eps)
    loss = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T).sum() / count
    with torch.no_grad():
        sums = {
            "ratio": ratio_T * mask_T,
            "clip_fraction": (ratio_T - 1).abs() > clip_eps,
            "behaviour_factor": behaviour_factor_T * mask_T,
            # KL(pi_old || pi): k1 is unbiased; k3 also non-negative and lower in variance
            "approx_kl_k1": -log_ratio_T,
            "approx_kl": log_ratio_T.expm1() - log_ratio_T,
        }
        if entropy_T is not None:
            sums["entropy"] = torch.where(mask_T, entropy_T, 0)
        # a masked token has ratio 1 and log-ratio 0, so it adds to no sum but those masked here
        metrics = {name: terms_T.sum() / count for name, terms_T in sums.items()}
    return loss, {"policy_loss": loss.detach()} | metrics


def ppo_policy_loss(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    behaviour_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    clip_eps: float,
    mask_T: torch.Tensor | None = None,
    entropy_T: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """(loss, metrics), fp32; differentiable with respect to logprobs_T only. No host
    synchronisation.

    mask_T (bool) chooses the response tokens, all by default. `denominator` is a count over the
    whole update, so that losses and metrics add up over micro-batches and ranks; by default the
    unmasked tokens of this call. `entropy_T` is averaged into the metrics.

    Raises ValueError for shapes that differ, a mask that is not bool, clip_eps <= 0.
    """
    tensors = {
        "old_logprobs_T": old_logprobs_T,
        "behaviour_logprobs_T": behaviour_logprobs_T,
        "advantages_T": advantages_T,
        "mask_T": mask_T,
        "entropy_T": entropy_T,
    }
    check_same_shape("logprobs_T", logprobs_T, tensors)
    if not clip_eps > 0:
        raise ValueError(f"clip_eps is {clip_eps}, must be above 0 (RLEF: 0.2)")
    others = (old_logprobs_T, behaviour_logprobs_T, advantages_T)
    if uses_kernels(logprobs_T, *others):
        from rlef_kernels.gpu.ppo_policy_loss import ppo_policy_loss_kernels as compute
    else:
        compute = ppo_policy_loss_reference
    return compute(
        logprobs_T,
        old_logprobs_T.detach(),
        behaviour_logprobs_T.detach(),
        advantages_T.detach(),
        clip_eps=clip_eps,
        mask_T=mask_T,
        entropy_T=entropy_T,
        denominator=denominator,
    )


def check_same_shape(
    name: str, tensor: torch.Tensor, others: dict[str, torch.Tensor | None]
) -> None:
    for other_name, other in others.items():
        if other is None:
            continue
        if other.shape != tensor.shape:
            raise ValueError(
                f"{other_name} has shape {tuple(other.shape)}, {name} {tuple(tensor.shape)}: "
                "they must be equal"
            )
        if other_name.startswith("mask") and other.dtype != torch.bool:
            raise ValueError(f"{other_name} is {other.dtype}; convert it to torch.bool")


METRICS = (
    "policy_loss",
    "ratio",
    "clip_fraction",
    "behaviour_factor",
    "approx_kl_k1",
    "approx_kl",
    "entropy",
)


# old log-probs, behaviour log-probs, advantages
PolicyInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def save_gradients(
    ctx: SavedForBackward,
    weight_VD: torch.Tensor,
    grad_hidden_TD: torch.Tensor | None,
    grad_weight_VD: torch.Tensor | None,
    into_main_grad: bool,
) -> None:
    ctx.accumulate_main_grad = into_main_grad
    ctx.save_for_backward(
        grad_hidden_TD,  # type: ignore[arg-type]  # None is allowed
        weight_VD if into_main_grad else grad_weight_VD,  # type: ignore[arg-type]
    )


def scaled_gradients(
    ctx: SavedForBackward, grad_loss: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dhidden, dweight) times the upstream gradient of the loss, which must be 1 where main_grad
    already holds the weight's."""
    grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
    if ctx.accumulate_main_grad:
        check_upstream_is_one(grad_loss)
        return grad_hidden_TD, stand_in_gradient(grad_weight_VD)
    grads = (
        None if grad is None else grad * grad_loss.to(grad.dtype)
        for grad in (grad_hidden_TD, grad_weight_VD)
    )
    return next(grads), next(grads)
