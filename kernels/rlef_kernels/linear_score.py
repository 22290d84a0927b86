"""Scores of tokens under policy and reference: both log-probs, the policy's entropy, and the exact
KL(policy || reference) over the vocabulary, from two hidden states and two heads.

    z = hidden weight^T / temperature            p = softmax(z)    the policy
    y = ref_hidden ref_weight^T / temperature    q = softmax(y)    the reference

    logprob_t     = log p_t[target_t]        entropy_t = - sum_j p_tj log p_tj
    ref_logprob_t = log q_t[target_t]        kl_t      = sum_j p_tj (log p_tj - log q_tj)

kl_t is the expectation of logprob_t - ref_logprob_t over targets drawn from p_t.

The two models may differ in width; the vocabulary and its sharding are the same. There are no
gradients. FLOPs: P + P', P = 2 T V D and P' = 2 T V E, as two calls of `linear_logprob`. Bytes that
must move: both hidden states and both heads read once, 8 T numbers written. [T, V] is never stored
whole.

Vocab-parallel: each rank of `group` holds an equal shard of the rows of both heads; one gather of
[T, 8] numbers.

On NVIDIA GPUs `rlef_kernels.gpu.linear_score` computes this; the chunked PyTorch form here defines
it and runs everywhere else.

Shape suffixes: T tokens, D and E hidden sizes, V vocabulary shard, C tokens of a chunk, P partial
sums.
"""

import torch
from torch.distributed import ProcessGroup

from rlef_kernels.dispatch import uses_kernels
from rlef_kernels.vocab_parallel import (
    NUM_PARTIALS,
    TokenScores,
    check_chunk,
    check_head,
    check_targets,
    check_temperature,
    chunk_logits,
    chunk_size,
    combine_two_heads,
    compute_dtype,
    group_size,
    local_columns,
    reduce_logits_,
    shard_start,
)


@torch.no_grad()
def linear_score_reference(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    ref_hidden_TE: torch.Tensor,
    ref_weight_VE: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> TokenScores:
    """Compute `linear_score` in plain PyTorch, on any device, in fp32 (fp64 for fp64 inputs)."""
    check_chunk(chunk_tokens)
    num_tokens, shard = hidden_TD.shape[0], weight_VD.shape[0]
    step = chunk_tokens or chunk_size(shard, hidden_TD.device)
    dtype = compute_dtype(hidden_TD, weight_VD)
    weight, ref_weight = weight_VD.to(dtype), ref_weight_VE.to(dtype)
    column_T, owned_T = local_columns(target_T, shard_start(shard, group), shard)
    partials_TP = hidden_TD.new_empty(num_tokens, 2 * NUM_PARTIALS, dtype=dtype)
    buffer = hidden_TD.new_empty(2, min(step, num_tokens), shard, dtype=dtype)
    for start in range(0, num_tokens, step):
        rows = slice(start, start + step)
        target, partials_CP = (column_T[rows], owned_T[rows]), partials_TP[rows]
        logits_CV = chunk_logits(hidden_TD[rows].to(dtype), weight, temperature, buffer[0])
        ref_CV = chunk_logits(ref_hidden_TE[rows].to(dtype), ref_weight, temperature, buffer[1])
        # both leave the logits minus their maximum
        reduce_logits_(logits_CV, target, partials_CP[:, :NUM_PARTIALS])
        reduce_logits_(ref_CV, target, partials_CP[:, NUM_PARTIALS:])
        exp_CV = logits_CV.exp()
        partials_CP[:, -2] = exp_CV.mul_(logits_CV.sub_(ref_CV)).sum(-1)
    return combine_two_heads(partials_TP, target_T, shard * group_size(group), group)


def linear_score(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    ref_hidden_TE: torch.Tensor,
    ref_weight_VE: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
) -> TokenScores:
    """Compute the targets' log-probs under policy and reference, the policy's entropy, and
    KL(policy || reference), at each token.

    With `group`, both heads are this rank's shard of the same part of the vocabulary, and hidden
    states and targets are the same on every rank. Every rank must call it, even with an empty
    batch.

    Returns (logprob_T, ref_logprob_T, entropy_T, kl_T), fp32, in nats, without gradients.

    Raises ValueError if shapes do not match, a target is outside the vocabulary (on a GPU its
    log-probs are NaN instead), a gradient is required, or temperature <= 0.
    """
    check_head(hidden_TD, weight_VD)
    check_head(ref_hidden_TE, ref_weight_VE)
    check_temperature(temperature)
    if len(hidden_TD) != len(ref_hidden_TE) or len(weight_VD) != len(ref_weight_VE):
        raise ValueError(
            f"the policy has {len(hidden_TD)} tokens and {len(weight_VD)} vocabulary entries, "
            f"the reference {len(ref_hidden_TE)} and {len(ref_weight_VE)}; both must be equal"
        )
    matrices = (hidden_TD, weight_VD, ref_hidden_TE, ref_weight_VE)
    if torch.is_grad_enabled() and any(matrix.requires_grad for matrix in matrices):
        raise ValueError(
            "linear_score has no gradients; call it under torch.no_grad(), or linear_logprob for "
            "log-probs and entropy with gradients"
        )
    check_targets(target_T, len(hidden_TD), len(weight_VD) * group_size(group))
    if uses_kernels(*matrices):
        from rlef_kernels.gpu.linear_score import linear_score_kernels as compute
    else:
        compute = linear_score_reference  # type: ignore[assignment]
    return compute(*matrices, target_T, temperature=temperature, group=group)
