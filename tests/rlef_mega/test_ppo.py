"""Each function of the algorithm against numbers worked by hand."""

import pytest
import torch

from rlef_mega import ppo


def test_reward_cases_in_the_papers_order():
    solved = torch.tensor([True, False, False, False, False])
    valid = torch.tensor([True, True, True, False, False])
    last = torch.tensor([True, True, False, False, True])
    rewards = ppo.task_rewards(solved, valid, last, invalid_code_penalty=-0.2)
    # solved last | failed last | valid middle | invalid middle | invalid last: -1 wins
    torch.testing.assert_close(rewards, torch.tensor([1.0, -1.0, 0.0, -0.2, -1.0]))
    both = ppo.task_rewards(
        solved, valid, last, invalid_code_penalty=-0.2, penalize_invalid_last_turn=True
    )
    torch.testing.assert_close(both, torch.tensor([1.0, -1.0, 0.0, -0.2, -1.2]))


def test_kl_is_a_mean_over_the_tokens_of_each_turn():
    policy = torch.tensor([-1.0, -2.0, -3.0, -0.5])
    reference = torch.tensor([-1.5, -2.5, -5.0, -0.1])
    kl = ppo.turn_kl(policy - reference, torch.tensor([0, 0, 0, 1]), num_turns=2)
    # turn 0: (0.5 + 0.5 + 2.0) / 3 = 1; turn 1: -0.4
    torch.testing.assert_close(kl, torch.tensor([1.0, -0.4]))


def test_kl_does_not_grow_with_length():
    short = ppo.turn_kl(torch.full((2,), 0.5), torch.zeros(2).long(), 1)
    long = ppo.turn_kl(torch.full((90,), 0.5), torch.zeros(90).long(), 1)
    torch.testing.assert_close(short, long)


def test_beta_times_kl_is_subtracted_from_the_reward():
    rewards = ppo.turn_rewards(torch.tensor([0.0, 1.0]), torch.tensor([0.4, -0.2]), beta=0.05)
    torch.testing.assert_close(rewards, torch.tensor([-0.02, 1.01]))


def test_returns_sum_the_rest_of_the_episode_and_stop_at_its_end():
    rewards = torch.tensor([-0.2, 0.0, 1.0, -1.0, -0.2, -1.0])
    episodes = torch.tensor([0, 0, 0, 1, 2, 2])
    expected = torch.tensor([0.8, 1.0, 1.0, -1.0, -1.2, -1.0])
    torch.testing.assert_close(ppo.turn_returns(rewards, episodes), expected)
    halved = ppo.turn_returns(rewards, episodes, gamma=0.5)
    torch.testing.assert_close(halved, torch.tensor([0.05, 0.5, 1.0, -1.0, -0.7, -1.0]))


def test_with_lambda_below_1_returns_are_partly_the_critics_predictions():
    rewards, episodes = torch.tensor([-0.2, 0.0, 1.0, -1.0]), torch.tensor([0, 0, 0, 1])
    values = torch.tensor([9.0, 0.4, 0.6, 9.0])
    # turn 3: 1. Turn 2: 0.5 * 0.6 + 0.5 * 1 = 0.8. Turn 1: -0.2 + 0.5 * 0.4 + 0.5 * 0.8 = 0.4
    half = ppo.turn_returns(rewards, episodes, lam=0.5, values_N=values)
    torch.testing.assert_close(half, torch.tensor([0.4, 0.8, 1.0, -1.0]))
    # one step: -0.2 + 0.9 * 0.4 = 0.16; 0.9 * 0.6 = 0.54
    one_step = ppo.turn_returns(rewards, episodes, gamma=0.9, lam=0.0, values_N=values)
    torch.testing.assert_close(one_step, torch.tensor([0.16, 0.54, 1.0, -1.0]))
    monte_carlo = ppo.turn_returns(rewards, episodes, values_N=values)
    assert torch.equal(monte_carlo, ppo.turn_returns(rewards, episodes))


