"""Compile, without a GPU, exactly the kernels that the code would launch on one.

`compiled_for(arch)` gives Triton a fake NVIDIA GPU of that architecture, which accepts every launch
and does nothing. The code under test runs on "meta" tensors, of real sizes but without memory. Each
kernel that it launches is compiled to machine code, specialised as it would be on the device. The
NVIDIA tools in Triton's wheel then report what the machine code uses.
"""

import contextlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver

from rlef_mega.bench.measure import AllocatedBytes

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_MEMORY = 227 * 1024  # of a block, on sm_90 and sm_100


@dataclass(frozen=True)
class MachineCode:
    """A kernel's cubin, and the shared memory of a launch."""

    name: str
    cubin: Path
    shared_bytes: int

    @cached_property
    def usage(self) -> dict[str, int]:
        """REG, STACK and LOCAL as the assembler reports them."""
        command = [TOOLS / "cuobjdump", "-res-usage", self.cubin]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}

    @cached_property
    def assembly(self) -> str:
        command = [TOOLS / "nvdisasm", self.cubin]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def count(self, instruction: str) -> int:
        """Count an instruction, which may end with operands."""
        return len(re.findall(rf"\b{re.escape(instruction)}\b", self.assembly))


class NoSuchGpu:
    """A driver whose GPU does nothing at a launch."""

    class Utilities:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132}

        @staticmethod
        def load_binary(name: str, cubin: bytes, shared: int, device: int) -> tuple:
            return None, None, 0, 0, 1024

    utils = Utilities()

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are cached by device: so each architecture has its own

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: object, metadata: object):
        return lambda *arguments: None


@contextlib.contextmanager
def compiled_for(arch: int, folder: Path) -> Iterator[dict[str, MachineCode]]:
    """Yield a dictionary that collects the machine code of every launched kernel, by name."""
    found: dict[str, MachineCode] = {}
    launch = jit.JITFunction.run

    def run(self, *arguments, **options):
        kernel = launch(self, *arguments, **options)
        # of two specialisations of a kernel in one test, the later one gets a number
        name, number = kernel.name, 2
        while name in found and found[name].cubin.read_bytes() != kernel.asm["cubin"]:
            name, number = f"{kernel.name} {number}", number + 1
        path = folder / f"{name}.cubin"
        path.write_bytes(kernel.asm["cubin"])
        found[name] = MachineCode(name, path, kernel.metadata.shared)
        return kernel

    before = driver._active
    driver.set_active(NoSuchGpu(arch))  # type: ignore[arg-type]
    jit.JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield found
    finally:
        jit.JITFunction.run = launch  # type: ignore[method-assign]
        driver._active = before


class AllocatedOnMeta(AllocatedBytes):
    """Count the bytes of tensors on the device "meta", which have a size but no memory.

    "meta" cannot know how many entries are nonzero, so here all are. It has no products with fp32
    results, so here they do nothing.
    """

    def call(self, func, args, kwargs):
        if func in (torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out):
            return kwargs["out"]
        if func is torch.ops.aten.nonzero.default:
            return torch.empty(args[0].numel(), 1, dtype=torch.int64, device="meta")
        return super().call(func, args, kwargs)
