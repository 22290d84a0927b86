"""The bandwidth of a copy, and the KL of two heads beside its PyTorch form."""

from collections.abc import Callable, Iterator

import torch

import rlef_kernels
from rlef_mega.bench.figures import Figure
from rlef_mega.bench.measure import measure_call


def figures(device: torch.device, sample_s: float) -> list[Figure]:
    found = []
    for name, call, num_bytes in calls(device):
        measured = measure_call(call, device, sample_s)
        found.append(Figure(name, "ms", tuple(1e3 * s for s in measured.seconds)))
        if num_bytes:
            rates = tuple(num_bytes / s / 1e9 for s in measured.seconds)
            found.append(Figure(f"{name}, bandwidth", "GB/s", rates))
    return found


def calls(device: torch.device) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, call, bytes that it must move; 0 where bytes are not what counts)."""
    on_gpu = device.type == "cuda"
    # logits of the 8B head for 4,096 tokens: 1 GiB of bf16
    tokens, vocabulary = (4096, 128256) if on_gpu else (64, 512)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    logits = torch.randn(tokens, vocabulary, dtype=dtype, device=device)
    size = logits.numel() * logits.element_size()
    yield "copy", logits.clone, 2 * size
    del logits
    yield from kl_calls(device, dtype)


def kl_calls(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], object], int]]:
    tokens, width, vocabulary = (2048, 4096, 128256) if device.type == "cuda" else (64, 32, 512)
    shapes = [(tokens, width), (vocabulary, width)] * 2
    inputs = [torch.randn(shape, device=device, dtype=dtype) / width**0.25 for shape in shapes]
    for tensor in inputs[:2]:
        tensor.requires_grad_()

    for name in ("linear_kl", "linear_kl_reference"):
        compute = getattr(rlef_kernels, name)

        def train(compute: Callable[..., torch.Tensor] = compute) -> None:
            torch.autograd.grad(compute(*inputs).sum(), inputs[:2])

        yield f"{name} | forward and backward", train, 0
