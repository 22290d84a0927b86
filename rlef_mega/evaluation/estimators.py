"""From counts of samples to n@k and pass@k, with 95% intervals (RLEF 3.1, B.1). Pure.

n@k is the probability that any of n solutions, selected from k samples, is correct. Every turn is a
sample, so k samples are R = k // t dialogues of up to t turns, or k single responses (t = 1). A
dialogue brings at most one solution worth submitting: it ends when its public tests pass. So the
unit here is the dialogue, and of one problem all that counts is

    N  dialogues held,  p  of them passed the public tests,  c  of these are correct (private tests)

Selection is uniform without replacement among those that pass the public tests; a solution that
fails one is not correct, so what is submitted when fewer than n pass adds nothing (AlphaCode's
filtering; RLEF 3.1). pass@k is n@k without a limit on n.

Shape suffixes: P problems, R resamples; counts broadcast against each other.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 200  # RLEF B.1
# A resample repeats dialogues. Of simulated models, intervals of 95% held the truth in 89 to 94% of
# cases where there were so many dialogues for each that is drawn; with fewer, in as few as 71%.
ENOUGH = 4
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems. `low` and `high` bound it for other problems of this kind (problems are
    resampled); `sampling_low` and `sampling_high` for these problems alone (the dialogues of each
    are resampled, as RLEF B.1), where there are enough dialogues to say so."""

    value: float
    low: float
    high: float
    sampling_low: float | None
    sampling_high: float | None
    problems: int
    bootstrapped: int  # problems with fewer dialogues than a draw needs


def n_at_k(held: ArrayLike, passed: ArrayLike, correct: ArrayLike, *, n: int, draws: int) -> Floats:
    """Unbiased, from N = `held` >= `draws` = R dialogues: the mean over all subsets of R.

    sum_j H(j; N, p, R) [1 - C(p - c, m) / C(p, m)],  m = min(n, j)

    with H the hypergeometric probability that j of the R drawn pass the public tests: a uniform
    choice of m among uniformly drawn j of p is a uniform choice of m of p.
    """
    held_, passed_, correct_, drawn = counts(held, passed, correct, draws)
    if np.any(held_ < draws):
        raise ValueError(f"{draws} dialogues cannot be drawn from {held_.min()} without repetition")
    picked = np.minimum(n, drawn)
    log_choose = LogBinomials(int(held_.max(initial=0)))
    hypergeometric = np.exp(
        log_choose(passed_, drawn)
        + log_choose(held_ - passed_, draws - drawn)
        - log_choose(held_, np.full_like(drawn, draws))
    )
    # more picked than pass: such j have probability 0, and C(p, m) = 0 must not divide
    possible = picked <= passed_
    all_wrong = np.exp(
        log_choose(passed_ - correct_, picked)
        - np.where(possible, log_choose(passed_, picked), 0.0)
    )
    return (hypergeometric * np.where(possible, 1 - all_wrong, 0.0)).sum(-1)


def n_at_k_with_repetition(
    held: ArrayLike, passed: ArrayLike, correct: ArrayLike, *, n: int, draws: int
) -> Floats:
    """The bootstrap's expectation, for N < R: R dialogues drawn from N with repetition.

    sum_j B(j; R, p / N) [1 - (1 - c / p)^m],  m = min(n, j)

    with B binomial. Biased downwards: a dialogue drawn twice is submitted twice.
    """
    held_, passed_, correct_, drawn = counts(held, passed, correct, draws)
    picked = np.minimum(n, drawn)
    passing = passed_ / held_
    binomial = (
        np.exp(LogBinomials(draws)(np.full_like(drawn, draws), drawn))
        * passing**drawn
        * (1 - passing) ** (draws - drawn)
    )
    wrong = 1 - correct_ / np.maximum(passed_, 1)
    return (binomial * (1 - wrong**picked)).sum(-1)


def counts(
    held: ArrayLike, passed: ArrayLike, correct: ArrayLike, draws: int
) -> tuple[Ints, Ints, Ints, Ints]:
    """With an axis more at the end, over j = 0 .. draws."""
    arrays = [np.asarray(each, dtype=np.int64)[..., None] for each in (held, passed, correct)]
    held_, passed_, correct_ = np.broadcast_arrays(*arrays)
    if draws < 1:
        raise ValueError(f"{draws} dialogues are no sample; give a k of at least the turns")
    assert np.all((correct_ >= 0) & (correct_ <= passed_) & (passed_ <= held_)), "no counts"
    return held_, passed_, correct_, np.arange(draws + 1)


