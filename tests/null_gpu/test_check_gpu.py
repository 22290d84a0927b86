"""`rlef check-gpu` from its first step to its last, at its real sizes, on the null GPU.

Every launch is made, with real arguments: a launch that fails raises, and its figure is missing.
Numbers mean nothing: what is larger than the null GPU computes differs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlef_mega.bench.kernel_methods import METHODS
from rlef_mega.check_gpu.command import LIMITS

pytestmark = pytest.mark.null_gpu
ROOT = Path(__file__).parents[2]
# Runs the program without looking at it.
SANITIZER = '#!/bin/sh\nshift 4  # --tool memcheck --error-exitcode 86\nexec "$@"\n'
SHORT = ("run.steps=1", "rollout.episodes_per_batch=2", "rollout.max_new_tokens=8")


@pytest.fixture(scope="module")
def check(tmp_path_factory) -> tuple[Path, str]:
    """Run all steps. Returns the folder of results and what the command printed."""
    folder = tmp_path_factory.mktemp("check")
    (folder / "compute-sanitizer").write_text(SANITIZER)
    (folder / "compute-sanitizer").chmod(0o755)
    small = {"NULL_GPU_COMPUTE_MIB": "1"}  # not SmolLM2's products
    environment = os.environ | small | {"PATH": f"{folder}:{os.environ['PATH']}"}
    return folder / "out", run(folder / "out", environment)


def run(out: Path, environment: dict[str, str], *words: str) -> str:
    command = [sys.executable, "-m", "rlef_mega.check_gpu.command", str(out), *words]
    patient = ["--minutes", "60", "--patience", "6", "--set", *SHORT]
    ended = subprocess.run(
        [*command, *patient], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return ended.stdout + ended.stderr


def result(check: tuple[Path, str], name: str) -> dict:
    return json.loads((check[0] / f"{name}.json").read_text())


@pytest.mark.parametrize("name", LIMITS)
def test_every_step_ends_and_nothing_but_numbers_fails(check, name):
    found = result(check, name)
    assert found["ended"] in ("exit code 0", "exit code 1"), check[1]
    assert found["figures"], check[1]
    assert all(text.startswith("numbers differ") for text in found["failures"]), check[1]


def test_every_kernel_of_ours_is_launched_forward_and_backward(check):
    figures = result(check, "head")["figures"]
    ours = [m.name for m in METHODS if m.name.startswith("rlef") and "PyTorch" not in m.name]
    for case in ("8B | 8192 | 0%", "8B | 8192 | 50%", "70B, TP8 | 8192 | 0%"):
        for name in ours:
            assert {
                f"{case} | {name} | {what}" for what in ("forward", "forward and backward")
            } <= (figures.keys())


def test_the_summary_has_every_figure_and_its_goal(check):
    page = (check[0] / "summary.md").read_text()
    for name in LIMITS:
        for label in result(check, name)["figures"]:
            assert f"| {label.replace(' | ', ', ')} |" in page
    assert "QuACK 35.5" in page and "on the null GPU 76,548" in page and "NVIDIA H200" in page


def test_a_second_run_repeats_only_what_has_not_passed(check):
    before = result(check, "ipc")["started"]
    printed = run(check[0], dict(os.environ), "--skip", "tests", "memcheck")
    assert "ipc: passed before" in printed and result(check, "ipc")["started"] == before
