"""Batched generation with a Hugging Face causal LM over ragged prompts.

Prompts are padded on the left, so that all rows write their next token into the same column of the
cache. The prefill runs in groups of similar length, each padded to its own longest prompt only. The
decode loop calls `model.forward` on one column per step and drops finished rows from the batch
when enough have finished.

transformers' `generate` is not used: it keeps finished rows in the batch, and its logits processors
take longer than a small model's arithmetic.

Shape suffixes: B rows of the batch, G rows of a prefill group, P longest prompt, L columns of the
cache, V vocabulary, K maximum number of new tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from rlef_mega.engines import EngineError, GenerationRequest
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
    positions = model.config.max_position_embeddings
    rows = [
        BatchRow(r, min(r.sampling.max_new_tokens, positions - len(r.token_ids))) for r in requests
    ]
    cache, logits_BV = prefill(model, requests)
    decode(model, rows, cache, logits_BV)
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
    model: PreTrainedModel, requests: Sequence[GenerationRequest]
) -> tuple[DynamicCache, torch.Tensor]:
    """Read the prompts, which the engine sorts by length, in groups, each padded to its longest
    prompt. Returns a cache of all prompts and the logits after each of them, [B, V]."""
    budget = CPU_PREFILL_TOKENS if model.device.type == "cpu" else GPU_PREFILL_TOKENS
    lengths_B = [len(request.token_ids) for request in requests]
    caches, logits = [], []
    start = 0
    while start < len(requests):
        end = start + 1
        while end < len(lengths_B) and (end + 1 - start) * lengths_B[end] <= budget:
            end += 1
        token_ids_GP, position_ids_GP, mask_GP = pad_left(requests[start:end])
        caches.append(DynamicCache(config=model.config))
        output = model(
            input_ids=token_ids_GP.to(model.device),
            position_ids=position_ids_GP.to(model.device),
            attention_mask=mask_GP.to(model.device),
            past_key_values=caches[-1],
            use_cache=True,
            logits_to_keep=1,
        )
        logits.append(output.logits[:, -1])
        start = end
    return concatenated(caches), torch.cat(logits)


def concatenated(caches: Sequence[DynamicCache]) -> DynamicCache:
    """Move the rows of all caches into the first one, padded on the left to the longest."""
    for whole, *others in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):  # [G, heads, P, head size]
            parts = [getattr(layer, name) for layer in (whole, *others)]
            columns = max(part.shape[2] for part in parts)
            padded = [pad(part, (0, 0, columns - part.shape[2], 0)) for part in parts]
            setattr(whole, name, torch.cat(padded))
            for layer in others:  # or memory would hold all prompts twice
                setattr(layer, name, None)
    return caches[0]


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


def decode(
    model: PreTrainedModel, rows: Sequence[BatchRow], cache: DynamicCache, logits_BV: torch.Tensor
) -> None:
    """Sample, append to the rows, and feed the tokens back, until all rows are finished."""
    device = model.device
    samplings = [row.request.sampling for row in rows]
    temperature_B = torch.tensor([sampling.temperature for sampling in samplings], device=device)
    top_p_B = torch.tensor([sampling.top_p for sampling in samplings], device=device)
    uniforms = [torch.from_numpy(request_uniforms(r.request.seed, r.limit)) for r in rows]
    uniforms_BK = pad_sequence(uniforms, batch_first=True).to(device)  # 0 beyond a row's own limit
    lengths = [len(row.request.token_ids) for row in rows]
    position_ids_B = torch.tensor(lengths, device=device)
    mask_B11L = decode_mask(lengths, max(lengths) + uniforms_BK.shape[1], model)
    live = list(rows)
    for step in range(uniforms_BK.shape[1]):
        tokens_B, logprobs_B = sample(logits_BV, uniforms_BK[:, step], temperature_B, top_p_B)
        append(live, tokens_B.tolist(), logprobs_B.tolist())
        unfinished = [index for index, row in enumerate(live) if row.unfinished]
        if not unfinished:
            return
        if len(unfinished) <= COMPACT_BELOW * len(live):
            kept = torch.tensor(unfinished, device=device)
            live = [live[index] for index in unfinished]
            cache.batch_select_indices(kept)
            temperature_B, top_p_B = temperature_B[kept], top_p_B[kept]
            uniforms_BK = uniforms_BK[kept]
            mask_B11L = None if mask_B11L is None else mask_B11L[kept]
            tokens_B, position_ids_B = tokens_B[kept], position_ids_B[kept]
        columns = cache.get_seq_length() + 1
        output = model(
            input_ids=tokens_B[:, None],
            position_ids=position_ids_B[:, None],
            attention_mask=None if mask_B11L is None else mask_B11L[..., :columns],
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
    lengths: Sequence[int], columns: int, model: PreTrainedModel
) -> torch.Tensor | None:
    """Return the additive mask that hides the padding left of the prompts, [B, 1, 1, columns], for
    all columns that the cache will have; None without padding.

    Attention takes it as it is. If a mask had two dimensions, the host would wait in each step,
    because transformers looks into it.
    """
    if min(lengths) == max(lengths):
        return None
    padding_B = max(lengths) - torch.tensor(lengths, device=model.device)
    is_padding_BL = torch.arange(columns, device=model.device) < padding_B[:, None]
    mask_BL = torch.zeros_like(is_padding_BL, dtype=model.dtype)
    return mask_BL.masked_fill_(is_padding_BL, -torch.inf)[:, None, None, :]
