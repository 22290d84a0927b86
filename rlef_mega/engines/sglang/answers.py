"""The contents of requests to SGLang servers and of their answers, under SGLang's names, and the
error of a server that fails."""

import math
from typing import Any

from pydantic import BaseModel

from rlef_mega.engines import EngineError, GenerationRequest
from rlef_mega.types import Completion


class ServerError(EngineError):
    """A server failed a request; another server may succeed.

    `status` is the HTTP status if it was not 200.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServerInfo(BaseModel):
    """What a server reports of itself, under SGLang's names."""

    version: str
    model_path: str  # the folder it started from; /model_info has that of the last update
    dtype: str
    device: str
    tp_size: int
    max_req_input_len: int
    internal_states: list[dict[str, Any]]

    @property
    def longest_prompt(self) -> int:
        return self.max_req_input_len - 1  # a prompt must be shorter

    @property
    def context_length(self) -> int:
        """Return how many tokens a prompt and its response may have together."""
        # SGLang reports its context length minus 6, and keeps 2 tokens for itself (SPARE_TOKENS)
        return self.max_req_input_len + 4

    @property
    def weight_version(self) -> str:
        """Return the version known to the scheduler, which stamps tokens with it."""
        return str(self.internal_states[0]["weight_version"])


def sampling_parameters(request: GenerationRequest) -> dict[str, Any]:
    """Return the request's sampling parameters under SGLang's names. The seed has an effect only in
    deterministic servers."""
    sampling = request.sampling
    return {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(sampling.stop_token_ids),
        # otherwise the model's own end-of-text token would end the response too
        "ignore_eos": not sampling.stop_token_ids,
        "skip_special_tokens": False,
        "sampling_seed": request.seed,
    }


def completion_of(answer: Any, request: GenerationRequest) -> tuple[Completion, int]:
    """Return the completion in an answer of /generate, and how many tokens of its prompt came from
    the server's cache. Raises ValueError, KeyError or TypeError if the answer is incomplete."""
    meta = answer["meta_info"]
    entries = meta["output_token_logprobs"]
    token_ids = tuple(int(entry[1]) for entry in entries)
    logprobs = tuple(float(entry[0]) for entry in entries)
    if list(token_ids) != list(answer["output_ids"]):
        raise ValueError("the ids given with the log-probs are not those of the output")
    if not token_ids or len(token_ids) > request.sampling.max_new_tokens:
        raise ValueError(f"{len(token_ids)} tokens for at most {request.sampling.max_new_tokens}")
    if not all(math.isfinite(logprob) and logprob <= 1e-3 for logprob in logprobs):
        raise ValueError("a log-prob is NaN, infinite or positive")
    reason = meta["finish_reason"]["type"]
    if reason not in ("stop", "length"):
        raise ValueError(f"it ended by {reason!r}")
    # raises ValueError for the version "default": nothing was published to this server
    spans = [(int(s["start"]), int(s["end"]), int(s["version"])) for s in meta["weight_versions"]]
    versions = tuple(version for start, end, version in spans for _ in range(start, end))
    starts, ends, _ = zip(*spans, strict=True)
    if starts != (0, *ends[:-1]) or len(versions) != len(token_ids):
        raise ValueError(f"weight versions {spans} do not cover {len(token_ids)} tokens")
    return Completion(token_ids, logprobs, versions, reason), int(meta["cached_tokens"])
