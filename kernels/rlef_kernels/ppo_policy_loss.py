"""RLEF's clipped policy loss of log-probs, and the autograd function of `linear_ppo_loss`.

    r_t = pi / pi_old * stop_grad(min(pi / pi_b, 1))                                   (RLEF A.1)
    L   = - sum_t min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) / denominator
    dL/dlogprob_t = - r_t A_t / denominator, and 0 where the clipped term is the smaller one

Source: Gehring et al., arXiv 2410.02089. About 20 T FLOPs; nothing next to the head's products.

Shape suffixes: T tokens, D hidden size, V vocabulary shard, C tokens of a chunk, P partial sums.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from rlef_kernels.logits import MakeChunk
from rlef_kernels.main_grad import check_upstream_is_one, placeholder_gradient, weight_gradient_sum
from rlef_kernels.vocab_parallel import (
    SavedForBackward,
    combine_shards,
    compute_dtype,
    group_size,
    shard_start,
)

METRICS = (
    "policy_loss",
    "ratio",
    "clip_fraction",
    "behaviour_factor",
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
        log_ratio_T.expm1() - log_ratio_T,  # k3 of KL(pi_old || pi): non-negative, low in variance
        entropy_T,
    )
    metrics = torch.stack([term_T.to(logprobs_T.dtype).sum() / denominator for term_T in terms])
    gradient_T = torch.where(surrogate_T > clipped_T, 0, -surrogate_T) / denominator
    return metrics, gradient_T.to(logprobs_T.dtype)


class LinearPpoLoss(torch.autograd.Function):
    """Compute the gradients in the forward pass, and save them."""

    @staticmethod
    def forward(
        ctx: SavedForBackward,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        target_T: torch.Tensor,
        policy_T: PolicyInputs,
        make_chunk: MakeChunk,
        loss: Callable[..., tuple[torch.Tensor, torch.Tensor]],  # `policy_loss`, with its settings
        accumulate_main_grad: bool,
        with_gradients: bool,
    ) -> torch.Tensor:
        num_tokens, shard = hidden_TD.shape[0], weight_VD.shape[0]
        needs_hidden, needs_weight = (with_gradients and need for need in ctx.needs_input_grad[:2])
        into_main_grad = accumulate_main_grad and needs_weight
        chunk = make_chunk(hidden_TD, weight_VD, needs_hidden or needs_weight)
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_VD = weight_gradient_sum(
            weight_VD, chunk.sum_dtype, needed=needs_weight, into_main_grad=into_main_grad
        )
        metrics = hidden_TD.new_zeros(len(METRICS), dtype=compute_dtype(hidden_TD, weight_VD))
        column_T = target_T - shard_start(shard, chunk.group)
        vocabulary = shard * group_size(chunk.group)
        for rows in chunk.slices(num_tokens):
            partials_CP = chunk.partials(hidden_TD[rows], column_T[rows])
            softmax = combine_shards(partials_CP, target_T[rows], vocabulary, chunk.group)
            policy_C = tuple(tensor_T[rows] for tensor_T in policy_T)
            values, grad_C = loss(softmax.logprob_T, softmax.entropy_T, policy_C)
            metrics += values
            if needs_hidden or needs_weight:
                part_CD = None if grad_hidden_TD is None else grad_hidden_TD[rows]
                chunk.add_gradients(softmax[:3], grad_C, None, part_CD, grad_weight_VD)
        if grad_weight_VD is not None and not into_main_grad:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        ctx.accumulate_main_grad = into_main_grad
        ctx.save_for_backward(
            grad_hidden_TD,  # type: ignore[arg-type]  # None is allowed
            weight_VD if into_main_grad else grad_weight_VD,  # type: ignore[arg-type]
        )
        return metrics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: SavedForBackward, grad_metrics: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Multiply the gradients by the loss's upstream gradient, which must be 1 if main_grad
        already contains the weight's."""
        grad_loss, (grad_hidden_TD, grad_weight_VD) = grad_metrics[0], ctx.saved_tensors
        if ctx.accumulate_main_grad:
            check_upstream_is_one(grad_loss)
            return grad_hidden_TD, placeholder_gradient(grad_weight_VD), *(None,) * 6
        grads = (
            None if grad is None else grad * grad_loss.to(grad.dtype)
            for grad in (grad_hidden_TD, grad_weight_VD)
        )
        return *grads, *(None,) * 6
