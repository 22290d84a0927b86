"""Conversion between checkpoints and Hugging Face folders, at the layer shape of Llama 3.1 70B with
as many layers as a disk holds lightly: how fast, beside `cp` of the same bytes, and in how much
memory.

Each step runs as the command a user would give, reads from the disk (what was written before is
dropped from the page cache) and ends with its bytes on the disk, `cp` too. Steps of a repeat follow
each other, so that they share the minute. The memory is the largest resident set of the command's
process, Python and PyTorch included.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from rlef_mega.bench.figures import Figure, Report, describe_benchmark
from rlef_mega.config import ConfigError
from rlef_mega.megatron.convert.safetensors_files import (
    Shard,
    StoredTensor,
    plan_shards,
    write_index,
    write_tensors,
)
from rlef_mega.megatron.hf_names import name_map

LAYERS = 2
REPEATS = 2
SHAPE: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
RANDOM_NUMBERS = 2**24 + 1  # repeated over the tensors; odd, so that no two rows are alike


@dataclass(frozen=True)
class Step:
    """What one command took."""

    seconds: float
    peak_bytes: int


def benchmark(
    shape: dict[str, Any] | None = None,
    *,
    repeats: int = REPEATS,
    process_counts: Sequence[int] = (1, 2),
) -> Report:
    config = LlamaConfig(**(shape or SHAPE | {"num_hidden_layers": LAYERS}))
    samples: dict[str, list[Step]] = {}
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="rlef-bench-", dir=".") as name:
        folder = Path(name)
        size = generate(folder / "hf", config)
        if shutil.disk_usage(folder).free < 3 * size:
            raise ConfigError(f"the disk has no room for three times {size / 1e9:,.0f} GB here")
        for _ in range(repeats):
            for step, measured in steps(folder, process_counts):
                samples.setdefault(step, []).append(measured)
    return report(samples, size, config, load)


def generate(folder: Path, config: LlamaConfig) -> int:
    """A Hugging Face folder of bf16 numbers, written a tensor at a time; bytes of the weights."""
    folder.mkdir()
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    tensors = [StoredTensor(t.name, t.shape, torch.bfloat16) for t in name_map(config)]
    shards = plan_shards(tensors, "5GB")
    write_tensors(folder, shards, numbers(shards))
    write_index(folder, shards)
    flush(folder)
    return sum(shard.bytes for shard in shards)


def numbers(shards: list[Shard]) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(RANDOM_NUMBERS, generator=generator).bfloat16()
    for shard in shards:
        for index, tensor in enumerate(shard.tensors):
            count = torch.Size(tensor.shape).numel()
            filled = drawn.roll(index).repeat(-(-count // RANDOM_NUMBERS))[:count]
            yield tensor.name, filled.view(tensor.shape)


def steps(folder: Path, process_counts: Sequence[int]) -> Iterator[tuple[str, Step]]:
    """Copy, import, export: alone, then by two processes. Each result is removed when the next
    step has read it."""
    source, checkpoint, back = (folder / name for name in ("hf", "checkpoint", "back"))
    yield "cp", run(["cp", "-r", str(source), str(back)], source, back)
    shutil.rmtree(back)
    for count in process_counts:
        title = "one process" if count == 1 else f"{count} processes"
        options = ["--processes", str(count)]
        arguments = ["import-hf", str(source), str(checkpoint), *options]
        yield f"import, {title}", run(rlef(arguments), source, checkpoint)
        arguments = ["export-hf", str(checkpoint), str(back), *options]
        yield f"export, {title}", run(rlef(arguments), checkpoint, back)
        compare(source, back)
        shutil.rmtree(checkpoint)
        shutil.rmtree(back)


def rlef(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "rlef_mega.cli", *arguments]


def run(command: list[str], source: Path, written: Path) -> Step:
    """Seconds until the bytes are on the disk. A conversion says itself how long it took, without
    the start of Python, which a model of full size does not notice."""
    drop_from_cache(source)
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said)
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident_peak(process.pid))
            time.sleep(0.05)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")
        flush(written)
        seconds = time.perf_counter() - started
        said.seek(0)
        if match := re.search(r"in ([\d.,]+) s", said.read()):
            seconds = float(match[1].replace(",", ""))
    return Step(seconds, peak)


def resident_peak(process: int) -> int:
    """The kernel's own high-water mark; what a parent had before it started the process is not in
    it, as it would be in getrusage's."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"VmHWM:\s+(\d+) kB", status)  # none once it has ended
    return int(match[1]) * 1024 if match else 0


def flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(source: Path, back: Path) -> None:
    """The round trip must be the same bytes, or nothing here means anything."""
    for path in source.glob("*.safetensors"):
        subprocess.run(["cmp", str(path), str(back / path.name)], check=True)


def report(
    samples: dict[str, list[Step]], size: int, config: LlamaConfig, load: tuple[float, ...]
) -> Report:
    figures = []
    for name, measured in samples.items():
        rates = tuple(size / 1e6 / step.seconds for step in measured)
        figures.append(Figure(name, "MB/s", rates))
    copies = [step.seconds for step in samples["cp"]]
    for name, measured in samples.items():
        if name != "cp":
            pairs = zip(copies, measured, strict=True)
            ratios = tuple(copy / step.seconds for copy, step in pairs)
            figures.append(Figure(f"{name}, against cp", "ratio", ratios))
    for name, measured in samples.items():
        if name.endswith("one process"):
            peaks = tuple(step.peak_bytes / 1e9 for step in measured)
            figures.append(Figure(f"{name}: largest resident set", "GB", peaks))
    shape = json.loads(config.to_json_string())
    return Report(
        "Converting between checkpoints and Hugging Face folders",
        describe_benchmark(
            model=f"{config.num_hidden_layers} layers of Llama 3.1 70B's shape, with its embedding "
            f"and head, bf16, {size / 1e9:.2f} GB",
            shape={key: shape[key] for key in (*SHAPE, "num_hidden_layers")},
            bytes=size,
            repeats=len(copies),
            load_average_before=[round(number, 1) for number in load],
        ),
        tuple(figures),
        notes=(
            "every step reads from the disk and ends with its bytes on the disk; each round trip "
            "was compared byte by byte",
        ),
    )
