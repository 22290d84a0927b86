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
    """Return the log-probs [A] of the action tokens, computed one unpadded sequence at a time."""
    rows = []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        ids = batch.token_ids_T[start:end]
        logits = model(ids[None]).logits[0, :-1] / temperature
        logprobs = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        rows.append(torch.nn.functional.pad(logprobs, (1, 0)))
    return torch.cat(rows)[batch.action_positions_A]


def hf_values(
    model: PreTrainedModel, head: Callable[[torch.Tensor], torch.Tensor], batch: Batch
) -> torch.Tensor:
    """Return the values [N] at the positions where the batch reads them."""
    hidden = [
        model.model(batch.token_ids_T[start:end][None]).last_hidden_state[0]
        for start, end in pairwise(batch.cu_seqlens.tolist())
    ]
    return head(torch.cat(hidden)).squeeze(-1)[batch.value_positions_N]
