"""The algorithm: PPO as RLEF uses it. Tensors in, tensors out; knows no Megatron and no config.

Source: Gehring et al., "RLEF: Grounding Code LLMs in Execution Feedback with Reinforcement
Learning", arXiv 2410.02089, sections 2.2 and A.1. An episode is a dialogue of turns; a turn is one
response.

Shape suffixes: T response tokens of a batch (prompt and feedback tokens left out), N turns in
episode order. All arithmetic is fp32. A loss is a sum over its terms divided by `denominator`, a
count over the whole update; so it and its metrics add up over micro-batches and data-parallel
ranks. Without one it is a plain mean.
"""

import torch
import torch.distributed as dist

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
    """r_t = +1 last turn, all tests pass; -1 last turn, any fails; the penalty if no valid code;
    else 0 (RLEF 2.2).

    First match wins, so a last turn without valid code gets -1. The paper is silent there;
    `penalize_invalid_last_turn` adds the penalty to it.
    """
    final_N = torch.where(solved_N, 1.0, -1.0)
    penalty_N = torch.where(valid_N, 0.0, invalid_code_penalty)
    extra_N = penalty_N if penalize_invalid_last_turn else torch.zeros_like(penalty_N)
    return torch.where(last_N, final_N + extra_N, penalty_N)


def turn_kl(
    logprobs_T: torch.Tensor,
    ref_logprobs_T: torch.Tensor,
    turn_of_token_T: torch.Tensor,
    num_turns: int,
) -> torch.Tensor:
    """kl_t = mean_k log pi(a_k) - mean_k log rho(a_k), the mean over the tokens k of turn t (RLEF
    2.2).

    The mean, not the sum: a log of the geometric mean of the token probabilities, so that long
    responses are not punished for their length.
    """
    difference_T = (logprobs_T - ref_logprobs_T).float()
    sums_N = difference_T.new_zeros(num_turns).index_add(0, turn_of_token_T, difference_T)
    counts_N = torch.bincount(turn_of_token_T, minlength=num_turns)
    return sums_N / counts_N.clamp(min=1)


def turn_rewards(task_rewards_N: torch.Tensor, kl_N: torch.Tensor, *, beta: float) -> torch.Tensor:
    """R_t = r_t - beta * kl_t (RLEF 2.2)."""
    return task_rewards_N - beta * kl_N


def turn_returns(
    rewards_N: torch.Tensor, episode_of_turn_N: torch.Tensor, *, gamma: float = 1.0
) -> torch.Tensor:
    """G_t = sum over i >= t of gamma^(i - t) R_i within the episode: Monte Carlo, lambda = 1 (RLEF
    A.1)."""
    returns = rewards_N.tolist()
    episodes = episode_of_turn_N.tolist()
    for turn in reversed(range(len(returns) - 1)):
        if episodes[turn] == episodes[turn + 1]:
            returns[turn] += gamma * returns[turn + 1]
    return rewards_N.new_tensor(returns)


