"""Micro-batches: what one forward pass of a pipeline takes, cut from a packed batch for this
data-parallel rank.

A micro-batch knows which rows of the hidden states are read and which entries of the batch's
results they are, so that a loss gathers its constants, and a score scatters its results, by one
index.

Shape suffixes: T packed tokens of the micro-batch, R its response tokens, M its values; A response
tokens of the whole batch, in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlef_mega.flops import SequenceFlops
from rlef_mega.megatron.network.attention import PackedSequences, packed_sequences
from rlef_mega.megatron.parallel import Ranks
from rlef_mega.packing import microbatches, token_positions, turns_of
from rlef_mega.types import Batch


@dataclass(frozen=True)
class Microbatch:
    token_ids_T: torch.Tensor
    sequences: PackedSequences
    action_rows_R: (
        torch.Tensor
    )  # the position before each response token: where its log-prob is read
    action_ids_R: torch.Tensor
    actions_R: torch.Tensor  # into A
    value_rows_M: torch.Tensor  # where a value is read
    values_M: torch.Tensor  # into the batch's values


@dataclass(frozen=True)
class Cutting:
    """How batches are cut; the same for all of a run. `multiple` is what the pipeline's schedule
    wants the number of micro-batches to be a multiple of.
    """

    ranks: Ranks
    dtype: torch.dtype
    token_budget: int
    flops: SequenceFlops
    token_level_value: bool = False
    multiple: int = 1

    def cut(self, batch: Batch, sequences: Sequence[int]) -> list[Microbatch]:
        """This data-parallel rank's micro-batches of these sequences; as many on every rank, some
        perhaps empty.
        """
        chosen, bounds = list(sequences), batch.cu_seqlens.long()
        lengths = bounds.diff()[chosen].tolist()
        ends_T = batch.action_mask_T.cumsum(0)
        actions = torch.nn.functional.pad(ends_T, (1, 0))[bounds].diff()[chosen].tolist()
        plan = microbatches(
            lengths,
            self.token_budget,
            self.ranks.data_parallel_size,
            costs=list(map(self.flops, lengths, actions)),
            multiple=self.multiple,
        )
        mine = plan[self.ranks.data_parallel_rank]
        ordinal_T = ends_T - 1  # response tokens are numbered through the batch
        return [self.microbatch(batch, [sequences[i] for i in part], ordinal_T) for part in mine]

    def microbatch(self, batch: Batch, sequences: list[int], ordinal_T: torch.Tensor) -> Microbatch:
        positions_T = token_positions(batch.cu_seqlens, sequences)
        lengths = batch.cu_seqlens.diff()[sequences].tolist()
        row_of = torch.full((batch.num_tokens,), -1)
        row_of[positions_T] = torch.arange(positions_T.numel())
        action_T = batch.action_mask_T[positions_T]
        action_rows_R = action_T.nonzero().squeeze(1) - 1
        actions_R = ordinal_T[positions_T][action_T]
        if self.token_level_value:
            value_rows_M, values_M = action_rows_R, actions_R
        else:
            values_M = turns_of(batch, sequences)
            value_rows_M = row_of[batch.value_positions_N[values_M]]
        token_ids_T, lengths = self.pad(batch.token_ids_T[positions_T], lengths)
        device = self.ranks.device
        return Microbatch(
            token_ids_T=token_ids_T.to(device),
            sequences=packed_sequences(lengths, device),
            action_rows_R=action_rows_R.to(device),
            action_ids_R=batch.token_ids_T[positions_T][action_T].to(device),
            actions_R=actions_R.to(device),
            value_rows_M=value_rows_M.to(device),
            values_M=values_M.to(device),
        )

    def pad(self, token_ids_T: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, list[int]]:
        """A sequence of padding, read by nothing: sequence parallelism splits tokens evenly, and an
        empty micro-batch still takes part in its group's collectives.
        """
        multiple = self.ranks.groups.tp.size() if self.ranks.layout.sequence_parallel else 1
        missing = -token_ids_T.numel() % multiple if lengths else multiple
        if not missing:
            return token_ids_T, lengths
        return torch.cat([token_ids_T, token_ids_T.new_zeros(missing)]), [*lengths, missing]
