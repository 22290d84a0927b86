"""The algorithm: PPO as RLEF uses it. Tensors in, tensors out.

Source: Gehring et al., "RLEF: Grounding Code LLMs in Execution Feedback with Reinforcement
Learning", arXiv 2410.02089, sections 2.2 and A.1. An episode is a dialogue; a turn is one response;
an action is one token of a response. `targets` is called once for each batch, before its updates,
and uses the functions above it; `policy_loss` and `value_loss` are the losses of the updates.

Shape suffixes as in types.py: A action tokens, N turns, E episodes, M values (N or A). All
arithmetic is fp32. A loss is a sum divided by `denominator`, which is a count over the whole
update, so losses and their metrics add up over micro-batches and data-parallel ranks. Without a
denominator a loss is a mean.
"""

import torch

from rlef_mega.config import PPOConfig
from rlef_mega.types import Batch, Scores, Targets

Metrics = dict[str, torch.Tensor]


def task_rewards(
    solved_N: torch.Tensor,
    valid_N: torch.Tensor,
    last_N: torch.Tensor,
    *,
    invalid_code_penalty: float,
    penalize_invalid_last_turn: bool = False,
) -> torch.Tensor:
    """Return r_t (RLEF 2.2); the first case that applies counts.

        r_t = +1                     last turn of the episode, all tests pass
              -1                     last turn of the episode, any test fails
              invalid_code_penalty   no valid code in the response (-0.2 in the paper)
               0                     otherwise

    So a last turn without valid code gets -1. The paper does not say whether it also gets the
    penalty; `penalize_invalid_last_turn` adds it.
    """
    final_N = torch.where(solved_N, 1.0, -1.0)
    penalty_N = torch.where(valid_N, 0.0, invalid_code_penalty)
    extra_N = penalty_N if penalize_invalid_last_turn else torch.zeros_like(penalty_N)
    return torch.where(last_N, final_N + extra_N, penalty_N)


def turn_kl(
    logprobs_A: torch.Tensor,
    ref_logprobs_A: torch.Tensor,
    turn_of_action_A: torch.Tensor,
    num_turns: int,
) -> torch.Tensor:
    """Return kl_t = mean_k log pi(a_tk) - mean_k log rho(a_tk) over the tokens k of turn t, where
    rho is the frozen initial policy (RLEF 2.2).

    The paper calls the mean of log-probs the geometric mean of the token probabilities. A sum
    would punish long responses for their length.
    """
    difference_A = (logprobs_A - ref_logprobs_A).float()
    sums_N = difference_A.new_zeros(num_turns).index_add(0, turn_of_action_A, difference_A)
    counts_N = torch.bincount(turn_of_action_A, minlength=num_turns)
    return sums_N / counts_N.clamp(min=1)


