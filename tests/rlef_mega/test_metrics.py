"""The metrics of a step by hand."""

import math
from dataclasses import replace

import pytest
import torch

from rlef_mega import metrics
from rlef_mega.config import GuardConfig
from rlef_mega.packing import pack
from rlef_mega.run.guards import GuardError, Guards, kinds_of, most_frequent
from rlef_mega.types import Scores
from tests.rlef_mega.episodes import episode

ONE_TURN, TWO_TURNS, THREE_TURNS = ([(2, 1)] * turns for turns in (1, 2, 3))


def test_solve_and_repair_rates_by_hand():
    episodes = [
        episode(ONE_TURN, solved=True),
        episode(TWO_TURNS, solved=True),
        episode(TWO_TURNS, solved=True),
        episode(THREE_TURNS, solved=True),
        episode(THREE_TURNS, solved=False),
    ]
    rates = metrics.episode_metrics(episodes)
    assert rates["solved"] == pytest.approx(4 / 5)
    assert rates["solved_turn1"] == pytest.approx(1 / 5)
    assert rates["repaired_turn2"] == pytest.approx(2 / 4)  # four reached turn 2
    assert rates["repaired_turn3"] == pytest.approx(1 / 2)
    assert rates["turns_mean"] == pytest.approx(11 / 5)
    assert rates["tokens"] == 3 * 11


def test_rates_of_nothing_are_none_not_zero():
    rates = metrics.episode_metrics([episode(ONE_TURN, solved=True)])
    assert rates["repaired_turn2"] is None


# ------------------------------------------------------------------------- off-policy metrics


def stale_batch():
    """Return a batch of two episodes of one turn of two tokens, and its scores. The tokens have the
    versions 3, 3 and 2, 3, the trainer has 3. log pi_old - log pi_b is 0, log 2, log 3, 0."""
    batch = pack([episode([(1, 2)], solved=True), episode([(2, 2)], solved=False)])
    difference_A = torch.tensor([0.0, math.log(2), math.log(3), 0.0])
    behaviour_A = batch.behaviour_logprobs_A
    scores = Scores(behaviour_A + difference_A, behaviour_A, torch.zeros(2))
    return replace(batch, weight_versions_A=torch.tensor([3, 3, 2, 3])), scores


def test_staleness_and_ratios_by_hand():
    numbers = metrics.off_policy(*stale_batch(), version=3)
    assert numbers["staleness"] == {"0": 3, "1": 1}
    assert numbers["staleness_mean"] == 0.25 and numbers["staleness_max"] == 1
    assert numbers["mixed_fraction"] == 0.5
    assert numbers["effective_sample_size"] == pytest.approx(7**2 / (4 * 15))  # w = 1, 2, 3, 1
    assert numbers["truncated_fraction"] == 0.5
    k3 = ((2 - 1 - math.log(2)) + (3 - 1 - math.log(3))) / 4
    assert numbers["behaviour_k3"] == pytest.approx(k3, rel=1e-6)


def test_the_gap_is_of_tokens_sampled_with_the_trainers_weights():
    batch, scores = stale_batch()
    gap = metrics.logprob_gap(batch, scores, version=3)  # 0, log 2 and 0
    assert gap["logprob_gap_max"] == pytest.approx(math.log(2), rel=1e-6)
    assert gap["logprob_gap_mean"] == pytest.approx(math.log(2) / 3, rel=1e-6)
    assert gap["logprob_gap_k3"] == pytest.approx((1 - math.log(2)) / 3, rel=1e-6)
    assert set(metrics.logprob_gap(batch, scores, version=4).values()) == {None}


HEALTHY = {
    "logprob_gap_max": 0.0,
    "logprob_gap_mean": 0.0,
    "invalid_fraction": 0.0,
    "effective_sample_size": 1.0,
    "behaviour_k3": 0.0,
    "staleness": {"0": 10},
}


def watch(*records: dict) -> list[list[str]]:
    guards = Guards(GuardConfig(window=2), max_drop_fraction=0.05, max_staleness=1)
    alarms = []
    for step, record in enumerate(records, 1):
        record = {**HEALTHY, **record, "step": step}
        alarms.append(guards.alarms(record))
        guards.check(record)
    return alarms


@pytest.mark.parametrize(
    "fault", [{"effective_sample_size": 0.3}, {"behaviour_k3": 0.5}, {"behaviour_k3": math.nan}]
)
def test_tokens_too_far_off_policy_raise_an_alarm_and_then_end_the_run(fault):
    (name,) = fault
    assert watch({}, {}) == [[], []]
    (alarm,) = watch(fault)[0]
    assert name in alarm
    assert watch({}, {"effective_sample_size": 0.45}, {})[1]  # the mean of two steps is within
    with pytest.raises(GuardError, match=f"(?s)last 2 steps.*{name}"):
        watch(fault, fault)


def test_a_gap_of_half_the_limit_is_an_alarm_and_above_the_limit_ends_the_run():
    assert watch({"logprob_gap_mean": 0.02}) == [[]]
    assert "half" in watch({"logprob_gap_mean": 0.03})[0][0]
    with pytest.raises(GuardError, match="their weights differ"):
        watch({"logprob_gap_max": 5.5})
    assert watch({"logprob_gap_max": None, "logprob_gap_mean": None}) == [[]]


def test_too_many_drops_end_the_run_with_the_reasons_that_were_given():
    guards = Guards(GuardConfig(), max_drop_fraction=0.5, max_staleness=1)
    reasons = {"EngineError: weights are broken": 3, "prompt too long": 1}
    guards.check_drops(reasons, 8)
    with pytest.raises(GuardError, match=r"4 of 7 .* 3 x EngineError: weights are broken; 1 x"):
        guards.check_drops(reasons, 7)
    reasons |= {f"JudgeError: {n}": 1 for n in range(3)}
    assert most_frequent(reasons).endswith("1 x JudgeError: 0; 2 for other reasons")
    assert kinds_of(reasons) == {"EngineError": 3, "prompt too long": 1, "JudgeError": 3}


@pytest.mark.parametrize("lag", ["-1", "2"])
def test_tokens_of_versions_that_this_run_cannot_have_published_end_it(lag):
    assert watch({"staleness": {"0": 3, "1": 5}}) == [[]]
    with pytest.raises(GuardError, match="another run publishes"):
        watch({"staleness": {"0": 3, lag: 1}})


def test_a_servers_busy_time_is_the_largest_that_a_rank_reports():
    """Two ranks, two servers; other counts are summed over the ranks."""
    one = {"requests": 3, "server_busy_s a": 2.0, "server_busy_s b": 1.0}
    other = {"requests": 4, "server_busy_s b": 1.5, "follow_up_tokens": 8}
    counts = metrics.total_counts([one, other, {}])
    assert counts == {
        "requests": 7,
        "server_busy_s": 3.5,
        "follow_up_tokens": 8,
        "follow_up_cached_share": 0.0,
    }
    idle = metrics.idle_shares({"rollout": 1.0, "step": 5.0}, counts, servers=2)
    assert idle == {"trainer": 0.2, "engines": 1 - 3.5 / 10}
