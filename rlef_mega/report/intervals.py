"""95% intervals of rates: by resampling problems, or seeds and problems, and Wilson's."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 200  # RLEF B.1
RESAMPLES_OVER_SEEDS = 2000
Z = 1.96  # standard deviations of a 95% interval
Floats = NDArray[np.float64]


def bootstrap_interval(
    values: ArrayLike, *, resamples: int = RESAMPLES, generator: np.random.Generator | None = None
) -> dict[str, float]:
    """Return the mean and its 95% interval: percentiles 2.5 and 97.5 of the means of resamples with
    replacement (RLEF B.1). Without a generator, the same values give the same interval."""
    sample = np.asarray(values, dtype=float)
    generator = generator or np.random.default_rng(0)
    means = sample[generator.integers(0, len(sample), (resamples, len(sample)))].mean(1)
    return {"value": float(sample.mean()), **percentiles(means)}


def interval_over_seeds(outcomes: Sequence[Sequence[float | None]]) -> dict[str, float]:
    """Return the mean over seeds (one list each) and problems, and its 95% interval, for which both
    are resampled. All lists have the same problems in the same order. A problem that is None in any
    list is left out."""
    everyone = np.array(outcomes, dtype=float)
    known = everyone[:, ~np.isnan(everyone).any(axis=0)]  # seeds x problems
    generator = np.random.default_rng(0)
    problems = generator.integers(known.shape[1], size=(RESAMPLES_OVER_SEEDS, known.shape[1]))
    seeds = generator.integers(len(known), size=(RESAMPLES_OVER_SEEDS, len(known)))
    means = [known[s].mean(0)[p].mean() for s, p in zip(seeds, problems, strict=True)]
    return {"value": float(known.mean()), **percentiles(np.array(means))}


def wilson_interval(rates: Sequence[float], counts: Sequence[float]) -> tuple[Floats, Floats]:
    """Return the lower and upper bounds of Wilson's 95% interval (1927) of each rate among its
    count of trials. It lies within [0, 1], and is [0, 1] where the count is 0."""
    rate, count = np.clip(rates, 0, 1), np.asarray(counts, dtype=float)
    trials = np.where(count > 0, count, 1)
    middle = (rate + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    spread = np.sqrt(rate * (1 - rate) / trials + Z**2 / (4 * trials**2))
    half = Z * spread / (1 + Z**2 / trials)
    return np.where(count > 0, middle - half, 0.0), np.where(count > 0, middle + half, 1.0)


def percentiles(resampled: Floats) -> dict[str, float]:
    """Return the 2.5 and 97.5 percentiles as `low` and `high`."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}
