"""Sample tokens from logits: the inverse CDF at uniform numbers that belong to the request.

A request's k-th token depends on its seed, k and its logits alone, so other requests in the batch
cannot change it (beyond the rounding of the logits). Philox is counter-based: neighbouring seeds
are as independent as any others.

Shape suffixes: B rows of a batch, V vocabulary.
"""

import numpy as np
import torch


def request_uniforms(seed: int, count: int) -> np.ndarray:
    """Return u_0 .. u_(count - 1) in [0, 1), a prefix of those for a larger count."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def sample(
    logits_BV: torch.Tensor,
    uniforms_B: torch.Tensor,
    temperature_B: torch.Tensor,
    top_p_B: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens_B, logprobs_B): the first id whose cumulative probability exceeds u.

    The log-prob is of the whole softmax at the temperature, also where top-p narrows the choice.
    Temperature 0 takes the likeliest token and reports its log-prob at temperature 1.
    """
    greedy_B = temperature_B == 0
    any_greedy = bool(greedy_B.any())
    logits_BV = logits_BV.float()
    if bool((temperature_B != 1).any()):
        logits_BV = logits_BV / torch.where(greedy_B, 1, temperature_B)[:, None]
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    # fp64: over 100,000 tokens, the rounding of an fp32 sum would be a noticeable probability
    weights_BV = logprobs_BV.double().exp_()
    if bool((top_p_B < 1).any()):
        weights_BV = nucleus(weights_BV, top_p_B)
    cumulative_BV = weights_BV.cumsum(-1)
    total_B = cumulative_BV[:, -1]
    # u is at most 1 - 2^-53, so in fp64 this rounds to less than the total: some token exceeds it,
    # and the first one that does has a probability above 0
    threshold_B = uniforms_B * total_B
    tokens_B = torch.searchsorted(cumulative_BV, threshold_B[:, None], right=True)[:, 0]
    if any_greedy:
        tokens_B = torch.where(greedy_B, logits_BV.argmax(-1), tokens_B)
    # NaN logits would run past the end; the NaN log-prob then tells the caller
    tokens_B = tokens_B.clamp(max=logits_BV.shape[-1] - 1)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]


def nucleus(weights_BV: torch.Tensor, top_p_B: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches top-p; zero the rest."""
    sorted_BV, order_BV = weights_BV.sort(dim=-1, descending=True, stable=True)
    # a token stays while those before it have not reached top-p: the likeliest always stays
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    sorted_BV = sorted_BV.masked_fill(before_BV >= top_p_B[:, None], 0)
    return torch.empty_like(weights_BV).scatter_(1, order_BV, sorted_BV)
