"""Log-prob of the target and entropy from hidden states and the LM head; the logits are never
stored whole.

    z = hidden weight^T / temperature        p = softmax(z)
    logprob_t = log p_t[target_t]            entropy_t = - sum_j p_tj log p_tj

    dz_tj    = g_t [j = target_t] - p_tj (g_t + h_t (log p_tj + entropy_t)),  g and h the upstream
    gradients dhidden  = dz weight / temperature       dweight = dz^T hidden / temperature

FLOPs: P = 2 T V D a matrix product; forward P, backward 3 P (the logits are computed again). Bytes
that must move, forward: hidden and weight read once, 4 T numbers written. Kept for backward: the
inputs and 3 T numbers.

Vocab-parallel (Megatron's word): each rank of `group` holds an equal shard of the rows of the head.
Forward gathers [T, 4] numbers, backward sums dhidden over the group.

Tuned Triton kernels are not there yet: CPU and CUDA tensors both run the chunked PyTorch form.

Shape suffixes: T tokens, D hidden size, V vocabulary shard, C tokens of a chunk, P partial sums.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup

from rlef_kernels.vocab_parallel import (
    NUM_PARTIALS,
    check_targets,
    check_temperature,
    chunk_size,
    combine_shards,
    compute_dtype,
    group_size,
    local_columns,
    logits_gradient_,
    reduce_logits_,
    shard_start,
)


class ChunkedLinearLogprob(torch.autograd.Function):
    """Saves the inputs and three numbers a token; backward computes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
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
            reduce_logits_(logits_CV, column_T[rows], owned_T[rows], partials_TP[rows])
        softmax = combine_shards(partials_TP, target_T, shard * group_size(group), group)
        ctx.save_for_backward(hidden_TD, weight_VD, column_T, owned_T, *softmax[:3])
        ctx.temperature, ctx.group, ctx.chunk_tokens = temperature, group, chunk_tokens
        ctx.accumulate_main_grad = accumulate_main_grad
        ctx.set_materialize_grads(False)  # an output that the loss does not use costs nothing
        return softmax.logprob_T, softmax.entropy_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_logprob_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, weight_VD, column_T, owned_T, *softmax = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        if grad_logprob_T is None and grad_entropy_T is None:
            return (None,) * 7
        dtype = softmax[0].dtype
        weight, scale = weight_VD.to(dtype), 1 / ctx.temperature
        grad_hidden_TD = torch.empty_like(hidden_TD, dtype=dtype) if needs_hidden else None
        into_main_grad = ctx.accumulate_main_grad and needs_weight
        grad_weight_VD = None
        if into_main_grad:
            grad_weight_VD = weight_VD.main_grad
        elif needs_weight:
            grad_weight_VD = torch.zeros_like(weight)
        num_tokens, step = hidden_TD.shape[0], ctx.chunk_tokens
        buffer = hidden_TD.new_empty(min(step, num_tokens), weight.shape[0], dtype=dtype)
        for start in range(0, num_tokens, step):
            rows = slice(start, start + step)
            hidden_CD = hidden_TD[rows].to(dtype)
            grad_CV = logits_gradient_(
                chunk_logits(hidden_CD, weight, ctx.temperature, buffer),
                column_T[rows],
                owned_T[rows],
                (softmax[0][rows], softmax[1][rows], softmax[2][rows]),
                None if grad_logprob_T is None else grad_logprob_T[rows],
                None if grad_entropy_T is None else grad_entropy_T[rows],
            )
            if grad_hidden_TD is not None:
                chunk = grad_hidden_TD[rows]
                torch.addmm(chunk, grad_CV, weight, beta=0, alpha=scale, out=chunk)
            if grad_weight_VD is not None:
                grad_weight_VD.addmm_(grad_CV.t(), hidden_CD, alpha=scale)
        if grad_hidden_TD is not None:
            if group_size(ctx.group) > 1:
                # Tensor-parallel group: sums each shard's part of dhidden [T, D].
                dist.all_reduce(grad_hidden_TD, group=ctx.group)
            grad_hidden_TD = grad_hidden_TD.to(hidden_TD.dtype)
        if into_main_grad:
            grad_weight_VD = stand_in_gradient(weight_VD)
        elif grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None, None


def chunk_logits(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, temperature: float, buffer: torch.Tensor
) -> torch.Tensor:
    """hidden weight^T / temperature, written into the first rows of `buffer`."""
    out = buffer[: hidden_CD.shape[0]]
    return torch.addmm(out, hidden_CD, weight_VD.t(), beta=0, alpha=1 / temperature, out=out)


def stand_in_gradient(weight_VD: torch.Tensor) -> torch.Tensor | None:
    """Tells Megatron's data-parallel hook that main_grad already holds the gradient.

    The hook asserts that `.grad` is not None and, with this flag set, drops it unread.
    """
    if not hasattr(weight_VD, "grad_added_to_main_grad"):
        return None
    weight_VD.grad_added_to_main_grad = True
    return torch.zeros_like(weight_VD)


def linear_logprob_reference(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    accumulate_main_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_logprob` in plain PyTorch, for any device; arithmetic in fp32, in fp64 for fp64
    inputs.
    """
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
    chunk_tokens: int | None = None,
    accumulate_main_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprob_T, entropy_T) of softmax(hidden weight^T / temperature), fp32, in nats.

    Differentiable in both outputs, with respect to hidden and weight. Under `group`, weight_VD is
    this rank's shard (equal on all ranks), targets are ids of the whole vocabulary, hidden and
    targets are the same on every rank, and every rank must call, with an empty batch too; the
    gradient of hidden comes back summed over the group.

    `chunk_tokens` bounds the memory: chunk_tokens x V numbers, twice. With `accumulate_main_grad`
    the gradient of the weight is added to `weight.main_grad` (fp32, Megatron's) instead of being
    returned.

    Raises ValueError for shapes that do not fit, targets outside the vocabulary (on a GPU: NaN),
    temperature <= 0.
    """
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden_TD {tuple(hidden_TD.shape)} and weight_VD {tuple(weight_VD.shape)} must be two "
            "matrices of the same width; flatten batch and sequence dimensions first"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, must be at least 1")
    if accumulate_main_grad and getattr(weight_VD, "main_grad", None) is None:
        raise ValueError(
            "accumulate_main_grad needs weight.main_grad, which only Megatron's DDP makes"
        )
    check_temperature(temperature)
    check_targets(target_T, hidden_TD.shape[0], weight_VD.shape[0] * group_size(group))
    return linear_logprob_reference(
        hidden_TD,
        weight_VD,
        target_T,
        temperature=temperature,
        group=group,
        chunk_tokens=chunk_tokens,
        accumulate_main_grad=accumulate_main_grad,
    )
