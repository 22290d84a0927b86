"""Asynchronous training through the command's function, on servers that sample from a real model.

They speak SGLang's HTTP (tests/sglang has the real ones) in this test's process.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from typer.testing import CliRunner

from rlef_mega.cli import app
from rlef_mega.config import ConfigError, TrainConfig, find_recipe, load_config
from rlef_mega.megatron.checkpoints.files import fault_in, read_score, steps_in
from rlef_mega.preflight import model_shape, plan_train
from rlef_mega.problems import load_problems, sample
from tests.rlef_mega.distributed import Ranks
from tests.rlef_mega.engines.sglang.model_double import ModelDouble
from tests.rlef_mega.test_train import (  # noqa: F401 - the model is a fixture
    ended_ranks,
    metrics,
    model,
    steps_done,
    train,
    wait_for,
)

STEPS, BATCH = 6, 8


@pytest.fixture
def servers(model):  # noqa: F811
    with ModelDouble(1, model) as one, ModelDouble(2, model) as two:
        yield one, two


def asynchronous(servers, *overrides: str) -> list[str]:
    urls = json.dumps([server.url for server in servers])
    return [
        "rollout.engine=sglang",
        f"rollout.servers.urls={urls}",
        "rollout.mode=async",
        "rollout.max_staleness=2",
        f"run.steps={STEPS}",
        "run.checkpoint_every=1",
        "run.keep_checkpoints=99",
        *overrides,
    ]


def trained_on(run: Path) -> Counter[str]:
    """Count the problems of all episodes of all steps."""
    return sum(batches(run), Counter())


def batches(run: Path) -> list[Counter[str]]:
    """Count the problems of each step's episodes."""
    counts = []
    for file in (run / "episodes").glob("step_*.jsonl.zst"):
        lines = zstandard.decompress(file.read_bytes()).decode().splitlines()
        counts.append(Counter(json.loads(line)["problem_id"] for line in lines))
    return counts


def drawn(samples: int = 1) -> Counter[str]:
    """Count the problems that synchronous training draws in as many steps."""
    problems, size = load_problems("curriculum:train"), BATCH // samples
    steps = (sample(problems, step, size, 0) for step in range(1, STEPS + 1))
    return Counter(problem.id for step in steps for problem in step for _ in range(samples))


def test_training_goes_on_while_dialogues_do(model, servers, tmp_path):  # noqa: F811
    """Two ranks, each with its share. The first batch has the trainer's own weights, so the gap is
    that of two implementations; later ones are stale, and within the bound."""
    run = tmp_path / "run"
    lines = train(run, model, *asynchronous(servers))
    assert len(lines) == STEPS
    for line in lines:
        assert line["dropped"] == {} and line["episodes"] == BATCH
        assert 0 <= line["staleness_max"] <= 2
        assert sum(line["staleness"].values()) > 0
        assert 0 < line["effective_sample_size"] <= 1 + 1e-9
        if line["logprob_gap_max"] is not None:
            assert line["logprob_gap_max"] < 1e-4
            assert line["logprob_gap_k3"] < 1e-6
    assert lines[0]["staleness"].keys() == {"0"} and lines[0]["logprob_gap_max"] is not None
    assert any(line["staleness_max"] > 0 for line in lines), "nothing went on while it trained"
    evaluated = [line for line in lines if "valid_solved" in line]
    assert [line["valid_step"] for line in evaluated] == [2, 4, 6]
    assert all(line["valid_versions"][0] >= line["valid_step"] for line in evaluated)
    assert trained_on(run) == drawn()
    scores = {path.name: read_score(path) for path in steps_in(run / "checkpoints")}
    scored = {name for name, score in scores.items() if score is not None}
    assert scored == {"step_000002", "step_000004", "step_000006"}


def test_the_dialogues_about_a_problem_are_in_one_batch(model, servers, tmp_path):  # noqa: F811
    """Each of two ranks drives half of the problems."""
    run = tmp_path / "groups"
    grouped = ("ppo.advantage=rloo", "rollout.samples_per_problem=2", "eval.every=0")
    lines = train(run, model, *asynchronous(servers, *grouped))
    assert all(0 <= line["turns_alone"] < 1 and line["episodes"] == BATCH for line in lines)
    for batch in batches(run):
        assert set(batch.values()) <= {2, 4}
    assert trained_on(run) == drawn(2)


