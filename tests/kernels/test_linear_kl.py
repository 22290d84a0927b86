"""`linear_kl` against float64 truth and torch's own KL."""

import pytest
import torch

from rlef_kernels import linear_kl, linear_kl_reference


def truth(hidden, weight, ref_hidden, ref_weight, temperature=1.0):
    logprobs = torch.log_softmax(hidden.double() @ weight.double().t() / temperature, dim=-1)
    ref = torch.log_softmax(ref_hidden.double() @ ref_weight.double().t() / temperature, dim=-1)
    return torch.nn.functional.kl_div(ref, logprobs, reduction="none", log_target=True).sum(-1)


def make_inputs(tokens, width, ref_width, vocabulary, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, width), (vocabulary, width), (tokens, ref_width), (vocabulary, ref_width))
    hidden, weight, ref_hidden, ref_weight = (
        torch.randn(shape, generator=generator).to(dtype) for shape in shapes
    )
    return hidden.requires_grad_(), weight.requires_grad_(), ref_hidden, ref_weight


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("tokens", "width", "ref_width", "vocabulary", "chunk"),
    [(1, 4, 4, 3, None), (0, 4, 4, 3, None), (33, 17, 9, 257, 8), (65, 8, 8, 1280, 64)],
)
def test_agrees_with_float64_truth(tokens, width, ref_width, vocabulary, chunk, temperature):
    inputs = make_inputs(tokens, width, ref_width, vocabulary)
    kl = linear_kl_reference(*inputs, temperature=temperature, chunk_tokens=chunk)
    expected = truth(*inputs, temperature)
    torch.testing.assert_close(kl.double(), expected, atol=2e-5, rtol=2e-6)
    ramp = torch.linspace(-1, 2, tokens)
    for grad, value in zip(
        torch.autograd.grad((kl * ramp).sum(), inputs[:2]),
        torch.autograd.grad((expected * ramp).sum(), inputs[:2]),
        strict=True,
    ):
        torch.testing.assert_close(grad, value, atol=1e-4, rtol=1e-4)


def test_gradcheck():
    hidden, weight, ref_hidden, ref_weight = make_inputs(5, 3, 4, 7, torch.float64)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_kl_reference(
            hidden, weight, ref_hidden, ref_weight, temperature=0.7, chunk_tokens=2
        ),
        (hidden, weight),
    )


def test_a_model_has_no_divergence_from_itself():
    hidden, weight, *_ = make_inputs(20, 16, 16, 300)
    kl = linear_kl(hidden, weight, hidden.detach(), weight.detach())
    assert kl.abs().max() < 1e-5
    (grad,) = torch.autograd.grad(kl.sum(), hidden)
    assert grad.abs().max() < 1e-4  # a minimum


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1.0], [-1.0]])
    weight = torch.tensor([[1e4], [-1e4], [0.0]])
    kl = linear_kl(hidden, weight, -hidden, weight)
    torch.testing.assert_close(kl, torch.full((2,), 2e4))


def test_bad_input_is_named():
    hidden, weight, ref_hidden, ref_weight = make_inputs(5, 4, 4, 7)
    with pytest.raises(ValueError, match="7 vocabulary entries, the reference 5 and 6"):
        linear_kl(hidden, weight, ref_hidden, ref_weight[:6])
    with pytest.raises(ValueError, match="detach ref_hidden_TE"):
        linear_kl(hidden, weight, ref_hidden.clone().requires_grad_(), ref_weight)
    with pytest.raises(ValueError, match="same width"):
        linear_kl(hidden, weight, ref_hidden[:, :3], ref_weight)
