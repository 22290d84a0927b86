"""Pack episodes into a batch: sequences end to end without padding, divided into micro-batches of
equal work within a token budget.

This stage is between the rollout and the learner. Every rank packs the same episodes into the same
batch; the plan of micro-batches says which sequences each data-parallel rank computes.
"""

import heapq
from collections.abc import Sequence

import torch

from rlef_mega.types import Batch, Episode


def pack(episodes: Sequence[Episode]) -> Batch:
    """Concatenate episodes, in order. Turns are numbered through the whole batch.

    Raises ValueError if there are no episodes.
    """
    if not episodes:
        raise ValueError("no episodes to pack: every episode of the batch was dropped")
    token_ids: list[int] = []
    starts = [0]
    action_positions: list[int] = []
    turn_of_action: list[int] = []
    logprobs: list[float] = []
    versions: list[int] = []
    value_positions: list[int] = []
    episode_of_turn: list[int] = []
    groups: dict[tuple[str, int], int] = {}
    group_of_turn: list[int] = []
    valid_code: list[bool] = []
    for number, episode in enumerate(episodes):
        for turn_number, turn in enumerate(episode.turns):
            token_ids += turn.observed_ids
            sampled = turn.completion
            first = len(token_ids)
            token_ids += sampled.token_ids
            action_positions += range(first, len(token_ids))
            turn_of_action += [len(value_positions)] * len(sampled.token_ids)
            logprobs += sampled.logprobs
            versions += sampled.weight_versions
            value_positions.append(first - 1)
            episode_of_turn.append(number)
            group = groups.setdefault((episode.problem_id, turn_number), len(groups))
            group_of_turn.append(group)
            valid_code.append(turn.program is not None)
        starts.append(len(token_ids))
    return Batch(
        token_ids_T=torch.tensor(token_ids),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        action_positions_A=torch.tensor(action_positions),
        turn_of_action_A=torch.tensor(turn_of_action),
        behaviour_logprobs_A=torch.tensor(logprobs, dtype=torch.float32),
        weight_versions_A=torch.tensor(versions),
        value_positions_N=torch.tensor(value_positions),
        episode_of_turn_N=torch.tensor(episode_of_turn),
        group_of_turn_N=torch.tensor(group_of_turn),
        valid_code_N=torch.tensor(valid_code),
        solved_E=torch.tensor([episode.solved for episode in episodes]),
    )


def spans(bounds: torch.Tensor, sequences: Sequence[int]) -> torch.Tensor:
    """Return the indices bounds[s]:bounds[s + 1] of each of these sequences, in the order given."""
    starts_and_ends = bounds.tolist()
    ranges = [torch.arange(starts_and_ends[s], starts_and_ends[s + 1]) for s in sequences]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)


def microbatches(
    lengths: Sequence[int],
    token_budget: int,
    data_parallel_size: int,
    *,
    costs: Sequence[int] | None = None,
    multiple: int = 1,
) -> list[list[list[int]]]:
    """Divide sequences over data-parallel ranks and then into micro-batches.

    Returns, for each rank, its micro-batches, heaviest first, as lists of indices into `lengths`,
    longest sequence first. Every rank has the same number of micro-batches, none above
    `token_budget` tokens; some are empty if a rank has fewer sequences.

    `costs` is the cost of each sequence, such as its FLOPs (default: its length). Costs are
    balanced over the ranks first, because ranks wait for each other at the end of an update, and
    then over each rank's micro-batches, because the stages of a pipeline wait for each other at
    every micro-batch. The number of micro-batches is the smallest multiple of `multiple` that
    keeps the budget: some pipeline schedules need a multiple of their stages.

    Raises ValueError if a single sequence is longer than the budget.
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
    while True:  # ends at the latest with one sequence in each micro-batch
        plan = [equal_parts(costs, rank, count) for rank in ranks]
        if all(sum(lengths[i] for i in part) <= token_budget for rank in plan for part in rank):
            return [[sorted(p, key=lambda i: (-lengths[i], i)) for p in rank] for rank in plan]
        count += multiple


def equal_parts(costs: Sequence[int], members: Sequence[int], count: int) -> list[list[int]]:
    """Divide `members` into `count` parts of nearly equal cost, heaviest first, by the largest
    differencing method (Karmarkar and Karp 1982).

    The method starts with one division for each member, in which it is alone, and merges the two
    least even divisions, heaviest part with lightest, until one is left. A division lists its
    non-empty parts only, heaviest first, so that its size is bounded by its members.
    """
    divisions: list[tuple[int, int, list[tuple[int, tuple[int, ...]]]]]
    divisions = [(-costs[member], member, [(costs[member], (member,))]) for member in members]
    heapq.heapify(divisions)
    while len(divisions) > 1:
        _, number, first = heapq.heappop(divisions)
        _, _, second = heapq.heappop(divisions)
        shared = max(0, len(first) + len(second) - count)  # parts that are merged with another
        alone, added = len(first) - shared, len(second) - shared
        parts = first[:alone] + second[:added]
        for (a, these), (b, those) in zip(first[alone:], reversed(second[added:]), strict=True):
            parts.append((a + b, these + those))
        parts.sort(reverse=True)
        lightest = parts[-1][0] if len(parts) == count else 0
        heapq.heappush(divisions, (lightest - parts[0][0], number, parts))
    found = [list(part) for _, part in divisions[0][2]] if divisions else []
    return found + [[] for _ in range(count - len(found))]


def shuffled(count: int, seed: int) -> torch.Tensor:
    """Return a permutation of `count` items, determined by the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
