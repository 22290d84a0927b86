"""Decide which optional packages for speed are used on this machine. Attention and model ask this
file; `rlef doctor`, a run's manifest and its first lines report what it says. megatron-core chooses
its Adam, and the output head its kernels (rlef_kernels/dispatch.py).

An optional package that cannot work here (no GPU; built for another PyTorch) is hidden before
megatron-core is imported. So megatron-core, transformers and this package all fall back at the
start, and the package cannot fail a run later.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from rlef_mega.config import ConfigError

NOT_INSTALLED = "not installed"
# a kernel of NVIDIA's apex, which adds weight gradients directly to the fp32 main gradients
WEIGHT_GRADIENTS = "fused_weight_gradient_mlp_cuda"
TRANSFORMER_ENGINE = "transformer_engine"  # megatron-core takes its Adam, and nothing else is used
BUILD_APEX = (
    "git clone https://github.com/NVIDIA/apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
    "pip install --no-build-isolation ./apex"
)
INSTALL = {
    "flash_attn": "pip install 'rlef-mega[gpu]'",
    "triton": "pip install 'rlef-mega[gpu]'",
    "apex": BUILD_APEX,
    WEIGHT_GRADIENTS: BUILD_APEX,
    TRANSFORMER_ENGINE: "pip install --no-build-isolation 'transformer_engine[pytorch]'",
}


def uses(package: str, device: torch.device) -> bool:
    """Return whether an optional package is used on this device."""
    return device.type == "cuda" and fault(package) is None


@functools.cache
def attention_kernel(
    device_type: str, dtype: torch.dtype
) -> Literal["flash-attn", "torch-varlen", "sdpa"]:
    """Name the kernel that our own packed attention calls."""
    if device_type != "cuda" or dtype == torch.float32:  # the varlen kernels are for half precision
        return "sdpa"
    if fault("flash_attn") is None:
        return "flash-attn"
    return "torch-varlen" if importlib.util.find_spec("torch.nn.attention.varlen") else "sdpa"


def optimizer() -> str:
    """Name the Adam that megatron-core imported: Transformer Engine's, apex's or PyTorch's."""
    from megatron.core.optimizer import Adam

    package = Adam.__module__.split(".")[0]
    known = {"transformer_engine": "Transformer Engine", "torch": "PyTorch"}
    return f"{known.get(package, package)} {Adam.__name__}"


@functools.cache
def fault(package: str) -> str | None:
    """Say why an optional package cannot be used; None if it can."""
    if importlib.util.find_spec(package) is None:
        return NOT_INSTALLED
    if not torch.cuda.is_available():
        return "installed, but there is no NVIDIA GPU"
    try:
        module = f"{package}.pytorch" if package == TRANSFORMER_ENGINE else package
        importlib.import_module(module)
    except Exception as error:  # a foreign binary may raise anything: ImportError, OSError, ...
        return f"installed, but cannot be imported: {type(error).__name__}: {error}"
    if package == "apex" and is_nvidias_apex() and not importlib.util.find_spec("amp_C"):
        return "installed, but built without its CUDA extensions"
    return None


def hide_unusable() -> None:
    """Hide packages that cannot work. Called before megatron-core is imported: it tries them and
    catches nothing but an ImportError."""
    for package in INSTALL:
        useless = fault(package) not in (None, NOT_INSTALLED)
        # Triton's interpreter runs the kernels' tests on CPUs
        if useless and (package != "triton" or torch.cuda.is_available()):
            sys.modules[package] = None  # type: ignore[assignment]  # makes its import an ImportError


def refuse_foreign_apex() -> None:
    """Raise ConfigError for PyPI's `apex`, an unrelated web toolkit, which megatron-core would
    import."""
    spec = importlib.util.find_spec("apex")
    if spec and not is_nvidias_apex():
        raise ConfigError(
            f"the package apex at {spec.origin} is not NVIDIA's; remove it (pip uninstall apex), "
            f"or build https://github.com/NVIDIA/apex"
        )


def is_nvidias_apex() -> bool:
    spec = importlib.util.find_spec("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return any((Path(folder) / "optimizers").is_dir() for folder in folders)


def varlen_options(function: Callable) -> dict[str, Any]:
    """Return the options that make `torch.nn.attention.varlen.varlen_attn` causal with grouped
    heads, by its signature: `is_causal` in PyTorch 2.10, which has no grouped heads; `window_size`
    from 2.11, which takes them as they are; `enable_gqa` from 2.12.
    """
    known = inspect.signature(function).parameters
    causal: dict[str, Any]
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


def report(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Report what each part uses and what each missing package costs, for `rlef doctor` and
    `manifest.json`. Costs are not numbers, because none was measured."""
    if device.type != "cuda":
        idle = {name: fault(name) or NOT_INSTALLED for name in INSTALL if name != "triton"}
        return {
            "attention": "PyTorch SDPA, one call per sequence",
            "optimizer": optimizer(),
            "head": "PyTorch",
            **{name: f"not used: {why}" for name, why in idle.items() if why != NOT_INSTALLED},
        }
    found = {
        "attention": attention_report(attention_kernel(device.type, dtype), dtype),
        "optimizer": optimizer(),
        "weight gradients": "fused into the main gradients",
        "head": "Triton kernels",
    }
    if found["optimizer"].startswith("PyTorch"):
        found["optimizer"] += ", fused"
    if not uses(WEIGHT_GRADIENTS, device):
        cost = "each weight gradient is written in bf16, then added to the fp32 main gradient"
        found["weight gradients"] = without(WEIGHT_GRADIENTS, "PyTorch", cost)
    if not uses("triton", device):
        found["head"] = without("triton", "PyTorch", "logits are stored, in chunks")
    return found


def without(package: str, used: str, cost: str) -> str:
    """Report a part that lacks a package."""
    lacking = f"{package} {fault(package) or 'not used'}"
    return f"{used}; {lacking}, so {cost} (remedy: {INSTALL[package]})"


def attention_report(kernel: str, dtype: torch.dtype) -> str:
    if kernel == "flash-attn":
        return "flash_attn_varlen_func"
    calls = "attention is one call per sequence"
    if dtype == torch.float32:
        lacking, remedy = "float32 has no varlen kernel", "model.dtype = 'bfloat16'"
        return f"PyTorch SDPA; {lacking}, so {calls} (remedy: {remedy})"
    if kernel == "sdpa":
        return without("flash_attn", "PyTorch SDPA", calls)
    from torch.nn.attention.varlen import varlen_attn

    cost = "PyTorch's kernel of the same family is used"
    if "is_causal" in varlen_options(varlen_attn):
        cost += ", which before PyTorch 2.11 copies keys and values for each query head"
    return without("flash_attn", "torch.nn.attention.varlen", cost)


def announce(device: torch.device, dtype: torch.dtype) -> None:
    """Print the first lines of a run, on one rank."""
    for part, used in report(device, dtype).items():
        print(f"{part:17} {used}", flush=True)
