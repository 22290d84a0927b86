"""The rotation against transformers', outputs and gradients, over packed sequences."""

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rlef_mega.megatron.network.rotary import Rotation

POSITIONS_T = torch.cat([torch.arange(7), torch.arange(1), torch.arange(30)])


def theirs(x_THD: torch.Tensor, frequencies_E: torch.Tensor) -> torch.Tensor:
    angles_TD = (POSITIONS_T[:, None].float() * frequencies_E).repeat(1, 2)
    x_1HTD = x_THD.transpose(0, 1)[None]
    turned, _ = apply_rotary_pos_emb(x_1HTD, x_1HTD, angles_TD.cos()[None], angles_TD.sin()[None])
    return turned[0].transpose(0, 1)


def test_a_rotation_equals_transformers_forward_and_backward() -> None:
    generator = torch.Generator().manual_seed(0)
    x_THD = torch.randn(POSITIONS_T.numel(), 3, 8, generator=generator, dtype=torch.float32)
    gradient_THD = torch.randn(x_THD.shape, generator=generator)
    rotation = Rotation(POSITIONS_T)
    for frequencies_E in (torch.rand(4, generator=generator), torch.rand(4, generator=generator)):
        ours, truth = x_THD.clone().requires_grad_(), x_THD.clone().requires_grad_()
        turned, expected = rotation(ours, frequencies_E), theirs(truth, frequencies_E)
        torch.testing.assert_close(turned, expected)
        assert not torch.equal(turned, x_THD)
        turned.backward(gradient_THD)
        expected.backward(gradient_THD)
        torch.testing.assert_close(ours.grad, truth.grad)


def test_angles_are_fp32_whatever_the_heads_dtype() -> None:
    """In bfloat16, neighbouring positions beyond 256 would be equal."""
    positions_T = torch.arange(5000, 5004)
    x_THD = torch.ones(4, 1, 2, dtype=torch.bfloat16)
    turned = Rotation(positions_T)(x_THD, torch.ones(1))
    angles_T = positions_T.float()
    expected = torch.stack([angles_T.cos() - angles_T.sin(), angles_T.sin() + angles_T.cos()], 1)
    torch.testing.assert_close(turned[:, 0].float(), expected, rtol=0.02, atol=0.02)
