"""Micro-batches: the input of one forward pass of a pipeline, cut from a packed batch for this
data-parallel rank.

A micro-batch lists the rows of the hidden states that are read, and the index of each into the
batch's results. With this one index a loss gathers its constants and a score scatters its results.

Shape suffixes of a micro-batch: T its packed tokens, R its action tokens, V its values. Those of
the batch are in types.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlef_mega.flops import LlamaShape
from rlef_mega.megatron.network.attention import PackedSequences, packed_sequences, to_device
from rlef_mega.megatron.parallel import Ranks
from rlef_mega.packing import microbatches, spans
from rlef_mega.types import Batch


@dataclass(frozen=True)
class Microbatch:
    """Some sequences of a batch, on the device, with the rows from which their outputs are read and
    the outputs' indices in the batch."""

    token_ids_T: torch.Tensor
    sequences: PackedSequences
    action_rows_R: torch.Tensor  # into T: the position before the token, where its log-prob is read
    action_ids_R: torch.Tensor
    actions_R: torch.Tensor  # into the batch's A
    value_rows_V: torch.Tensor  # into T: where the value is read
    values_V: torch.Tensor  # into the batch's M


@dataclass(frozen=True)
class Cutting:
    """How batches are cut into micro-batches; the same for the whole run.

    The number of micro-batches is a multiple of the pipeline's size p. Megatron's interleaved
    schedule requires it. The plain one does not, but with m micro-batches its stages are idle for
    (p - 1) / (m + p - 1) of the time (Narayanan et al., arXiv 2104.04473): for m below p, at least
    half.
    """

    ranks: Ranks
    token_budget: int
    shape: LlamaShape
    token_level_value: bool = False

    def cut(self, batch: Batch, sequences: Sequence[int]) -> list[Microbatch]:
        """Return this data-parallel rank's micro-batches of these sequences. Every rank has the
        same number; some may be empty."""
        lengths = batch.cu_seqlens.diff()[list(sequences)].tolist()
        actions = batch.action_bounds.diff()[list(sequences)].tolist()
        data_parallel = self.ranks.groups.dp
        plan = microbatches(
            lengths,
            self.token_budget,
            data_parallel.size(),
            costs=list(map(self.shape.flops, lengths, actions)),
            multiple=self.ranks.layout.pipeline_model_parallel_size,
        )
        mine = plan[data_parallel.rank()]
        return [self.microbatch(batch, [sequences[i] for i in part]) for part in mine]

    def microbatch(self, batch: Batch, sequences: list[int]) -> Microbatch:
        tokens_T = spans(batch.cu_seqlens, sequences)
        lengths = batch.cu_seqlens.diff()[sequences].tolist()
        row_of = torch.full((batch.num_tokens,), -1)
        row_of[tokens_T] = torch.arange(tokens_T.numel())
        actions_R = spans(batch.action_bounds, sequences)
        action_positions_R = batch.action_positions_A[actions_R]
        action_rows_R = row_of[action_positions_R] - 1
        if self.token_level_value:
            value_rows_V, values_V = action_rows_R, actions_R
        else:
            values_V = spans(batch.turn_bounds, sequences)
            value_rows_V = row_of[batch.value_positions_N[values_V]]
        token_ids_T, lengths = self.pad(batch.token_ids_T[tokens_T], lengths)
        device = self.ranks.device
        return Microbatch(
            token_ids_T=to_device(token_ids_T, device),
            sequences=packed_sequences(lengths, device),
            action_rows_R=to_device(action_rows_R, device),
            action_ids_R=to_device(batch.token_ids_T[action_positions_R], device),
            actions_R=to_device(actions_R, device),
            value_rows_V=to_device(value_rows_V, device),
            values_V=to_device(values_V, device),
        )

    def pad(self, token_ids_T: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Append a sequence of padding, whose outputs nothing reads, if one is needed: sequence
        parallelism splits tokens evenly, and an empty micro-batch still takes part in its group's
        collectives."""
        multiple = self.ranks.groups.tp.size() if self.ranks.layout.sequence_parallel else 1
        missing = -token_ids_T.numel() % multiple if lengths else multiple
        if not missing:
            return token_ids_T, lengths
        return torch.cat([token_ids_T, token_ids_T.new_zeros(missing)]), [*lengths, missing]
