"""The softmax statistics of one vocabulary shard, and how shards combine: one small all-gather.

A rank that holds the columns [start, start + V) of the logits z reduces each row to four numbers,

    m = max z,    s = sum exp(z - m),    u = sum exp(z - m) (z - m),    z_target (0 if elsewhere).

The four numbers of every rank, reduced over the ranks, give the whole row's log-prob and entropy:

    log p(target) = (z_target - m) - log s          entropy = log s - u / s

Both stay accurate for logits of any size, because m is subtracted before anything is rounded.

Theory of operation. Every rank of the tensor-parallel group calls the same operation on its own
shard of the head, with the same hidden states; forward gathers the partial sums once (once per
chunk in `linear_ppo_loss`), backward sums dhidden once. A rank waits in these collectives for all
others of the group, so each must call the operation, even with an empty batch.

Shape suffixes: T tokens, D hidden size, V vocabulary shard, P partial sums, R ranks of the group
or tiles of a shard.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

CPU_CHUNK_ELEMENTS = 2**18  # 1 MiB of fp32 logits: stays in a core's L2 cache
GPU_CHUNK_ELEMENTS = 2**27  # 512 MiB of fp32 logits: 1,046 tokens of a vocabulary of 128,256
# Each chunk reads the whole head; with fewer tokens, reading it would take most of the time.
FEWEST_CHUNK_TOKENS = 256


class SavedForBackward(FunctionCtx):
    """The autograd context: what the forward passes of this package save for backward."""

    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    make_chunk: Any  # `logits.MakeChunk`
    accumulate_main_grad: bool


class Softmax(NamedTuple):
    """The statistics of each row of logits over the whole vocabulary."""

    row_max_T: torch.Tensor
    sum_exp_T: torch.Tensor
    entropy_T: torch.Tensor
    logprob_T: torch.Tensor


class TokenScores(NamedTuple):
    """What `linear_score` returns."""

    logprob_T: torch.Tensor
    ref_logprob_T: torch.Tensor
    entropy_T: torch.Tensor
    kl_T: torch.Tensor


def group_size(group: ProcessGroup | None) -> int:
    """Return the number of ranks; 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


def shard_start(shard_size: int, group: ProcessGroup | None) -> int:
    """Return the first token id of this rank's shard; Megatron pads all shards to one size."""
    return 0 if group is None else dist.get_rank(group) * shard_size


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Return fp32, or fp64 for fp64 inputs (gradcheck and the tests' truth)."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def chunk_size(vocabulary_size: int, device: torch.device) -> int:
    """Return the number of tokens whose logits are stored at a time."""
    elements = CPU_CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS
    return max(FEWEST_CHUNK_TOKENS, elements // max(1, vocabulary_size))


def check_head(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> None:
    """Raise ValueError unless both are matrices of the same width."""
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden_TD {tuple(hidden_TD.shape)} and weight_VD {tuple(weight_VD.shape)} must be "
            "two matrices of the same width; flatten batch and sequence dimensions first"
        )


def check_targets(target_T: torch.Tensor, num_tokens: int, vocabulary_size: int) -> None:
    """Raise ValueError for targets of a wrong shape or dtype or, on a CPU, out of range.

    On a GPU the range check would stall the stream; there an out-of-range target's log-prob is NaN
    (`softmax_of`).
    """
    if target_T.shape != (num_tokens,):
        raise ValueError(
            f"target_T has shape {tuple(target_T.shape)}, expected ({num_tokens},): "
            "give one target per token"
        )
    if target_T.dtype != torch.int64:
        raise ValueError(f"target_T is {target_T.dtype}; convert it to torch.int64")
    if target_T.device.type == "cpu" and num_tokens:
        low, high = (int(bound) for bound in target_T.aminmax())
        if low < 0 or high >= vocabulary_size:
            raise ValueError(
                f"target_T has ids from {low} to {high}, outside [0, {vocabulary_size}), "
                "the vocabulary over all shards; leave out masked tokens before the call"
            )


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}, must be above 0; for greedy scoring use 1.0"
        )


def combine_shards(
    partials_TP: torch.Tensor,
    target_T: torch.Tensor,
    vocabulary_size: int,
    group: ProcessGroup | None,
) -> Softmax:
    """Gather the partial sums of all ranks into the statistics over the whole vocabulary."""
    if group_size(group) == 1:
        return softmax_of(partials_TP.unbind(-1), target_T, vocabulary_size)
    *sums_RT, target_logit_RT = gather_partials(partials_TP, group).unbind(-1)
    numbers = (*reduce_sums(*sums_RT), target_logit_RT.sum(0))
    return softmax_of(numbers, target_T, vocabulary_size)


