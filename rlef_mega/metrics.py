"""The numbers of a step, from what flowed through it. Pure."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from rlef_mega.types import Batch, Episode, Scores


def mean(values: Sequence[float | bool]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def episode_metrics(episodes: Sequence[Episode]) -> dict[str, float | None]:
    """Solve, repair and validity rates of a set of episodes."""
    responses = [turn for episode in episodes for turn in episode.turns]
    return {
        "solved": mean([episode.solved for episode in episodes]),
        "solved_turn1": mean([solved_at(episode, 0) for episode in episodes]),
        "repaired_turn2": repair_rate(episodes, 1),
        "repaired_turn3": repair_rate(episodes, 2),
        "invalid_fraction": mean([turn.program is None for turn in responses]),
        "turns_mean": mean([len(episode.turns) for episode in episodes]),
        "response_tokens_mean": mean([len(turn.action_ids) for turn in responses]),
        "tokens": sum(len(episode.token_ids) for episode in episodes),
    }


def solved_at(episode: Episode, turn: int) -> bool:
    """The episode ended with this turn, solved."""
    return episode.solved and len(episode.turns) == turn + 1


def repair_rate(episodes: Sequence[Episode], turn: int) -> float | None:
    """Of the dialogues that came to this turn, the fraction which it solved."""
    return mean([solved_at(episode, turn) for episode in episodes if len(episode.turns) > turn])


def error_kinds(episodes: Sequence[Episode], turn: int) -> dict[str, int]:
    """How the responses of one turn failed: no valid code, or the first status of a public test
    that is not OK.

    A response that passes the public tests and fails the private ones counts as PRIVATE_TEST.
    """
    counts: Counter[str] = Counter()
    for episode in episodes:
        if len(episode.turns) <= turn or solved_at(episode, turn):
            continue
        response = episode.turns[turn]
        failed = [
            o.result.status.name for o in response.verdict.public if o.result.status.name != "OK"
        ]
        if response.program is None:
            counts["NO_VALID_CODE"] += 1
        else:
            counts[failed[0] if failed else "PRIVATE_TEST"] += 1
    return dict(sorted(counts.items()))


def logprob_gap(batch: Batch, scores: Scores) -> dict[str, float]:
    """|log-prob(engine) - log-prob(trainer)| of the sampled tokens, before any update: 0 but for
    rounding when both hold the same weights."""
    action_T = batch.action_mask_T
    gap = (batch.behaviour_logprobs_T[action_T] - scores.old_logprobs_T[action_T]).abs()
    return {"logprob_gap_max": float(gap.max()), "logprob_gap_mean": float(gap.mean())}


def bootstrap_interval(
    values: Sequence[float | bool], *, resamples: int = 200, seed: int = 0
) -> dict[str, float]:
    """Mean with its 95% interval: resample with replacement 200 times, 2.5 and 97.5 percentiles
    (RLEF B.1)."""
    sample = np.asarray(values, dtype=float)
    generator = np.random.default_rng(seed)
    means = sample[generator.integers(0, len(sample), (resamples, len(sample)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"value": float(sample.mean()), "low": float(low), "high": float(high)}
