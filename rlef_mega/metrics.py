"""The numbers of a step, from what flowed through it. Pure."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlef_mega.types import Batch, Episode, Scores

TRUNCATED = 1.01  # a ratio that min(ratio, 1) changes by more than 1%: less may be rounding


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


def logprob_gap(batch: Batch, scores: Scores, version: int) -> dict[str, float | None]:
    """log-prob(trainer) - log-prob(engine), before any update, of the tokens that the engine
    sampled with the trainer's weights (`version`): 0 but for rounding. None where there are none.

    `k3` estimates KL(engine || trainer) a token: exp(d) - 1 - d.
    """
    same_T = batch.action_mask_T & (batch.weight_versions_T == version)
    gap = scores.old_logprobs_T[same_T] - batch.behaviour_logprobs_T[same_T]
    if not gap.numel():
        return {"logprob_gap_max": None, "logprob_gap_mean": None, "logprob_gap_k3": None}
    return {
        "logprob_gap_max": float(gap.abs().max()),
        "logprob_gap_mean": float(gap.abs().mean()),
        "logprob_gap_k3": float((gap.double().expm1() - gap.double()).mean()),
    }


def off_policy(batch: Batch, scores: Scores, version: int) -> dict[str, Any]:
    """How far what sampled the batch is from the policy at the start of its updates, which has the
    weights `version`. The ratio w = pi_old / pi_b of each response token says it.

    `effective_sample_size` is (sum w)^2 / (n sum w^2), 1 when nothing is stale;
    `truncated_fraction` the share of tokens of which min(w, 1) takes more than 1%; `behaviour_k3` a
    token's KL(pi_b || pi_old). `staleness` counts tokens by how many versions they are behind;
    `mixed_fraction` is the share of episodes that more than one version sampled.
    """
    action_T = batch.action_mask_T
    difference = (scores.old_logprobs_T[action_T] - batch.behaviour_logprobs_T[action_T]).double()
    ratio = difference.exp()
    lag = version - batch.weight_versions_T[action_T]
    episode = batch.episode_of_turn_N[batch.turn_index_T[action_T]]
    zero_E = torch.zeros(batch.num_sequences, dtype=torch.int64)
    least_E = zero_E.scatter_reduce(0, episode, lag, "amin", include_self=False)
    most_E = zero_E.scatter_reduce(0, episode, lag, "amax", include_self=False)
    lags, tokens = lag.unique(return_counts=True)
    return {
        "staleness": dict(zip(map(str, lags.tolist()), tokens.tolist(), strict=True)),
        "staleness_mean": float(lag.double().mean()),
        "staleness_max": int(lag.max()),
        "mixed_fraction": float((least_E != most_E).double().mean()),
        "effective_sample_size": float(ratio.sum() ** 2 / (ratio.numel() * (ratio**2).sum())),
        "truncated_fraction": float((ratio > TRUNCATED).double().mean()),
        "behaviour_k3": float((difference.expm1() - difference).mean()),
    }