@pytest.mark.slow
def test_a_killed_run_trains_on_every_dialogue_once(model, servers, tmp_path):  # noqa: F811
    run = tmp_path / "killed"
    overrides = asynchronous(servers)

    def kill(ranks: Ranks) -> None:
        wait_for(lambda: steps_done(run) >= 3, ranks)
        ranks.kill()

    ended_ranks(run, model, *overrides, meanwhile=kill)
    newest = steps_in(run / "checkpoints")[-1]
    step = int(newest.name.removeprefix("step_"))
    state = json.loads((newest / "meta.json").read_text())["state"]
    assert state["next_dialogue"] - len(state["dialogues_passed_over"]) == step * BATCH
    lines = train(run, model, *overrides)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert trained_on(run) == drawn()


@pytest.mark.slow
def test_without_any_server_the_run_saves_and_stops(model, servers, tmp_path):  # noqa: F811
    """It resumes when there are servers again."""
    run = tmp_path / "lost"
    overrides = asynchronous(servers, "rollout.servers.lost_s=3", "run.checkpoint_every=100")

    def lose_the_servers(ranks: Ranks) -> None:
        wait_for(lambda: steps_done(run) >= 2, ranks)
        for server in servers:
            server.mode = "drop"

    codes, outputs = ended_ranks(run, model, *overrides, meanwhile=lose_the_servers)
    said = "\n".join(outputs)
    assert 2 in codes
    assert "no server" in said and servers[0].url in said, said
    newest = steps_in(run / "checkpoints")[-1]
    assert fault_in(newest) is None
    assert newest.name == f"step_{len(metrics(run)):06d}"
    for server in servers:
        server.mode = "answer"
    assert len(train(run, model, *overrides)) == STEPS


def test_asynchronous_training_needs_servers_and_equal_shares(tmp_path):
    def load(*overrides: str) -> TrainConfig:
        given = ["rollout.mode=async", f"model.path={json.dumps(str(tmp_path / 'none'))}"]
        return load_config(find_recipe("demo"), [*given, *overrides], TrainConfig)

    with pytest.raises(ConfigError, match=r"needs rollout\.engine"):
        load()
    uneven = ["rollout.engine=sglang", "rollout.episodes_per_batch=9", "ppo.updates_per_batch=3"]
    shape = "model.shape={hidden=8, heads=2, key_value_heads=2, layers=2, vocab_size=64, ffn=8}"
    config = load(*uneven, shape)
    with pytest.raises(ConfigError, match="9 problems, not divisible by 2 processes"):
        plan_train(config, model_shape(config))


def test_a_folder_is_evaluated_on_servers(model, servers, tmp_path):  # noqa: F811
    """Its weights are loaded on servers that no other process uses; afterwards they are free."""
    words = ["eval", str(model), "--data", "curriculum:test", "--problems", "6", "--turns", "2"]
    limits = ["--max-new-tokens", "20", "--max-context", "320"]
    only = ["--feedback", "true", "--no-single-turn"]
    urls = [word for server in servers for word in ("--sglang", server.url)]
    evaluate = [*words, *limits, *only, *urls]
    result = CliRunner().invoke(app, [*evaluate, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "eval/init.json").read_text())["protocols"]["multi_turn"]
    assert summary["dropped"] == {} and summary["solve_rate"]["value"] == 0.0
    for server in servers:
        assert server.calls["update_weights_from_disk"] == 1 and server.weight_version == "default"
    assert sum(server.calls["generate"] for server in servers) == 12
    assert not (tmp_path / "weights").exists()
    path = tmp_path / "eval/init.dialogues.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    for server in servers:
        server.weight_version = "0"  # as after SIGKILL before the last dialogue
    again = CliRunner().invoke(app, [*evaluate, "--out", str(tmp_path)])
    assert again.exit_code == 0, again.output
    assert sum(server.calls["generate"] for server in servers) == 14
    servers[1].weight_version = "3"  # used by a training run
    refused = CliRunner().invoke(app, [*evaluate, "--out", str(tmp_path / "other")])
    assert f"{servers[1].url} has weights of version 3" in str(refused.exception)
