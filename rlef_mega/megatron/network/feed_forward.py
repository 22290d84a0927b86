"""The gated feed-forward block for machines without Megatron's fused activation, which is compiled
for GPUs. Its gradient is written once, without the copies that autograd makes of the two halves.

Shape suffixes: T tokens, F columns of this rank.
"""

import torch
from megatron.core.transformer.mlp import MLP


class GatedMLP(MLP):
    def forward(self, hidden_states: torch.Tensor, *args: object, **options: object):
        if self.config.bias_activation_fusion:
            return super().forward(hidden_states, *args, **options)
        gate_and_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(SwiGLU.apply(gate_and_up))


class SwiGLU(torch.autograd.Function):
    """Maps [..., 2F], gate and up, to [..., F]: silu(gate) * up."""

    @staticmethod
    def forward(ctx, gate_and_up):
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad_F):
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        gradient = torch.empty_like(gate_and_up)
        grad_gate, grad_up = gradient.chunk(2, dim=-1)
        torch.mul(torch.nn.functional.silu(gate), grad_F, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_F * up, gate, grad_input=grad_gate)
        return gradient
