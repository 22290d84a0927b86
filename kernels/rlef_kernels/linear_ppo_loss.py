"""RLEF's clipped policy loss from hidden states, with its gradients, in three matrix products.

    z = hidden weight^T / temperature        logprob_t = log softmax(z_t)[target_t]
    L = the loss of `rlef_kernels.ppo_policy_loss` for these log-probs             (RLEF A.1)
    dz_tj = dL/dlogprob_t ([j = target_t] - p_tj)

Because dL/dlogprob_t depends on row t alone, the gradient of a row's logits can be written as soon
as the row's sum of exponentials is known, while its logits are still in memory. So the forward pass
computes the gradients, chunk by chunk of rows, and the backward pass only scales them by its
upstream gradient. FLOPs: three products of 2 T V D each, all in the forward pass; one without
gradients. Bytes that must move: a chunk's hidden states are read and their gradient written once;
the weight is read, and its gradient updated, once per chunk.

Vocab-parallel: a chunk's rows need the sums of every rank before the gradient, so there is one
small all-gather ([C, 4]) per chunk, and dhidden is summed over the group.

Shape suffixes: T tokens, D hidden size, V vocabulary shard, C tokens of a chunk, P partial sums.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from rlef_kernels.dispatch import uses_kernels
from rlef_kernels.main_grad import check_main_grad, weight_gradient_sum
from rlef_kernels.ppo_policy_loss import (
    METRICS,
    PolicyInputs,
    policy_loss,
    save_gradients,
    scaled_gradients,
)
from rlef_kernels.rows import check_mask
from rlef_kernels.vocab_parallel import (
    NUM_PARTIALS,
    SavedForBackward,
    check_chunk,
    check_head,
    check_targets,
    check_temperature,
    chunk_logits,
    chunk_size,
    combine_shards,
    compute_dtype,
    group_size,
    local_columns,
    logits_gradient_,
    reduce_logits_,
    shard_start,
    sum_over_shards_,
)


class ChunkedLinearPpoLoss(torch.autograd.Function):
    """Compute the gradients in the forward pass, and save them."""

    @staticmethod
    def forward(
        ctx: SavedForBackward,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        target_T: torch.Tensor,
        policy_T: PolicyInputs,
        clip_eps: float,
        temperature: float,
        group: ProcessGroup | None,
        denominator: float | torch.Tensor,
        accumulate_main_grad: bool,
        with_gradients: bool,
        chunk_tokens: int,
    ) -> torch.Tensor:
        num_tokens, shard = hidden_TD.shape[0], weight_VD.shape[0]
        dtype, scale = compute_dtype(hidden_TD, weight_VD), 1 / temperature
        needs_hidden, needs_weight = (with_gradients and need for need in ctx.needs_input_grad[:2])
        column_T, owned_T = local_columns(target_T, shard_start(shard, group), shard)
        weight = weight_VD.to(dtype)
        grad_hidden_TD = torch.empty_like(hidden_TD, dtype=dtype) if needs_hidden else None
        into_main_grad = accumulate_main_grad and needs_weight
        grad_weight_VD = weight_gradient_sum(
            weight_VD, dtype, needed=needs_weight, into_main_grad=into_main_grad
        )
        metrics = hidden_TD.new_zeros(len(METRICS), dtype=dtype)
        buffer = hidden_TD.new_empty(min(chunk_tokens, num_tokens), shard, dtype=dtype)
        partials_CP = hidden_TD.new_empty(chunk_tokens, NUM_PARTIALS, dtype=dtype)
        for start in range(0, num_tokens, chunk_tokens):
            rows = slice(start, min(start + chunk_tokens, num_tokens))
            hidden_CD, target = hidden_TD[rows].to(dtype), (column_T[rows], owned_T[rows])
            partials = partials_CP[: hidden_CD.shape[0]]
            logits_CV = chunk_logits(hidden_CD, weight, temperature, buffer)
            reduce_logits_(logits_CV, target, partials)  # leaves z - max z
            own_max_C = partials[:, 0].clone()
            softmax = combine_shards(partials, target_T[rows], shard * group_size(group), group)
            old_T, behaviour_T, advantages_T = policy_T
            values, grad_C = policy_loss(
                softmax.logprob_T,
                softmax.entropy_T,
                (old_T[rows], behaviour_T[rows], advantages_T[rows]),
                clip_eps=clip_eps,
                denominator=denominator,
            )
            metrics += values
            if not (needs_hidden or needs_weight):
                continue
            statistics = (softmax.row_max_T - own_max_C, softmax.sum_exp_T, softmax.entropy_T)
            grad_CV = logits_gradient_(logits_CV, target, statistics, grad_C, None)
            if grad_hidden_TD is not None:
                chunk = grad_hidden_TD[rows]
                torch.addmm(chunk, grad_CV, weight, beta=0, alpha=scale, out=chunk)
            if grad_weight_VD is not None:
                grad_weight_VD.addmm_(grad_CV.t(), hidden_CD, alpha=scale)
        if grad_hidden_TD is not None:
            grad_hidden_TD = sum_over_shards_(grad_hidden_TD, group).to(hidden_TD.dtype)
        if grad_weight_VD is not None and not into_main_grad:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        save_gradients(ctx, weight_VD, grad_hidden_TD, grad_weight_VD, into_main_grad)
        return metrics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: SavedForBackward, grad_metrics: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        return (*scaled_gradients(ctx, grad_metrics[0]), *(None,) * 9)


def linear_ppo_loss_reference(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    policy_T: PolicyInputs,
    *,
    clip_eps: float,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    denominator: float | torch.Tensor | None = None,
    accumulate_main_grad: bool = False,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Compute `linear_ppo_loss` in plain PyTorch, on any device; returns METRICS as a vector."""
    check_chunk(chunk_tokens)
    return ChunkedLinearPpoLoss.apply(
        hidden_TD,
        weight_VD,
        target_T,
        policy_T,
        clip_eps,
        temperature,
        group,
        max(1, hidden_TD.shape[0]) if denominator is None else denominator,
        accumulate_main_grad,
        torch.is_grad_enabled(),
        chunk_tokens or chunk_size(weight_VD.shape[0], hidden_TD.device),
    )


