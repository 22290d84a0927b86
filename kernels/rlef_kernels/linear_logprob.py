"""Log-prob of the target and entropy from hidden states and head, without storing all logits.

    z = hidden weight^T / temperature        p = softmax(z)
    logprob_t = log p_t[target_t]            entropy_t = - sum_j p_tj log p_tj

With upstream gradients g of logprob and h of entropy:

    dz_tj   = g_t [j = target_t] - p_tj (g_t + h_t (log p_tj + entropy_t))
    dhidden = dz weight / temperature        dweight = dz^T hidden / temperature

FLOPs: P = 2 T V D per matrix product; forward P, backward 3 P (the logits are recomputed). Bytes
that must move, forward: hidden and weight read once, 4 T numbers written. Saved for backward: the
inputs and 3 T numbers.

Vocab-parallel: each rank of `group` holds an equal shard of the rows of the head. Forward gathers
[T, 4] numbers, backward sums dhidden over the group.

On NVIDIA GPUs `rlef_kernels.gpu.linear_logprob` computes this; the chunked PyTorch form here
defines it and runs everywhere else.

Shape suffixes: T tokens, D hidden size, V vocabulary shard, C tokens of a chunk, P partial sums.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from rlef_kernels.dispatch import uses_kernels
from rlef_kernels.main_grad import check_main_grad, placeholder_gradient, weight_gradient_sum
from rlef_kernels.rows import check_mask, rows_with_gradient, scatter_rows, select_rows
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


class ChunkedLinearLogprob(torch.autograd.Function):
    """Save the inputs and three numbers per token; backward recomputes each chunk's logits."""

    @staticmethod
    def forward(
        ctx: SavedForBackward,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        target_T: torch.Tensor,
        temperature: float,
        group: ProcessGroup | None,
        chunk_tokens: int,
        accumulate_main_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shard = weight_VD.shape[0]
        dtype = compute_dtype(hidden_TD, weight_VD)
        column_T, owned_T = local_columns(target_T, shard_start(shard, group), shard)
        weight = weight_VD.to(dtype)
        partials_TP = hidden_TD.new_empty(hidden_TD.shape[0], NUM_PARTIALS, dtype=dtype)
        buffer = hidden_TD.new_empty(min(chunk_tokens, hidden_TD.shape[0]), shard, dtype=dtype)
        for start in range(0, hidden_TD.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits_CV = chunk_logits(hidden_TD[rows].to(dtype), weight, temperature, buffer)
            reduce_logits_(logits_CV, (column_T[rows], owned_T[rows]), partials_TP[rows])
        softmax = combine_shards(partials_TP, target_T, shard * group_size(group), group)
        ctx.save_for_backward(hidden_TD, weight_VD, column_T, owned_T, *softmax[:3])
        ctx.temperature, ctx.group, ctx.chunk_tokens = temperature, group, chunk_tokens
        ctx.accumulate_main_grad = accumulate_main_grad
        ctx.set_materialize_grads(False)  # an output without a gradient costs nothing
        return softmax.logprob_T, softmax.entropy_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: SavedForBackward,
        grad_logprob_T: torch.Tensor | None,
        grad_entropy_T: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        if grad_logprob_T is None and grad_entropy_T is None:
            return (None,) * 7
        whole_TD, weight_VD, *of_rows = ctx.saved_tensors
        rows_R = rows_with_gradient(grad_logprob_T, grad_entropy_T)
        hidden_TD, column_T, owned_T, row_max_T, sum_exp_T, entropy_T = (
            select_rows(tensor, rows_R) for tensor in (whole_TD, *of_rows)
        )
        if grad_logprob_T is not None:
            grad_logprob_T = select_rows(grad_logprob_T, rows_R)
        if grad_entropy_T is not None:
            grad_entropy_T = select_rows(grad_entropy_T, rows_R)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype, scale = row_max_T.dtype, 1 / ctx.temperature
        weight = weight_VD.to(dtype)
        grad_hidden_TD = torch.empty_like(hidden_TD, dtype=dtype) if needs_hidden else None
        into_main_grad = ctx.accumulate_main_grad and needs_weight
        grad_weight_VD = weight_gradient_sum(
            weight_VD, dtype, needed=needs_weight, into_main_grad=into_main_grad
        )
        num_tokens, step = hidden_TD.shape[0], ctx.chunk_tokens
        buffer = hidden_TD.new_empty(min(step, num_tokens), weight.shape[0], dtype=dtype)
        for start in range(0, num_tokens, step):
            rows = slice(start, start + step)
            hidden_CD = hidden_TD[rows].to(dtype)
            grad_CV = logits_gradient_(
                chunk_logits(hidden_CD, weight, ctx.temperature, buffer),
                (column_T[rows], owned_T[rows]),
                (row_max_T[rows], sum_exp_T[rows], entropy_T[rows]),
                None if grad_logprob_T is None else grad_logprob_T[rows],
                None if grad_entropy_T is None else grad_entropy_T[rows],
            )
            if grad_hidden_TD is not None:
                chunk = grad_hidden_TD[rows]
                torch.addmm(chunk, grad_CV, weight, beta=0, alpha=scale, out=chunk)
            if grad_weight_VD is not None:
                grad_weight_VD.addmm_(grad_CV.t(), hidden_CD, alpha=scale)
        if grad_hidden_TD is not None:
            grad_hidden_TD = sum_over_shards_(grad_hidden_TD, ctx.group).to(hidden_TD.dtype)
            grad_hidden_TD = scatter_rows(grad_hidden_TD, rows_R, whole_TD.shape[0])
        if into_main_grad:
            grad_weight_VD = placeholder_gradient(weight_VD)
        elif grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None, None


def linear_logprob_reference(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    accumulate_main_grad: bool = False,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `linear_logprob` in plain PyTorch, on any device, in fp32 (fp64 for fp64 inputs).

    `chunk_tokens` bounds the memory: 2 chunk_tokens V numbers.
    """
    check_chunk(chunk_tokens)
    step = chunk_tokens or chunk_size(weight_VD.shape[0], hidden_TD.device)
    return ChunkedLinearLogprob.apply(
        hidden_TD, weight_VD, target_T, temperature, group, step, accumulate_main_grad
    )


def linear_logprob(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    mask_T: torch.Tensor | None = None,
    accumulate_main_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-prob and entropy of softmax(hidden weight^T / temperature), in nats.

    With `group`, weight_VD is this rank's shard, of equal size on all ranks, and targets are ids of
    the whole vocabulary. Hidden, targets, mask and upstream gradients are the same on every rank.
    Every rank must call it, even with an empty batch; the gradient of hidden is summed over the
    group.

    Tokens outside `mask_T` (bool) get zeros and no gradient, whatever their targets, and cost
    nothing. Tokens whose upstream gradients are zero cost nothing in the backward pass. With
    `accumulate_main_grad` the gradient of the weight is added to Megatron's `weight.main_grad`
    (fp32) instead of being returned.

    Returns (logprob_T, entropy_T), fp32, both differentiable with respect to hidden and weight.

    Raises ValueError if shapes do not match, a target is outside the vocabulary (on a GPU its
    log-prob is NaN instead), or temperature <= 0.
    """
    check_head(hidden_TD, weight_VD)
    if accumulate_main_grad:
        check_main_grad(weight_VD)
    check_temperature(temperature)
    num_tokens = hidden_TD.shape[0]
    rows_R = None
    if mask_T is not None:
        check_mask(mask_T, num_tokens)
        rows_R = mask_T.nonzero()[:, 0]
        hidden_TD, target_T = hidden_TD[rows_R], target_T[rows_R]
    check_targets(target_T, hidden_TD.shape[0], weight_VD.shape[0] * group_size(group))
    if uses_kernels(hidden_TD, weight_VD):
        from rlef_kernels.gpu.linear_logprob import linear_logprob_kernels as compute
    else:
        compute = linear_logprob_reference  # type: ignore[assignment]
    logprob_T, entropy_T = compute(
        hidden_TD,
        weight_VD,
        target_T,
        temperature=temperature,
        group=group,
        accumulate_main_grad=accumulate_main_grad,
    )
    return (
        scatter_rows(logprob_T, rows_R, num_tokens),
        scatter_rows(entropy_T, rows_R, num_tokens),
    )