def turn_advantages(
    returns_N: torch.Tensor,
    values_N: torch.Tensor,
    *,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """A_t = G_t - V(c_t), then to mean 0 and standard deviation 1 over all turns of the batch (RLEF
    2.2, A.1).

    With a process group, each rank holds a part of the batch and the moments are over all parts.
    The paper does not say over what it normalises; the whole rollout batch is our choice.
    """
    advantages_N = (returns_N - values_N).float()
    if not normalize:
        return advantages_N
    moments = torch.stack(
        [
            advantages_N.new_tensor(advantages_N.numel()).double(),
            advantages_N.double().sum(),
            advantages_N.double().square().sum(),
        ]
    )
    if group is not None:
        dist.all_reduce(
            moments, group=group
        )  # over the ranks that share the batch: count, sum, sum of squares
    count, total, squares = moments
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    return ((advantages_N - mean) / (deviation + 1e-8)).float()


def policy_loss(
    logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    behaviour_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    clip_eps: float,
    denominator: float | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """L = -mean_k min(r_k A, clip(r_k, 1 - eps, 1 + eps) A), r_k = pi/pi_old * sg(min(pi/pi_b, 1))
    (RLEF A.1).

    pi_old is the policy at the start of this batch's updates, pi_b the one that sampled the tokens;
    the truncated, stop-gradient factor corrects for tokens sampled by an older policy or a slightly
    different engine.
    """
    count = denominator if denominator is not None else max(logprobs_T.numel(), 1)
    log_ratio_T = logprobs_T - old_logprobs_T
    behaviour_factor_T = (logprobs_T.detach() - behaviour_logprobs_T).exp().clamp(max=1)
    ratio_T = log_ratio_T.exp() * behaviour_factor_T
    clipped_T = ratio_T.clamp(1 - clip_eps, 1 + clip_eps)
    loss = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T).sum() / count
    with torch.no_grad():
        metrics = {
            "policy_loss": loss.detach(),
            "ratio": ratio_T.sum() / count,
            "clip_fraction": ((ratio_T - 1).abs() > clip_eps).sum() / count,
            "behaviour_factor": behaviour_factor_T.sum() / count,
            # k3 estimator of KL(pi_old || pi): non-negative and low in variance
            "approx_kl": (log_ratio_T.exp() - 1 - log_ratio_T).sum() / count,
        }
    return loss, metrics


def value_loss(
    values_N: torch.Tensor,
    old_values_N: torch.Tensor,
    returns_N: torch.Tensor,
    *,
    clip_alpha: float,
    denominator: float | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """L = 1/2 mean_t max((V - G)^2, (clip(V, V_old - alpha, V_old + alpha) - G)^2), a term a turn
    (RLEF A.1)."""
    count = denominator if denominator is not None else max(values_N.numel(), 1)
    clipped_N = torch.clamp(values_N, old_values_N - clip_alpha, old_values_N + clip_alpha)
    errors_N = torch.maximum((values_N - returns_N).square(), (clipped_N - returns_N).square())
    loss = 0.5 * errors_N.sum() / count
    with torch.no_grad():
        moved_N = (values_N - old_values_N).abs() > clip_alpha
        metrics = {"value_loss": loss.detach(), "value_clip_fraction": moved_N.sum() / count}
    return loss, metrics


def targets(
    batch: Batch,
    scores: Scores,
    *,
    beta: float,
    gamma: float,
    normalize: bool,
    token_level_value: bool = False,
) -> tuple[Targets, dict[str, float]]:
    """From scores to what the updates aim for; everything here is constant over the updates of the
    batch.

    The KL in the reward is that of the policy which produced the rollout, so it uses the behaviour
    log-probs. With `token_level_value` every response token has a value of its own and the turn's
    return for its target (B.6).
    """
    action_T = batch.action_mask_T
    turn_of_token = batch.turn_index_T[action_T]
    kl_N = turn_kl(
        batch.behaviour_logprobs_T[action_T],
        scores.ref_logprobs_T[action_T],
        turn_of_token,
        batch.num_turns,
    )
    # without the penalty the reference is not scored at all
    rewards_N = turn_rewards(batch.rewards_N, kl_N, beta=beta) if beta else batch.rewards_N
    returns_N = turn_returns(rewards_N, batch.episode_of_turn_N, gamma=gamma)
    if token_level_value:
        returns_N = returns_N[turn_of_token]
    advantages_N = turn_advantages(returns_N, scores.values_N, normalize=normalize)
    residual = (returns_N - scores.values_N).var(correction=0)
    metrics = {
        "kl": float(kl_N.mean()) if beta else 0.0,
        "reward": float(rewards_N.sum() / batch.num_sequences),
        "return": float(returns_N.mean()),
        "value": float(scores.values_N.mean()),
        "value_explained_variance": float(
            1 - residual / returns_N.var(correction=0).clamp(min=1e-8)
        ),
    }
    return Targets(scores.old_logprobs_T, scores.values_N, advantages_N, returns_N), metrics
