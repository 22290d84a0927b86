"""Intervals of rates: by hand, and by their properties."""

import random

import pytest

from rlef_mega.report.intervals import bootstrap_interval, interval_over_seeds, wilson_interval


def test_the_interval_holds_the_mean_and_narrows_with_the_sample():
    few, many = ([0.0, 1.0] * size for size in (10, 1000))
    narrow, wide = bootstrap_interval(many), bootstrap_interval(few)
    for interval in (narrow, wide):
        assert interval["low"] < interval["value"] == 0.5 < interval["high"]
    assert narrow["high"] - narrow["low"] < (wide["high"] - wide["low"]) / 5
    assert bootstrap_interval(few) == wide  # the same every time


def outcomes(rng, *rates, problems=400):
    """Return random outcomes of `problems` problems for the rate of each seed."""
    return [[float(rng.random() < rate) for _ in range(problems)] for rate in rates]


def test_an_interval_over_seeds_counts_problems_and_what_differs_between_seeds():
    """If seeds agree, it is 1 to 2 times as wide as that of all problems together, because random
    differences between seeds count too. If seeds differ, it spans them."""
    alike = outcomes(random.Random(0), 0.5, 0.5)
    found = interval_over_seeds(alike)
    assert found["value"] == pytest.approx(sum(map(sum, alike)) / 800)
    of_problems = 2 * 1.96 * 0.5 / 800**0.5
    assert of_problems < found["high"] - found["low"] < 2 * of_problems
    apart = interval_over_seeds([[0.0] * 400, [1.0] * 400])
    assert (apart["low"], apart["value"], apart["high"]) == (0.0, 0.5, 1.0)
    # a problem that one seed's faults have dropped is left out of all
    assert interval_over_seeds([[1.0, 0.0, None], [1.0, 0.0, 1.0]])["value"] == 0.5


def test_the_interval_of_a_rate_is_wilsons():
    # 5 of 10: 0.5 -+ 1.96 sqrt(0.025 + 1.96^2 / 400) / (1 + 1.96^2 / 10)
    low, high = wilson_interval([0.5, 0.0, 1.0], [10, 10, 10])
    assert (low[0], high[0]) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert (low[1], high[1]) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert (low[2], high[2]) == pytest.approx((0.7225, 1.0), abs=1e-4)
