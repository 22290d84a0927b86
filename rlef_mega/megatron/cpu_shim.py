"""Makes megatron-core run without CUDA: its literal device "cuda" becomes "cpu".

megatron-core 0.16 writes `device="cuda"` and calls `torch.cuda` where no GPU is needed: in the
schedule's token counter, the gradient norm, the random-number tracker. On a machine without CUDA,
`install` replaces a few functions of `torch.cuda` and Megatron, and `device_mode` is a torch
function mode for tensors. The mode is active only during our calls into Megatron, because it costs
a microsecond or two per operation.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode


def install() -> None:
    """Replace the `torch.cuda` functions that Megatron calls even without a GPU (from 0.19 on,
    `current_stream` too), and its own two for CUDA's random state. Does nothing where CUDA is.
    """
    if torch.cuda.is_available():
        return
    from megatron.core.tensor_parallel import random as megatron_random

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_stream = torch.cpu.current_stream  # type: ignore[assignment]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


class CudaMeansCpu(TorchFunctionMode):
    """Makes tensors for "cuda" on the CPU, with the type names that Megatron expects."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


@contextlib.contextmanager
def device_mode() -> Iterator[None]:
    """Activate the mode where there is no CUDA."""
    with contextlib.nullcontext() if torch.cuda.is_available() else CudaMeansCpu():
        yield


calls_megatron = device_mode()  # a decorator: the mode is active while the function runs


def without_mode() -> contextlib.AbstractContextManager[object]:
    """Suspend the mode for a network's own operations: they name no device, and in small models
    they are many and small."""
    return (
        contextlib.nullcontext() if torch.cuda.is_available() else torch._C.DisableTorchFunction()
    )
