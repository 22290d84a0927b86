"""Scores of tokens under policy and reference: both log-probs, the policy's entropy, and the exact
KL(policy || reference) over the vocabulary, from two hidden states and two heads.

    z = hidden weight^T / temperature            p = softmax(z)    the policy
    y = ref_hidden ref_weight^T / temperature    q = softmax(y)    the reference

    logprob_t     = log p_t[target_t]        entropy_t = - sum_j p_tj log p_tj
    ref_logprob_t = log q_t[target_t]        kl_t      = sum_j p_tj (log p_tj - log q_tj)

kl_t is the expectation of logprob_t - ref_logprob_t over targets drawn from p_t.

The two models may differ in width; the vocabulary and its sharding are the same. There are no
gradients. FLOPs: 2 T V D + 2 T V E, as two calls of `linear_logprob`. Bytes that must move: both
hidden states and both heads read once, 8 T numbers written. Of [T, V] a chunk is stored at a time.

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
from rlef_kernels.logits import LogitsChunk
from rlef_kernels.vocab_parallel import (
    TokenScores,
    check_head,
    check_targets,
    check_temperature,
    combine_two_heads,
    group_size,
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
    shard = weight_VD.shape[0]
    column_T = target_T - shard_start(shard, group)
    policy, reference = (
        LogitsChunk(
            *matrices, False, temperature=temperature, group=group, chunk_tokens=chunk_tokens
        )
        for matrices in ((hidden_TD, weight_VD), (ref_hidden_TE, ref_weight_VE))
    )
    partials = []
    for rows in policy.slices(hidden_TD.shape[0]):
        partials_CP = policy.partials(hidden_TD[rows], column_T[rows])
        ref_partials_CP = reference.partials(ref_hidden_TE[rows], column_T[rows])
        logits_CV, ref_CV = policy.logits_CV, reference.logits_CV  # minus their maxima
        ref_partials_CP[:, 2] = logits_CV.exp().mul_(logits_CV.sub_(ref_CV)).sum(-1)
        partials.append(torch.cat([partials_CP, ref_partials_CP], dim=1))
    return combine_two_heads(torch.cat(partials), target_T, shard * group_size(group), group)


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
