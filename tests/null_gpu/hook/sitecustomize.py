"""Has null_gpu_compute.py prepare PyTorch and Triton in processes on the null GPU."""

import importlib.abc
import importlib.machinery
import os
import sys
from types import ModuleType

PREPARED = ("torch", "triton.runtime.jit", "torch._inductor.runtime.triton_heuristics")


class Preparing(importlib.abc.MetaPathFinder):
    """Finds these modules as Python would, and prepares each when it has run."""

    def find_spec(self, name, path, target=None):
        if name not in PREPARED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                import null_gpu_compute

                null_gpu_compute.prepare(module)

            spec.loader.exec_module = exec_module
        return spec


if os.environ.get("NULL_GPU_COMPUTE_MIB") != "0":
    sys.meta_path.insert(0, Preparing())
