"""Recipes: the shipped ones are consistent, wrong ones are refused with what is allowed."""

import codecs
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlef_mega.config import (
    RECIPES,
    ConfigError,
    SFTConfig,
    TrainConfig,
    apply_override,
    check_placement,
    dump_toml,
    find_recipe,
    load_config,
)
from rlef_mega.preflight import model_shape, plan_train

TRAINING_RECIPES = sorted(p.stem for p in RECIPES.glob("*.toml") if not p.stem.endswith("_base"))


@pytest.mark.parametrize("recipe", TRAINING_RECIPES)
def test_a_written_config_reads_back_as_the_same(recipe, tmp_path):
    config = load_config(find_recipe(recipe), [], TrainConfig)
    (tmp_path / "config.toml").write_text(dump_toml(config))
    assert load_config(tmp_path / "config.toml", [], TrainConfig) == config


@pytest.mark.parametrize(
    ("recipe", "world_size", "updates"),
    [("llama31_8b", 128, "12,000"), ("llama31_70b", 1024, "8,000")],
)
def test_the_recipes_of_the_papers_runs_have_its_numbers(recipe, world_size, updates):
    """RLEF A.1: training GPUs, updates of 256 sequences out of 1,024 rollouts, learning rate, KL
    weight."""
    config = load_config(find_recipe(recipe), [], TrainConfig)
    plan = plan_train(config, model_shape(config))
    assert plan["world size"] == world_size
    assert plan["rollouts per batch"] == 1024
    assert plan["updates"] == f"{updates} of 256 sequences"
    for optimizer in (config.learner.policy, config.learner.critic):
        assert (optimizer.lr, optimizer.weight_decay, optimizer.warmup_updates) == (2e-7, 0.1, 50)
    assert (config.ppo.beta, config.ppo.clip_eps, config.ppo.clip_alpha) == (0.05, 0.2, 0.2)
    assert config.ppo.invalid_code_penalty == -0.2
    assert (config.rollout.turns, config.rollout.temperature) == (3, 1.0)


def test_a_70b_layout_with_more_stages_than_layers_is_refused():
    overrides = ["parallel.pipeline_model_parallel_size=81"]
    config = load_config(find_recipe("llama31_70b"), overrides, TrainConfig)
    with pytest.raises(ConfigError, match="80 layers cannot be split into 405 stages"):
        plan_train(config, model_shape(config))


