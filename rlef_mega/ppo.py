"""The algorithm: PPO as RLEF uses it. Tensors in, tensors out.

Source: Gehring et al., "RLEF: Grounding Code LLMs in Execution Feedback with Reinforcement
Learning", arXiv 2410.02089, sections 2.2 and A.1. An episode is a dialogue; a turn is one response;
an action is one token of a response. targets.py calls the functions up to the advantages, once for
each batch, before its updates. `value_loss` is the critic's loss in the updates; the policy's, the
clipped one, is computed inside the output head: kernels/rlef_kernels/ppo_policy_loss.py.

Shape suffixes as in types.py: A action tokens, N turns, M values (N or A).
Arithmetic is fp32 or fp64. A loss is a sum divided by `denominator`, a count over the whole
update, so losses and their metrics add up over micro-batches and data-parallel ranks. Without a
denominator a loss is a mean.
"""

import torch

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
    log_ratios_A: torch.Tensor, turn_of_action_A: torch.Tensor, num_turns: int
) -> torch.Tensor:
    """Return kl_t = mean_k log (pi(a_tk) / rho(a_tk)) over the tokens k of turn t, where rho is the
    frozen initial policy (RLEF 2.2). A sum would punish long responses for their length.

    `log_ratios_A` are those of the sampled tokens or, for the exact KL, their expectations.
    """
    sums_N = torch.zeros(num_turns).index_add(0, turn_of_action_A, log_ratios_A.float())
    counts_N = torch.bincount(turn_of_action_A, minlength=num_turns)
    return sums_N / counts_N.clamp(min=1)


def turn_rewards(task_rewards_N: torch.Tensor, kl_N: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Return R_t = r_t - beta * kl_t (RLEF 2.2)."""
    return task_rewards_N - beta * kl_N


def turn_returns(
    rewards_N: torch.Tensor,
    episode_of_turn_N: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    values_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return G_t = R_t + gamma ((1 - lam) V_{t+1} + lam G_{t+1}) within the episode.

    The paper has lam = 1 (RLEF A.1): Monte Carlo returns, the sum of what follows, without values.
    Below 1, G_t - V_t is the generalised advantage estimate over turns (Schulman et al. 2015, arXiv
    1506.02438, eq. 16), and G_t the critic's target.
    """
    returns, episodes = rewards_N.tolist(), episode_of_turn_N.tolist()
    values = returns if values_N is None else values_N.tolist()
    for turn in reversed(range(len(returns) - 1)):
        if episodes[turn] == episodes[turn + 1]:
            after = returns[turn + 1] + (1 - lam) * (values[turn + 1] - returns[turn + 1])
            returns[turn] += gamma * after
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


def rloo_baselines(returns_N: torch.Tensor, group_of_turn_N: torch.Tensor) -> torch.Tensor:
    """Return b_t = mean of G over the other turns of t's group, which takes the place of V(c_t):
    RLOO (Ahmadian et al. 2024, arXiv 2402.14740).

    In RLOO a group is the K responses to a prompt. Here it is turn t of every dialogue about the
    problem that reached turn t, so only dialogues that failed equally often are compared. Like
    V(c_t), b_t does not depend on the response, and adds no bias. A turn that is alone in its group
    has b_t = G_t.
    """
    counts_N = torch.bincount(group_of_turn_N)[group_of_turn_N]
    centred_N = centred(returns_N, group_of_turn_N)
    return returns_N - centred_N * counts_N / (counts_N - 1).clamp(min=1)


def grpo_advantages(
    returns_N: torch.Tensor,
    task_returns_N: torch.Tensor,
    group_of_turn_N: torch.Tensor,
    *,
    normalize: bool = True,
) -> torch.Tensor:
    """Return A_t = (g_t - mean g) / (std g + 1e-6) + (d_t - mean d) over t's group, which is that
    of `rloo_baselines`: GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    g is the return of the task's rewards; d = G - g is the KL penalty's. GRPO does not divide its
    KL, a term of its loss, by the deviation; if we did, noise would become the signal where all
    dialogues of a group are solved. The deviation's denominator is n - 1, as in TRL, verl and
    OpenRLHF. Without `normalize`: Dr. GRPO (Liu et al. 2025, arXiv 2503.20783).
    """
    task_N = centred(task_returns_N, group_of_turn_N)
    if normalize:
        counts = torch.bincount(group_of_turn_N)
        squares = task_N.new_zeros(len(counts)).index_add(0, group_of_turn_N, task_N.square())
        task_N /= (squares / (counts - 1).clamp(min=1)).sqrt()[group_of_turn_N] + 1e-6
    return (task_N + centred(returns_N - task_returns_N, group_of_turn_N)).float()


def centred(values_N: torch.Tensor, group_of_turn_N: torch.Tensor) -> torch.Tensor:
    """Return each turn's value minus its group's mean, in fp64: exactly 0 where all are equal."""
    counts = torch.bincount(group_of_turn_N)
    sums = torch.zeros(len(counts), dtype=torch.float64)
    sums.index_add_(0, group_of_turn_N, values_N.double())
    return values_N - (sums / counts)[group_of_turn_N]


def value_loss(
    values_M: torch.Tensor,
    old_values_M: torch.Tensor,
    returns_M: torch.Tensor,
    *,
    clip_alpha: float,
    denominator: float | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """Return L_V and its metrics; one term for each value (RLEF A.1):

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
