"""`rlef train` on the null GPU, from the user's command to checkpoint and resumption.

The model is small enough that everything is computed: PyTorch's operations by its CPU kernels, the
Triton kernels of the head and those that torch.compile generates by Triton's interpreter. So the
numbers must be those of a CPU, up to rounding.
"""

import json
import re
from pathlib import Path

import pytest

from rlef_mega.config import TrainConfig, find_recipe, load_config
from rlef_mega.preflight import check_train, claim_run_directory
from tests.null_gpu.processes import environment, python

pytestmark = pytest.mark.null_gpu

SETTINGS = [
    "data.test=''",
    "run.steps=2",
    "run.checkpoint_every=1",
    "rollout.episodes_per_batch=4",
    "rollout.max_new_tokens=8",
    "ppo.updates_per_batch=2",
    "eval.every=0",
    "guard.max_invalid_fraction=1.0",  # an untrained model writes no code
    "learner.policy.lr=1e-3",
    "learner.offload='idle'",
]


def train(run: Path, model: Path, *overrides: str, code: int = 0, **settings: object) -> str:
    """Run `rlef train demo`. Returns what it prints."""
    place = [f"run.dir={json.dumps(str(run))}", f"model.path={json.dumps(str(model))}"]
    sets = [word for each in (*place, *SETTINGS, *overrides) for word in ("--set", each)]
    env = environment(**{"compute_mib": 64, **settings})
    result = python("-P", "-m", "rlef_mega.cli", "train", "demo", *sets, env=env, code=code)
    return result.stdout + result.stderr


def metrics(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "time" not in k} for line in lines]


@pytest.fixture(scope="module")
def on_a_cpu(tmp_path_factory, model) -> list[dict]:
    run = tmp_path_factory.mktemp("cpu") / "run"
    train(run, model, "parallel.tensor_model_parallel_size=1", gpus=0)
    return metrics(run)


@pytest.mark.parametrize("devices", [1, 2])
def test_two_steps_have_the_numbers_of_a_cpu(on_a_cpu, model, tmp_path, devices):
    """Rollout, grading, scores, updates, publication to the embedded engine and checkpoints, with
    idle networks in host memory; on two devices with tensor parallelism."""
    run = tmp_path / "run"
    printed = train(run, model, f"parallel.tensor_model_parallel_size={devices}", gpus=devices)
    assert "Triton kernels" in printed
    for ours, expected in zip(metrics(run), on_a_cpu, strict=True):
        assert ours.keys() == expected.keys()
        for name, value in ours.items():
            assert value == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    manifest = json.loads((run / "manifest.json").read_text())
    assert "NVIDIA H200" in json.dumps(manifest)
    assert len(list((run / "checkpoints").glob("step_*"))) == 2


def test_two_pipeline_stages_train_in_bfloat16(model, tmp_path):
    """Engine and trainer compute the same log-probs up to bfloat16's rounding."""
    run = tmp_path / "run"
    layout = ("parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2")
    wider = ("guard.max_logprob_gap=1", "guard.mean_logprob_gap=1")
    short = ("run.steps=1", "rollout.episodes_per_batch=2", "ppo.updates_per_batch=1")
    train(run, model, *layout, *wider, *short, "model.dtype='bfloat16'", gpus=2)
    (found,) = metrics(run)
    assert found["tokens"] > 0 and 0 < found["policy_grad_norm"] < 100
    assert found["logprob_gap_max"] < 0.1


def test_too_few_devices_are_refused_with_a_message(model, tmp_path):
    printed = train(tmp_path / "run", model, gpus=1, code=2)
    assert re.search(r"error.*GPU", printed) and "invalid device ordinal" not in printed, printed


def test_a_full_device_names_phase_and_rank_and_loses_nothing(model, tmp_path):
    """At each moment of a step; then the run, resumed with more memory, ends."""
    run = tmp_path / "run"
    place = [f"run.dir={json.dumps(str(run))}", f"model.path={json.dumps(str(model))}"]
    short = ("parallel.tensor_model_parallel_size=1", "rollout.episodes_per_batch=2")
    overrides = [*place, *SETTINGS, *short]
    config = load_config(find_recipe("demo"), overrides, TrainConfig)
    claim_run_directory(config, run, check_train(config))
    moments = ("start", "rollout", "score", "update", "publish", "checkpoint")
    words = ("-m", "tests.null_gpu.out_of_memory_worker", run, *moments, "none")
    ended = python(*words, env=environment(compute_mib=64))
    for moment in moments:
        assert f"{moment} 2\n" in ended.stdout, ended.stderr
        found = re.search(f"error: rank 0, phase {moment}: (.*)", ended.stderr)
        assert found, ended.stderr
        said = found[1]
        assert said.startswith("CUDA out of memory. Tried to allocate")
        assert "et learner.offload = 'idle', or split the networks" in said
        assert ("Lower learner.microbatch_tokens" in said) == (moment in ("score", "update"))
        assert ("Lower rollout.max_context" in said) == (moment == "rollout")
    assert "none 0\n" in ended.stdout, ended.stderr
    assert [line["step"] for line in metrics(run)] == [1, 2]
