"""Engines sample responses. One protocol, so that the trainer does not know which of them it
drives."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import torch

from rlef_mega.types import Completion, Sampling

BUSY = "server_busy_s "  # of `take_counts`, before a server's address


class EngineError(RuntimeError):
    """The engine failed, not the model: the episode is retried, then dropped and counted, never
    scored."""


class WeightsMismatchError(EngineError):
    """What was sent are not the weights of the engine's model. Another try would bring the same."""


class EngineLostError(RuntimeError):
    """No engine is left that could serve. No dialogue can end, so none is retried or dropped: the
    run saves what it has learned, and stops."""


class Session(Protocol):
    """One dialogue's place in an engine: keeps its turns together (prefix reuse, lock-step
    batches)."""

    async def generate(
        self, token_ids: Sequence[int], sampling: Sampling, seed: int
    ) -> Completion: ...


class Engine(Protocol):
    """Samples exact token ids from the newest published weights."""

    weight_version: int

    def session(self) -> AbstractAsyncContextManager[Session]:
        """A dialogue opens one session and holds it until its last response."""
        ...

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Take over the weights, under their Hugging Face names. Raises EngineError unless what is
        served afterwards is exactly what was sent; WeightsMismatchError where names or shapes are
        not the model's."""
        ...

    def rest(self) -> None:
        """No dialogue is under way, and none begins before the next `update_weights`: memory that
        the trainer can use meanwhile may be given back."""
        ...

    def end_update(self, version: int | None) -> None:
        """Every rank's `update_weights` has ended: what is sampled from now on is of this version
        or a newer one. None: it failed somewhere, and is tried again or the run ends."""
        ...

    def take_counts(self) -> dict[str, float]:
        """What happened since this was last asked, for a step's metrics; may be empty."""
        ...
