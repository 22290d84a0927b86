"""The logits of a head, one chunk of rows at a time, for `linear_logprob`, `linear_ppo_loss` and
`linear_score_reference`.

A chunk reduces its logits to the partial sums of `vocab_parallel` and, while they are still in
memory, turns them into their gradient, from which the gradients of hidden and weight follow:

    dhidden = dz weight / temperature        dweight = dz^T hidden / temperature

This is the form in PyTorch; `rlef_kernels.gpu.head` has the one for GPUs.

Shape suffixes: T tokens, D hidden size, V vocabulary shard, C tokens of a chunk, P partial sums.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.distributed import ProcessGroup

from rlef_kernels.vocab_parallel import chunk_size, compute_dtype, sum_over_shards_


class LogitsChunk:
    """The memory for the logits of some rows, reused for all rows of `hidden_TD`."""

    tokens: int  # of a chunk, at most
    sum_dtype: torch.dtype  # of the weight's gradient, a sum over chunks
    subtracted_C: torch.Tensor | float  # from the logits

    def __init__(
        self,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        with_gradient: bool,
        *,
        temperature: float,
        group: ProcessGroup | None,
        chunk_tokens: int | None = None,
    ) -> None:
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {chunk_tokens}, must be at least 1")
        self.temperature, self.group = temperature, group
        num_tokens, shard = hidden_TD.shape[0], weight_VD.shape[0]
        self.sum_dtype = compute_dtype(hidden_TD, weight_VD)
        self.weight_VD = weight_VD.to(self.sum_dtype)
        self.tokens = min(chunk_tokens or chunk_size(shard, hidden_TD.device), max(1, num_tokens))
        self.buffer_CV = hidden_TD.new_empty(self.tokens, shard, dtype=self.sum_dtype)

    def slices(self, num_tokens: int) -> Iterator[slice]:
        """Yield the rows of each chunk; without tokens, one empty chunk, so that every rank of the
        group issues the same collectives."""
        for start in range(0, max(1, num_tokens), self.tokens):
            yield slice(start, min(start + self.tokens, num_tokens))

    def partials(self, hidden_CD: torch.Tensor, column_C: torch.Tensor) -> torch.Tensor:
        """Compute the logits of these rows, and return their partial sums, [C, P]. `column_C`: the
        targets' columns, which may lie outside the shard. Leaves z - max z in `logits_CV`."""
        self.compute(hidden_CD, column_C)
        column_C, owned_C = self.target
        target_logit_C = self.logits_CV.gather(1, column_C[:, None])[:, 0].masked_fill(~owned_C, 0)
        row_max_C = self.logits_CV.amax(-1)
        shifted_CV = self.logits_CV.sub_(row_max_C[:, None])
        self.subtracted_C = row_max_C
        exp_CV = shifted_CV.exp()
        sum_exp_C = exp_CV.sum(-1)
        weighted_C = exp_CV.mul_(shifted_CV).sum(-1)
        return torch.stack([row_max_C, sum_exp_C, weighted_C, target_logit_C], dim=-1)

    def compute(self, hidden_CD: torch.Tensor, column_C: torch.Tensor) -> None:
        """Compute the logits of these rows for `add_gradients`."""
        self.hidden_CD = hidden_CD.to(self.sum_dtype)
        # a target's column (0 if another shard has it), and whether this shard has it
        owned_C = (column_C >= 0) & (column_C < self.weight_VD.shape[0])
        self.target = column_C.masked_fill(~owned_C, 0), owned_C
        self.logits_CV = self.buffer_CV[: len(hidden_CD)].addmm_(
            self.hidden_CD, self.weight_VD.t(), beta=0, alpha=1 / self.temperature
        )
        self.subtracted_C = 0.0

    def add_gradients(
        self,
        statistics: Sequence[torch.Tensor],
        grad_logprob_C: torch.Tensor | None,
        grad_entropy_C: torch.Tensor | None,
        grad_hidden_CD: torch.Tensor | None,
        grad_weight_VD: torch.Tensor | None,
    ) -> None:
        """Write the gradient of these rows, summed over the group, to `grad_hidden_CD`, and add
        their part of the weight's to `grad_weight_VD`. Overwrites the logits. `statistics`: max,
        sum of exp and entropy of each whole row."""
        gradient_CV = self.logits_gradient_(
            statistics,
            None if grad_logprob_C is None else grad_logprob_C / self.temperature,
            None if grad_entropy_C is None else grad_entropy_C / self.temperature,
        )
        if grad_hidden_CD is not None:
            grad_hidden_CD.copy_(sum_over_shards_(gradient_CV @ self.weight_VD, self.group))
        if grad_weight_VD is not None:
            grad_weight_VD.addmm_(gradient_CV.t(), self.hidden_CD)

    def logits_gradient_(
        self,
        statistics: Sequence[torch.Tensor],
        grad_logprob_C: torch.Tensor | None,
        grad_entropy_C: torch.Tensor | None,
    ) -> torch.Tensor:
        """Overwrite the logits with the gradient with respect to them.

        With p = e / s, e = exp(z - m), and upstream gradients g (log-prob) and h (entropy H):

            dz_j = g [j = target] - p_j (g + h (log p_j + H))
                 = g [j = target] - e_j ((z_j - m) h / s + (g + h (H - log s)) / s)
        """
        column_C, owned_C = self.target
        row_max_C, sum_exp_C, entropy_C = statistics
        shifted_CV = self.logits_CV.sub_((row_max_C - self.subtracted_C)[:, None])
        if grad_entropy_C is None:
            assert grad_logprob_C is not None
            grad_CV = shifted_CV.exp_().mul_((-grad_logprob_C / sum_exp_C)[:, None])
        else:
            exp_CV = shifted_CV.exp()
            constant_C = grad_entropy_C * (entropy_C - sum_exp_C.log())
            if grad_logprob_C is not None:
                constant_C += grad_logprob_C
            slope_C = -grad_entropy_C / sum_exp_C
            grad_CV = shifted_CV.mul_(slope_C[:, None]).sub_((constant_C / sum_exp_C)[:, None])
            grad_CV.mul_(exp_CV)
        if grad_logprob_C is not None:
            at_target_C = grad_logprob_C.masked_fill(~owned_C, 0)
            grad_CV.scatter_add_(1, column_C[:, None], at_target_C[:, None])
        return grad_CV


# Makes the chunk for hidden states and head; the last argument says whether gradients are needed.
MakeChunk = Callable[[torch.Tensor, torch.Tensor, bool], LogitsChunk]
