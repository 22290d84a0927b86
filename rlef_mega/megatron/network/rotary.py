"""Rotary embeddings of packed sequences. Angles are computed once per micro-batch; Megatron's own
code splits a packed tensor by sequence and computes cosines twice in every layer.

Shape suffixes: T packed tokens, H heads, D head dimension, E half of it.
"""

import torch


class Rotation:
    """The angles of these positions, for the frequencies of a model."""

    def __init__(self, positions_T: torch.Tensor) -> None:
        self.positions_T = positions_T
        self.computed_for: tuple[int, torch.dtype] | None = None  # frequencies, dtype
        self.cos_T1E = self.sin_T1E = torch.empty(0)

    def __call__(self, x_THD: torch.Tensor, frequencies_E: torch.Tensor) -> torch.Tensor:
        """Rotate each head by its token's angles: fp32 angles whose cosines and sines are rounded
        to the heads' dtype, as transformers does.
        """
        wanted = id(frequencies_E), x_THD.dtype
        if self.computed_for != wanted:
            angles_T1E = (self.positions_T[:, None] * frequencies_E).unsqueeze(1)
            self.cos_T1E = angles_T1E.cos().to(x_THD.dtype)
            self.sin_T1E = angles_T1E.sin().to(x_THD.dtype)
            self.computed_for = wanted
        return Rotate.apply(x_THD, self.cos_T1E, self.sin_T1E)


class Rotate(torch.autograd.Function):
    """Rotates the halves (first, second) of a head to (first cos - second sin, second cos + first
    sin)."""

    @staticmethod
    def forward(ctx, x_THD, cos_T1E, sin_T1E):
        ctx.save_for_backward(cos_T1E, sin_T1E)
        return rotate(x_THD, cos_T1E, sin_T1E)

    @staticmethod
    def backward(ctx, grad_THD):
        cos_T1E, sin_T1E = ctx.saved_tensors
        return rotate(grad_THD, cos_T1E, -sin_T1E), None, None


def rotate(x_THD: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor) -> torch.Tensor:
    first, second = x_THD.chunk(2, dim=-1)
    turned = torch.empty_like(x_THD)
    turned_first, turned_second = turned.chunk(2, dim=-1)
    torch.mul(first, cos_T1E, out=turned_first).addcmul_(second, sin_T1E, value=-1)
    torch.mul(second, cos_T1E, out=turned_second).addcmul_(first, sin_T1E)
    return turned
