"""What this machine offers beyond plain PyTorch, and what of it is used: the one decision, read by
model and attention and reported by `rlef doctor` and a run's manifest.
"""

import functools
import importlib.metadata
import importlib.util
import inspect
from pathlib import Path

import torch

from rlef_mega.config import ConfigError


def refuse_foreign_apex() -> None:
    """PyPI's `apex` is an unrelated web toolkit; megatron-core would import it in good faith."""
    spec = importlib.util.find_spec("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if spec and not any((Path(folder) / "optimizers").is_dir() for folder in folders):
        raise ConfigError(
            f"the package apex at {spec.origin} is not NVIDIA's; remove it (pip uninstall apex), "
            f"or build https://github.com/NVIDIA/apex"
        )


@functools.cache
def attention_kernel(device_type: str, dtype: torch.dtype) -> str:
    """Which packed attention runs: the one decision, read by the model and reported by
    `accelerations`.
    """
    if device_type != "cuda" or dtype == torch.float32:  # the varlen kernels are for half precision
        return "sdpa"
    if importlib.util.find_spec("flash_attn"):
        return "flash-attn"
    # grouped-query heads came to torch's kernel later than the kernel itself
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            return "torch-varlen"
    return "sdpa"


def fused_weight_gradients(device: torch.device) -> bool:
    """Weight gradients accumulated straight into fp32 main gradients, by a kernel that NVIDIA's
    apex brings.
    """
    return device.type == "cuda" and bool(
        importlib.util.find_spec("fused_weight_gradient_mlp_cuda")
    )


def accelerations(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What this machine offers and what is used of it, for logs and `rlef doctor`."""
    engine, apex = installed_version("transformer-engine"), installed_version("apex")
    optimizers = {bool(apex): "apex FusedAdam", bool(engine): "Transformer Engine FusedAdam"}
    return {
        "attention": {
            "flash-attn": "flash_attn_varlen_func",
            "torch-varlen": "torch.nn.attention.varlen",
            "sdpa": "torch scaled_dot_product_attention, sequences padded to the longest",
        }[attention_kernel(device.type, dtype)],
        "optimizer": optimizers.get(True, "torch AdamW"),
        "weight gradients": "fused" if fused_weight_gradients(device) else "torch",
        "transformer-engine": engine or "not installed",
        "apex": apex or "not installed",
    }


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
