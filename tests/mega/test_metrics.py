"""Rates and intervals by hand."""

import pytest

from rlef_mega import metrics
from rlef_mega.evaluate import n_at_k
from tests.mega.episodes import episode

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
    assert rates["repaired_turn2"] == pytest.approx(2 / 4)  # four came to turn 2
    assert rates["repaired_turn3"] == pytest.approx(1 / 2)
    assert rates["turns_mean"] == pytest.approx(11 / 5)
    assert rates["tokens"] == 3 * 11


def test_rates_of_nothing_are_none_not_zero():
    rates = metrics.episode_metrics([episode(ONE_TURN, solved=True)])
    assert rates["repaired_turn2"] is None


@pytest.mark.parametrize(
    ("samples", "n", "expected"),
    [
        # (public passed, correct)
        ([(False, False)] * 3, 1, 0.0),
        ([(True, True), (False, False), (False, False)], 1, 1.0),
        ([(True, True), (True, False), (False, False)], 1, 0.5),
        ([(True, True), (True, False), (True, False)], 2, 2 / 3),
        ([(True, True), (False, False)], 5, 1.0),
    ],
)
def test_one_of_n_selected_among_those_that_pass_the_public_tests(samples, n, expected):
    assert n_at_k(samples, n) == pytest.approx(expected)


def test_the_interval_holds_the_mean_and_narrows_with_the_sample():
    few, many = ([0.0, 1.0] * size for size in (10, 1000))
    narrow, wide = metrics.bootstrap_interval(many), metrics.bootstrap_interval(few)
    for interval in (narrow, wide):
        assert interval["low"] < interval["value"] == 0.5 < interval["high"]
    assert narrow["high"] - narrow["low"] < (wide["high"] - wide["low"]) / 5
    assert metrics.bootstrap_interval(few) == wide  # the same every time
