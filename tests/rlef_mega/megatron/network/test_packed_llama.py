"""Model, learner, weights and checkpoints in one process, against Hugging Face and hand-worked
numbers.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
)

from rlef_mega.config import (
    ConfigError,
    LearnerConfig,
    OptimizerConfig,
    ParallelConfig,
    PPOConfig,
)
from rlef_mega.megatron import hf_weights
from rlef_mega.megatron.checkpoints.checkpoints import Checkpoints
from rlef_mega.megatron.convert.from_hf import import_folder
from rlef_mega.megatron.convert.to_hf import export_checkpoint
from rlef_mega.megatron.learner import Learner
from rlef_mega.megatron.parallel import Ranks, initialize
from rlef_mega.megatron.supervised import SupervisedLearner
from rlef_mega.megatron.trained_model import learning_rate
from rlef_mega.packing import pack
from rlef_mega.preflight import check_weights
from rlef_mega.targets import targets_of
from rlef_mega.types import Batch
from tests.policy_loss import policy_loss
from tests.rlef_mega.megatron.hugging_face import hf_distributions, hf_logprobs, hf_values
from tests.rlef_mega.megatron.megatron_worker import (
    LLAMA31_ROPE,
    make_batch,
    make_episodes,
    make_learner,
    make_model,
    move_reference,
    one_batch,
)

ALONE = ParallelConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model(path, rope_parameters=LLAMA31_ROPE)
    return path


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_supervised_step_has_the_gradient_of_its_loss(
    ranks: Ranks, tmp_path: Path, tied: bool
) -> None:
    truth = make_model(tmp_path, tie_word_embeddings=tied)
    batch = make_batch(6)
    supervised = make_supervised(ranks, tmp_path)  # a step without clipping or momentum
    stats = supervised.supervised_update(batch)
    loss = -hf_logprobs(truth, batch, temperature=1.0).mean()
    loss.backward()
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-6)
    gradients = {name: parameter.grad for name, parameter in truth.named_parameters()}
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    assert stats["supervised_grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    ours = dict(gradients_under_hf_names(supervised))
    assert set(ours) == set(gradients)
    for name, expected in gradients.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-6)


def make_supervised(ranks: Ranks, folder: Path) -> SupervisedLearner:
    optimizer = OptimizerConfig(lr=1e-3, warmup_updates=0, clip_grad=0)
    settings = LearnerConfig(microbatch_tokens=100, policy=optimizer)
    return SupervisedLearner(ranks, folder, learner=settings, dtype="float32")


def gradients_under_hf_names(
    learner: SupervisedLearner | Learner,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Replace parameters by their gradients, and return them: the name map views parameters."""
    for parameter in learner.policy.last_chunk.parameters():
        parameter.data = parameter.main_grad.clone()
    return learner.policy_weights()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_policy_step_has_the_gradient_of_ppos_loss(
    ranks: Ranks, tmp_path: Path, tied: bool
) -> None:
    """The learner computes loss and gradients inside the head, over several micro-batches; the
    truth is the paper's loss of Hugging Face's log-probs, differentiated by PyTorch."""
    truth = make_model(tmp_path, tie_word_embeddings=tied)
    batch = make_batch(8)
    optimizer = OptimizerConfig(lr=1e-3, warmup_updates=0, clip_grad=0)
    settings = LearnerConfig(microbatch_tokens=120, policy=optimizer, critic=optimizer)
    learner = make_learner(ranks, tmp_path, learner=settings)
    # off-policy by a little, so that some ratios are clipped
    scores = learner.score(batch)
    noise_A = torch.randn(batch.num_actions, generator=torch.Generator().manual_seed(3))
    scores = replace(scores, old_logprobs_A=scores.old_logprobs_A + 0.2 * noise_A)
    targets, _ = targets_of(batch, scores, learner.ppo)
    stats = learner.update_policy(batch, targets, range(batch.num_sequences))
    loss, metrics = policy_loss(
        hf_logprobs(truth, batch),
        scores.old_logprobs_A,
        batch.behaviour_logprobs_A,
        targets.advantages_A,
        clip_eps=learner.ppo.clip_eps,
    )
    assert 0.05 < metrics["clip_fraction"] < 0.95
    for name, expected in metrics.items():
        assert stats[name] == pytest.approx(expected.item(), rel=1e-4, abs=1e-6), name
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in truth.named_parameters()}
    ours = dict(gradients_under_hf_names(learner))
    assert set(ours) == set(gradients)
    for name, expected in gradients.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-6)