# Three dialogues about a problem, with turns in the groups 0 and 1, and one about another, in group
# 2, whose others were dropped. The first needs one turn, so that group 1 has two members.
GROUPS = torch.tensor([0, 0, 1, 0, 1, 2])
RETURNS = torch.tensor([1.0, -1.0, -0.8, 0.6, 1.0, 1.0])


def test_rloo_compares_a_turn_with_the_others_of_its_group():
    # group 0 (1, -1, 0.6): (-1 + 0.6) / 2, (1 + 0.6) / 2, (1 - 1) / 2; group 1 (-0.8, 1): the other
    baselines = ppo.rloo_baselines(RETURNS, GROUPS).float()
    torch.testing.assert_close(baselines, torch.tensor([-0.2, 0.8, 1.0, 0.0, -0.8, 1.0]))
    advantages = ppo.turn_advantages(RETURNS, baselines, normalize=False)
    torch.testing.assert_close(advantages, torch.tensor([1.2, -1.8, -1.8, 0.6, 1.8, 0.0]))


def test_grpo_divides_the_tasks_return_but_not_the_kls_by_the_groups_deviation():
    kl = torch.tensor([0.1, 0.0, 0.2, -0.1, 0.0, 0.3])
    # group 0: mean 0.2; 0.8, -1.2, 0.4; deviation sqrt((0.64 + 1.44 + 0.16) / 2) = 1.058301
    # group 1: mean 0.1; -0.9, 0.9; deviation sqrt(1.62) = 1.272792
    raw = torch.tensor([0.8, -1.2, -0.9, 0.4, 0.9, 0.0])
    deviations = torch.tensor([1.058301, 1.058301, 1.272792, 1.058301, 1.272792, 1.0])
    of_kl = torch.tensor([0.1, 0.0, 0.1, -0.1, -0.1, 0.0])  # means 0, 0.1, 0.3
    advantages = ppo.grpo_advantages(RETURNS + kl, RETURNS, GROUPS)
    torch.testing.assert_close(advantages, raw / deviations + of_kl, rtol=0, atol=3e-6)
    without = ppo.grpo_advantages(RETURNS + kl, RETURNS, GROUPS, normalize=False)
    torch.testing.assert_close(without, raw + of_kl)


def test_a_group_of_equal_returns_gives_no_advantage():
    equal, groups = torch.full((3,), 0.1), torch.zeros(3, dtype=torch.int64)
    assert not ppo.grpo_advantages(equal, equal, groups).any()
    assert torch.equal(ppo.rloo_baselines(equal, groups).float(), equal)


def test_advantages_are_normalised_over_all_turns():
    returns, values = torch.tensor([1.0, 1.0, -1.0, 0.0]), torch.tensor([0.0, 0.5, 0.0, -0.5])
    raw = ppo.turn_advantages(returns, values, normalize=False)
    torch.testing.assert_close(raw, torch.tensor([1.0, 0.5, -1.0, 0.5]))
    # mean 0.25; squares 1 + .25 + 1 + .25 = 2.5; variance 2.5/4 - 0.0625 = 0.5625; deviation 0.75
    normal = ppo.turn_advantages(returns, values)
    torch.testing.assert_close(normal, torch.tensor([1.0, 1 / 3, -5 / 3, 1 / 3]))


def test_equal_advantages_normalise_to_zero_not_to_nan():
    normal = ppo.turn_advantages(torch.ones(3), torch.zeros(3))
    torch.testing.assert_close(normal, torch.zeros(3))


def test_value_loss_by_hand():
    values, old = torch.tensor([0.5, 0.0, 1.0]), torch.tensor([0.0, 0.1, 1.0])
    returns = torch.tensor([1.0, 1.0, -1.0])
    # clipped values 0.2, 0.0, 1.0: max(.25, .64) = .64; max(1, 1) = 1; max(4, 4) = 4
    loss, metrics = ppo.value_loss(values, old, returns, clip_alpha=0.2)
    assert loss.item() == pytest.approx(0.5 * 5.64 / 3)
    assert metrics["value_clip_fraction"].item() == pytest.approx(1 / 3)
