"""Episodes to packed batches: sequences end to end without padding, cut into micro-batches of equal
work within a token budget.

Stands between rollout and learner. Every rank packs the same episodes to the same batch; the plan
of micro-batches then says which sequences each data-parallel rank computes.
"""

import heapq
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
    versions: list[int] = []
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
            versions += [-1] * observed + list(turn.weight_versions)
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
        weight_versions_T=torch.tensor(versions),
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
        weight_versions_T=batch.weight_versions_T[positions],
        value_positions_N=batch.value_positions_N[turns] + (new_starts - starts)[episode_of_turn_N],
        episode_of_turn_N=episode_of_turn_N,
        rewards_N=batch.rewards_N[turns],
    )


def microbatches(
    lengths: Sequence[int],
    token_budget: int,
    data_parallel_size: int,
    *,
    costs: Sequence[int] | None = None,
    multiple: int = 1,
) -> list[list[list[int]]]:
    """Indices into `lengths`: for each data-parallel rank its micro-batches, the same number on
    every rank, none above `token_budget` tokens.

    `costs` is what each sequence takes, its FLOPs say (default: its length). First the ranks get
    equal costs, for they wait for each other at the end of an update; then a rank's micro-batches
    do, for the stages of a pipeline wait for each other at each one. Their number is the smallest
    multiple of `multiple` found to keep the budget: a schedule may need a multiple of its stages.
    Micro-batches are empty where a rank has fewer sequences. Longest first within each.

    Raises ValueError for a single sequence longer than the budget.
    """
    longest = max(lengths, default=0)
    if longest > token_budget:
        raise ValueError(
            f"a sequence of {longest} tokens exceeds learner.microbatch_tokens = {token_budget}; "
            f"raise it to at least rollout.max_context"
        )
    costs = lengths if costs is None else costs
    ranks = equal_parts(costs, range(len(lengths)), data_parallel_size)
    fullest = max(sum(lengths[i] for i in rank) for rank in ranks)
    count = multiple * max(1, -(-fullest // (token_budget * multiple)))
    while True:  # ends at the latest with a micro-batch for each sequence
        plan = [equal_parts(costs, rank, count) for rank in ranks]
        if all(sum(lengths[i] for i in part) <= token_budget for rank in plan for part in rank):
            return [[sorted(p, key=lambda i: (-lengths[i], i)) for p in rank] for rank in plan]
        count += multiple


def equal_parts(costs: Sequence[int], members: Sequence[int], count: int) -> list[list[int]]:
    """`members` in `count` parts of nearly equal cost, heaviest first: the largest differencing
    method (Karmarkar and Karp 1982).

    It keeps several divisions into parts, at first one for each member; the two that are least even
    are laid over each other, heaviest part on lightest, until one is left. Here a division lists
    its parts heaviest first, without the empty ones, so that it costs no more than its members.
    """
    divisions: list[tuple[int, int, list[tuple[int, tuple[int, ...]]]]]
    divisions = [(-costs[member], member, [(costs[member], (member,))]) for member in members]
    heapq.heapify(divisions)
    while len(divisions) > 1:
        _, number, first = heapq.heappop(divisions)
        _, _, second = heapq.heappop(divisions)
        shared = max(0, len(first) + len(second) - count)  # parts that meet one of the other's
        kept, laid = len(first) - shared, len(second) - shared
        parts = first[:kept] + second[:laid]
        for (a, these), (b, those) in zip(first[kept:], reversed(second[laid:]), strict=True):
            parts.append((a + b, these + those))
        parts.sort(reverse=True)
        lightest = parts[-1][0] if len(parts) == count else 0
        heapq.heappush(divisions, (lightest - parts[0][0], number, parts))
    found = [list(part) for _, part in divisions[0][2]] if divisions else []
    return found + [[] for _ in range(count - len(found))]


def shuffled(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
