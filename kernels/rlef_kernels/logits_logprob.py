"""Log-prob of the target and entropy from logits that are already there, vocab-parallel.

    z = logits / temperature        logprob_t = log softmax(z_t)[target_t]
    entropy_t = - sum_j p_tj log p_tj

    dlogits_tj = (g_t [j = target_t] - p_tj (g_t + h_t (log p_tj + entropy_t))) / temperature

with upstream gradients g of logprob and h of entropy. About 8 T V FLOPs; the bytes decide: logits
read once forward, read and written once backward. Where hidden states and head are at hand,
`linear_logprob` needs no logits at all.

On NVIDIA GPUs `rlef_kernels.gpu.logits_logprob` computes this; the chunked PyTorch form here
defines it and runs everywhere else.

Shape suffixes: T tokens, V vocabulary shard, C tokens of a chunk.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from rlef_kernels.dispatch import uses_kernels
from rlef_kernels.vocab_parallel import (
    NUM_PARTIALS,
    SavedForBackward,
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

# -inf would make 0 * inf = NaN. exp of this is 0, and it times any sane gradient is finite.
LOWEST_LOGIT = -1e30


class ChunkedLogitsLogprob(torch.autograd.Function):
    """Works on copies of a few rows at a time: bf16 logits never exist in fp32 as a whole."""

    @staticmethod
    def forward(
        ctx: SavedForBackward,
        logits_TV: torch.Tensor,
        target_T: torch.Tensor,
        temperature: float,
        group: ProcessGroup | None,
        inplace_backward: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, shard = logits_TV.shape
        step = chunk_size(shard, logits_TV.device)
        column_T, owned_T = local_columns(target_T, shard_start(shard, group), shard)
        dtype = compute_dtype(logits_TV)
        partials_TP = logits_TV.new_empty(num_tokens, NUM_PARTIALS, dtype=dtype)
        for start in range(0, num_tokens, step):
            rows = slice(start, start + step)
            logits_CV = scaled_copy(logits_TV[rows], dtype, temperature)
            reduce_logits_(logits_CV, (column_T[rows], owned_T[rows]), partials_TP[rows])
        softmax = combine_shards(partials_TP, target_T, shard * group_size(group), group)
        ctx.save_for_backward(logits_TV, column_T, owned_T, *softmax[:3])
        ctx.temperature, ctx.chunk_tokens, ctx.inplace = temperature, step, inplace_backward
        ctx.set_materialize_grads(False)
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
        logits_TV, column_T, owned_T, row_max_T, sum_exp_T, entropy_T = ctx.saved_tensors
        grad_TV = logits_TV.detach() if ctx.inplace else torch.empty_like(logits_TV)
        for start in range(0, logits_TV.shape[0], ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            grad_CV = logits_gradient_(
                scaled_copy(logits_TV[rows], row_max_T.dtype, ctx.temperature),
                (column_T[rows], owned_T[rows]),
                (row_max_T[rows], sum_exp_T[rows], entropy_T[rows]),
                None if grad_logprob_T is None else grad_logprob_T[rows],
                None if grad_entropy_T is None else grad_entropy_T[rows],
            )
            grad_TV[rows] = grad_CV.mul_(1 / ctx.temperature)
        return grad_TV, None, None, None, None


def scaled_copy(logits_CV: torch.Tensor, dtype: torch.dtype, temperature: float) -> torch.Tensor:
    copy_CV = logits_CV.to(dtype, copy=True)
    if temperature != 1:
        copy_CV.mul_(1 / temperature)
    return copy_CV.clamp_(min=LOWEST_LOGIT)


def logits_logprob_reference(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits_logprob` in plain PyTorch, for any device."""
    return ChunkedLogitsLogprob.apply(logits_TV, target_T, temperature, group, inplace_backward)


def logits_logprob(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprob_T, entropy_T) of softmax(logits / temperature), fp32, in nats; differentiable in
    both.

    Under `group`, logits_TV holds this rank's columns (equal shares) and targets are ids of the
    whole vocabulary; every rank must call, with an empty batch too. Logits of -inf (words that are
    masked out) have probability 0; each row needs a finite one. `inplace_backward` writes the
    gradient over the logits: only for logits that nothing else reads afterwards.

    Raises ValueError for shapes that do not fit, targets outside the vocabulary (on a GPU: NaN),
    temperature <= 0.
    """
    if logits_TV.dim() != 2:
        raise ValueError(f"logits_TV has shape {tuple(logits_TV.shape)}; flatten it to [T, V]")
    check_temperature(temperature)
    check_targets(target_T, logits_TV.shape[0], logits_TV.shape[1] * group_size(group))
    if uses_kernels(logits_TV):
        from rlef_kernels.gpu.logits_logprob import logits_logprob_kernels as compute
    else:
        compute = logits_logprob_reference
    return compute(
        logits_TV,
        target_T,
        temperature=temperature,
        group=group,
        inplace_backward=inplace_backward,
    )
