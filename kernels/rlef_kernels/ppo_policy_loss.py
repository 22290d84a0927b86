"""RLEF's clipped policy loss of log-probs, and its gradient, for `linear_ppo_loss`.

    r_t = pi / pi_old * stop_grad(min(pi / pi_b, 1))                                   (RLEF A.1)
    L   = - sum_t min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) / denominator
    dL/dlogprob_t = - r_t A_t / denominator, and 0 where the clipped term is the smaller one

Source: Gehring et al., arXiv 2410.02089. About 20 T FLOPs; nothing next to the head's products.

Shape suffixes: T tokens; D hidden size, V vocabulary shard.
"""

import torch

from rlef_kernels.main_grad import check_upstream_is_one, placeholder_gradient
from rlef_kernels.vocab_parallel import SavedForBackward

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


def policy_loss(
    logprobs_T: torch.Tensor,
    entropy_T: torch.Tensor,
    policy_T: PolicyInputs,
    *,
    clip_eps: float,
    denominator: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss and its metrics, each a sum over tokens divided by `denominator`.

    Returns (METRICS as a vector, the gradient of the loss with respect to `logprobs_T`).
    """
    old_logprobs_T, behaviour_logprobs_T, advantages_T = policy_T
    log_ratio_T = logprobs_T - old_logprobs_T
    behaviour_factor_T = (logprobs_T - behaviour_logprobs_T).clamp(max=0).exp()
    ratio_T = log_ratio_T.exp() * behaviour_factor_T
    surrogate_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(1 - clip_eps, 1 + clip_eps) * advantages_T
    terms = (
        -torch.minimum(surrogate_T, clipped_T),
        ratio_T,
        (ratio_T - 1).abs() > clip_eps,
        behaviour_factor_T,
        # KL(pi_old || pi): k1 is unbiased; k3 also non-negative and lower in variance
        -log_ratio_T,
        log_ratio_T.expm1() - log_ratio_T,
        entropy_T,
    )
    metrics = torch.stack([term_T.to(logprobs_T.dtype).sum() / denominator for term_T in terms])
    gradient_T = torch.where(surrogate_T > clipped_T, 0, -surrogate_T) / denominator
    return metrics, gradient_T.to(logprobs_T.dtype)


def save_gradients(
    ctx: SavedForBackward,
    weight_VD: torch.Tensor,
    grad_hidden_TD: torch.Tensor | None,
    grad_weight_VD: torch.Tensor | None,
    into_main_grad: bool,
) -> None:
    """Keep for `scaled_gradients` the gradients that the forward pass has computed."""
    ctx.accumulate_main_grad = into_main_grad
    ctx.save_for_backward(
        grad_hidden_TD,  # type: ignore[arg-type]  # None is allowed
        weight_VD if into_main_grad else grad_weight_VD,  # type: ignore[arg-type]
    )


def scaled_gradients(
    ctx: SavedForBackward, grad_loss: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Multiply the saved gradients by the loss's upstream gradient; returns (dhidden, dweight).

    Raises ValueError if main_grad already contains the weight's and the upstream gradient is not 1
    (on a GPU, a device-side assertion fails).
    """
    grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
    if ctx.accumulate_main_grad:
        check_upstream_is_one(grad_loss)
        return grad_hidden_TD, placeholder_gradient(grad_weight_VD)
    grads = (
        None if grad is None else grad * grad_loss.to(grad.dtype)
        for grad in (grad_hidden_TD, grad_weight_VD)
    )
    return next(grads), next(grads)
