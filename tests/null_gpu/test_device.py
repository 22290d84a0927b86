"""The null GPU itself: what PyTorch sees, what is computed, what fails when it is told to."""

import ctypes
import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.null_gpu.processes import counter, environment, python

pytestmark = pytest.mark.null_gpu
MIB = 2**20


def test_pytorch_finds_the_devices():
    assert torch.cuda.is_available() and torch.cuda.device_count() == 2
    device = torch.cuda.get_device_properties(1)
    assert device.name == "NVIDIA H200" and (device.major, device.minor) == (9, 0)
    assert device.total_memory == 143771 * MIB
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(1, device="cuda:2")


@pytest.mark.parametrize(
    "device, name, capability", [("h100", "H100", "(9, 0)"), ("b200", "B200", "(10, 0)")]
)
def test_a_device_of_another_model(device, name, capability):
    script = "import torch as t; print(t.cuda.get_device_name(), t.cuda.get_device_capability())"
    printed = python("-c", script, env=environment(device=device)).stdout
    assert name in printed and capability in printed


def test_memory_is_as_large_as_the_devices_and_no_larger():
    whole = torch.empty(100 * 2**30, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_allocated() >= 100 * 2**30
    with pytest.raises(torch.OutOfMemoryError, match=r"total capacity of 140\.40 GiB"):
        torch.empty(50 * 2**30, dtype=torch.uint8, device="cuda")
    torch.empty(50 * 2**30, dtype=torch.uint8, device="cuda:1")
    del whole
    torch.cuda.empty_cache()


def attention(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_tensors_have_the_values_of_a_cpu(dtype):
    """Through views, products, attention, a reduction, a choice of rows and their gradients."""

    def compute(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        x = torch.randn(2, 4, 48, 16).to(device, dtype).requires_grad_()
        weight = torch.randn(16, 16).to(device, dtype).requires_grad_()
        y = attention(x @ weight, x.flip(2), x * 0.5)
        kept = y.flatten(0, 2)[y.flatten(0, 2).float().sum(1) > 0.1]
        loss = (kept.float() ** 2).mean() + torch.logsumexp(kept.float(), 0).sum()
        loss.backward()
        assert isinstance(x.grad, torch.Tensor) and isinstance(weight.grad, torch.Tensor)
        return [loss, x.grad, weight.grad]

    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for ours, expected in zip(compute("cuda"), compute("cpu"), strict=True):
        assert ours.device.type == "cuda"
        scale = expected.float().abs().max().item()
        torch.testing.assert_close(
            ours.cpu().float(), expected.float(), rtol=0, atol=tolerance * scale
        )


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_has_the_values_of_a_cpu(fused):
    def train(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(5, 7).to(device)) for _ in range(3)]
        optimizer = torch.optim.AdamW(weights, lr=0.1, fused=fused)
        for _ in range(3):
            sum((weight**2).sum() for weight in weights).backward()
            optimizer.step()
        return torch.stack(weights).detach().cpu()

    torch.testing.assert_close(train("cuda"), train("cpu"))


def test_random_numbers_follow_from_the_devices_generator():
    torch.manual_seed(3)
    first = torch.randn(4, device="cuda"), torch.randn(4, device="cuda"), torch.rand(1)
    torch.manual_seed(3)
    again = torch.randn(4, device="cuda"), torch.randn(4, device="cuda"), torch.rand(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


def test_a_number_is_raised_to_a_tensor_while_a_device_is_the_default():
    with torch.device("cuda"):
        assert (10000.0 ** torch.arange(3)).tolist() == [1, 1e4, 1e8]
        assert (1 - torch.arange(3)).tolist() == [1, 0, -1]


def test_what_was_not_computed_makes_no_infinity():
    """A division by a sum that was not computed would end a run."""
    script = """
import torch
x = torch.ones(2**21, device="cuda")
print((torch.ones(3, device="cuda") / (x + x)[:3]).tolist(), (x[:3] / 0).tolist())
"""
    printed = python("-c", script, env=environment(compute_mib=1)).stdout
    assert printed.startswith("[0.0, 0.0, 0.0]"), printed


def test_a_large_result_is_zero_whatever_memory_held_before():
    limit = 64 * MIB  # above any that a test sets
    held = torch.full((limit // 4,), 7.0, device="cuda:1")
    address = held.data_ptr()
    ctypes.memset(address, 7, 4096)
    del held
    large = torch.empty(limit // 2, device="cuda:1", dtype=torch.bfloat16)
    assert large.data_ptr() == address
    result = large.add(1)
    assert result[:100].sum() == 0 and result.norm() == 0


def test_a_large_copy_to_itself_keeps_what_is_there():
    """As a reduction over one rank makes; other copies of this size are not made."""
    large = torch.zeros(2**25, device="cuda")
    large[:3] = 7
    large.copy_(large.view(-1))
    assert large[:4].tolist() == [7, 7, 7, 0]
    assert not torch.empty_like(large).copy_(large)[:3].any()


def test_allocated_memory_is_zero_whatever_it_held_before():
    """A Triton kernel that is not computed leaves its results as they were allocated."""
    held = torch.full((1000,), torch.nan, device="cuda:1")
    address = held.data_ptr()
    del held
    fresh = torch.empty(1000, device="cuda:1")
    assert fresh.data_ptr() == address and not fresh.any()


def test_pinned_memory_is_counted():
    before = counter("pinned_bytes")
    host = torch.empty(5 * MIB, dtype=torch.uint8, pin_memory=True)
    assert host.is_pinned()
    assert counter("pinned_bytes") - before == 8 * MIB  # PyTorch rounds up to a power of two
    memory = torch.empty(5 * MIB + 1, dtype=torch.uint8)
    cudart = torch.cuda.cudart()
    assert int(cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0
    assert memory.is_pinned() and counter("pinned_bytes") - before == 13 * MIB + 1
    assert int(cudart.cudaHostUnregister(memory.data_ptr())) == 0


OPENER = """
import pickle, sys, torch
(x,) = pickle.loads(sys.stdin.buffer.read())
print(x.device, x.sum().item())
x += 1
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("expandable", ["False", "True"])
def test_another_process_maps_the_same_memory(expandable):
    """CUDA IPC: it sees what this process wrote, and this one what it writes."""
    script = f"""
import pickle, subprocess, sys, torch
from multiprocessing.reduction import ForkingPickler
import torch.multiprocessing
x = torch.arange(1000, device="cuda:1", dtype=torch.float32)
child = subprocess.run(
    [sys.executable, "-c", {OPENER!r}], input=bytes(ForkingPickler.dumps([x])), capture_output=True
)
print(child.stdout.decode(), child.stderr.decode()[-2000:], x.sum().item())
"""
    options = {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{expandable}"}
    printed = python("-c", script, env=environment() | options).stdout
    assert "cuda:1 499500.0" in printed and printed.split()[-1] == "500500.0", printed


def test_memory_of_a_process_that_is_gone_cannot_be_mapped():
    script = """
import sys, torch
from multiprocessing.reduction import ForkingPickler
import torch.multiprocessing
sys.stdout.buffer.write(bytes(ForkingPickler.dumps([torch.ones(3, device="cuda")])))
"""
    command = [sys.executable, "-c", script]
    handle = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, check=True).stdout
    with pytest.raises(RuntimeError, match="invalid resource handle"):
        pickle.loads(handle)


def test_allocations_fail_from_the_one_that_is_named():
    script = """
import torch
torch.zeros(2**21, device="cuda")
try:
    torch.zeros(2**26, device="cuda")
except torch.OutOfMemoryError as error:
    print(error)
"""
    printed = python("-c", script, env=environment(fail_allocation=2)).stdout
    assert "Tried to allocate 256.00 MiB" in printed


def test_a_failed_launch_ends_the_context():
    script = """
import torch
x = torch.zeros(3, device="cuda")
for work in (lambda: x + 1, lambda: torch.zeros(3, device="cuda"), torch.cuda.synchronize):
    try:
        work()
    except RuntimeError as error:
        print(type(error).__name__, str(error).splitlines()[0])
"""
    printed = python("-c", script, env=environment(fail_launch=2)).stdout
    assert printed.count("unspecified launch failure") == 3
