"""What this machine offers beyond plain PyTorch, and what of it is used. The one place that
decides: attention, model and optimizer read it; `rlef doctor`, a run's manifest and its first lines
report it.

An optional package that cannot work here (no GPU; built for another PyTorch) is hidden before
megatron-core is imported, so that megatron-core, transformers and this package all fall back alike,
at start, and no run fails over it in the middle.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rlef_mega.config import ConfigError

Layers = Literal["auto", "local", "transformer_engine"]
NOT_INSTALLED = "not installed"
WEIGHT_GRADIENTS = "fused_weight_gradient_mlp_cuda"
INSTALL = {
    "flash_attn": "pip install 'rlef-mega[gpu]'",
    "triton": "pip install 'rlef-mega[gpu]'",
    "transformer_engine": "pip install 'rlef-mega[te]'",
    "apex": "docs/install.md says how to build it",
    WEIGHT_GRADIENTS: "docs/install.md says how to build apex",
}
PROBES = {"transformer_engine": "transformer_engine.pytorch"}  # else the package itself


@dataclass(frozen=True)
class Choice:
    """What one part of training uses; for lack of what, and what that costs."""

    part: str
    used: str
    lacking: str = ""  # a package and why it is not used
    cost: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        if not self.lacking:
            return self.used
        return f"{self.used}; {self.lacking}, so {self.cost} (remedy: {self.remedy})"


@dataclass(frozen=True)
class Accelerations:
    """The decision, for a device and a dtype."""

    attention: Literal["flash-attn", "torch-varlen", "sdpa", "transformer-engine"]
    layers: Literal["local", "transformer_engine"]
    fused_weight_gradients: bool
    triton_head: bool


@functools.cache
def choose(device_type: str, dtype: torch.dtype, layers: Layers = "auto") -> Accelerations:
    """Raises ConfigError when Transformer Engine is asked for and cannot be had."""
    half = device_type == "cuda" and dtype != torch.float32
    engine_fault = fault("transformer_engine") or (None if half else "its attention takes bfloat16")
    if layers == "transformer_engine" and engine_fault:
        raise ConfigError(
            f"model.layers = 'transformer_engine', but Transformer Engine: {engine_fault}; "
            f"{INSTALL['transformer_engine']}, or set model.layers = 'auto'"
        )
    engine = layers != "local" and not engine_fault
    return Accelerations(
        attention="transformer-engine" if engine else attention_kernel(device_type, dtype),
        layers="transformer_engine" if engine else "local",
        # straight into the fp32 main gradients, by a kernel that NVIDIA's apex brings
        fused_weight_gradients=device_type == "cuda" and fault(WEIGHT_GRADIENTS) is None,
        triton_head=device_type == "cuda" and fault("triton") is None,
    )


@functools.cache
def attention_kernel(
    device_type: str, dtype: torch.dtype
) -> Literal["flash-attn", "torch-varlen", "sdpa"]:
    """What our own packed attention calls."""
    if device_type != "cuda" or dtype == torch.float32:  # the varlen kernels are for half precision
        return "sdpa"
    if fault("flash_attn") is None:
        return "flash-attn"
    return "torch-varlen" if importlib.util.find_spec("torch.nn.attention.varlen") else "sdpa"


def optimizer() -> str:
    """The Adam that megatron-core imported: Transformer Engine's, else apex's, else PyTorch's."""
    from megatron.core.optimizer import Adam

    package = Adam.__module__.split(".")[0]
    known = {"transformer_engine": "Transformer Engine", "torch": "PyTorch"}
    return f"{known.get(package, package)} {Adam.__name__}"


@functools.cache
def fault(package: str) -> str | None:
    """Why an optional package cannot be used; None if it can."""
    if importlib.util.find_spec(package) is None:
        return NOT_INSTALLED
    if not torch.cuda.is_available():
        return "installed, but there is no NVIDIA GPU"
    try:
        importlib.import_module(PROBES.get(package, package))
    except Exception as error:  # whatever a foreign binary raises: ImportError, OSError, Runtime...
        return f"installed, but cannot be imported: {type(error).__name__}: {error}"
    if package == "apex" and is_nvidias_apex() and not importlib.util.find_spec("amp_C"):
        return "installed, but built without its CUDA extensions"
    return None


def hide_unusable() -> None:
    """Called before megatron-core is imported, which tries these and expects nothing worse than an
    ImportError."""
    for package in INSTALL:
        useless = fault(package) not in (None, NOT_INSTALLED)
        # Triton's interpreter runs the kernels' tests on CPUs
        if useless and (package != "triton" or torch.cuda.is_available()):
            sys.modules[package] = None  # type: ignore[assignment]  # the import system's own way


