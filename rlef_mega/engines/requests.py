"""What every engine refuses before a request is under way."""

from collections.abc import Sequence

from rlef_mega.types import Sampling


def check_ids_and_sampling(token_ids: Sequence[int], words: int, sampling: Sampling) -> None:
    """ValueError for ids outside a vocabulary of so many words, and for a sampling that is none.
    The prompt is not empty.
    """
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= words:
        raise ValueError(
            f"the prompt has token ids from {low} to {high}, outside [0, {words}); "
            "it was made with another model's tokenizer"
        )
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {sampling.max_new_tokens}, must be at least 1")
    if not sampling.temperature >= 0:
        raise ValueError(f"temperature is {sampling.temperature}, must be 0 (greedy) or above")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}, must be in (0, 1]")


NO_WEIGHTS = -1


def listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
