"""Faults of the model and the data are reported before the first step."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rlef_mega import cli
from rlef_mega.config import ConfigError, SFTConfig, TrainConfig, find_recipe, load_config
from rlef_mega.demo.base_model import make_initial_model
from rlef_mega.parts import training_problems
from rlef_mega.preflight import check_train, claim_run_directory


@pytest.fixture(scope="module")
def first_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    small = ["hidden_size=32", "num_layers=2", "ffn_hidden_size=64"]
    overrides = [f"dir={json.dumps(str(folder))}", *small]
    make_initial_model(load_config(find_recipe("demo_base"), overrides, SFTConfig))
    return folder / "init"


@pytest.fixture
def model(first_model, tmp_path) -> Path:
    return shutil.copytree(first_model, tmp_path / "model")


def row(name: str, statement: str) -> str:
    test = {"stdin": "", "expected": "1\n"}
    return json.dumps({"id": name, "statement": statement, "public_tests": [test]}) + "\n"


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(row(f"p{i}", f"Show {i}.") for i in range(40)))
    return path


def configured(model: Path, data: Path, *overrides: str) -> TrainConfig:
    settings = {"model.path": model, "data.train": data, "run.dir": model.parent / "run"}
    words = [f"{key}={json.dumps(str(value))}" for key, value in settings.items()]
    words += ["data.valid=''", "data.test=''", "rollout.max_context=320", *overrides]
    return load_config(find_recipe("demo"), words, TrainConfig)


def claim(model: Path, data: Path, *overrides: str) -> None:
    config = configured(model, data, *overrides)
    claim_run_directory(config, Path(config.run.dir), check_train(config))


def test_a_resumed_run_refuses_other_problems_under_the_same_path(model, data):
    claim(model, data)
    before = data.read_text()
    data.write_text(before.replace("Show 7.", "Show 8."))
    with pytest.raises(ConfigError, match=r"have changed: data.train. Restore .*or start anew"):
        claim(model, data)
    data.write_text(before)
    claim(model, data, "run.steps=1000", "profile.steps=[7]", "guard.max_logprob_gap=9.0")


@pytest.mark.parametrize("changed", ["weights of model.path", "config and tokenizer of model.path"])
def test_a_resumed_run_refuses_another_reference_under_the_same_path(model, data, changed):
    claim(model, data)
    if changed.startswith("weights"):
        weights = load_file(model / "model.safetensors")
        weights = {name: tensor * 1.05 for name, tensor in weights.items()}
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    else:
        with (model / "generation_config.json").open("a") as file:
            file.write("\n")
    with pytest.raises(ConfigError, match=f"have changed: {changed}"):
        claim(model, data)


def test_a_learning_rate_changes_only_if_allowed_by_name_and_that_is_recorded(model, data):
    claim(model, data)
    other = "learner.policy.lr=1e-6"
    with pytest.raises(ConfigError, match=r"learner.policy.lr = .* there, 1e-06 here"):
        claim(model, data, other)
    with pytest.raises(ConfigError, match=r"rollout.turns cannot change within a run; these can"):
        claim(model, data, 'run.allow_change=["rollout.turns"]')
    claim(model, data, other, 'run.allow_change=["learner.policy.lr"]')
    (line,) = (model.parent / "run/changes.jsonl").read_text().splitlines()
    assert json.loads(line)["changes"]["learner.policy.lr"][1] == 1e-6


@pytest.mark.parametrize(
    ("chosen", "folder"),
    [((), "runs/demo-imitation"), (("run.dir=own",), "own"), (("run.dir = 'own'",), "own")],
)
def test_imitation_leaves_the_folder_of_the_recipes_run_alone(
    model, data, monkeypatch, chosen, folder
):
    ran_in = []
    monkeypatch.setattr(cli, "launch", lambda module, run, layout: ran_in.append(run) or 0)
    words = [f'model.path="{model}"', f'data.train="{data}"', "data.valid=''", "data.test=''"]
    cli.imitate("demo", [*words, "rollout.max_context=320", *chosen])
    assert ran_in == [Path(folder)] and (ran_in[0] / "config.toml").is_file()
    assert not Path("runs/demo").exists()


def test_problems_whose_prompts_leave_no_room_are_left_out_and_counted(model, data, capsys):
    data.write_text(data.read_text() + row("long", "word " * 400))
    claim(model, data)
    assert "1 of 41 problems" in (said := capsys.readouterr().err) and "'long'" in said
    kept = training_problems(configured(model, data))
    assert len(kept) == 40 and "long" not in {problem.id for problem in kept}
    claim(model, data)  # a resumed run leaves out the same ones


def test_too_many_prompts_without_room_are_refused(model, data):
    data.write_text(data.read_text() + row("long", "word " * 400) * 1)
    with pytest.raises(ConfigError, match=r"1 of 41 problems .* more than rollout.max_drop_frac"):
        claim(model, data, "rollout.max_drop_fraction=0.01")


def test_a_context_beyond_the_models_positions_is_refused(model, data):
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 160}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"max_position_embeddings = 160; lower max_context"):
        claim(model, data)


def test_tokens_beyond_the_embedding_are_refused_by_name(model, data):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<plan>"])
    tokenizer.save_pretrained(model)
    with pytest.raises(ConfigError, match=r"without a row in the embedding .*'<plan>'"):
        claim(model, data)
