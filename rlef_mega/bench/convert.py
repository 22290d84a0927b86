"""`rlef bench convert`: speed (compared with `cp` of the same bytes) and memory of converting
checkpoints to Hugging Face folders and back, with the layer shape of Llama 3.1 70B and few enough
layers for most disks.

Each step runs as the command that a user would give, reads from the disk (what was written before
is dropped from the page cache) and ends with its bytes on the disk; `cp` too. The memory is the
largest resident set of the command's process, Python and PyTorch included.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from rlef_mega.bench.random_model import write_model
from rlef_mega.bench.results import Figure, Results, describe_benchmark
from rlef_mega.config import ConfigError
from rlef_mega.flops import LLAMA_31_70B, LlamaShape
from rlef_mega.run.launch import RLEF

REPEATS = 2
SHAPE = LLAMA_31_70B.with_layers(2)


def benchmark(shape: LlamaShape = SHAPE, *, repeats: int = REPEATS) -> Results:
    seconds, peaks = defaultdict(list), defaultdict(list)
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="rlef-bench-", dir=".") as name:
        folder = Path(name)
        write_model(folder / "hf", shape, torch.bfloat16)
        flush(folder)
        size = sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
        if shutil.disk_usage(folder).free < 3 * size:
            raise ConfigError(f"not enough disk space here: {3 * size / 1e9:,.0f} GB are needed")
        for _ in range(repeats):
            for step, step_s, peak_bytes in steps(folder):
                seconds[step].append(step_s)
                peaks[step].append(peak_bytes)
    figures = [
        Figure(step, "MB/s", tuple(size / 1e6 / s for s in each)) for step, each in seconds.items()
    ]
    copies = seconds.pop("cp")
    for step, each in seconds.items():
        ratios = tuple(copy / s for copy, s in zip(copies, each, strict=True))
        figures.append(Figure(f"{step}, against cp", "ratio", ratios))
    for step in ("import", "export"):
        resident = tuple(peak / 1e9 for peak in peaks[step])
        figures.append(Figure(f"{step}: largest resident set", "GB", resident))
    about = describe_benchmark(
        model=f"{shape.layers} layers of Llama 3.1 70B's shape, with its embedding and head, "
        f"bf16, {size / 1e9:.2f} GB",
        shape=vars(shape),
        bytes=size,
        load_average_before=[round(number, 1) for number in load],
    )
    notes = (
        "every step reads from the disk and ends with its bytes on the disk; each round trip was "
        "compared byte by byte",
    )
    return Results("rlef bench convert", about, tuple(figures), notes)


def steps(folder: Path) -> Iterator[tuple[str, float, int]]:
    """Copy, import and export. Yields each step's name, seconds and bytes of memory."""
    source, checkpoint, back = (folder / name for name in ("hf", "checkpoint", "back"))
    yield "cp", *run(["cp", "-r", str(source), str(back)], source, back)
    shutil.rmtree(back)
    yield "import", *run([*RLEF, "import-hf", str(source), str(checkpoint)], source, checkpoint)
    yield "export", *run([*RLEF, "export-hf", str(checkpoint), str(back)], checkpoint, back)
    for path in source.glob("*.safetensors"):
        subprocess.run(["cmp", str(path), str(back / path.name)], check=True)
    shutil.rmtree(checkpoint)
    shutil.rmtree(back)


def run(command: list[str], source: Path, written: Path) -> tuple[float, int]:
    """Run the command. Returns the seconds until its bytes are on the disk, a start of Python
    included, and its memory."""
    for path in files(source):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_peak(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")
    flush(written)
    return time.perf_counter() - started, peak


def resident_peak(process: int) -> int:
    """Return the kernel's high-water mark in bytes; getrusage's would include the memory that the
    parent had when it started the process."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    match = re.search(r"VmHWM:\s+(\d+) kB", status)  # missing once the process has ended
    return int(match[1]) * 1024 if match else 0


def flush(folder: Path) -> None:
    for path in files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
