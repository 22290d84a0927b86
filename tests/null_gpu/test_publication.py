"""Weights on a device reach a server in another process by each way, verified by checksums."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.null_gpu.conftest import ROOT
from tests.null_gpu.processes import environment

pytestmark = pytest.mark.null_gpu


@pytest.fixture(scope="module")
def server(model):
    """On the second device. Yields its address."""
    command = [sys.executable, "-m", "tests.null_gpu.serving_process", str(model), "cuda:1"]
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield child.stdout.readline().strip()
    child.stdin.close()
    child.wait(30)


@pytest.mark.parametrize("way", ["disk", "distributed", "tensor"])
def test_weights_on_a_device_reach_a_server(server: str, model: Path, tmp_path: Path, way: str):
    """By a folder, a broadcast over NCCL, CUDA IPC; a second publication replaces the first."""
    from rlef_mega.engines.sglang.engine import RequestLimits, SGLangEngine

    policy = LlamaForCausalLM.from_pretrained(model).to("cuda:0")
    limits = RequestLimits(publish_s=120.0)
    with SGLangEngine(
        [server], model, limits, way=way, weights_folder=tmp_path / "weights", take_over=True
    ) as engine:
        for version in (1, 2):
            for weight in policy.parameters():
                weight.data += version
            engine.update_weights(policy.state_dict().items(), version)
            engine.end_update(version)
            assert engine.weight_version == version
