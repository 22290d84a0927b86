"""n@k against enumeration of every choice, and against simulation of models whose rate is known."""

import itertools
from math import comb

import numpy as np
import pytest

from rlef_mega.evaluation.estimators import (
    estimate,
    n_at_k,
    n_at_k_with_repetition,
    parse_n_at_k,
    per_problem,
)

# a dialogue fails a public test; or passes them, but is wrong; or is correct
FAILS, WRONG, RIGHT = range(3)
SAMPLES = [
    samples
    for size in (1, 2, 3, 5)
    for samples in itertools.combinations_with_replacement((FAILS, WRONG, RIGHT), size)
]


def tally(samples) -> tuple[int, int, int]:
    passed = sum(sample != FAILS for sample in samples)
    return len(samples), passed, samples.count(RIGHT)


def any_of_the_selected(drawn, n: int) -> float:
    """Return the share of all selections of n passing samples that have a correct one."""
    passing = [sample for sample in drawn if sample != FAILS]
    selections = list(itertools.combinations(passing, min(n, len(passing))))
    return sum(RIGHT in selection for selection in selections) / len(selections)


@pytest.mark.parametrize("samples", SAMPLES, ids=str)
def test_n_at_k_is_the_mean_over_every_draw_and_every_selection(samples):
    for draws in range(1, len(samples) + 1):
        for n in range(1, draws + 1):
            every = [any_of_the_selected(d, n) for d in itertools.combinations(samples, draws)]
            found = n_at_k(tally(samples), n=n, draws=draws)
            assert found == pytest.approx(np.mean(every), abs=1e-12)


@pytest.mark.parametrize("samples", [s for s in SAMPLES if len(s) <= 3], ids=str)
def test_the_bootstrap_is_the_mean_over_every_draw_with_repetition(samples):
    for draws in range(1, 5):
        for n in range(1, draws + 1):
            every = [any_of_the_selected(d, n) for d in itertools.product(samples, repeat=draws)]
            found = n_at_k_with_repetition(tally(samples), n=n, draws=draws)
            assert found == pytest.approx(np.mean(every), abs=1e-12)


def test_pass_at_k_is_the_published_formula_whatever_the_public_tests_say():
    for held, correct, k in ((200, 3, 33), (200, 150, 100), (5000, 1, 1000)):
        chen = 1 - comb(held - correct, k) / comb(held, k)  # Chen et al. 2021
        for passed in (correct, (held + correct) // 2, held):
            assert n_at_k((held, passed, correct), n=k, draws=k) == pytest.approx(chen, abs=1e-9)


@pytest.mark.parametrize(
    ("samples", "n", "expected"),
    [
        ([FAILS] * 3, 1, 0.0),
        ([RIGHT, FAILS, FAILS], 1, 1.0),
        ([RIGHT, WRONG, FAILS], 1, 0.5),
        ([RIGHT, WRONG, WRONG], 2, 2 / 3),
        ([RIGHT, FAILS], 5, 1.0),
    ],
)
def test_one_of_n_selected_among_all_that_pass_by_hand(samples, n, expected):
    assert n_at_k(tally(samples), n=n, draws=len(samples)) == pytest.approx(expected)


def test_too_few_dialogues_are_drawn_with_repetition_and_counted():
    counts = np.array([[2, 6], [1, 3], [1, 1]])  # held, passed, correct
    with pytest.raises(AssertionError, match="4 of 2 dialogues"):
        n_at_k(counts, n=2, draws=4)
    values = per_problem(counts, n=2, draws=4)
    assert values[0] == n_at_k_with_repetition((2, 1, 1), n=2, draws=4)
    assert values[1] == n_at_k((6, 3, 1), n=2, draws=4)
    assert estimate(counts, n=2, draws=4)["bootstrapped"] == 1
    with pytest.raises(AssertionError, match="without dialogues"):
        estimate(counts[:, :0], n=1, draws=1)


# ------------------------------------------------------------------------------ simulated models


def dialogues_of(rates, held: int, generator) -> np.ndarray:
    """Draw counts for each problem from its rates of failed, wrong and correct dialogues."""
    drawn = np.array([generator.multinomial(held, rate) for rate in rates])
    return np.array([drawn.sum(-1), drawn[:, 1] + drawn[:, 2], drawn[:, 2]])


def true_rate(rates, n: int, draws: int) -> float:
    """Compute n@k from the rates: j of the draws pass, each is correct with probability c / p."""
    total = 0.0
    for fails, wrong, right in rates:
        passes = wrong + right
        for j in range(draws + 1):
            chance = comb(draws, j) * passes**j * fails ** (draws - j)
            total += chance * (1 - (wrong / passes) ** min(n, j))
    return total / len(rates)


def random_rates(count: int, generator) -> np.ndarray:
    return generator.dirichlet([2.0, 0.5, 0.7], size=count)


def test_the_estimate_is_unbiased_and_the_bootstrap_is_not():
    generator = np.random.default_rng(1)
    rates = random_rates(4, generator)
    truth = true_rate(rates, n=3, draws=8)
    found = np.mean(
        [per_problem(dialogues_of(rates, 9, generator), n=3, draws=8).mean() for _ in range(1500)]
    )
    few = np.mean(
        [
            n_at_k_with_repetition(dialogues_of(rates, 9, generator), n=3, draws=8).mean()
            for _ in range(1500)
        ]
    )
    assert found == pytest.approx(truth, abs=0.012)  # three standard errors of the mean
    assert few < truth - 0.02


@pytest.mark.parametrize(("n", "draws"), [(1, 1), (3, 10)])  # at most 10 draws of 40
def test_intervals_contain_the_true_rate_of_simulated_models(n, draws):
    """The rate of these problems, when dialogues are drawn again, and that of all such problems,
    when problems are drawn too."""
    generator = np.random.default_rng(2)
    population = true_rate(random_rates(5_000, generator), n, draws)
    these = others = 0
    for _ in range(100):
        rates = random_rates(20, generator)
        found = estimate(dialogues_of(rates, 40, generator), n=n, draws=draws)
        these += found["sampling"]["low"] <= true_rate(rates, n, draws) <= found["sampling"]["high"]
        others += found["low"] <= population <= found["high"]
    # 95 are asked for, with a standard error of 2; percentiles of a bootstrap are a little narrow
    assert 85 <= these <= 99, these
    assert 85 <= others <= 99, others


def test_n_at_k_is_read_as_it_is_written():
    assert parse_n_at_k("1@3, 10@100,1@3") == ((1, 3), (10, 100))
    for wrong in ("3", "4@3", "0@3", "a@b", "", "1@3,"):
        with pytest.raises(ValueError, match="is not n@k"):
            parse_n_at_k(wrong)
