"""Engines sample responses, and training publishes weights to them."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import torch

from rlef_mega.types import Completion, Sampling

BUSY = "server_busy_s "  # prefix of a key of `take_counts`; a server's address follows


class EngineError(RuntimeError):
    """The engine failed, not the model: the dialogue is retried, then dropped and counted, never
    scored."""


class WeightsMismatchError(EngineError):
    """The weights do not belong to the engine's model. Sending them again would not help."""


class EngineLostError(RuntimeError):
    """No engine is left to sample from. Nothing is retried or dropped: the run saves and stops."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to continue it."""

    token_ids: tuple[int, ...]
    sampling: Sampling
    seed: int


# Samples the responses of one dialogue, one at a time: its turns go to the server that has its
# prefix cached, or the embedded engine waits for it before it generates a batch. Raises ValueError
# for a request that the engine can never serve, EngineError if it failed.
Session = Callable[[GenerationRequest], Awaitable[Completion]]


class Engine:
    """Samples exact token ids, from the weights which training published last. The base of the
    engines: the last three methods do nothing unless an engine needs them."""

    weight_version: int

    def session(self) -> AbstractAsyncContextManager[Session]:
        """Open a session, which a dialogue keeps until its last response."""
        raise NotImplementedError

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> Sequence[str]:
        """Load weights, named as in Hugging Face's model, and verify them. Returns the URLs of the
        servers that have them; empty for an engine within this process.

        Raises EngineError unless the engine then serves exactly what was sent;
        WeightsMismatchError if names or shapes are not the model's.
        """
        raise NotImplementedError

    def end_update(self, version: int | None, served: Sequence[str] = ()) -> None:
        """Note that `update_weights` has ended on every rank, and which servers (`served`) have the
        weights. From now on the engine samples from this version or a newer one. The version is
        None if a rank failed."""

    def rest(self) -> None:
        """Release memory for the trainer. No dialogue runs before the next `update_weights`."""

    def take_counts(self) -> dict[str, float]:
        """Return what was counted since the last call, for a step's metrics; may be empty."""
        return {}
