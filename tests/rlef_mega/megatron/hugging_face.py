"""Scores of a batch by transformers, the reference for ours; differentiable."""

from collections.abc import Callable
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from rlef_mega.types import Batch

TEMPERATURE = 0.9


def hf_logprobs(
    model: PreTrainedModel, batch: Batch, *, temperature: float = TEMPERATURE
) -> torch.Tensor:
    """Return the log-probs [A] of the action tokens."""
    ids_A = batch.token_ids_T[batch.action_positions_A]
    logprobs_AV = hf_distributions(model, batch, temperature=temperature)
    return logprobs_AV.gather(1, ids_A[:, None])[:, 0]


def hf_distributions(
    model: PreTrainedModel, batch: Batch, *, temperature: float = TEMPERATURE
) -> torch.Tensor:
    """Return the log-probs [A, V] of all tokens where the action tokens were sampled, computed one
    unpadded sequence at a time."""
    rows = [
        (model(batch.token_ids_T[start:end][None]).logits[0] / temperature).log_softmax(-1)
        for start, end in pairwise(batch.cu_seqlens.tolist())
    ]
    return torch.cat(rows)[batch.action_positions_A - 1]


def hf_values(
    model: PreTrainedModel, head: Callable[[torch.Tensor], torch.Tensor], batch: Batch
) -> torch.Tensor:
    """Return the values [N] at the positions where the batch reads them."""
    hidden = [
        model.model(batch.token_ids_T[start:end][None]).last_hidden_state[0]
        for start, end in pairwise(batch.cu_seqlens.tolist())
    ]
    return head(torch.cat(hidden)).squeeze(-1)[batch.value_positions_N]
