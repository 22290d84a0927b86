"""Decide which optional packages for speed are used on this machine. Attention and model ask this
file; `rlef doctor`, a run's manifest and its first lines report what it says. The output head
chooses its kernels (rlef_kernels/dispatch.py), and the optimizer is always PyTorch's AdamW.

An optional package that cannot work here (no GPU; built for another PyTorch) is hidden before
megatron-core is imported. So megatron-core, transformers and this package all fall back at the
start, and the package cannot fail a run later. Transformer Engine and apex are hidden too:
megatron-core would take its Adam from them (or from PyPI's `apex`, an unrelated web toolkit).
"""

import functools
import importlib
import importlib.util
import sys

import torch

# kernels of attention, as reports name them
FLASH_ATTN, TORCH_VARLEN = "flash_attn_varlen_func", "torch varlen_attn"
SDPA = "PyTorch SDPA, one call per sequence"
NOT_INSTALLED = "not installed"
# a kernel of NVIDIA's apex, which adds weight gradients directly to the fp32 main gradients
WEIGHT_GRADIENTS = "fused_weight_gradient_mlp_cuda"
HIDDEN = ("apex", "transformer_engine")
BUILD_APEX = (
    "git clone https://github.com/NVIDIA/apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
    "pip install --no-build-isolation ./apex"
)
INSTALL = {
    "flash_attn": "pip install 'rlef-mega[gpu]'",
    "triton": "pip install 'rlef-mega[gpu]'",
    WEIGHT_GRADIENTS: BUILD_APEX,
}


def uses(package: str, device: torch.device) -> bool:
    """Return whether an optional package is used on this device."""
    return device.type == "cuda" and fault(package) is None


@functools.cache
def attention_kernel(device_type: str, dtype: torch.dtype) -> str:
    """Return which kernel computes attention over packed sequences."""
    if device_type != "cuda" or dtype == torch.float32:  # the varlen kernels are for half precision
        return SDPA
    if fault("flash_attn") is None:
        return FLASH_ATTN
    return TORCH_VARLEN if importlib.util.find_spec("torch.nn.attention.varlen") else SDPA


@functools.cache
def fault(package: str) -> str | None:
    """Say why an optional package cannot be used; None if it can."""
    if importlib.util.find_spec(package) is None:
        return NOT_INSTALLED
    if not torch.cuda.is_available():
        return "installed, but there is no NVIDIA GPU"
    try:
        importlib.import_module(package)
    except Exception as error:  # a foreign binary may raise anything: ImportError, OSError, ...
        return f"installed, but cannot be imported: {type(error).__name__}: {error}"
    return None


def hide_unusable() -> None:
    """Hide packages that cannot work. Called before megatron-core is imported: it tries them and
    catches nothing but an ImportError."""
    for package in HIDDEN:
        sys.modules[package] = None  # type: ignore[assignment]  # makes its import an ImportError
    for package in INSTALL:
        useless = fault(package) not in (None, NOT_INSTALLED)
        # Triton's interpreter runs the kernels' tests on CPUs
        if useless and (package != "triton" or torch.cuda.is_available()):
            sys.modules[package] = None  # type: ignore[assignment]


def report(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Report what each part uses, and why each optional package is not used, for `rlef doctor`, a
    run's first lines and `manifest.json`. docs/install.md says what each is for."""
    cuda = device.type == "cuda"
    fused = "fused into the main gradients"
    unused = {name: fault(name) for name in INSTALL if not uses(name, device)}
    return {
        "attention": attention_kernel(device.type, dtype),
        "optimizer": "PyTorch AdamW" + ", fused" * cuda,
        "weight gradients": fused if uses(WEIGHT_GRADIENTS, device) else "PyTorch",
        "head": "Triton kernels" if uses("triton", device) else "PyTorch",
        **{
            n: f"not used: {why}" + f"; {INSTALL[n]}" * cuda
            for n, why in unused.items()
            if why and (cuda or (n != "triton" and why != NOT_INSTALLED))
        },
    }


def announce(device: torch.device, dtype: torch.dtype) -> None:
    """Print the first lines of a run, on one rank."""
    for part, used in report(device, dtype).items():
        print(f"{part:17} {used}", flush=True)
