"""Packing keeps every token, turn and reward where the algorithm reads it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlef_mega import packing, ppo
from rlef_mega.types import Scores
from tests.mega.episodes import episode

EPISODES = [
    episode([(3, 2), (2, 1)], solved=True, first_id=100),
    episode([(2, 3)], solved=False, first_id=200),
    episode([(4, 1), (1, 1), (1, 2)], solved=True, first_id=300),
]


def pack(episodes):
    return packing.pack(episodes, invalid_code_penalty=-0.2)


def test_a_packed_batch_by_hand():
    batch = pack(EPISODES[:2])
    assert batch.token_ids_T.tolist() == [*range(100, 108), *range(200, 205)]
    assert batch.position_ids_T.tolist() == [*range(8), *range(5)]
    assert batch.cu_seqlens.tolist() == [0, 8, 13]
    assert batch.turn_index_T.tolist() == [-1, -1, -1, 0, 0, -1, -1, 1, -1, -1, 2, 2, 2]
    # the last prompt token of each turn: its next token is the first of the response
    assert batch.value_positions_N.tolist() == [2, 6, 9]
    assert batch.episode_of_turn_N.tolist() == [0, 0, 1]
    assert batch.rewards_N.tolist() == [0.0, 1.0, -1.0]
    torch.testing.assert_close(
        batch.behaviour_logprobs_T[batch.action_mask_T],
        torch.tensor([-0.1, -0.2, -0.1, -0.1, -0.2, -0.3]),
    )


@given(st.lists(st.integers(0, 2), max_size=3, unique=True))
def test_selecting_equals_packing_the_selection(chosen):
    batch = pack(EPISODES)
    selected = packing.select(batch, chosen)
    if not chosen:
        assert selected.num_tokens == selected.num_turns == selected.num_sequences == 0
        return
    expected = pack([EPISODES[i] for i in chosen])
    for name in expected.__dataclass_fields__:
        assert torch.equal(getattr(selected, name), getattr(expected, name)), name


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 200), st.integers(1, 4)
)
def test_microbatches_hold_each_sequence_once_within_budget_and_equal_in_number(
    lengths, budget, ranks
):
    plan = packing.microbatches(lengths, budget, ranks)
    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1
    chosen = sorted(index for rank in plan for microbatch in rank for index in microbatch)
    assert chosen == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in m) <= budget for rank in plan for m in rank)


def test_a_sequence_over_the_budget_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"120 tokens exceeds learner\.microbatch_tokens = 100"):
        packing.microbatches([50, 120], 100, 1)


def test_advantages_are_invariant_to_packing():
    """The same episodes in another order give each turn the same target."""
    forward, backward = pack(EPISODES), pack(EPISODES[::-1])

    def targets(batch):
        logprobs_T = batch.behaviour_logprobs_T
        scores = Scores(logprobs_T, logprobs_T * 1.5, torch.arange(6.0) * 0 + 0.25)
        options = dict(beta=0.05, gamma=1.0, normalize=True)
        return ppo.targets(batch, scores, **options)[0].advantages_N

    a, b = targets(forward), targets(backward)
    torch.testing.assert_close(torch.cat([a[3:], a[2:3], a[:2]]), b)
