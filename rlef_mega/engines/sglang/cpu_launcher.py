"""Starts the real SGLang server on a machine without a GPU; run by the server's own Python.

SGLang has no wheels for a CPU build. Two things are missing beside its Python code, and both are
made up for before it is imported: torchvision's compiled operators (its wheel is linked against the
CUDA build of torch) and `sgl_kernel`, of which a float32 model on `torch_native` attention calls
nothing. A kernel that is called all the same raises. Nothing of this is used on a GPU.

Its processes import this file again (multiprocessing's spawn), so the stand-ins are made at import.
It imports nothing of this project, which is not installed there; run it with `python -P`, or this
folder's `sglang.py` would hide the package.
"""

import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
# torch.compile would build C++ for a few small functions, with a command that
# breaks where the path of the environment has a space
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


class StandIn(types.ModuleType):
    """A module whose every name can be imported, and none called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        full_name = f"{self.__name__}.{name}"

        def missing(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"{full_name} does not exist on a CPU")

        missing.__name__ = name
        return missing


def stand_in_for_kernels() -> None:
    module = StandIn("sgl_kernel")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
    module.__path__ = []
    module.__version__ = "0.0.0"  # type: ignore[attr-defined]
    sys.modules["sgl_kernel"] = module


def define_torchvision_operators() -> torch.library.Library:
    """Their schemas, which torchvision registers shape functions for as it is imported."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


TORCHVISION = define_torchvision_operators()  # its definitions end with it
stand_in_for_kernels()


def main() -> None:
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
