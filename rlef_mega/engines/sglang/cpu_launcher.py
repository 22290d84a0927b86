"""Start the real SGLang server on a machine without a GPU; run by the server's own Python.

SGLang has no wheels for a CPU build. Two compiled parts are missing, and are replaced before SGLang
is imported: torchvision's operators (its wheel is linked against CUDA) and `sgl_kernel`, which a
float32 model on `torch_native` attention never calls; a kernel that is called raises. Nothing of
this is used on a GPU.

SGLang's processes import this file again (multiprocessing's spawn), so the replacements are made at
import. It imports nothing of this project, which is not installed there. `python -P` runs it:
otherwise the modules of this folder could hide others.
"""

import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
# torch.compile would build C++ for a few small functions, with a command that breaks if the path of
# the environment has a space
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


class StandIn(types.ModuleType):
    """A module in which every name exists, and raises NotImplementedError when called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"{self.__name__}.{name} does not exist on a CPU")

        missing.__name__ = name
        return missing


kernels = StandIn("sgl_kernel")
kernels.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
kernels.__path__ = []
kernels.__version__ = "0.0.0"  # type: ignore[attr-defined]
sys.modules["sgl_kernel"] = kernels

# torchvision registers shape functions for these as it is imported
torchvision_operators = torch.library.Library("torchvision", "FRAGMENT")
for operator in ("nms", "qnms"):
    torchvision_operators.define(
        f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )


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
