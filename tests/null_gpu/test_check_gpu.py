"""`rlef check-gpu` from its first step to its last on the null GPU: at its real sizes, but for the
model that is trained, which is small enough to be computed.

Every launch is made, with real arguments: a launch that fails raises, and its figure is missing.
Other numbers mean nothing, and what is larger than the null GPU computes differs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlef_mega.bench.kernel_methods import METHODS
from rlef_mega.check_gpu.command import LIMITS
from rlef_mega.check_gpu.summary import REHEARSED, read

pytestmark = pytest.mark.null_gpu
ROOT = Path(__file__).parents[2]
# Runs the program without looking at it.
SANITIZER = '#!/bin/sh\nshift 4  # --tool memcheck --error-exitcode 86\nexec "$@"\n'
TINY = (
    *("run.steps=1", "data.train=curriculum:train", "data.valid=curriculum:valid"),
    *("rollout.episodes_per_batch=2", "rollout.max_new_tokens=8", "rollout.max_context=320"),
)


@pytest.fixture(scope="module")
def check(tmp_path_factory, model) -> tuple[Path, str]:
    """Run all steps. Returns the folder of results and what the command printed."""
    folder = tmp_path_factory.mktemp("check")
    (folder / "compute-sanitizer").write_text(SANITIZER)
    (folder / "compute-sanitizer").chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    tiny = ("--set", f"model.path={json.dumps(str(model))}", *TINY)
    printed = [  # mebibytes that are computed, and steps; the last call runs those that remain
        run(folder / "out", *words, PATH=path, NULL_GPU_COMPUTE_MIB=computed)
        for computed, words in (
            ("0", ("--only", "slice")),
            ("64", ("--only", "smollm2", *tiny)),
            ("1", ()),
        )
    ]
    return folder / "out", "\n".join(printed)


def run(out: Path, *words: str, **variables: str) -> str:
    command = [sys.executable, "-m", "rlef_mega.check_gpu.command", str(out), *words]
    ended = subprocess.run(
        [*command, "--minutes", "60", "--patience", "6"],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
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


def test_every_kernel_of_ours_is_launched_and_backward_where_it_has_gradients(check):
    figures = result(check, "head")["figures"]
    ours = [m for m in METHODS if m.name.startswith("rlef") and "PyTorch" not in m.name]
    for case in ("8B | 8192 | 0%", "8B | 8192 | 50%", "70B, TP8 | 8192 | 0%"):
        for method in ours:
            backward = method.products[1] is not None
            expected = ("forward", "forward and backward") if backward else ("forward",)
            assert {f"{case} | {method.name} | {what}" for what in expected} <= figures.keys()


def test_the_summary_has_every_figure_and_its_goal(check):
    page = (check[0] / "summary.md").read_text()
    for name in LIMITS:
        for label in result(check, name)["figures"]:
            assert f"| {label.replace(' | ', ', ')} |" in page
    assert "QuACK 35.5" in page and "on the null GPU 76,548" in page and "NVIDIA H200" in page


def test_the_memory_that_the_summary_expects_is_what_this_slice_takes(check):
    found = result(check, "slice")["figures"]
    for label, figure in read(REHEARSED)["figures"].items():
        assert found[label]["median"] == pytest.approx(figure["median"], rel=0.01), label


def test_steps_that_passed_are_not_repeated(check):
    assert "slice: passed before" in check[1] and "smollm2: passed before" in check[1]
