"""Episodes to packed batches: sequences end to end without padding, cut into micro-batches by a
token budget.

Stands between rollout and learner. Every rank packs the same episodes to the same batch; the plan
of micro-batches then says which sequences each data-parallel rank computes.
"""

from collections.abc import Sequence

import torch

from rlef_mega.ppo import task_rewards
from rlef_mega.types import Batch, Episode


def pack(
    episodes: Sequence[Episode],
    *,
    invalid_code_penalty: float,
    penalize_invalid_last_turn: bool = False,
) -> Batch:
    """Lay episodes end to end, in order. Turns are numbered through the whole batch."""
    if not episodes:
        raise ValueError("no episodes to pack: every episode of the batch was dropped")
    token_ids: list[int] = []
    turn_index: list[int] = []
    logprobs: list[float] = []
    value_positions: list[int] = []
    episode_of_turn: list[int] = []
    solved: list[bool] = []
    valid: list[bool] = []
    last: list[bool] = []
    lengths = [len(episode.token_ids) for episode in episodes]
    for number, episode in enumerate(episodes):
        start = len(token_ids)
        token_ids += episode.token_ids
        for turn in episode.turns:
            observed = start + turn.context_len - len(turn_index)  # tokens since the last response
            turn_index += [-1] * observed + [len(value_positions)] * len(turn.action_ids)
            logprobs += [0.0] * observed + list(turn.action_logprobs)
            value_positions.append(start + turn.context_len - 1)
            episode_of_turn.append(number)
            solved.append(episode.solved)
            valid.append(turn.program is not None)
            last.append(turn is episode.turns[-1])
    turn_index_T = torch.tensor(turn_index)
    return Batch(
        token_ids_T=torch.tensor(token_ids),
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        action_mask_T=turn_index_T >= 0,
        turn_index_T=turn_index_T,
        behaviour_logprobs_T=torch.tensor(logprobs, dtype=torch.float32),
        value_positions_N=torch.tensor(value_positions),
        episode_of_turn_N=torch.tensor(episode_of_turn),
        rewards_N=task_rewards(
            torch.tensor(solved),
            torch.tensor(valid),
            torch.tensor(last),
            invalid_code_penalty=invalid_code_penalty,
            penalize_invalid_last_turn=penalize_invalid_last_turn,
        ),
    )


def token_positions(cu_seqlens: torch.Tensor, sequences: Sequence[int]) -> torch.Tensor:
    """Where the tokens of these sequences lie in the packed batch, in the order asked for."""
    bounds = cu_seqlens.tolist()
    spans = [torch.arange(bounds[s], bounds[s + 1]) for s in sequences]
    return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)


def turns_of(batch: Batch, sequences: Sequence[int]) -> torch.Tensor:
    """The batch's turn numbers that belong to these sequences, in the order asked for."""
    first = torch.searchsorted(
        batch.episode_of_turn_N, torch.arange(batch.num_sequences + 1)
    ).tolist()
    spans = [torch.arange(first[s], first[s + 1]) for s in sequences]
    return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)


def select(batch: Batch, sequences: Sequence[int]) -> Batch:
    """The batch that `pack` would have made of these (distinct) sequences alone, in the order asked
    for."""
    positions = token_positions(batch.cu_seqlens, sequences)
    turns = turns_of(batch, sequences)
    lengths = batch.cu_seqlens.diff()[list(sequences)].long()
    starts = batch.cu_seqlens[:-1][list(sequences)].long()
    new_starts = lengths.cumsum(0) - lengths
    renumber = torch.full((batch.num_turns + 1,), -1)  # the last entry serves turn_index -1
    renumber[turns] = torch.arange(turns.numel())
    turn_counts = torch.bincount(batch.episode_of_turn_N, minlength=batch.num_sequences)
    episode_of_turn_N = torch.arange(len(sequences)).repeat_interleave(turn_counts[list(sequences)])
    return Batch(
        token_ids_T=batch.token_ids_T[positions],
        position_ids_T=batch.position_ids_T[positions],
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
        action_mask_T=batch.action_mask_T[positions],
        turn_index_T=renumber[batch.turn_index_T[positions]],
        behaviour_logprobs_T=batch.behaviour_logprobs_T[positions],
        value_positions_N=batch.value_positions_N[turns] + (new_starts - starts)[episode_of_turn_N],
        episode_of_turn_N=episode_of_turn_N,
        rewards_N=batch.rewards_N[turns],
    )


def microbatches(
    lengths: Sequence[int], token_budget: int, data_parallel_size: int
) -> list[list[list[int]]]:
    """Indices into `lengths`: for each data-parallel rank its micro-batches, the same number on
    every rank.

    Longest first, each sequence goes to the micro-batch with the fewest tokens so far; the number
    of micro-batches is the smallest multiple of the data-parallel size at which none exceeds the
    budget. A single sequence longer than the budget is an error. Ranks may get an empty micro-batch
    when there are fewer sequences than ranks.
    """
    longest = max(lengths, default=0)
    if longest > token_budget:
        raise ValueError(
            f"a sequence of {longest} tokens exceeds learner.microbatch_tokens = {token_budget}; "
            f"raise it to at least rollout.max_context"
        )
    count = max(1, -(-sum(lengths) // (token_budget * data_parallel_size))) * data_parallel_size
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            lightest = loads.index(min(loads))
            bins[lightest].append(index)
            loads[lightest] += lengths[index]
        if max(loads) <= token_budget:
            return [bins[rank::data_parallel_size] for rank in range(data_parallel_size)]
        count += data_parallel_size
