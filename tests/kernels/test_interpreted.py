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