class LogBinomials:
    """log C(a, b) for a up to `most`; -inf where there is no such choice."""

    def __init__(self, most: int) -> None:
        self.log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 1)))])

    def __call__(self, of: Ints, choose: Ints) -> Floats:
        of, choose = np.broadcast_arrays(of, choose)
        exists = (choose >= 0) & (choose <= of)
        a, b = np.where(exists, of, 0), np.where(exists, choose, 0)
        found = self.log_factorial[a] - self.log_factorial[b] - self.log_factorial[a - b]
        return np.where(exists, found, -np.inf)


def per_problem(
    held: ArrayLike, passed: ArrayLike, correct: ArrayLike, *, n: int, draws: int
) -> Floats:
    """Unbiased where there are dialogues enough, else the bootstrap."""
    held_, passed_, correct_ = (np.asarray(each) for each in (held, passed, correct))
    enough = held_ >= draws
    values = np.empty(held_.shape)
    for chosen, estimator in ((enough, n_at_k), (~enough, n_at_k_with_repetition)):
        if chosen.any():
            values[chosen] = estimator(
                held_[chosen], passed_[chosen], correct_[chosen], n=n, draws=draws
            )
    return values


def estimate(
    held_P: ArrayLike, passed_P: ArrayLike, correct_P: ArrayLike, *, n: int, draws: int
) -> Estimate:
    """The mean over problems, each with at least one dialogue. ValueError where there is none."""
    held, passed, correct = (np.asarray(each) for each in (held_P, passed_P, correct_P))
    if not held.size or held.min() < 1:
        raise ValueError("a problem without dialogues has no estimate; leave it out")
    values_P = per_problem(held, passed, correct, n=n, draws=draws)
    generator = np.random.default_rng(0)  # the same counts, the same interval
    again_RP = generator.integers(0, len(held), (RESAMPLES, len(held)))
    low, high = percentiles(values_P[again_RP].mean(1))
    sampling: tuple[float | None, float | None] = (None, None)
    if np.all(held >= ENOUGH * draws):
        means_R = resampled_means(held, passed, correct, n, draws, generator)
        # centred, unlike RLEF B.1: resamples are poorer than the sample, so their mean is lower
        sampling = percentiles(np.clip(means_R + values_P.mean() - means_R.mean(), 0, 1))
    return Estimate(
        float(values_P.mean()), low, high, *sampling, len(held), int((held < draws).sum())
    )


def resampled_means(
    held: Ints, passed: Ints, correct: Ints, n: int, draws: int, generator: np.random.Generator
) -> Floats:
    """Means over problems, of each problem's N dialogues drawn again with repetition."""
    shares_P3 = np.stack([held - passed, passed - correct, correct], -1) / held[:, None]
    drawn_RP3 = generator.multinomial(held, shares_P3, size=(RESAMPLES, len(held)))
    passed_RP, correct_RP = drawn_RP3[..., 1:].sum(-1), drawn_RP3[..., 2]
    # few counts are different, so each is computed once; they are told apart by one number
    base = int(held.max()) + 1
    keys_RP = (held * base + passed_RP) * base + correct_RP
    keys, place = np.unique(keys_RP, return_inverse=True)
    different = keys // base**2, keys // base % base, keys % base
    values = per_problem(*different, n=n, draws=draws)
    return values[place.reshape(keys_RP.shape)].mean(1)


def percentiles(means_R: Floats) -> tuple[float, float]:
    low, high = np.percentile(means_R, [2.5, 97.5])
    return float(low), float(high)


def parse_n_at_k(text: str) -> tuple[tuple[int, int], ...]:
    """`1@3,10@100` to ((1, 3), (10, 100)). ValueError for anything else."""
    pairs = []
    for part in text.split(","):
        n, separator, k = part.strip().partition("@")
        if not (separator and n.isdigit() and k.isdigit() and 1 <= int(n) <= int(k)):
            raise ValueError(
                f"{part.strip()!r} is no n@k with 1 <= n <= k; write it like 1@3,10@100"
            )
        pairs.append((int(n), int(k)))
    return tuple(dict.fromkeys(pairs))