def exact(settings: PPOConfig) -> PPOConfig:
    return settings.model_copy(update={"kl": "exact"})


@pytest.mark.parametrize("offload", ["none", "idle"])
def test_the_exact_kl_is_that_of_the_whole_softmax(
    ranks: Ranks, tmp_path: Path, offload: str
) -> None:
    """At the sampling temperature, at each action token's context; the log-probs are those of the
    sampled way, and the metrics have the mean over turns of both KLs."""
    truth = make_model(tmp_path)
    batch = make_batch(8)
    learner = make_learner(ranks, tmp_path, offload=offload)
    move_reference(learner)
    sampled = learner.score(batch)
    learner.ppo = exact(learner.ppo)
    scores = learner.score(batch)
    torch.testing.assert_close(scores.old_logprobs_A, sampled.old_logprobs_A, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.ref_logprobs_A, sampled.ref_logprobs_A, rtol=0, atol=1e-5)
    with torch.no_grad():
        policy_AV = hf_distributions(truth, batch)
        for parameter in truth.parameters():
            parameter.mul_(1.1)
        reference_AV = hf_distributions(truth, batch)
        kl_A = (policy_AV.exp() * (policy_AV - reference_AV)).sum(-1)
    assert kl_A.min() > 0.001
    torch.testing.assert_close(scores.kl_A, kl_A, rtol=1e-4, atol=1e-5)

    _, metrics = targets_of(batch, scores, learner.ppo)
    turns = [kl_A[batch.turn_of_action_A == turn].mean() for turn in range(batch.num_turns)]
    assert metrics["kl_exact"] == pytest.approx(float(torch.stack(turns).mean()), rel=1e-4)
    assert metrics["kl"] == targets_of(batch, sampled, learner.ppo)[1]["kl"] != 0


def test_packing_does_not_change_a_score(ranks: Ranks, folder: Path) -> None:
    episodes = make_episodes(7)
    learner = make_learner(ranks, folder)
    learner.ppo = exact(learner.ppo)
    together = learner.score(pack(episodes))
    alone = [learner.score(pack([episode])) for episode in episodes]
    for name, expected in vars(together).items():
        pieces = torch.cat([getattr(scores, name) for scores in alone])
        torch.testing.assert_close(pieces, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("budget", "stages"), [(60, 1), (10_000, 5)], ids=["many", "empty"])