def linear_ppo_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    behaviour_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    clip_eps: float,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    mask_T: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
    accumulate_main_grad: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the clipped policy loss of the target tokens' log-probs.

    Masks, `group` and temperature are as in `linear_logprob`. `denominator` is a count over the
    whole update, so that losses and metrics add up over micro-batches and ranks; by default it is
    the number of unmasked tokens of this call.

    Returns (loss, metrics), fp32; the loss is differentiable with respect to hidden and weight.
    With `accumulate_main_grad` the weight's gradient is added to `weight.main_grad` in the
    *forward* pass, if gradients are enabled; `loss.backward()` must follow, with an upstream
    gradient of 1.

    Raises ValueError as `linear_logprob` does, and for clip_eps <= 0; with
    `accumulate_main_grad`, `backward` raises it if the upstream gradient is not 1 (on a GPU, a
    device-side assertion fails).
    """
    check_head(hidden_TD, weight_VD)
    check_temperature(temperature)
    policy = {
        "old_logprobs_T": old_logprobs_T,
        "behaviour_logprobs_T": behaviour_logprobs_T,
        "advantages_T": advantages_T,
    }
    for name, tensor_T in policy.items():
        if tensor_T.shape != target_T.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor_T.shape)}, target_T {tuple(target_T.shape)}: "
                "give one number per target"
            )
    if not clip_eps > 0:
        raise ValueError(f"clip_eps is {clip_eps}, must be above 0 (RLEF: 0.2)")
    if accumulate_main_grad:
        check_main_grad(weight_VD)
    tensors = [hidden_TD, target_T, *(tensor.detach() for tensor in policy.values())]
    if mask_T is not None:
        check_mask(mask_T, hidden_TD.shape[0])
        rows_R = mask_T.nonzero()[:, 0]
        tensors = [tensor[rows_R] for tensor in tensors]
    hidden_TD, target_T, old_T, behaviour_T, advantages_T = tensors
    check_targets(target_T, hidden_TD.shape[0], weight_VD.shape[0] * group_size(group))
    if uses_kernels(hidden_TD, weight_VD):
        from rlef_kernels.gpu.linear_ppo_loss import linear_ppo_loss_kernels as compute
    else:
        compute = linear_ppo_loss_reference  # type: ignore[assignment]
    values = compute(
        hidden_TD,
        weight_VD,
        target_T,
        (old_T, behaviour_T, advantages_T),
        clip_eps=clip_eps,
        temperature=temperature,
        group=group,
        denominator=denominator,
        accumulate_main_grad=accumulate_main_grad,
    )
    # cloned: Megatron's pipeline frees the loss's memory, and refuses views
    return values[0].clone(), dict(zip(METRICS, values.detach().unbind(), strict=True))
