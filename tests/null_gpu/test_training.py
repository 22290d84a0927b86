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


def test_too_few_devices_are_refused_with_a_message(model, tmp_path):
    printed = train(tmp_path / "run", model, gpus=1, code=2)
    assert re.search(r"error.*GPU", printed) and "invalid device ordinal" not in printed, printed


def test_a_full_device_names_phase_and_rank_and_loses_nothing(model, tmp_path):
    """When it starts, scores and updates; then the run, resumed with more memory, ends."""
    run = tmp_path / "run"
    place = [f"run.dir={json.dumps(str(run))}", f"model.path={json.dumps(str(model))}"]
    overrides = [*place, *SETTINGS, "parallel.tensor_model_parallel_size=1"]
    config = load_config(find_recipe("demo"), overrides, TrainConfig)
    claim_run_directory(config, run, check_train(config, grading_token=None))

    def rank(moment: str, code: int) -> str:
        (run / ".failed").unlink(missing_ok=True)  # as the launcher does
        words = ("-m", "tests.null_gpu.out_of_memory_worker", run, moment)
        return python(*words, env=environment(compute_mib=64), code=code).stderr

    for moment in ("start", "score", "update"):  # others need no memory in so small a run
        said = rank(moment, 2)
        assert f"error: rank 0, phase {moment}: CUDA out of memory. Tried to allocate" in said
        assert "Set learner.offload = 'idle', or split the networks" in said, said
        assert ("Lower learner.microbatch_tokens" in said) == (moment != "start")
    rank("none", 0)
    assert [line["step"] for line in metrics(run)] == [1, 2]