def test_servers_on_the_ranks_gpus_take_turns_with_them():
    served = ["rollout.engine=sglang", "parallel.tensor_model_parallel_size=2"]
    resting = [*served, "rollout.servers.release_memory=true"]
    for sets, message in (
        (served, r"ranks take GPUs 0 to 1 .*first_gpu = 0; set it to 2, or .*release_memory"),
        ([*resting, "rollout.servers.publish=distributed"], 'NCCL takes one .*"tensor"'),
        ([*resting, "rollout.mode=async"], "in async mode servers are never idle"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_placement(load_config(find_recipe("demo"), sets, TrainConfig))
    for sets in (resting, [*served, "rollout.servers.first_gpu=2"]):
        check_placement(load_config(find_recipe("demo"), sets, TrainConfig))


def test_the_supervised_recipe_loads():
    config = load_config(find_recipe("demo_base"), [], SFTConfig)
    assert config.num_attention_heads % config.num_key_value_heads == 0


def test_a_recipe_extends_another_key_by_key(tmp_path):
    (tmp_path / "base.toml").write_text("extends = 'demo'\n[rollout]\nturns = 2")
    text = f"extends = '{tmp_path / 'base.toml'}'\n[rollout]\nmax_context = 99"
    (tmp_path / "mine.toml").write_text(text)
    rollout = load_config(tmp_path / "mine.toml", [], TrainConfig).rollout
    assert (rollout.turns, rollout.max_context, rollout.max_new_tokens) == (2, 99, 40)
    (tmp_path / "base.toml").write_text(f"extends = '{tmp_path / 'mine.toml'}'")
    with pytest.raises(ConfigError, match=r"mine.toml extends itself"):
        load_config(tmp_path / "mine.toml", [], TrainConfig)


def test_the_allowed_log_prob_gap_is_the_rounding_of_the_dtype():
    """Engine and trainer differ by more than 0.01 in bfloat16, where nothing is wrong."""
    for dtype, most, mean in (("float32", 0.01, 0.001), ("bfloat16", 5.0, 0.05)):
        sets = [f"model.dtype={dtype}"]
        guard = load_config(find_recipe("smollm2_functions"), sets, TrainConfig).guard
        assert (guard.max_logprob_gap, guard.mean_logprob_gap) == (most, mean)
        sets.append("guard.max_logprob_gap=0.5")
        guard = load_config(find_recipe("smollm2_functions"), sets, TrainConfig).guard
        assert (guard.max_logprob_gap, guard.mean_logprob_gap) == (0.5, mean)


def test_overrides_take_toml_values_and_bare_words():
    tree = {"run": {"steps": 3}}
    for override in ("run.steps=5", "run.dir=some/where", "ppo.token_level_value=true"):
        apply_override(tree, override)
    assert tree == {
        "run": {"steps": 5, "dir": "some/where"},
        "ppo": {"token_level_value": True},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run = [", "not valid TOML"),
        ("extends = 'none'", "no recipe 'none': neither a file nor one of demo,"),
        ('[ppo]\nkl = "exact"\nbeta = 0', r"needs ppo.beta above 0: without a KL penalty"),
        ("[ppo]\nbetta = 1", r"unknown key 'ppo.betta'; known there: beta"),
        (
            "[critic_parallel]\ntensor = 2",
            r"unknown key 'critic_parallel.tensor'; known there: tens",
        ),
        ("[learner.policy]\nlr = -1", r"learner.policy.lr: .* greater than 0"),
        ("[ppo]\nlam = 1.5", "ppo.lam: .* less than or equal to 1"),
        ("[ppo]\nlam = 0.9\nadvantage = 'rloo'", "ppo: ppo.lam = 0.9 needs a critic, .*'rloo'"),
        (
            "[ppo]\nadvantage = 'grpo'\ntoken_level_value = true",
            "value = True needs a critic",
        ),
        ("[ppo]\nlam = 0.9\ntoken_level_value = true", "lam = 0.9 needs one value per turn"),
        ("extends = 'demo'\nppo.advantage = 'rloo'", "'rloo' compares .*samples_per_problem to 2"),
        (
            "extends = 'demo'\nrollout.samples_per_problem = 3",
            "256 cannot be divided into pro",
        ),
        (
            "extends = 'demo'\nppo.advantage = 'grpo'\nrollout.samples_per_problem = 8\n"
            "critic_parallel.data_parallel_size = 2",
            "'grpo' has no critic; remove critic_parallel",
        ),
        ("[rollout]\nturns = 11", r"rollout.turns: .* less than or equal to 10"),
        (
            "[rollout]\nfeedback = 'maybe'",
            r"rollout.feedback: .*'true', 'none' or 'private'",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_with_file_and_key(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(path, [], TrainConfig)
    assert str(path) in str(raised.value) or "extends" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (codecs.BOM_UTF8 + b"[run]", "byte order mark"),
        ("[run]".encode("utf-16"), "UTF-16"),
        ("[run]".encode("utf-16-be").join([codecs.BOM_UTF16_BE, b""]), "UTF-16"),
        ("[run]\ndir = 'größe'".encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_recipe_of_another_encoding_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"recipe.toml .*{message}.*; save it as UTF-8"):
        load_config(path, [], TrainConfig)


def test_recipes_and_their_paths_are_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "größe.toml").write_text("extends = 'demo'\n[model]\npath = 'mödel'", "utf-8")
    ascii_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", "from rlef_mega.cli import main; main()", "plan", "größe.toml"],
        env={**os.environ, **ascii_locale, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        encoding="utf-8",
    )
    assert ended.returncode == 2 and "mödel/config.json" in ended.stderr, ended.stderr


def test_a_tilde_is_the_home_directory_where_a_path_begins(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("extends = 'demo'\n[run]\ndir = '~/run'\n[data]\ntrain = 'mbpp:~/m?a=~'")
    config = load_config(recipe, ["model.path=~/model", "data.test=a~b/~c"], TrainConfig)
    assert config.run.dir == str(Path.home() / "run")
    assert config.model.path == str(Path.home() / "model")
    assert config.data.train == f"mbpp:{Path.home()}/m?a={Path.home()}"
    assert config.data.test == "a~b/~c"


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(ConfigError, match="demo, demo_base, gpu1, llama31_70b"):
        find_recipe("demmo")