def test_micro_batches_change_an_update_only_by_rounding(
    ranks: Ranks, folder: Path, budget: int, stages: int
) -> None:
    """Compared with one micro-batch per update; of five, two are empty."""
    batch = make_batch(6)
    whole, cut = make_learner(ranks, folder), make_learner(ranks, folder)
    whole.cutting = replace(whole.cutting, token_budget=10_000)
    layout = ranks.layout.model_copy(update={"pipeline_model_parallel_size": stages})
    cut.cutting = replace(cut.cutting, token_budget=budget, ranks=replace(ranks, layout=layout))
    assert len(whole.cutting.cut(batch, range(6))) == 1
    assert len(cut.cutting.cut(batch, range(6))) > 2
    expected, found = one_batch(whole, batch, seed=1), one_batch(cut, batch, seed=1)
    assert found["stats"] == pytest.approx(expected["stats"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_number(ranks: Ranks, folder: Path, recompute: str) -> None:
    batch = make_batch(6)
    plain = one_batch(make_learner(ranks, folder), batch, seed=1)
    again = one_batch(make_learner(ranks, folder, recompute=recompute), batch, seed=1)
    assert again["stats"] == plain["stats"]


def test_token_level_values_are_one_per_response_token(ranks: Ranks, folder: Path) -> None:
    batch = make_batch(6)
    settings = PPOConfig(updates_per_batch=2, token_level_value=True)
    learner = make_learner(ranks, folder, ppo=settings)
    by_turn = make_learner(ranks, folder).score(batch).values_M
    values = learner.score(batch).values_M
    assert values.numel() == batch.num_actions
    first = torch.cat([torch.tensor([True]), batch.turn_of_action_A.diff() > 0])
    torch.testing.assert_close(values[first], by_turn, rtol=0, atol=1e-6)
    assert one_batch(learner, batch, seed=1)["stats"]["critic_grad_norm"] > 0


def test_without_a_kl_penalty_there_is_no_reference(ranks: Ranks, folder: Path) -> None:
    learner = make_learner(ranks, folder, ppo=PPOConfig(beta=0, updates_per_batch=2))
    assert learner.reference is None
    assert learner.score(make_batch(4)).ref_logprobs_A is None


def test_critic_warm_up_leaves_the_policy_alone(ranks: Ranks, folder: Path) -> None:
    learner = make_learner(ranks, folder)
    batch = make_batch(4)
    before = {name: tensor.clone() for name, tensor in learner.policy_weights()}
    scores = learner.score(batch)
    targets = zero_advantages(batch, scores)
    learner.update(batch, targets, torch.arange(4), train_policy=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.policy_weights())
    assert (learner.policy.updates, learner.critic.updates) == (0, 2)


def zero_advantages(batch: Batch, scores):
    from rlef_mega.types import Targets

    zeros_A, zeros_N = torch.zeros(batch.num_actions), torch.zeros(batch.num_turns)
    return Targets(scores.old_logprobs_A, zeros_A, scores.values_M, zeros_N)


def test_a_loss_that_is_not_finite_stops_before_the_step(ranks: Ranks, folder: Path) -> None:
    learner = make_learner(ranks, folder)
    batch = make_batch(4)
    before = {name: tensor.clone() for name, tensor in learner.policy_weights()}
    targets = zero_advantages(batch, learner.score(batch))
    poisoned = replace(targets, advantages_A=targets.advantages_A + float("nan"))
    with pytest.raises(FloatingPointError, match="policy_loss is nan at update 0"):
        learner.update(batch, poisoned, torch.arange(4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.policy_weights())


def test_an_order_that_is_not_a_permutation_is_refused(ranks: Ranks, folder: Path) -> None:
    learner = make_learner(ranks, folder)
    batch = make_batch(4)
    targets = zero_advantages(batch, learner.score(batch))
    with pytest.raises(ValueError, match="a permutation of the 4 sequences"):
        learner.update(batch, targets, torch.tensor([0, 1, 2, 2]))


def test_weight_decay_spares_norms_and_biases(ranks: Ranks, folder: Path) -> None:
    learner = make_learner(ranks, folder)
    one_batch(learner, make_batch(4), seed=1)
    decay = {group["weight_decay"] for group in learner.critic.optimizer.param_groups}
    assert decay == {0.0, 0.1}
    for group in learner.critic.optimizer.param_groups:
        sizes = sum(parameter.numel() for parameter in group["params"])
        vectors = sum(p.numel() for p in learner.critic.last_chunk.parameters() if p.dim() == 1)
        matrices = sum(p.numel() for p in learner.critic.last_chunk.parameters() if p.dim() > 1)
        assert sizes == (vectors if group["weight_decay"] == 0 else matrices)


def test_learning_rate_warms_up_holds_and_decays() -> None:
    config = OptimizerConfig(
        lr=1.0, warmup_updates=4, decay_start_update=6, decay_updates=4, min_lr_ratio=0.2
    )
    rates = [learning_rate(config, update) for update in range(12)]
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2]
    assert rates == pytest.approx(expected)
    constant = OptimizerConfig(lr=1.0, warmup_updates=0)
    assert learning_rate(constant, 0) == learning_rate(constant, 10**6) == 1.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"intermediate_size": 64}, "shape"),
        ({"num_hidden_layers": 5}, "lacks 9 tensor"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_name(
    ranks: Ranks, folder: Path, tmp_path: Path, change: dict, message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        make_learner(ranks, tmp_path)


def test_an_export_loads_in_transformers_and_in_the_learner(
    ranks: Ranks, folder: Path, tmp_path: Path
) -> None:
    batch = make_batch(6)
    learner = make_learner(ranks, folder)
    one_batch(learner, batch, seed=1)
    out = tmp_path / "exported"
    hf_weights.export_hf(learner.policy_weights(), folder, out, torch.float32)
    truth = AutoModelForCausalLM.from_pretrained(out)
    ours = learner.score(batch).old_logprobs_A
    with torch.no_grad():
        logprobs_A = hf_logprobs(truth, batch)
    torch.testing.assert_close(ours, logprobs_A, rtol=0, atol=2e-5)
    again = make_learner(ranks, out)
    assert torch.equal(again.score(batch).old_logprobs_A, ours)


def save(folder: Path, learner: Learner, state: dict) -> Path:
    checkpoints = Checkpoints(folder, learner, keep=1)
    checkpoints.save(1, state)
    checkpoints.require_saved()
    return folder / "step_000001"


def test_exported_networks_give_the_same_scores_in_transformers(
    ranks: Ranks, folder: Path, tmp_path: Path
) -> None:
    batch = make_batch(6)
    learner = make_learner(ranks, folder)
    one_batch(learner, batch, seed=1)
    saved = save(tmp_path, learner, {})
    scores = learner.score(batch)
    for role in ("policy", "critic"):
        export_checkpoint(saved, tmp_path / role, role=role, model=folder, verify=True)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic").eval()
    assert critic.config.num_labels == 1
    with torch.no_grad():
        logprobs_A = hf_logprobs(policy, batch)
        values_N = hf_values(critic, critic.score, batch)
    torch.testing.assert_close(scores.old_logprobs_A, logprobs_A, rtol=0, atol=2e-5)
    torch.testing.assert_close(scores.values_M, values_N, rtol=0, atol=1e-5)


def test_a_run_starts_from_a_checkpoint_of_another(
    ranks: Ranks, folder: Path, tmp_path: Path
) -> None:
    batch = make_batch(6)
    trained = make_learner(ranks, folder)
    one_batch(trained, batch, seed=1)
    saved = save(tmp_path / "run", trained, {})
    check_weights(saved, folder)
    expected, found = trained.score(batch), make_learner(ranks, folder, weights=saved).score(batch)
    assert torch.equal(found.old_logprobs_A, expected.old_logprobs_A)
    assert torch.equal(found.ref_logprobs_A, expected.old_logprobs_A)
    assert torch.equal(found.values_M, expected.values_M)

    # from a policy's checkpoint the critic takes the trunk, and draws its head
    export_checkpoint(saved, tmp_path / "hf", model=folder)
    import_folder(tmp_path / "hf", tmp_path / "policy")
    found = make_learner(ranks, folder, weights=tmp_path / "policy").score(batch)
    again = make_learner(ranks, tmp_path / "hf").score(batch)
    assert torch.equal(found.old_logprobs_A, expected.old_logprobs_A)
    assert torch.equal(found.values_M, again.values_M)

    with pytest.raises(ConfigError, match="give a checkpoint's own folder"):
        check_weights(tmp_path / "policy" / "networks", folder)
    make_model(tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"holds 4 layers, config\.json says 3"):
        check_weights(saved, tmp_path / "other")


def test_a_tied_head_that_is_stored_nevertheless_is_accepted(ranks: Ranks, tmp_path: Path) -> None:
    make_model(tmp_path, tie_word_embeddings=True)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    names = [name for name, _ in make_learner(ranks, tmp_path).policy_weights()]
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names


def test_bfloat16_trains_and_resumes_bit_for_bit(
    ranks: Ranks, folder: Path, tmp_path: Path
) -> None:
    batch = make_batch(6)
    learner = make_learner(ranks, folder, dtype="bfloat16")
    one_batch(learner, batch, seed=1)
    saved = save(tmp_path, learner, {"seen": [1, 2]})
    resumed = make_learner(ranks, folder, dtype="bfloat16")
    assert Checkpoints(saved.parent, resumed, keep=1).resume() == (1, {"seen": [1, 2]})
    expected, got = (one_batch(each, batch, seed=2) for each in (learner, resumed))
    assert got["stats"] == expected["stats"]
    assert all(torch.equal(got["weights"][n], t) for n, t in expected["weights"].items())
    assert learner.critic.last_chunk.output_layer.weight.dtype == torch.float32


def test_a_world_that_does_not_fit_the_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1 processes were started, but .* = 2 x 1 x 1 = 2"):
        initialize(ParallelConfig(tensor_model_parallel_size=2), seed=0)
