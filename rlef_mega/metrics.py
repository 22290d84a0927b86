"""The metrics of a step, computed from its episodes, batch and scores. Pure functions."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlef_mega.engines import BUSY
from rlef_mega.types import Batch, Episode, Scores

TRUNCATED = 1.01  # min(w, 1) changes this ratio by 1%; smaller changes may be rounding


def mean(values: Sequence[float | bool]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def episode_metrics(episodes: Sequence[Episode]) -> dict[str, float | None]:
    """Return the solve, repair and validity rates of episodes, and their lengths."""
    responses = [turn for episode in episodes for turn in episode.turns]
    return {
        "solved": mean([episode.solved for episode in episodes]),
        "solved_turn1": mean([solved_at(episode, 0) for episode in episodes]),
        "repaired_turn2": repair_rate(episodes, 1),
        "repaired_turn3": repair_rate(episodes, 2),
        "invalid_fraction": mean([turn.program is None for turn in responses]),
        "turns_mean": mean([len(episode.turns) for episode in episodes]),
        "response_tokens_mean": mean([len(turn.completion.token_ids) for turn in responses]),
        "tokens": sum(len(episode.token_ids) for episode in episodes),
    }


def solved_at(episode: Episode, turn: int) -> bool:
    """Return whether the episode ended with this turn and was solved."""
    return episode.solved and len(episode.turns) == turn + 1


def repair_rate(episodes: Sequence[Episode], turn: int) -> float | None:
    """Return the share of dialogues solved at this turn, among those that reached it."""
    return mean([solved_at(episode, turn) for episode in episodes if len(episode.turns) > turn])


def logprob_gap(batch: Batch, scores: Scores, version: int) -> dict[str, float | None]:
    """Return statistics of log-prob(trainer) - log-prob(engine), before any update, over the tokens
    that the engine sampled with the trainer's weights (`version`). The gap is 0 but for rounding;
    the statistics are None if there are no such tokens.

    `k3` estimates the KL(engine || trainer) of a token: exp(gap) - 1 - gap.
    """
    same_A = batch.weight_versions_A == version
    gap = (scores.old_logprobs_A - batch.behaviour_logprobs_A)[same_A]
    if not gap.numel():
        return {"logprob_gap_max": None, "logprob_gap_mean": None, "logprob_gap_k3": None}
    return {
        "logprob_gap_max": float(gap.abs().max()),
        "logprob_gap_mean": float(gap.abs().mean()),
        "logprob_gap_k3": float((gap.double().expm1() - gap.double()).mean()),
    }


def off_policy(batch: Batch, scores: Scores, version: int) -> dict[str, Any]:
    """Return how far the policies that sampled the batch are from the policy at the start of its
    updates, which has the weights `version`. w is the pi_old / pi_b of a token.

    `effective_sample_size` is (sum w)^2 / (n sum w^2), 1 if all w are equal. `truncated_fraction`
    is the share of tokens which min(w, 1) changes by more than 1%. `behaviour_k3` estimates the
    KL(pi_b || pi_old) of a token. `staleness` counts tokens by how many versions they are behind.
    `mixed_fraction` is the share of episodes that more than one version sampled.
    """
    log_ratio_A = (scores.old_logprobs_A - batch.behaviour_logprobs_A).double()
    ratio_A = log_ratio_A.exp()
    lag_A = version - batch.weight_versions_A
    episode_A = batch.episode_of_turn_N[batch.turn_of_action_A]
    zero_E = torch.zeros(batch.num_sequences, dtype=torch.int64)
    least_E = zero_E.scatter_reduce(0, episode_A, lag_A, "amin", include_self=False)
    most_E = zero_E.scatter_reduce(0, episode_A, lag_A, "amax", include_self=False)
    lags, tokens = lag_A.unique(return_counts=True)
    return {
        "staleness": dict(zip(map(str, lags.tolist()), tokens.tolist(), strict=True)),
        "staleness_mean": float(lag_A.double().mean()),
        "staleness_max": int(lag_A.max()),
        "mixed_fraction": float((least_E != most_E).double().mean()),
        "effective_sample_size": float(ratio_A.sum() ** 2 / (ratio_A.numel() * (ratio_A**2).sum())),
        "truncated_fraction": float((ratio_A > TRUNCATED).double().mean()),
        "behaviour_k3": float((log_ratio_A.expm1() - log_ratio_A).mean()),
    }


def total_counts(by_rank: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the sums over ranks of an engine's counts in this step (`Engine.take_counts`).

    All ranks use the same servers, so a server's busy time is the largest that a rank reports;
    `server_busy_s` is the sum over servers.
    """
    total: dict[str, float] = dict(sum(map(Counter, by_rank), Counter()))
    servers = [name for name in total if name.startswith(BUSY)]
    for name in servers:
        del total[name]
    if servers:
        busiest = (max(counts.get(name, 0.0) for counts in by_rank) for name in servers)
        total["server_busy_s"] = sum(busiest)
    if "follow_up_tokens" in total:
        cached = total.get("follow_up_cached_tokens", 0.0)
        total["follow_up_cached_share"] = cached / total["follow_up_tokens"]
    return total


def idle_shares(
    times: dict[str, float], counts: dict[str, float], *, servers: int
) -> dict[str, float]:
    """Return the shares of a step's time in which the trainer waited for episodes and (an upper
    bound) in which a server had no request of ours."""
    shares = {"trainer": times["rollout"] / times["step"]}
    if "server_busy_s" in counts:
        shares["engines"] = max(0.0, 1 - counts["server_busy_s"] / (servers * times["step"]))
    return shares
