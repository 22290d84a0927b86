"""`logits_logprob` on a GPU; the equations are in `rlef_kernels.logits_logprob`.

Bound by memory bandwidth. Bytes: T V elements read forward, and 24 T V / 1024 of partial sums
written and read; T V elements read and written backward.

Shape suffixes: T tokens, V vocabulary shard.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from rlef_kernels.gpu.head import TileSums, forward_tokens
from rlef_kernels.gpu.head_gradient import pack_rows, write_gradient_from_logits
from rlef_kernels.gpu.plan import CUBLAS
from rlef_kernels.vocab_parallel import (
    NUM_PARTIALS,
    SavedForBackward,
    combine_shards,
    group_size,
    shard_start,
)


class LogitsLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: SavedForBackward,
        logits_TV: torch.Tensor,
        target_T: torch.Tensor,
        temperature: float,
        group: ProcessGroup | None,
        inplace_backward: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shard, scale = logits_TV.shape[1], 1 / temperature
        column_T = target_T - shard_start(shard, group)
        softmax = combine_shards(
            logits_partials(logits_TV, column_T, scale), target_T, shard * group_size(group), group
        )
        log_sum_T = softmax.sum_exp_T.log()
        ctx.save_for_backward(logits_TV, column_T, softmax.row_max_T, log_sum_T, softmax.entropy_T)
        ctx.temperature, ctx.inplace = temperature, inplace_backward
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
        logits_TV, column_T, row_max_T, log_sum_T, entropy_T = ctx.saved_tensors
        grad_TV = logits_TV.detach() if ctx.inplace else torch.empty_like(logits_TV)
        write_gradient_from_logits(
            logits_TV,
            grad_TV,
            column_T,
            pack_rows(row_max_T, log_sum_T, entropy_T, grad_logprob_T, grad_entropy_T),
            1 / ctx.temperature,
            tile_columns=CUBLAS.tile_columns,
            has_entropy=grad_entropy_T is not None,
        )
        return grad_TV, None, None, None, None


def logits_partials(
    logits_TV: torch.Tensor, column_T: torch.Tensor, inverse_temperature: float
) -> torch.Tensor:
    num_tokens, vocabulary = logits_TV.shape
    partials_TP = torch.empty(num_tokens, NUM_PARTIALS, device=logits_TV.device)
    step = forward_tokens(vocabulary, CUBLAS)
    sums = TileSums(min(step, num_tokens), vocabulary, logits_TV.device, CUBLAS)
    for start in range(0, num_tokens, step):
        rows = slice(start, start + step)
        sums.reduce(logits_TV[rows], 0, column_T[rows], inverse_temperature)
        sums.combine(column_T[rows], inverse_temperature, partials_TP[rows])
    return partials_TP


def logits_logprob_kernels(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    if logits_TV.stride(1) != 1:
        logits_TV = logits_TV.contiguous()
    return LogitsLogprob.apply(logits_TV, target_T, temperature, group, inplace_backward)
