"""Benchmarks: what they count, and that a small one runs through the command.

Speeds are not asserted, because they depend on the machine.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from rlef_mega.bench import checkpoint, measured, run_benchmark
from rlef_mega.bench.e2e import with_outside
from rlef_mega.bench.results import Figure, shares
from rlef_mega.bench.sandbox import benchmark as benchmark_sandbox
from rlef_mega.bench.workload import random_batch, workload
from rlef_mega.config import ConfigError, RolloutConfig, TrainConfig, find_recipe, load_config

DEMO = load_config(find_recipe("demo"), [], TrainConfig).rollout
SMALL = """
[run]
dir = "unused"
steps = 1
[model]
path = "no model here"
dtype = "float32"
[data]
train = "curriculum:train"
[rollout]
episodes_per_batch = 8
max_new_tokens = 40
max_context = 320
[ppo]
updates_per_batch = 2
"""


@pytest.mark.parametrize("rollout", [DEMO, RolloutConfig(episodes_per_batch=16)])
def test_made_up_episodes_stay_within_the_recipe_and_repeat(rollout):
    episodes = random_batch(rollout, vocab_size=640, seed=3)
    assert episodes == random_batch(rollout, vocab_size=640, seed=3)
    assert episodes != random_batch(rollout, vocab_size=640, seed=4)
    assert len(episodes) == rollout.episodes_per_batch
    turns = [turn for episode in episodes for turn in episode.turns]
    assert {len(episode.turns) for episode in episodes} == {1, 2, 3}
    assert max(len(turn.completion.token_ids) for turn in turns) <= rollout.max_new_tokens
    assert max(len(episode.token_ids) for episode in episodes) <= rollout.max_context
    assert max(max(episode.token_ids) for episode in episodes) < 640


def test_shares_are_of_the_whole_step():
    steps = [{"score": 1.0, "update": 2.0, "step": 4.0}, {"score": 3.0, "step": 6.0}]
    assert shares(steps) == [
        Figure("share: score", "share", (0.25, 0.5)),
        Figure("share: update", "share", (0.5, 0.0)),
    ]


def test_time_outside_the_phases_is_the_rest_of_the_step():
    times = {"rollout": 17.0, "update": 10.0, "step": 30.0}
    assert with_outside(times) == {**times, "outside": 3.0}


def test_options_of_another_benchmark_are_refused():
    with pytest.raises(ConfigError, match="--layers is an option of `rlef bench slice`"):
        run_benchmark("rollout", "demo", None, layers="2")


def test_an_unknown_benchmark_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"known: kernels, slice, train, .*, convert, sandbox"):
        measured("speed", "demo")


def test_a_recipe_whose_big_model_is_elsewhere_is_refused_rather_than_measured_on_another():
    with (
        pytest.raises(ConfigError, match="cannot be measured"),
        workload("llama31_8b"),
    ):
        pass


def test_a_critics_layout_that_does_not_fit_the_model_is_refused_before_a_rank_starts(tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(SMALL + "[critic_parallel]\ntensor_model_parallel_size = 3")
    with pytest.raises(ConfigError, match=r"critic_parallel: .*3"), workload(str(recipe)):
        pass


def test_a_checkpoints_step_has_a_dialogue_for_each_update(ranks, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "REPEATS", 1)
    recipe = tmp_path / "small.toml"
    recipe.write_text(SMALL.replace("updates_per_batch = 2", "updates_per_batch = 8"))
    with workload(str(recipe)) as work:
        found = checkpoint.measure(work.folder, work.config, ranks)
    assert {len(samples) for samples in found["seconds"].values()} == {1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "phases", "more", "launched"),
    [
        ("train", 5, "", "starting 1 ranks"),
        ("train", 5, "[critic_parallel]", "starting 2 ranks"),
        ("rollout", 3, "", "starting 1 ranks"),
        ("e2e", 7, "", ""),
    ],
)
def test_a_small_recipe_is_measured_through_the_command(what, phases, more, launched, tmp_path):
    recipe, out = tmp_path / "small.toml", tmp_path / "figures.json"
    recipe.write_text(SMALL + more)
    done = subprocess.run(
        [sys.executable, "-m", "rlef_mega.cli", "bench", what, str(recipe), "--json", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert written["model"] == "random weights, the shape of demo_base"
    assert {"versions", "device", "started", "command", "layout"} <= set(written)
    figures = written["figures"]
    for figure in figures.values():
        assert len(figure["samples"]) == 5
        assert figure["median"] == statistics.median(figure["samples"])
    parts = [f["samples"] for name, f in figures.items() if name.startswith("share: ")]
    assert len(parts) == phases
    # nothing is counted twice, and next to nothing is left out
    assert all(0.9 < sum(repeat) < 1.001 for repeat in zip(*parts, strict=True))
    assert str(Path(out)) in done.stdout and launched in done.stdout


def test_the_sandbox_is_compared_with_its_peers():
    report = benchmark_sandbox(rounds=1, runs=20)
    figures = {figure.name: figure for figure in report.figures}
    bare = figures["trivial: ours / bare subprocess"]
    assert bare.unit == "ratio" and bare.median > 0
    assert figures["trivial"].unit == figures["trivial, bare subprocess"].unit == "runs/s"
    assert bare.median == pytest.approx(
        figures["trivial"].median / figures["trivial, bare subprocess"].median, rel=0.01
    )
