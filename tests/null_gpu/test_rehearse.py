"""`rlef rehearse`: the planned memory of each phase is what PyTorch's allocator counts, for each
kind of rank of the shipped recipes and for other settings of a smaller model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.null_gpu
EIGHT_LAYERS = "model.shape.layers=8"


def rehearse(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rlef_mega.cli", "rehearse", *words]
    return subprocess.run(command, capture_output=True, text=True)


def rehearsed(folder: Path, *words: str) -> dict:
    ended = rehearse(*words, "--json", str(folder / "rehearsed.json"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads((folder / "rehearsed.json").read_text())


def settings(*words: str) -> list[str]:
    return [part for word in words for part in ("--set", word)]


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("llama31_8b", []),
        ("llama31_70b", []),
        ("llama31_8b", [EIGHT_LAYERS, "learner.offload=idle"]),
        (
            "llama31_8b",
            [
                EIGHT_LAYERS,
                "model.recompute=none",
                "critic_parallel.tensor_model_parallel_size=2",
                "critic_parallel.sequence_parallel=true",
            ],
        ),
        (
            "llama31_8b",
            [EIGHT_LAYERS, "model.recompute=full", "parallel.pipeline_model_parallel_size=2"],
        ),
        (
            "llama31_8b",
            [
                EIGHT_LAYERS,
                "ppo.kl=exact",
                "learner.offload=idle",
                "parallel.pipeline_model_parallel_size=2",
            ],
        ),
    ],
    ids=["8B", "70B", "offloaded", "critic on ranks of its own", "two stages", "exact KL"],
)
def test_planned_memory_and_flops_of_every_phase_are_those_of_the_rehearsal(
    recipe, changes, tmp_path
):
    for name, rank in rehearsed(tmp_path, recipe, *settings(*changes))["ranks"].items():
        assert {"update_policy", "update_critic"} & rank["phases"].keys()
        for phase, plan in rank["plan"].items():
            counted = rank["phases"][phase]
            assert plan["bytes"] == pytest.approx(counted["peak_bytes"], rel=0.03), (name, phase)
            assert counted["product_flops"] == pytest.approx(plan["product_flops"], rel=0.01)
        assert rank["planned_pinned_bytes"] == pytest.approx(
            rank["phases"]["checkpoint"]["pinned_bytes"], rel=0.03
        )


def test_the_host_waits_for_no_micro_batch(tmp_path):
    """Waits are for the copies of an update's inputs, its metrics and its gradient norm."""
    few, many = (
        rehearsed(
            tmp_path,
            "llama31_8b",
            *settings(EIGHT_LAYERS, f"rollout.episodes_per_batch={episodes}"),
        )["ranks"]["only stage"]["phases"]
        for episodes in (1024, 2048)
    )
    for phase in ("score_policy", "update_policy", "update_critic"):
        assert many[phase]["launches"] > 1.4 * few[phase]["launches"]
        assert many[phase]["waits"] == few[phase]["waits"] <= 4


def test_a_rank_that_does_not_fit_is_refused_with_its_phase_and_remedies():
    ended = rehearse(
        "llama31_8b",
        *settings("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"),
    )
    assert ended.returncode == 2
    message = " ".join(ended.stderr.split())
    assert "rank 0 (only stage) does not fit h100-80gb: in 'build'" in message
    assert "learner.offload" in message and "Traceback" not in message
