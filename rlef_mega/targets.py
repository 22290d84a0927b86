"""Turn the scores of a batch into targets, by the rewards, returns and advantages of ppo.py.

This stage is between the learner's scoring and its updates. Every rank has the whole batch and
computes the same targets. Shape suffixes as in types.py.
"""

import torch

from rlef_mega import ppo
from rlef_mega.config import PPOConfig
from rlef_mega.types import Batch, Scores, Targets


def targets_of(
    batch: Batch, scores: Scores, settings: PPOConfig, *, single_turn: bool = False
) -> tuple[Targets, dict[str, float | None]]:
    """Return the targets of the batch's updates, and the metrics of rewards and values.

    The KL in the reward is that of the policy which produced the rollout, so it uses the behaviour
    log-probs. The exact KL (`scores.kl_A`, not in the paper) replaces each token's log-ratio by its
    expectation over the vocabulary, under the policy at the start of this batch's updates, which in
    a stale batch is not the one that sampled. `single_turn` training has no penalty for invalid
    code (2.2). With token-level values, every action token has a value of its own, and its turn's
    return as the target (B.6).
    """
    last_N = torch.ones(batch.num_turns, dtype=torch.bool)
    last_N[:-1] = batch.episode_of_turn_N.diff() > 0
    rewards_N = task_rewards_N = ppo.task_rewards(
        batch.solved_E[batch.episode_of_turn_N],
        batch.valid_code_N,
        last_N,
        invalid_code_penalty=0.0 if single_turn else settings.invalid_code_penalty,
        penalize_invalid_last_turn=settings.penalize_invalid_last_turn,
    )
    kl: dict[str, float | None] = {"kl": None}  # unknown without the reference
    if scores.ref_logprobs_A is not None:
        of_turn = (batch.turn_of_action_A, batch.num_turns)
        kl_N = ppo.turn_kl(batch.behaviour_logprobs_A - scores.ref_logprobs_A, *of_turn)
        kl = {"kl": float(kl_N.mean()), "kl_std": float(kl_N.std(correction=0))}
        if scores.kl_A is not None:
            kl_N = ppo.turn_kl(scores.kl_A, *of_turn)
            kl |= {"kl_exact": float(kl_N.mean()), "kl_exact_std": float(kl_N.std(correction=0))}
        rewards_N = ppo.turn_rewards(task_rewards_N, kl_N, beta=settings.beta)
    returns_M, advantages_M, metrics = advantages_of(
        batch, rewards_N, task_rewards_N, scores.values_M, settings
    )
    metrics |= {
        **kl,
        "reward": float(rewards_N.sum() / batch.num_sequences),
        "return": float(returns_M.mean()),
    }
    if not settings.token_level_value:  # one advantage for all tokens of a response (A.1)
        advantages_M = advantages_M[batch.turn_of_action_A]
    return Targets(scores.old_logprobs_A, advantages_M, scores.values_M, returns_M), metrics


def advantages_of(
    batch: Batch,
    rewards_N: torch.Tensor,
    task_rewards_N: torch.Tensor,
    values_M: torch.Tensor | None,
    settings: PPOConfig,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float | None]]:
    """Return the returns, the advantages (one for each value or, without a critic, for each turn),
    and metrics: of the critic or, without one, the share of turns that are alone in their group."""
    episodes_N, groups_N = batch.episode_of_turn_N, batch.group_of_turn_N
    normalize, gamma = settings.normalize_advantages, settings.gamma
    if values_M is None:
        returns_N = ppo.turn_returns(rewards_N, episodes_N, gamma=gamma)
        alone = torch.bincount(groups_N)[groups_N] == 1
        metrics: dict[str, float | None] = {"turns_alone": float(alone.float().mean())}
        if settings.advantage == "rloo":
            baselines_N = ppo.rloo_baselines(returns_N, groups_N)
            advantages_N = ppo.turn_advantages(returns_N, baselines_N, normalize=normalize)
        else:
            task_N = ppo.turn_returns(task_rewards_N, episodes_N, gamma=gamma)
            advantages_N = ppo.grpo_advantages(returns_N, task_N, groups_N, normalize=normalize)
        return returns_N, advantages_N, metrics
    values_N = None if settings.token_level_value else values_M
    returns_M = ppo.turn_returns(
        rewards_N, episodes_N, gamma=gamma, lam=settings.lam, values_N=values_N
    )
    if settings.token_level_value:
        returns_M = returns_M[batch.turn_of_action_A]
    variance = float(returns_M.var(correction=0))
    residual = float((returns_M - values_M).var(correction=0))
    metrics = {
        "value": float(values_M.mean()),
        # None if all returns are equal, up to rounding: there is no variance to explain
        "value_explained_variance": 1 - residual / variance if variance > 1e-8 else None,
    }
    return returns_M, ppo.turn_advantages(returns_M, values_M, normalize=normalize), metrics
