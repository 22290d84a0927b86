"""CPU tensors never reach Triton, the package works where Triton is not installed, and its tests
where the trainer's packages are not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlef_kernels.dispatch import uses_kernels

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # any import of it fails
import torch
import rlef_kernels
from rlef_kernels import *

hidden, weight = torch.ones(5, 4, requires_grad=True), torch.ones(7, 4, requires_grad=True)
target, numbers = torch.arange(5), torch.ones(5)
linear_logprob(hidden, weight, target)[0].sum().backward()
linear_ppo_loss(hidden, weight, target, numbers, numbers, numbers, clip_eps=0.2)[0].backward()
with torch.no_grad():
    linear_score(hidden, weight, hidden, weight, target)
assert not any(name.startswith("rlef_kernels.gpu") for name in sys.modules)
"""


def test_everything_computes_on_a_cpu_without_triton():
    folder = Path(__file__).parents[2] / "kernels"
    command = [sys.executable, "-c", WITHOUT_TRITON]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_tensors_off_the_gpu_stay_with_pytorch():
    for device in ("cpu", "meta"):
        assert not uses_kernels(torch.empty(2, 2, dtype=torch.bfloat16, device=device))


WITHOUT_THE_TRAINER = """
import sys
sys.modules.update(dict.fromkeys(("megatron", "pydantic", "tomli_w", "typer", "zstandard")))
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_make_test_gpu_collects_only_the_kernels_tests():
    """An image with a GPU, PyTorch, Triton and pytest is enough."""
    pytest.importorskip("triton", reason="Triton is not installed")
    root = Path(__file__).parents[2]
    recipe = (root / "Makefile").read_text().partition("\ntest-gpu:")[2].partition("\n\n")[0]
    paths = re.findall(r"tests/\S+", recipe)
    assert paths and all(path.startswith("tests/kernels") for path in paths)
    command = [sys.executable, "-c", WITHOUT_THE_TRAINER, *paths, "tests/kernels/test_compiled.py"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0 and "tests collected" in run.stdout, run.stdout + run.stderr
