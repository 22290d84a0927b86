"""Weights on a device reach a server in another process by each way, verified by checksums."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from rlef_mega.config import ServersConfig
from tests.null_gpu.conftest import ROOT
from tests.null_gpu.processes import counter, environment
from tests.null_gpu.serving_process import CACHE_BYTES

pytestmark = pytest.mark.null_gpu


@pytest.fixture(scope="module")
def server(model):
    """Start a server on the second device, and yield its address."""
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
    from rlef_mega.engines.sglang.engine import SGLangEngine

    policy = LlamaForCausalLM.from_pretrained(model).to("cuda:0")
    asked = ServersConfig(urls=[server], publish=way, publish_s=120.0)
    with SGLangEngine(asked, model, weights_folder=tmp_path / "weights", take_over=True) as engine:
        for version in (1, 2):
            for weight in policy.parameters():
                weight.data += version
            engine.update_weights(policy.state_dict().items(), version)
            engine.end_update(version)
            assert engine.weight_version == version


def test_a_server_on_the_same_device_frees_its_memory_while_the_trainer_works(
    server: str, model: Path, tmp_path: Path
):
    """The device's free memory, as the driver reports it to the trainer's process."""
    from rlef_mega.engines.sglang.engine import SGLangEngine

    policy = LlamaForCausalLM.from_pretrained(model).to("cuda:1")
    asked = ServersConfig(urls=[server], publish_s=120.0, release_memory=True)
    with SGLangEngine(asked, model, weights_folder=tmp_path / "weights", take_over=True) as engine:
        free = []
        for version in (1, 2):
            engine.update_weights(policy.state_dict().items(), version)
            engine.end_update(version)
            free.append(torch.cuda.mem_get_info(1)[0])
            engine.rest()
            free.append(torch.cuda.mem_get_info(1)[0])
    sampling, training, again, _ = free
    assert training - sampling > CACHE_BYTES and abs(again - sampling) < 2**26


def test_the_embedded_engine_samples_on_a_device_what_it_samples_on_a_cpu(model: Path):
    """With weights that were published from another model on the device."""
    from rlef_mega.engines import GenerationRequest
    from rlef_mega.engines.local import LocalEngine
    from rlef_mega.types import Sampling

    published = LlamaForCausalLM.from_pretrained(model)
    published.model.embed_tokens.weight.data += 0.1
    sampling = Sampling(max_new_tokens=12)
    requests = [GenerationRequest(tuple(range(5, 5 + n)), sampling, seed=n) for n in (3, 9, 20)]
    completions = []
    for device in ("cpu", "cuda:0"):
        engine = LocalEngine(model, device=device)
        engine.update_weights(published.to(device).state_dict().items(), 1)
        before = counter("host_waits")
        completions.append(engine.generate(requests))
        waits = counter("host_waits") - before
    for ours, expected in zip(completions[1], completions[0], strict=True):
        assert ours.token_ids == expected.token_ids and ours.weight_versions[-1] == 1
        assert ours.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert 0 < waits <= 8 * sampling.max_new_tokens
