"""What a device could do: its published peak, and the roof that its own matrix products reach."""

import torch

from rlef_mega.bench.measure import seconds
from rlef_mega.flops import LlamaShape

# Dense bf16 tensor-core FLOP/s by a part of the name that CUDA gives the device, the more special
# name first. NVIDIA's data sheets print the sparse rate, which is twice the dense one:
# H100 (SXM 1,979, PCIe 1,513, NVL 1,671 TFLOPS), H200 (1,979), B200 (4,500), A100 (624).
PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
)
SAMPLES = 10


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of the data sheet; None for a device that is not in the table."""
    return next((peak for part, peak in PEAKS if part in name), None)


def matmul_roof(
    device: torch.device, dtype: torch.dtype, tokens: int, shape: LlamaShape
) -> tuple[float, ...]:
    """FLOP/s of the largest product of a layer (hidden to gate and up) by the vendor's library, a
    sample a call: what a train step made of nothing but such products would reach.
    """
    hidden_TD = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
    weight_FD = torch.randn(2 * shape.ffn, shape.hidden, device=device, dtype=dtype)
    products = 2 * hidden_TD.numel() * weight_FD.shape[0]

    def multiply() -> None:
        torch.nn.functional.linear(hidden_TD, weight_FD)

    for _ in range(3):
        multiply()
    return tuple(products / seconds(multiply, device) for _ in range(SAMPLES))
