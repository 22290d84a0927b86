"""Run tests/kernels/device in Triton's interpreter, in a process of its own: Triton reads
TRITON_INTERPRET when it is first imported.

What this cannot catch: races (programs run one after another), and anything specific to hardware.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "device"


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(FOLDER)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 0 and "skipped" not in run.stdout, run.stdout[-1000:]


LOOP = """
import sys
sys.path.insert(0, sys.argv[1])
import interpreter
import torch, triton, triton.language as tl

@triton.jit
def sum_below(end, out):
    total = 0
    for number in range(0, tl.load(end)):
        total += number
    tl.store(out, total)

out = torch.zeros(1, dtype=torch.int32)
sum_below[(1,)](torch.tensor([5], dtype=torch.int32), out)
assert out.item() == 10
"""


def test_a_tensor_can_be_the_end_of_a_loop(tmp_path):
    """Triton 3.6.0 converts it in a way that NumPy deprecated, and refuses from 2.4 on."""
    pytest.importorskip("triton", reason="Triton is not installed")
    file = tmp_path / "loop.py"
    file.write_text(LOOP)
    command = [sys.executable, "-W", "error:Conversion of an array:DeprecationWarning", file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([*command, FOLDER.parent], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
