"""Seconds and bytes of one call, on a GPU or a CPU."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlef_mega.bench.memory import AllocatedBytes

FEWEST, MOST = 3, 20  # samples


@dataclass(frozen=True)
class Measurement:
    seconds: tuple[float, ...]
    peak_bytes: int  # beyond what was there before the call


def measure_call(
    function: Callable[[], object], device: torch.device, sample_s: float
) -> Measurement:
    """After a warm-up, which compiles and says how long a call takes: samples for about `sample_s`
    seconds.
    """
    function()
    peak = peak_bytes(function, device)
    first = seconds(function, device)
    samples = min(MOST, max(FEWEST, round(sample_s / max(first, 1e-9))))
    return Measurement(tuple(seconds(function, device) for _ in range(samples)), peak)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def wall_seconds(function: Callable[[], object], device: torch.device) -> float:
    """By the clock, from an idle device to an idle device: for whole phases, whose work on the host
    and on other streams (copies, collectives) counts too.
    """
    wait(device)
    started = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    if device.type != "cuda":
        with AllocatedBytes() as memory:
            function()
        return memory.peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
