"""The benchmarks of a GPU as commands: every launch and allocation is made, times mean nothing."""

import json
from pathlib import Path

import pytest

from tests.null_gpu.processes import environment, python

pytestmark = pytest.mark.null_gpu


def bench(out: Path, *words: str) -> dict:
    command = ("-P", "-m", "rlef_mega.cli", "bench", *words, "--json", out)
    python(*command, env=environment(compute_mib=0))
    return json.loads(out.read_text())


def test_kernels_launch_at_size(tmp_path):
    case = "70B, TP8 | 8192 | 0%"
    found = bench(tmp_path / "kernels.json", "kernels", "--cases", case, "--methods", "rlef fused")
    assert found["device"].endswith("NVIDIA H200")
    assert {f"{case} | rlef fused | {what}" for what in ("forward", "forward and backward")} <= (
        found["figures"].keys()
    )


def test_a_slice_runs_all_phases(tmp_path):
    found = bench(tmp_path / "slice.json", "slice", "demo", "--layers", "1", "--minutes", "0.01")
    for phase in ("old log-probs", "values", "policy update", "critic update"):
        assert found["figures"][f"{phase} | memory beyond resident"]["median"] > 0
    assert found["memory"]["resident_bytes"] > 0
