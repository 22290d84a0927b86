"""The embedded engine: a Hugging Face causal LM in the trainer's own process.

Theory of operation. A dialogue opens a session when it starts and closes it when it ends.
A session queues a request and waits. When as many requests wait as sessions are open, no dialogue
can continue without the model: the whole wave is generated, sorted by prompt length and session, in
batches of at most `max_batch`. So the batches depend on the dialogues alone, not on how long
grading took, and a run repeats bit for bit. Every event that may complete a wave looks for one: a
new request, and a session that closes because its dialogue ended, failed or was cancelled.

For repeatable runs, open all sessions of a batch of dialogues before the first of them has its
answer; tasks that are started together do.

The wave runs in the event loop's own thread. Every dialogue waits for it at that moment, so another
thread would overlap with nothing, and would need thread-local state (torch's thread count,
inference mode) and a lock for `update_weights`. Everything else in the loop stops meanwhile.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from rlef_mega.engines import Engine, EngineError, GenerationRequest, Session
from rlef_mega.engines.checks import NO_WEIGHTS, check_request, checked_weights, listed
from rlef_mega.engines.generation import generate_batch
from rlef_mega.run.model_folder import SafetensorsFolder
from rlef_mega.types import Completion


class LocalEngine(Engine):
    """Samples with a model from a Hugging Face folder, on any device that torch has.

    `end_update`, `rest` and `take_counts` do nothing: no other process uses this engine, only its
    weights need memory between batches, and nothing is counted.

    `dtype` is a torch dtype or its name (`bfloat16`). With `weights_from_folder=False` only
    config.json is read, and requests before the first `update_weights` fail with EngineError.
    """

    def __init__(
        self,
        model_folder: str | Path,
        *,
        dtype: torch.dtype | str = "float32",
        device: str | torch.device = "cpu",
        max_batch: int = 128,
        weights_from_folder: bool = True,
    ) -> None:
        self.model = load_model(Path(model_folder), dtype, device, weights_from_folder)
        self.max_batch = max_batch
        self.weight_version = 0 if weights_from_folder else NO_WEIGHTS
        self.sessions_opened = 0
        self.open_sessions: set[int] = set()
        self.waiting: dict[int, tuple[GenerationRequest, asyncio.Future[Completion]]] = {}

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        number = self.sessions_opened
        self.sessions_opened += 1
        self.open_sessions.add(number)
        try:
            yield partial(self.wait_for_wave, number)
        finally:
            self.open_sessions.remove(number)
            self.look_for_wave()

    async def wait_for_wave(self, session: int, request: GenerationRequest) -> Completion:
        """Generate in one wave with the requests of all open sessions."""
        config = self.model.config
        longest = config.max_position_embeddings - 1  # a new token needs a position
        check_request(request, vocabulary=config.vocab_size, longest_prompt=longest)
        assert session in self.open_sessions, "a request from a session that is closed"
        assert session not in self.waiting, "a session has one request at a time"
        future = asyncio.get_running_loop().create_future()
        self.waiting[session] = (request, future)
        self.look_for_wave()
        try:
            return await future
        finally:
            self.waiting.pop(session, None)

    def look_for_wave(self) -> None:
        """Schedule `run_complete_wave` for the event loop's next iteration. By then, dialogues
        that were started together have all opened their sessions."""
        asyncio.get_running_loop().call_soon(self.run_complete_wave)

    def run_complete_wave(self) -> None:
        """Generate for all waiting requests if every open session has one, and answer them."""
        # a cancelled request is still in `waiting` until its task runs
        wave = {session: entry for session, entry in self.waiting.items() if not entry[1].done()}
        if not wave or len(wave) < len(self.open_sessions):
            return
        order = sorted(wave, key=lambda session: (len(wave[session][0].token_ids), session))
        futures = [wave[session][1] for session in order]
        try:
            completions = self.generate([wave[session][0] for session in order])
        except Exception as error:
            # Raised in every dialogue, or it would be lost. A RuntimeError of torch is the engine's
            # fault. An out-of-memory error would recur, so it ends the run, with its remedy.
            # Anything else is a bug and stays as it is.
            reported = error
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                reported = EngineError(f"generation failed: {error}")
                reported.__cause__ = error
            for future in futures:
                future.set_exception(reported)
            return
        for future, completion in zip(futures, completions, strict=True):
            future.set_result(completion)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Return a completion for each request, in batches of at most `max_batch`, in order."""
        if self.weight_version == NO_WEIGHTS:
            raise EngineError("no weights: none were published, or the last update failed")
        completions = []
        for start in range(0, len(requests), self.max_batch):
            completions += generate_batch(
                self.model,
                requests[start : start + self.max_batch],
                weight_version=self.weight_version,
            )
        return completions

    @torch.no_grad()
    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> Sequence[str]:
        """Copy the weights into the model, and compare every parameter with what was sent.

        No copy of all weights is kept. If both names of tied weights are sent, they must be equal.
        Until an update succeeds, the engine serves nothing. Raises EngineError with the names of
        weights that differ, WeightsMismatchError for those that do not fit the model.
        """
        self.weight_version = NO_WEIGHTS
        served, filled, different = self.model.state_dict(), set[int](), list[str]()
        shapes = {name: tensor.shape for name, tensor in served.items()}
        tied = bool(self.model.config.tie_word_embeddings)
        for name, tensor in checked_weights(named_tensors, shapes, tied=tied):
            target = served[name]
            if target.data_ptr() not in filled:  # else it is the second name of tied weights
                filled.add(target.data_ptr())
                target.copy_(tensor)
            if not torch.equal(target, tensor.to(target)):
                different.append(name)
        if different:
            raise EngineError(
                f"after the update to version {version} these weights differ from what was sent "
                f"(NaN, or tied weights that were sent unequal): {listed(different)}"
            )
        self.weight_version = version
        return ()


def load_model(
    folder: Path, dtype: torch.dtype | str, device: str | torch.device, weights_from_folder: bool
) -> PreTrainedModel:
    """Load the model in evaluation mode, without gradients.

    Raises ValueError if the folder lacks a file or weights, which transformers would initialise at
    random, or if a layer has no full attention.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; give a folder in Hugging Face format")
    options: Any = {"dtype": dtype, "attn_implementation": "sdpa"}
    if weights_from_folder:
        SafetensorsFolder(folder)  # refuses what transformers would read in another way
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, **options
            )
            model, info = loaded  # a pair, because of output_loading_info
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder}: cannot read the weights: {error}") from error
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{folder}: weights are missing: {listed(missing)}")
    else:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_config(config, **options)
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        raise ValueError(
            f"{folder}: model type {model.config.model_type!r} has layers without full attention "
            "(sliding windows, recurrence), which the local engine does not serve"
        )
    return model.eval().requires_grad_(False).to(device=device)
