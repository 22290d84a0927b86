"""Time and memory of one call on a GPU or a CPU, and the peak FLOP/s of devices."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

FEWEST, MOST = 3, 20  # samples
# Dense bf16 tensor-core FLOP/s by a part of CUDA's device name, the more specific name first.
# NVIDIA's data sheets print the sparse rate, which is twice the dense one: H100 (SXM 1,979, PCIe
# 1,513, NVL 1,671 TFLOPS), H200 (1,979), B200 (4,500); A100 (312, dense).
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
}


def peak_flops(name: str) -> float | None:
    """Return the data sheet's dense bf16 FLOP/s, or None for a device not in the table."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


@dataclass(frozen=True)
class Measurement:
    seconds: tuple[float, ...]
    peak_bytes: int  # beyond those allocated before the call


def measure_call(
    function: Callable[[], object], device: torch.device, sample_s: float
) -> Measurement:
    """Measure a call after a warm-up, which compiles; take samples for about `sample_s` seconds."""
    function()
    peak = peak_bytes(function, device)
    first = seconds(function, device)
    samples = min(MOST, max(FEWEST, round(sample_s / max(first, 1e-9))))
    return Measurement(tuple(seconds(function, device) for _ in range(samples)), peak)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call: on a GPU, those between two CUDA events."""
    if device.type != "cuda":
        return wall_seconds(function, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def wall_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds from an idle device to an idle device, for whole phases: their work on
    the host and on other streams (copies, collectives) counts too."""
    wait(device)
    started = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Return the peak of the bytes that a call allocates."""
    if device.type != "cuda":
        with AllocatedBytes() as memory:
            function()
        return memory.peak
    wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of tensors made under it, on any device; `peak` is the most alive at once.
    Memory that an operation allocates and frees within itself does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        # a weak reference keeps another storage from getting the same key
        self.from_before: dict[int, StorageWeakRef] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                key = tensor.untyped_storage()._cdata
                if key not in self.alive and key not in self.from_before:
                    self.from_before[key] = StorageWeakRef(tensor.untyped_storage())
        result = self.call(func, args, kwargs)
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def call(self, func, args, kwargs):
        return func(*args, **kwargs)

    def count(self, storage: torch.UntypedStorage) -> None:
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        if storage._cdata in self.from_before:
            return
        self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
