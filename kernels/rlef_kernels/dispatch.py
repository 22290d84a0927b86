"""The choice between the Triton kernels and the PyTorch form of an operation."""

import importlib.util
from functools import partial

import torch
from torch.distributed import ProcessGroup

from rlef_kernels.logits import LogitsChunk, MakeChunk

HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNEL_DTYPES = (torch.bfloat16, torch.float32)


def uses_kernels(*tensors: torch.Tensor) -> bool:
    """Return whether the kernels accept these tensors: on an NVIDIA GPU, all bf16 or all fp32.

    The PyTorch form runs for the rest: CPUs, mixed types, fp64 (gradcheck), fp16 (whose range is
    too small for the gradient of a logit), other vendors' GPUs, installations without Triton.
    Raises ValueError if the tensors are not on the current device.
    """
    first = tensors[0]
    served = (
        HAS_TRITON
        and first.device.type == "cuda"
        and torch.version.cuda is not None
        and first.dtype in KERNEL_DTYPES
        and all(tensor.dtype == first.dtype for tensor in tensors)
    )
    if served and first.device.index != torch.cuda.current_device():
        raise ValueError(
            f"the tensors are on {first.device}, but Triton launches on the current device, "
            f"cuda:{torch.cuda.current_device()}; call torch.cuda.set_device first"
        )
    return served


def chunk_maker(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    *,
    temperature: float,
    group: ProcessGroup | None,
) -> MakeChunk:
    """Return the function that makes the chunks of logits, with kernels where they can run."""
    if not uses_kernels(hidden_TD, weight_VD):
        return partial(LogitsChunk, temperature=temperature, group=group)
    from rlef_kernels.gpu.head import KernelsChunk

    return partial(KernelsChunk, temperature=temperature, group=group)