def softmax_of(
    numbers: Sequence[torch.Tensor], target_T: torch.Tensor, vocabulary_size: int
) -> Softmax:
    """Return the statistics of whole rows, given their four numbers."""
    row_max_T, sum_exp_T, weighted_T, target_logit_T = numbers
    log_sum_T = sum_exp_T.log()
    entropy_T = log_sum_T - weighted_T / sum_exp_T
    logprob_T = (target_logit_T - row_max_T) - log_sum_T
    if target_T.device.type != "cpu":
        outside_T = (target_T < 0) | (target_T >= vocabulary_size)
        logprob_T = logprob_T.masked_fill(outside_T, torch.nan)
    return Softmax(row_max_T, sum_exp_T, entropy_T, logprob_T)


def gather_partials(partials_TP: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Return every rank's partial sums as [R, T, P], in the order of ranks."""
    if group_size(group) == 1:
        return partials_TP[None]
    num_ranks, num_tokens = group_size(group), partials_TP.shape[0]
    gathered = partials_TP.new_empty(num_ranks * num_tokens, partials_TP.shape[1])
    # Tensor-parallel group: gathers [T, 4] (linear_score: [T, 8]), for empty batches too.
    dist.all_gather_into_tensor(gathered, partials_TP, group=group)
    return gathered.view(num_ranks, *partials_TP.shape)


def reduce_sums(
    max_RT: torch.Tensor, sum_exp_RT: torch.Tensor, weighted_RT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Combine m, s and u of the parts of each row, which are ranks or a GPU kernel's tiles, in one
    order, so that all ranks get equal bits."""
    row_max_T = max_RT.amax(0)
    shift_RT = max_RT - row_max_T
    scale_RT = shift_RT.exp()
    weighted_T = torch.addcmul(weighted_RT, sum_exp_RT, shift_RT).mul_(scale_RT).sum(0)
    return row_max_T, scale_RT.mul_(sum_exp_RT).sum(0), weighted_T


def reduce_two_heads(
    max_RT: torch.Tensor,
    sum_exp_RT: torch.Tensor,
    weighted_RT: torch.Tensor,
    ref_max_RT: torch.Tensor,
    ref_sum_exp_RT: torch.Tensor,
    cross_RT: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Combine m, s, u of the logits z, then m and s of y and sum exp(z - m) (a - b), where a and b
    are z and y minus their maxima."""
    row_max_T, sum_exp_T, weighted_T = reduce_sums(max_RT, sum_exp_RT, weighted_RT)
    ref_max_T = ref_max_RT.amax(0)
    shift_RT, ref_shift_RT = max_RT - row_max_T, ref_max_RT - ref_max_T
    cross_RT = torch.addcmul(cross_RT, sum_exp_RT, shift_RT - ref_shift_RT)
    cross_T = cross_RT.mul_(shift_RT.exp_()).sum(0)
    ref_sum_exp_T = ref_shift_RT.exp_().mul_(ref_sum_exp_RT).sum(0)
    return row_max_T, sum_exp_T, weighted_T, ref_max_T, ref_sum_exp_T, cross_T


def sum_over_shards_(grad: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Sum over the ranks, in place, the gradient of a tensor that is the same on all of them."""
    if group_size(group) > 1:
        # Tensor-parallel group: sums dhidden [T, D]; issued for empty batches too.
        dist.all_reduce(grad, group=group)
    return grad


def combine_two_heads(
    partials_TP: torch.Tensor,
    target_T: torch.Tensor,
    vocabulary_size: int,
    group: ProcessGroup | None,
) -> TokenScores:
    """Gather the partial sums of two heads' logits, z and y, into the scores of `linear_score`.

    A rank's eight numbers are the four of z, then those of y with the cross sum of
    `reduce_two_heads` as the third.
    """
    gathered_8RT = gather_partials(partials_TP, group).unbind(-1)
    sums_6RT = (*gathered_8RT[:3], *gathered_8RT[4:7])
    *of_policy, ref_max_T, ref_sum_T, cross_T = reduce_two_heads(*sums_6RT)
    target_logit_T, ref_target_logit_T = (gathered_8RT[at].sum(0) for at in (3, 7))
    of_reference = (ref_max_T, ref_sum_T, cross_T, ref_target_logit_T)
    policy = softmax_of((*of_policy, target_logit_T), target_T, vocabulary_size)
    reference = softmax_of(of_reference, target_T, vocabulary_size)
    kl_T = cross_T / policy.sum_exp_T - policy.sum_exp_T.log() + reference.sum_exp_T.log()
    return TokenScores(policy.logprob_T, reference.logprob_T, policy.entropy_T, kl_T)
