import torch

from rlef_mega.bench.measure import AllocatedBytes
from rlef_mega.megatron.network.feed_forward import SwiGLU


def test_the_gated_activation_equals_autograds_and_keeps_its_input_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1, 14, generator=generator)
    gradient = torch.randn(5, 1, 7, generator=generator)
    ours, truth = x.clone().requires_grad_(), x.clone().requires_grad_()
    gate, up = truth.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    with AllocatedBytes() as memory:
        found = SwiGLU.apply(ours)
    assert memory.peak == found.nbytes, "the backward pass keeps nothing beside the input"
    assert torch.equal(found, expected)
    expected.backward(gradient)
    found.backward(gradient)
    torch.testing.assert_close(ours.grad, truth.grad)
