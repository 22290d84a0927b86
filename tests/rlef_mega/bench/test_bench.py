"""Benchmarks: what they count, and that a small one runs through the command.

Speeds themselves are not asserted: they belong to the machine, and its results file.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from rlef_mega.bench import Options, report_of, run_benchmark
from rlef_mega.bench.against_trl import Round, as_rollout, find_python, layouts, ways_to_try
from rlef_mega.bench.against_trl import figures as trl_figures
from rlef_mega.bench.figures import Figure, shares
from rlef_mega.bench.packing import WAYS, Case
from rlef_mega.bench.packing import measure as measure_waste
from rlef_mega.bench.sandbox import benchmark as benchmark_sandbox
from rlef_mega.bench.step import benchmark as benchmark_step
from rlef_mega.bench.workload import random_episodes, workload
from rlef_mega.config import ConfigError, RolloutConfig, TrainConfig, find_recipe, load_config
from rlef_mega.flops import SequenceFlops
from rlef_mega.packing import pack

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


def by_name(report) -> dict[str, Figure]:
    return {figure.name: figure for figure in report.figures}


@pytest.mark.parametrize("rollout", [DEMO, RolloutConfig(episodes_per_batch=16)])
def test_made_up_episodes_stay_within_the_recipe_and_repeat(rollout):
    episodes = random_episodes(rollout, vocab_size=640, seed=3)
    assert episodes == random_episodes(rollout, vocab_size=640, seed=3)
    assert episodes != random_episodes(rollout, vocab_size=640, seed=4)
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


def test_time_outside_the_phases_is_what_none_of_them_claims(tmp_path):
    times = [
        {"rollout": 9.0, "step": 90.0},  # the first step is left out
        {"rollout": 6.0, "update": 3.0, "step": 10.0},
        {"rollout": 17.0, "update": 10.0, "step": 30.0},
    ]
    lines = [{"step": n + 1, "tokens": 600, "time": t} for n, t in enumerate(times)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = benchmark_step(tmp_path)
    found = by_name(report)
    assert found["share: outside"].samples == pytest.approx((0.1, 0.1))
    assert found["tokens of dialogues"].samples == (60.0, 20.0)
    assert report.about["share_of_all_steps"] == {"rollout": 0.575, "update": 0.325, "outside": 0.1}
    assert "goal below 5%: missed" in report.notes[1]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="directory of a run"):
        benchmark_step(tmp_path)


def test_trl_is_given_the_same_tokens_with_only_the_responses_to_train_on():
    episodes = random_episodes(DEMO, vocab_size=640, seed=0)
    batch = pack(episodes)
    token_ids, said, logprobs = [], [], []
    for given in map(as_rollout, episodes):
        lengths = {len(given[name]) for name in ("completion_ids", "env_mask", "logprobs")}
        assert len(lengths) == 1 and given["env_mask"][0] == given["env_mask"][-1] == 1
        token_ids += given["prompt_ids"] + given["completion_ids"]
        said += [0] * len(given["prompt_ids"]) + given["env_mask"]
        logprobs += [0.0] * len(given["prompt_ids"]) + given["logprobs"]
    assert token_ids == batch.token_ids_T.tolist()
    actions = [place for place, one in enumerate(said) if one]
    assert actions == batch.action_positions_A.tolist()
    sampled = [logprobs[place] for place in actions]
    assert sampled == pytest.approx(batch.behaviour_logprobs_A.tolist())


def test_ratios_to_trl_are_taken_within_a_round():
    def ours(whole: float, policy: float) -> dict:
        phases = [{"pack": 0.0, "score": whole / 4, "targets": 0.0, "update": 3 * whole / 4}]
        return {"tokens": 1000, "sequences": 8, "phases": phases, "policy_alone": [policy]}

    # in the second round everything takes twice as long; only the ratios stay as they are
    rounds = [
        Round({"TP 2": ours(4.0, 2.0)}, {"seconds": [5.0, 4.0, 3.0], "padded_tokens": 1500}),
        Round({"TP 2": ours(8.0, 4.0)}, {"seconds": [8.0, 8.0, 9.0], "padded_tokens": 1500}),
    ]
    assert {figure.name: figure.samples for figure in trl_figures(rounds)} == {
        "TRL GRPOTrainer, policy": (250.0, 125.0),
        "ours TP 2, policy and critic": (250.0, 125.0),
        "ours TP 2, policy": (500.0, 250.0),
        "ours TP 2, policy and critic / TRL": (1.0, 1.0),
        "ours TP 2, policy / TRL": (2.0, 2.0),
    }


def test_trl_is_tried_and_ours_is_run_in_data_parallel_too():
    with workload("demo") as work:
        assert [(way.processes, way.microbatch) for way in ways_to_try(work, threads=2)] == [
            *[(1, 8), (1, 16), (1, 32), (1, 64)],
            *[(2, 8), (2, 16), (2, 32)],
        ]
        variants = layouts(work)
        assert list(variants) == ["TP 2 x PP 1 x DP 1", "DP 2"]
        own, data_parallel = (variant.config for variant in variants.values())
        assert own.parallel.tensor_model_parallel_size == 2
        assert data_parallel.parallel.data_parallel_size == data_parallel.parallel.world_size == 2
        assert own.model_dump(exclude={"parallel"}) == data_parallel.model_dump(
            exclude={"parallel"}
        )


def test_a_missing_trl_environment_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setenv("RLEF_BENCH_PYTHON", "/no/such/python")
    with pytest.raises(ConfigError, match="make bench-trl"):
        find_python()


def test_trl_goes_with_training_only():
    with pytest.raises(ConfigError, match="goes with `rlef bench train`"):
        run_benchmark("rollout", "demo", None, Options(against_trl=True))


def test_an_unknown_benchmark_is_refused_with_the_known_ones():
    known = r"known: train, slice, rollout, .*publish, step, checkpoint, sandbox"
    with pytest.raises(ConfigError, match=known):
        report_of("speed", "demo", Options())


def test_a_recipe_whose_big_model_is_elsewhere_is_refused_rather_than_measured_on_another():
    with (
        pytest.raises(ConfigError, match="cannot be measured"),
        workload("llama31_8b"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("what", "phases"), [("train", 5), ("rollout", 3), ("e2e", 7)])
def test_a_small_recipe_is_measured_through_the_command(what, phases, tmp_path):
    recipe, out = tmp_path / "small.toml", tmp_path / "figures.json"
    recipe.write_text(SMALL)
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
    assert str(Path(out)) in done.stdout


def test_the_sandbox_is_timed_beside_its_peers():
    report = benchmark_sandbox(rounds=1, runs=20)
    figures = {figure.name: figure for figure in report.figures}
    bare = figures["trivial: ours / bare subprocess"]
    assert bare.unit == "ratio" and bare.median > 0
    assert figures["trivial"].unit == figures["trivial, bare subprocess"].unit == "runs/s"
    assert bare.median == pytest.approx(
        figures["trivial"].median / figures["trivial, bare subprocess"].median, rel=0.01
    )


def test_waste_of_micro_batches_by_hand():
    """Six sequences on two ranks, a budget of 8; equal FLOPs a token and no attention."""
    batch = [(5, 0), (4, 0), (3, 0), (2, 0), (1, 0), (1, 0)]
    case = Case("by hand", SequenceFlops(1, 0, 0), [batch], token_budget=8, ranks=2)
    waste = {name: measure_waste(case, batch, way) for name, way in WAYS.items()}
    for way in WAYS.values():
        chosen = [i for rank in way.plan(case, batch) for row in rank for i in row]
        assert sorted(chosen) == list(range(6))
    ours = waste["ours"]  # 8 and 8
    assert (ours.padding, ours.idle, ours.wasted, ours.uneven, ours.microbatches) == (0, 0, 0, 0, 1)
    full = waste["first-fit decreasing"]  # 5 3 | 4 2 1 1
    assert (full.padding, full.wasted, full.microbatches) == (0, 0, 1)
    padded = waste["padded, sorted"]  # 5, 2 2 2 on the first rank; 4 4 and nothing on the other
    assert padded.padding == pytest.approx(1 - 16 / 19)
    assert padded.idle == pytest.approx(1 - 9.5 / 11)
    assert padded.wasted == pytest.approx(1 - 16 / 22)
    assert padded.uneven == pytest.approx(1 - 4.75 / 8)
