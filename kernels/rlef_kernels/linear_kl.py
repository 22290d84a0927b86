"""The exact KL(policy || reference) over the vocabulary, from two hidden states and two heads.

    z = hidden weight^T / temperature        p = softmax(z)        the policy
    y = ref_hidden ref_weight^T / temperature    q = softmax(y)    the reference, a constant

    kl_t    = sum_j p_tj (log p_tj - log q_tj)
    dz_tj   = g_t p_tj (log p_tj - log q_tj - kl_t),  g the upstream gradient
    dhidden = dz weight / temperature        dweight = dz^T hidden / temperature

The two models may differ in width; the vocabulary and its sharding are the same. FLOPs: P = 2 T V D
and P' = 2 T V E; forward P + P', backward 3 P + P' (the logits are recomputed). Bytes that must
move, forward: both hidden states and both heads read once, 5 T numbers written. [T, V] is never
stored whole.

On NVIDIA GPUs `rlef_kernels.gpu.linear_kl` computes this; the chunked PyTorch form here defines it
and runs everywhere else.

Shape suffixes: T tokens, D and E hidden sizes, V vocabulary shard, C tokens of a chunk, P partial
sums, R ranks.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from rlef_kernels.dispatch import uses_kernels
from rlef_kernels.rows import rows_with_gradient, scatter_rows, select_rows
from rlef_kernels.vocab_parallel import (
    SavedForBackward,
    check_chunk,
    check_head,
    check_temperature,
    chunk_logits,
    chunk_size,
    combine_two_shards,
    compute_dtype,
    gather_partials,
    sum_over_shards_,
)


class ChunkedLinearKl(torch.autograd.Function):
    """Save the inputs and five numbers per token; backward recomputes each chunk's logits."""

    @staticmethod
    def forward(
        ctx: SavedForBackward,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        ref_hidden_TE: torch.Tensor,
        ref_weight_VE: torch.Tensor,
        temperature: float,
        group: ProcessGroup | None,
        chunk_tokens: int,
    ) -> torch.Tensor:
        num_tokens, shard = hidden_TD.shape[0], weight_VD.shape[0]
        dtype = compute_dtype(hidden_TD, weight_VD)
        weight, ref_weight = weight_VD.to(dtype), ref_weight_VE.to(dtype)
        partials_TP = hidden_TD.new_empty(num_tokens, 5, dtype=dtype)
        buffer = hidden_TD.new_empty(2, min(chunk_tokens, num_tokens), shard, dtype=dtype)
        for start in range(0, num_tokens, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits_CV = chunk_logits(hidden_TD[rows].to(dtype), weight, temperature, buffer[0])
            ref_CV = chunk_logits(ref_hidden_TE[rows].to(dtype), ref_weight, temperature, buffer[1])
            reduce_two_logits_(logits_CV, ref_CV, partials_TP[rows])
        saved = combine_two_shards(gather_partials(partials_TP, group))
        ctx.save_for_backward(hidden_TD, weight_VD, ref_hidden_TE, ref_weight_VE, *saved)
        ctx.temperature, ctx.group, ctx.chunk_tokens = temperature, group, chunk_tokens
        return saved[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: SavedForBackward, grad_kl_T: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        whole_TD, weight_VD, ref_hidden_TE, ref_weight_VE, *saved = ctx.saved_tensors
        rows_R = rows_with_gradient(grad_kl_T)
        hidden_TD, ref_hidden_TE, grad_kl_T, *saved = (
            select_rows(tensor, rows_R) for tensor in (whole_TD, ref_hidden_TE, grad_kl_T, *saved)
        )
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype, step, scale = grad_kl_T.dtype, ctx.chunk_tokens, 1 / ctx.temperature
        weight, ref_weight = weight_VD.to(dtype), ref_weight_VE.to(dtype)
        grad_hidden_TD = torch.empty_like(hidden_TD, dtype=dtype) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight) if needs_weight else None
        num_tokens = hidden_TD.shape[0]
        buffer = weight.new_empty(2, min(step, num_tokens), weight.shape[0])
        for start in range(0, num_tokens, step):
            rows = slice(start, start + step)
            hidden_CD = hidden_TD[rows].to(dtype)
            grad_CV = kl_gradient_(
                chunk_logits(hidden_CD, weight, ctx.temperature, buffer[0]),
                chunk_logits(ref_hidden_TE[rows].to(dtype), ref_weight, ctx.temperature, buffer[1]),
                [tensor_T[rows] for tensor_T in saved],
                grad_kl_T[rows],
            )
            if grad_hidden_TD is not None:
                chunk = grad_hidden_TD[rows]
                torch.addmm(chunk, grad_CV, weight, beta=0, alpha=scale, out=chunk)
            if grad_weight_VD is not None:
                grad_weight_VD.addmm_(grad_CV.t(), hidden_CD, alpha=scale)
        if grad_hidden_TD is not None:
            grad_hidden_TD = sum_over_shards_(grad_hidden_TD, ctx.group).to(hidden_TD.dtype)
            grad_hidden_TD = scatter_rows(grad_hidden_TD, rows_R, whole_TD.shape[0])
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None, None


def reduce_two_logits_(
    logits_CV: torch.Tensor, ref_CV: torch.Tensor, partials_CP: torch.Tensor
) -> None:
    """Write max z, sum e^a, sum e^a (a - b), max y, sum e^b; a = z - max z and b = y - max y."""
    row_max_C, ref_max_C = logits_CV.amax(-1), ref_CV.amax(-1)
    exp_CV = logits_CV.sub_(row_max_C[:, None]).exp()
    ref_CV.sub_(ref_max_C[:, None])
    partials_CP[:, 0] = row_max_C
    partials_CP[:, 1] = exp_CV.sum(-1)
    partials_CP[:, 2] = exp_CV.mul_(logits_CV.sub_(ref_CV)).sum(-1)
    partials_CP[:, 3] = ref_max_C
    partials_CP[:, 4] = ref_CV.exp_().sum(-1)


def kl_gradient_(
    logits_CV: torch.Tensor,
    ref_CV: torch.Tensor,
    saved: list[torch.Tensor],
    grad_kl_C: torch.Tensor,
) -> torch.Tensor:
    """Overwrite the policy's logits with dz = g p (log p - log q - KL)."""
    row_max_C, log_sum_C, ref_max_C, ref_log_sum_C, kl_C = saved
    logprobs_CV = logits_CV.sub_(row_max_C[:, None]).sub_(log_sum_C[:, None])
    ref_CV.sub_(ref_max_C[:, None])
    probs_CV = logprobs_CV.exp()
    difference_CV = logprobs_CV.sub_(ref_CV).add_((ref_log_sum_C - kl_C)[:, None])
    return difference_CV.mul_(probs_CV).mul_(grad_kl_C[:, None])


def linear_kl_reference(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    ref_hidden_TE: torch.Tensor,
    ref_weight_VE: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Compute `linear_kl` in plain PyTorch, on any device, in fp32 (fp64 for fp64 inputs)."""
    check_chunk(chunk_tokens)
    step = chunk_tokens or chunk_size(weight_VD.shape[0], hidden_TD.device)
    return ChunkedLinearKl.apply(
        hidden_TD, weight_VD, ref_hidden_TE, ref_weight_VE, temperature, group, step
    )


def linear_kl(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    ref_hidden_TE: torch.Tensor,
    ref_weight_VE: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Compute KL(policy || reference) at each token.

    With `group`, both heads are this rank's shard of the same part of the vocabulary, and the
    hidden states are the same on every rank. Every rank must call it, even with an empty batch; the
    gradient of hidden is summed over the group.

    Returns kl_T, fp32, in nats, differentiable with respect to the policy's hidden and weight.

    Raises ValueError if shapes do not match, the reference requires gradients, or temperature <= 0.
    """
    check_head(hidden_TD, weight_VD)
    check_head(ref_hidden_TE, ref_weight_VE)
    check_temperature(temperature)
    if len(hidden_TD) != len(ref_hidden_TE) or len(weight_VD) != len(ref_weight_VE):
        raise ValueError(
            f"the policy has {len(hidden_TD)} tokens and {len(weight_VD)} vocabulary entries, "
            f"the reference {len(ref_hidden_TE)} and {len(ref_weight_VE)}; both must be equal"
        )
    if torch.is_grad_enabled() and (ref_hidden_TE.requires_grad or ref_weight_VE.requires_grad):
        raise ValueError(
            "the reference requires gradients, but is a constant here; detach ref_hidden_TE and "
            "ref_weight_VE"
        )
    if uses_kernels(hidden_TD, weight_VD, ref_hidden_TE, ref_weight_VE):
        from rlef_kernels.gpu.linear_kl import linear_kl_kernels as compute
    else:
        compute = linear_kl_reference  # type: ignore[assignment]
    return compute(
        hidden_TD,
        weight_VD,
        ref_hidden_TE,
        ref_weight_VE,
        temperature=temperature,
        group=group,
    )
