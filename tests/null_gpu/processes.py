"""Starts processes on the null GPU, or without it."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping

from tests.null_gpu.conftest import ROOT

COUNTERS = (
    "launches", "allocations", "host_waits", "pageable_copies", "collectives", "collective_bytes",
    "copied_bytes", "skipped_copies", "pinned_bytes", "pinned_peak",
)  # fmt: skip


def counter(name: str) -> int:
    """Return what the runtime has counted in this process."""
    counters = ctypes.CDLL(None).null_gpu_counters
    counters.restype = ctypes.POINTER(ctypes.c_uint64)
    return counters()[COUNTERS.index(name)]


def environment(*, gpus: int | None = None, **settings: object) -> dict[str, str]:
    """Return this process's environment with other settings of the null GPU (without NULL_GPU_, in
    lower case). With gpus=0 it has no null GPU at all."""
    named = {f"NULL_GPU_{name.upper()}": str(value) for name, value in settings.items()}
    paths = [str(ROOT / part) for part in ("", "kernels", "sandbox")]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if gpus == 0:
        inherited = [path for path in inherited if "null_gpu" not in path]
    values = {
        **os.environ,
        **named,
        "PYTHONPATH": os.pathsep.join([*inherited, *paths]),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    if gpus == 0:
        return {name: value for name, value in values.items() if name != "LD_PRELOAD"}
    return values if gpus is None else {**values, "NULL_GPU_COUNT": str(gpus)}


def python(
    *words: object, env: Mapping[str, str] | None = None, code: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """Run Python with these words. Fails with its output if it does not end with `code`."""
    command = [sys.executable, *map(str, words)]
    result = subprocess.run(
        command,
        env=env or environment(),
        cwd=None if words[0] == "-c" else ROOT,
        capture_output=True,
        text=True,
        timeout=900,  # a busy machine
    )
    assert code is None or result.returncode == code, result.stdout + result.stderr
    return result
