"""Runs tests/kernels/device in Triton's interpreter, each file in a process of its own:
TRITON_INTERPRET is read when triton is first imported.

What this cannot catch: races (programs run one after another), and anything of the machine's.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "device"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("test_*.py")), ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(path):
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-4000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 0 and "skipped" not in run.stdout, run.stdout[-1000:]
