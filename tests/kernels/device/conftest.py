"""Tests of the kernels on a GPU or, in a process with TRITON_INTERPRET=1, in Triton's interpreter
on the CPU.

`make test-gpu` runs them on the GPU; `tests/kernels/test_interpreted.py`, part of `make test`, runs
them in the interpreter.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import interpreter  # noqa: F401  (fixes bf16)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if not INTERPRETED and here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def needs_a_device() -> None:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
