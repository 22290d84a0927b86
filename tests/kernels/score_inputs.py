"""Inputs of `linear_score`, and its results in float64, for its tests on every device."""

import torch


def make_inputs(tokens, width, ref_width, vocabulary, device="cpu", dtype=torch.float32, scale=1.0):
    """Return hidden states and heads, whose entries are of size `scale`, and targets."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, width), (vocabulary, width), (tokens, ref_width), (vocabulary, ref_width))
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    matrices = [scale * one if i % 2 else one for i, one in enumerate(matrices)]
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    target[-1:] = vocabulary - 1  # in the last tile, which is not whole
    return *(matrix.to(device, dtype) for matrix in matrices), target.to(device)


def truth(hidden, weight, ref_hidden, ref_weight, target, temperature=1.0):
    logprobs = torch.log_softmax(hidden.double() @ weight.double().t() / temperature, dim=-1)
    ref = torch.log_softmax(ref_hidden.double() @ ref_weight.double().t() / temperature, dim=-1)
    at = target[:, None]
    kl = torch.nn.functional.kl_div(ref, logprobs, reduction="none", log_target=True).sum(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, at)[:, 0], ref.gather(1, at)[:, 0], entropy, kl
