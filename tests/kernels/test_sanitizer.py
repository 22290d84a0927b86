"""Every kernel on a small ragged case under NVIDIA's compute-sanitizer: no access out of bounds
(memcheck), no race in shared memory (racecheck), no read of uninitialised memory (initcheck).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASE = """
import torch
from rlef_kernels.gpu.linear_logprob import linear_logprob_kernels
from rlef_kernels.gpu.linear_ppo_loss import linear_ppo_loss_kernels
from rlef_kernels.gpu.linear_score import linear_score_kernels
from rlef_kernels.gpu.plan import CUBLAS, FUSED

def ones(*shape, dtype=torch.bfloat16):
    return torch.ones(shape, dtype=dtype, device="cuda")

hidden, weight = ones(70, 72).requires_grad_(), ones(1000, 72).requires_grad_()
target, numbers = torch.arange(70, device="cuda"), ones(70, dtype=torch.float32)
for plan in (FUSED, CUBLAS):
    if plan.fused and torch.cuda.get_device_capability() < (9, 0):
        continue
    logprob, entropy = linear_logprob_kernels(hidden, weight, target, plan=plan)
    (logprob + entropy).sum().backward()
    policy = (numbers, numbers, numbers)
    linear_ppo_loss_kernels(hidden, weight, target, policy, clip_eps=0.2, plan=plan)[0].backward()
    linear_score_kernels(hidden, weight, hidden, weight, target, plan=plan)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    # PyTorch's allocator returns parts of large blocks, which would hide an overrun
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sanitizer, "--tool", tool, "--error-exitcode", "86", sys.executable, "-c", CASE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
