"""What every engine checks: requests before they are served, weights before they are loaded."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from rlef_mega.engines import GenerationRequest, WeightsMismatchError
from rlef_mega.run.model_folder import HEAD

NO_WEIGHTS = -1  # the weight version of an engine that cannot serve


def check_request(request: GenerationRequest, *, vocabulary: int, longest_prompt: int) -> None:
    """Raise ValueError for a prompt or sampling settings that the engine cannot serve."""
    sampling, length = request.sampling, len(request.token_ids)
    if length == 0:
        raise ValueError("the prompt is empty; give at least a begin-of-text token")
    if length > longest_prompt:
        raise ValueError(
            f"the prompt has {length} tokens, but the engine takes at most {longest_prompt}; lower "
            "rollout.max_context, or start servers with a longer context"
        )
    low, high = min(request.token_ids), max(request.token_ids)
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"the prompt has token ids from {low} to {high}, outside [0, {vocabulary}); "
            "it was made with another model's tokenizer"
        )
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {sampling.max_new_tokens}, must be at least 1")
    if not sampling.temperature >= 0:
        raise ValueError(f"temperature is {sampling.temperature}, must be 0 (greedy) or above")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}, must be in (0, 1]")


def checked_weights(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    shapes: Mapping[str, Sequence[int]],
    *,
    tied: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors, each once its name and shape are known to be the model's.

    `shapes` are the model's, by Hugging Face name. With `tied` embeddings the head may be absent.
    Raises WeightsMismatchError for a name that is unknown, repeated or missing, and for a shape
    that differs.
    """
    missing = set(shapes)
    for name, tensor in named_tensors:
        if name not in shapes:
            raise WeightsMismatchError(
                f"the engine's model has no weight {name}; the name map and config.json must be of "
                "the same model"
            )
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise WeightsMismatchError(
                f"{name} has shape {list(tensor.shape)} instead of {list(shapes[name])}; trainer "
                "and engine must have the same model"
            )
        if name not in missing:
            raise WeightsMismatchError(f"weights were sent twice under the name {name}")
        missing.remove(name)
        yield name, tensor
    if missing := missing - {HEAD} if tied else missing:
        raise WeightsMismatchError(
            f"weights are missing from the update: {listed(sorted(missing))}"
        )


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return the names as text; beyond the first `most`, only their number."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
