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

For bf16 or fp32 on NVIDIA GPUs, the kernels of `rlef_kernels.gpu.head` compute a chunk's logits and
gradients; the PyTorch form in `rlef_kernels.logits` defines them and runs everywhere else.

Shape suffixes: T tokens, D hidden size, V vocabulary shard, R rows with an upstream gradient, C
tokens of a chunk.
"""

from functools import partial

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from rlef_kernels.dispatch import chunk_maker
from rlef_kernels.logits import LogitsChunk, MakeChunk
from rlef_kernels.main_grad import check_main_grad, placeholder_gradient, weight_gradient_sum
from rlef_kernels.rows import check_mask, rows_with_gradient, scatter_rows, select_rows
from rlef_kernels.vocab_parallel import (
    SavedForBackward,
    check_head,
    check_targets,
    check_temperature,
    combine_shards,
    group_size,
    shard_start,
)


class LinearLogprob(torch.autograd.Function):
    """Save the inputs and three numbers per token; backward recomputes each chunk's logits."""

    @staticmethod
    def forward(
        ctx: SavedForBackward,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        target_T: torch.Tensor,
        make_chunk: MakeChunk,
        accumulate_main_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, shard = hidden_TD.shape[0], weight_VD.shape[0]
        chunk = make_chunk(hidden_TD, weight_VD, False)
        column_T = target_T - shard_start(shard, chunk.group)
        parts = [
            chunk.partials(hidden_TD[rows], column_T[rows]) for rows in chunk.slices(num_tokens)
        ]
        vocabulary = shard * group_size(chunk.group)
        softmax = combine_shards(torch.cat(parts), target_T, vocabulary, chunk.group)
        ctx.save_for_backward(hidden_TD, weight_VD, column_T, *softmax[:3])
        ctx.make_chunk, ctx.accumulate_main_grad = make_chunk, accumulate_main_grad
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
            return (None,) * 5
        hidden_TD, weight_VD, *of_rows = ctx.saved_tensors
        rows_R = rows_with_gradient(grad_logprob_T, grad_entropy_T)
        hidden_RD = select_rows(hidden_TD, rows_R)
        # column, max, sum of exp and entropy of each row; upstream gradients
        numbers = [
            None if tensor is None else select_rows(tensor, rows_R)
            for tensor in (*of_rows, grad_logprob_T, grad_entropy_T)
        ]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        into_main_grad = ctx.accumulate_main_grad and needs_weight
        chunk = ctx.make_chunk(hidden_RD, weight_VD, True)
        grad_hidden_RD = torch.empty_like(hidden_RD) if needs_hidden else None
        grad_weight_VD = weight_gradient_sum(
            weight_VD, chunk.sum_dtype, needed=needs_weight, into_main_grad=into_main_grad
        )
        for rows in chunk.slices(len(hidden_RD)):
            column_C, *statistics, g_C, h_C = (
                None if tensor is None else tensor[rows] for tensor in numbers
            )
            chunk.compute(hidden_RD[rows], column_C)
            part_CD = None if grad_hidden_RD is None else grad_hidden_RD[rows]
            chunk.add_gradients(statistics, g_C, h_C, part_CD, grad_weight_VD)
        del chunk  # its logits, before a placeholder as large as the weight is made
        if grad_hidden_RD is not None:
            grad_hidden_RD = scatter_rows(grad_hidden_RD, rows_R, len(hidden_TD))
        if into_main_grad:
            grad_weight_VD = placeholder_gradient(weight_VD)
        elif grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_RD, grad_weight_VD, None, None, None


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

    `chunk_tokens` bounds the memory of the logits: 2 chunk_tokens V numbers.
    """
    make_chunk = partial(
        LogitsChunk, temperature=temperature, group=group, chunk_tokens=chunk_tokens
    )
    return LinearLogprob.apply(hidden_TD, weight_VD, target_T, make_chunk, accumulate_main_grad)


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

    Returns (logprob_T, entropy_T), fp32 (fp64 for fp64 inputs); hidden and weight get gradients.

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
    make_chunk = chunk_maker(hidden_TD, weight_VD, temperature=temperature, group=group)
    logprob_T, entropy_T = LinearLogprob.apply(
        hidden_TD, weight_VD, target_T, make_chunk, accumulate_main_grad
    )
    return (
        scatter_rows(logprob_T, rows_R, num_tokens),
        scatter_rows(entropy_T, rows_R, num_tokens),
    )
