"""The benchmarks of a GPU as commands: every launch and allocation is made, times mean nothing."""

import json
from pathlib import Path

import pytest

from tests.null_gpu.processes import environment, python

pytestmark = pytest.mark.null_gpu


def bench(out: Path, *words: str, compute_mib: int = 0) -> dict:
    command = ("-P", "-m", "rlef_mega.cli", "bench", *words, "--json", out)
    python(*command, env=environment(compute_mib=compute_mib))
    return json.loads(out.read_text())


def test_kernels_launch_at_size(tmp_path):
    case = "70B, TP8 | 8192 | 0%"
    found = bench(tmp_path / "kernels.json", "kernels", "--cases", case, "--methods", "rlef fused")
    assert found["device"].endswith("NVIDIA H200")
    assert {f"{case} | rlef fused | {what}" for what in ("forward", "forward and backward")} <= (
        found["figures"].keys()
    )


def test_a_slice_runs_all_phases_while_small_operations_are_computed(tmp_path):
    """Its losses stay finite, though most of what they depend on is not computed."""
    words = ("slice", "demo", "--layers", "1", "--minutes", "0.01")
    found = bench(tmp_path / "slice.json", *words, compute_mib=1)
    for phase in ("old log-probs", "values", "policy update", "critic update"):
        assert found["figures"][f"{phase} | memory beyond resident"]["median"] > 0
    assert found["memory"]["resident_bytes"] > 0