def refuse_foreign_apex() -> None:
    """PyPI's `apex` is an unrelated web toolkit; megatron-core would import it in good faith."""
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
    """How `torch.nn.attention.varlen.varlen_attn` is told causality and grouped heads, by its
    signature: `is_causal` in PyTorch 2.10, `window_size` from 2.11, `enable_gqa` from 2.12.
    """
    known = inspect.signature(function).parameters
    causal: dict[str, Any]
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


def choices(device: torch.device, dtype: torch.dtype, layers: Layers = "auto") -> list[Choice]:
    """The report: what is used, and what it costs not to have the rest. No cost is put in numbers
    here, for none was measured."""
    chosen = choose(device.type, dtype, layers)
    if device.type != "cuda":
        idle = [p for p in INSTALL if fault(p) not in (None, NOT_INSTALLED) and p != "triton"]
        return [
            Choice("attention", "PyTorch SDPA, a call a sequence"),
            Choice("layers", "megatron-core's local layers"),
            Choice("optimizer", optimizer()),
            Choice("head", "PyTorch"),
            *(Choice(package, f"not used: {fault(package)}") for package in idle),
        ]
    return [
        attention_choice(chosen, dtype),
        layers_choice(chosen, dtype, layers),
        optimizer_choice(),
        gradients_choice(chosen),
        head_choice(chosen),
    ]


def lack(package: str, cost: str) -> tuple[str, str, str]:
    return f"{package} {fault(package) or 'not used'}", cost, INSTALL[package]


PADDED = "sequences are padded into blocks"


def attention_choice(chosen: Accelerations, dtype: torch.dtype) -> Choice:
    if chosen.attention == "flash-attn":
        return Choice("attention", "flash_attn_varlen_func")
    if chosen.attention == "transformer-engine":
        return Choice("attention", "Transformer Engine DotProductAttention")
    if dtype == torch.float32:
        lacking, remedy = "float32 has no varlen kernel", "model.dtype = 'bfloat16'"
        return Choice("attention", "PyTorch SDPA", lacking, PADDED, remedy)
    if chosen.attention == "torch-varlen":
        from torch.nn.attention.varlen import varlen_attn

        cost = "PyTorch's kernel of the same family serves"
        if "enable_gqa" not in varlen_options(varlen_attn):
            cost += ", with keys and values copied for each query head before PyTorch 2.12"
        return Choice("attention", "torch.nn.attention.varlen", *lack("flash_attn", cost))
    return Choice("attention", "PyTorch SDPA", *lack("flash_attn", PADDED))


def layers_choice(chosen: Accelerations, dtype: torch.dtype, layers: Layers) -> Choice:
    if chosen.layers == "transformer_engine":
        return Choice("layers", "Transformer Engine")
    if layers == "local" or dtype == torch.float32:
        return Choice("layers", "megatron-core's local layers")
    cost = "norms and products are kernels of their own"
    return Choice("layers", "megatron-core's local layers", *lack("transformer_engine", cost))


def optimizer_choice() -> Choice:
    used = optimizer()
    if used.startswith("PyTorch"):
        cost = "a step is several passes over the optimizer's state"
        return Choice("optimizer", used, *lack("apex", cost))
    return Choice("optimizer", used)


def gradients_choice(chosen: Accelerations) -> Choice:
    if chosen.fused_weight_gradients:
        return Choice("weight gradients", "fused into the main gradients")
    cost = "each weight gradient is written in bf16, then added to the fp32 main gradient"
    return Choice("weight gradients", "PyTorch", *lack(WEIGHT_GRADIENTS, cost))


def head_choice(chosen: Accelerations) -> Choice:
    if chosen.triton_head:
        return Choice("head", "Triton kernels")
    return Choice("head", "PyTorch", *lack("triton", "logits are stored, a piece at a time"))


def report(device: torch.device, dtype: torch.dtype, layers: Layers = "auto") -> dict[str, str]:
    """`choices` for `rlef doctor` and `manifest.json`."""
    return {choice.part: str(choice) for choice in choices(device, dtype, layers)}


def announce(device: torch.device, dtype: torch.dtype, layers: Layers = "auto") -> None:
    """The first lines of a run; one rank prints them."""
    for part, used in report(device, dtype, layers).items():
        print(f"{part:17} {used}", flush=True)
