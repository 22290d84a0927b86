"""The only package that imports megatron-core: process groups, networks, learner, checkpoints, and
weights under Hugging Face's names.

Packages that cannot work here are hidden before megatron-core tries them; `accelerations` reports
once what is missing. megatron-core's warnings, which repeat that on every rank, and torch's
deprecation warnings, which appear at every call, are silenced here.
"""

import functools
import warnings
from typing import Any

import torch

from rlef_mega.megatron.network.accelerations import hide_unusable

warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
warnings.filterwarnings(
    "ignore",
    category=FutureWarning,
    module=r"torch\.distributed|megatron\.core|rlef_mega\.megatron\.cpu_shim",
)
# megatron-core reads .grad of parameters that are views of its buffers
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
hide_unusable()


def compile_when_called(function: Any = None, **options: Any) -> Any:
    """Stand in for `torch.compile`, which, as a decorator of megatron-core's functions, would
    import the compiler at once: 700 modules, for functions that a run may never call."""
    if not str(getattr(function, "__module__", "")).startswith("megatron.core"):
        return compile_now(function, **options)
    compiled = functools.cache(lambda: compile_now(function, **options))
    return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))


compile_now, torch.compile = torch.compile, compile_when_called  # type: ignore[assignment]