def turn_rewards(task_rewards_N: torch.Tensor, kl_N: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Return R_t = r_t - beta * kl_t (RLEF 2.2)."""
    return task_rewards_N - beta * kl_N


def turn_returns(
    rewards_N: torch.Tensor, episode_of_turn_N: torch.Tensor, *, gamma: float = 1.0
) -> torch.Tensor:
    """Return G_t = sum over i >= t of gamma^(i - t) R_i within the episode: Monte Carlo returns,
    lambda = 1 (RLEF A.1)."""
    returns = rewards_N.tolist()
    episodes = episode_of_turn_N.tolist()
    for turn in reversed(range(len(returns) - 1)):
        if episodes[turn] == episodes[turn + 1]:
            returns[turn] += gamma * returns[turn + 1]
    return rewards_N.new_tensor(returns)


def turn_advantages(
    returns_M: torch.Tensor, values_M: torch.Tensor, *, normalize: bool = True
) -> torch.Tensor:
    """Return A_t = G_t - V(c_t), scaled to mean 0 and standard deviation 1 (RLEF 2.2, A.1).

    The paper does not say over what it normalises. We do it over all turns of the rollout batch.
    """
    advantages_M = (returns_M - values_M).float()
    if not normalize:
        return advantages_M
    exact_M = advantages_M.double()
    mean, deviation = exact_M.mean(), exact_M.std(correction=0)
    return ((advantages_M - mean) / (deviation + 1e-8)).float()


def targets(
    batch: Batch, scores: Scores, ppo: PPOConfig, *, single_turn: bool = False
) -> tuple[Targets, dict[str, float | None]]:
    """Return what the updates of the batch aim for, and the metrics of rewards and values.

    The KL in the reward is that of the policy which produced the rollout, so it uses the behaviour
    log-probs. `single_turn` training has no penalty for invalid code (2.2). With token-level
    values, every action token has a value of its own, and its turn's return as the target (B.6).
    """
    last_N = torch.ones(batch.num_turns, dtype=torch.bool)
    last_N[:-1] = batch.episode_of_turn_N.diff() > 0
    rewards_N = task_rewards(
        batch.solved_E[batch.episode_of_turn_N],
        batch.valid_code_N,
        last_N,
        invalid_code_penalty=0.0 if single_turn else ppo.invalid_code_penalty,
        penalize_invalid_last_turn=ppo.penalize_invalid_last_turn,
    )
    kl = 0.0
    if scores.ref_logprobs_A is not None:
        kl_N = turn_kl(
            batch.behaviour_logprobs_A,
            scores.ref_logprobs_A,
            batch.turn_of_action_A,
            batch.num_turns,
        )
        rewards_N, kl = turn_rewards(rewards_N, kl_N, beta=ppo.beta), float(kl_N.mean())
    returns_M = turn_returns(rewards_N, batch.episode_of_turn_N, gamma=ppo.gamma)
    if ppo.token_level_value:
        returns_M = returns_M[batch.turn_of_action_A]
    values_M = scores.values_M
    advantages_A = turn_advantages(returns_M, values_M, normalize=ppo.normalize_advantages)
    if not ppo.token_level_value:  # one advantage for all tokens of a response (A.1)
        advantages_A = advantages_A[batch.turn_of_action_A]
    variance = float(returns_M.var(correction=0))
    residual = float((returns_M - values_M).var(correction=0))
    metrics: dict[str, float | None] = {
        "kl": kl,
        "reward": float(rewards_N.sum() / batch.num_sequences),
        "return": float(returns_M.mean()),
        "value": float(values_M.mean()),
        # None if all returns are equal to rounding: there was nothing to explain
        "value_explained_variance": 1 - residual / variance if variance > 1e-8 else None,
    }
    return Targets(scores.old_logprobs_A, advantages_A, values_M, returns_M), metrics


def policy_loss(
    logprobs_A: torch.Tensor,
    old_logprobs_A: torch.Tensor,
    behaviour_logprobs_A: torch.Tensor,
    advantages_A: torch.Tensor,
    *,
    clip_eps: float,
    denominator: float | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """Return L_pi and its metrics (RLEF A.1):

        r_k  = pi / pi_old * stop_grad(min(pi / pi_b, 1))
        L_pi = -mean_k min(r_k A, clip(r_k, 1 - eps, 1 + eps) A)

    pi_old is the policy at the start of this batch's updates, pi_b the one that sampled the tokens.
    The factor min(pi / pi_b, 1) corrects for tokens that an older policy sampled, or an engine
    whose log-probs differ slightly; no gradient flows through it.
    """
    count = denominator if denominator is not None else max(logprobs_A.numel(), 1)
    log_ratio_A = logprobs_A - old_logprobs_A
    behaviour_factor_A = (logprobs_A.detach() - behaviour_logprobs_A).exp().clamp(max=1)
    ratio_A = log_ratio_A.exp() * behaviour_factor_A
    clipped_A = ratio_A.clamp(1 - clip_eps, 1 + clip_eps)
    loss = -torch.minimum(ratio_A * advantages_A, clipped_A * advantages_A).sum() / count
    with torch.no_grad():
        metrics = {
            "policy_loss": loss.detach(),
            "ratio": ratio_A.sum() / count,
            "clip_fraction": ((ratio_A - 1).abs() > clip_eps).sum() / count,
            "behaviour_factor": behaviour_factor_A.sum() / count,
            # k3 estimator of KL(pi_old || pi): non-negative and of low variance
            "approx_kl": (log_ratio_A.exp() - 1 - log_ratio_A).sum() / count,
        }
    return loss, metrics


def value_loss(
    values_M: torch.Tensor,
    old_values_M: torch.Tensor,
    returns_M: torch.Tensor,
    *,
    clip_alpha: float,
    denominator: float | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """Return L_V and its metrics; one term for each turn (RLEF A.1):

    L_V = 1/2 mean_t max((V - G)^2, (clip(V, V_old - alpha, V_old + alpha) - G)^2)
    """
    count = denominator if denominator is not None else max(values_M.numel(), 1)
    clipped_M = torch.clamp(values_M, old_values_M - clip_alpha, old_values_M + clip_alpha)
    errors_M = torch.maximum((values_M - returns_M).square(), (clipped_M - returns_M).square())
    loss = 0.5 * errors_M.sum() / count
    with torch.no_grad():
        moved_M = (values_M - old_values_M).abs() > clip_alpha
        metrics = {"value_loss": loss.detach(), "value_clip_fraction": moved_M.sum() / count}
    return loss, metrics
