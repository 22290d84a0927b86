"""Batched generation with a Hugging Face causal LM over ragged prompts.

Prompts are padded on the left, so that all rows write their next token into the same column of the
cache. The prefill runs in groups of similar length, each padded to its own longest prompt only. The
decode loop calls `model.forward` on one column per step and drops finished rows from the batch
when enough have finished.

transformers' `generate` is not used: its mask construction, cache growth and logits processors take
longer than a small model's arithmetic.

Shape suffixes: B rows of the batch, G rows of a prefill group, P longest prompt, L columns of the
cache, V vocabulary, K maximum number of new tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlef_mega.engines import EngineError, GenerationRequest
from rlef_mega.engines.kv_cache import PreallocatedCache
from rlef_mega.engines.sampling import request_uniforms, sample
from rlef_mega.types import Completion

# tokens of a group; on a CPU, a small model's activations then stay in a core's cache
CPU_PREFILL_TOKENS = 2048
GPU_PREFILL_TOKENS = 16384
COMPACT_BELOW = 0.75  # share of unfinished rows; moving the cache costs about as much as a step


@dataclass
class BatchRow:
    """A request in the batch, and what was sampled for it."""

    request: GenerationRequest
    limit: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def stopped(self) -> bool:
        return bool(self.token_ids) and self.token_ids[-1] in self.request.sampling.stop_token_ids

    @property
    def unfinished(self) -> bool:
        return len(self.token_ids) < self.limit and not self.stopped


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel, requests: Sequence[GenerationRequest], *, weight_version: int
) -> list[Completion]:
    """Return a completion for each request, generated as one batch. The model must have full
    attention in every layer.

    Raises EngineError if the model's logits are not finite.
    """
    lengths_B = [len(request.token_ids) for request in requests]
    positions = model.config.max_position_embeddings
    rows = [
        BatchRow(request, limit=min(request.sampling.max_new_tokens, positions - length))
        for request, length in zip(requests, lengths_B, strict=True)
    ]
    capacity = max(lengths_B) + max(row.limit for row in rows)
    cache = PreallocatedCache(model.config.num_hidden_layers, len(rows), max(lengths_B), capacity)
    logits_BV = prefill(model, requests, cache)
    cache.begin_decoding()
    decode(model, rows, lengths_B, capacity, cache, logits_BV)
    return [
        Completion(
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs),
            weight_versions=(weight_version,) * len(row.token_ids),
            finish_reason="stop" if row.stopped else "length",
        )
        for row in rows
    ]


def prefill(
    model: PreTrainedModel, requests: Sequence[GenerationRequest], cache: PreallocatedCache
) -> torch.Tensor:
    """Fill the cache with the prompts, which the engine sorts by length, in groups that are padded
    to their longest one. Returns the logits after each prompt, [B, V]."""
    budget = CPU_PREFILL_TOKENS if model.device.type == "cpu" else GPU_PREFILL_TOKENS
    lengths_B = [len(request.token_ids) for request in requests]
    logits = []
    start = 0
    while start < len(requests):
        end = start + 1
        while end < len(lengths_B) and (end + 1 - start) * lengths_B[end] <= budget:
            end += 1
        cache.begin_prefill(slice(start, end))
        token_ids_GP, position_ids_GP, mask_GP = pad_left(requests[start:end])
        output = model(
            input_ids=token_ids_GP.to(model.device),
            position_ids=position_ids_GP.to(model.device),
            attention_mask=prefill_mask(mask_GP.to(model.device), model.dtype),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits.append(output.logits[:, -1])
        start = end
    return torch.cat(logits)


def pad_left(
    requests: Sequence[GenerationRequest],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (token_ids, position_ids, is_token), each [G, P]. Positions count from 0 at a prompt's
    start. The id of padding, 0, has no effect."""
    prompts = [torch.tensor(request.token_ids) for request in requests]
    token_ids_GP = pad_sequence(prompts, batch_first=True, padding_side="left")
    columns = token_ids_GP.shape[1]
    padding_G = columns - torch.tensor([len(prompt) for prompt in prompts])
    position_ids_GP = torch.arange(columns) - padding_G[:, None]
    return token_ids_GP, position_ids_GP.clamp(min=0), position_ids_GP >= 0


def prefill_mask(is_token_GP: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the additive mask, [G, 1, P, P], or None if plain causal attention suffices.

    Padding attends to itself: the softmax of a row of -inf is NaN.
    """
    if bool(is_token_GP.all()):
        return None
    columns = is_token_GP.shape[1]
    visible_PP = torch.ones(columns, columns, dtype=torch.bool, device=is_token_GP.device).tril()
    itself_PP = torch.eye(columns, dtype=torch.bool, device=is_token_GP.device)
    return additive(visible_PP & is_token_GP[:, None, None, :] | itself_PP, dtype)


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 where visible, -inf elsewhere. Attention would convert a bool mask in each layer."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, -torch.inf
    )


def decode(
    model: PreTrainedModel,
    rows: Sequence[BatchRow],
    lengths_B: Sequence[int],
    capacity: int,
    cache: PreallocatedCache,
    logits_BV: torch.Tensor,
) -> None:
    """Sample, append to the rows, and feed the tokens back, until all rows are finished."""
    device = model.device
    samplings = [row.request.sampling for row in rows]
    temperature_B = torch.tensor([sampling.temperature for sampling in samplings], device=device)
    top_p_B = torch.tensor([sampling.top_p for sampling in samplings], device=device)
    uniforms = [torch.from_numpy(request_uniforms(r.request.seed, r.limit)) for r in rows]
    uniforms_BK = pad_sequence(uniforms, batch_first=True).to(device)  # 0 beyond a row's own limit
    position_ids_B = torch.tensor(lengths_B, device=device)
    mask_BL = decode_mask(lengths_B, capacity, model.dtype, device)
    live = list(rows)
    for step in range(max(row.limit for row in rows)):
        tokens_B, logprobs_B = sample(logits_BV, uniforms_BK[:, step], temperature_B, top_p_B)
        append(live, tokens_B.tolist(), logprobs_B.tolist())
        unfinished = [index for index, row in enumerate(live) if row.unfinished]
        if not unfinished:
            return
        if len(unfinished) <= COMPACT_BELOW * len(live):
            kept = torch.tensor(unfinished, device=device)
            live = [live[index] for index in unfinished]
            cache.keep_rows(kept)
            uniforms_BK, temperature_B = uniforms_BK[kept], temperature_B[kept]
            top_p_B, tokens_B, position_ids_B = top_p_B[kept], tokens_B[kept], position_ids_B[kept]
            mask_BL = None if mask_BL is None else mask_BL[kept]
        columns = cache.get_seq_length() + 1
        output = model(
            input_ids=tokens_B[:, None],
            position_ids=position_ids_B[:, None],
            attention_mask=None if mask_BL is None else mask_BL[:, None, None, :columns],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV = output.logits[:, -1]
        position_ids_B = position_ids_B + 1


def append(live: Sequence[BatchRow], tokens: Sequence[int], logprobs: Sequence[float]) -> None:
    """Add a token to each unfinished row; finished rows in the batch are skipped.

    Raises EngineError for a log-prob that is NaN.
    """
    for row, token, logprob in zip(live, tokens, logprobs, strict=True):
        if not row.unfinished:
            continue
        if logprob != logprob:  # NaN
            raise EngineError(
                f"the model gave NaN or infinite logits after {len(row.request.token_ids)} + "
                f"{len(row.token_ids)} tokens: its weights are broken"
            )
        row.token_ids.append(token)
        row.logprobs.append(logprob)


def decode_mask(
    lengths_B: Sequence[int], capacity: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """Return the additive mask for all columns that the cache will have; None without padding."""
    if min(lengths_B) == max(lengths_B):
        return None
    padding_B = max(lengths_B) - torch.tensor(lengths_B, device=device)
    return additive(torch.arange(capacity, device=device) >= padding_B[:, None], dtype)
