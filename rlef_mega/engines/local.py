"""The embedded engine: a Hugging Face causal LM in the trainer's own process.

Theory of operation. A dialogue opens a session when it starts and closes it when it ends.
`generate` puts a request in the waiting room and waits. When as many requests wait as sessions are
open, no dialogue can go on without the model; then the whole wave is generated, sorted by prompt
length and session, in batches of at most `max_batch`, and every request gets its answer. So what is
batched with what depends on the dialogues alone, not on how long grading took, and a run is
repeatable bit for bit. Whoever may complete the wave looks whether it is complete: a request that
arrives, and a session that closes, whether its dialogue ended, failed or was cancelled; so none
waits for a dialogue that is gone.

For repeatable runs, open all sessions of a batch of dialogues before the first of them has its
answer: tasks that are started together do.

The wave runs in the event loop's own thread. At that moment every dialogue waits for it, so another
thread would overlap with nothing, and would bring thread-local state (torch's thread count,
inference mode) and a race with `update_weights`. What else runs in the loop stands still for as
long as a wave takes.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from rlef_mega.engines import EngineError, WeightsMismatchError
from rlef_mega.engines.generation import Request, generate_batch
from rlef_mega.engines.requests import NO_WEIGHTS, check_ids_and_sampling, listed
from rlef_mega.types import Completion, Sampling


class LocalSession:
    """One dialogue's place in the engine. One request at a time."""

    def __init__(self, engine: "LocalEngine", number: int) -> None:
        self.engine, self.number = engine, number

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, seed: int) -> Completion:
        """Continues the prompt; returns when all open sessions have asked, and the wave is done.

        Raises ValueError for a request that this model cannot serve, EngineError if the engine
        failed.
        """
        request = Request(tuple(token_ids), sampling, seed)
        check_request(self.engine.model, request)
        return await self.engine.wait_for_wave(self.number, request)


class LocalEngine:
    """Samples with a model from a Hugging Face folder, on any device torch has.

    `dtype` is torch's or its name (`float32`, `bfloat16`). `weights_from_folder=False` reads
    config.json only; then the first `update_weights` brings the weights, and requests before it
    fail with EngineError.
    """

    def __init__(
        self,
        model_folder: str | Path,
        *,
        dtype: torch.dtype | str = "float32",
        device: str | torch.device = "cpu",
        max_batch: int = 128,
        pad_token_id: int = 0,
        weights_from_folder: bool = True,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}, must be at least 1")
        self.model = load_model(
            Path(model_folder), dtype, torch.device(device), weights_from_folder
        )
        self.max_batch, self.pad_token_id = max_batch, pad_token_id
        self.weight_version = 0 if weights_from_folder else NO_WEIGHTS
        self.sessions_opened = 0
        self.open_sessions: set[int] = set()
        self.waiting: dict[int, tuple[Request, asyncio.Future[Completion]]] = {}

    @asynccontextmanager
    async def session(self) -> AsyncIterator[LocalSession]:
        """A place for one dialogue, from its first request to its last answer."""
        number = self.sessions_opened
        self.sessions_opened += 1
        self.open_sessions.add(number)
        try:
            yield LocalSession(self, number)
        finally:
            self.open_sessions.remove(number)
            self.look_for_wave()

    async def wait_for_wave(self, session: int, request: Request) -> Completion:
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
        """Later, not now: dialogues that were started together shall all have opened their
        session."""
        asyncio.get_running_loop().call_soon(self.run_complete_wave)

    def run_complete_wave(self) -> None:
        """Generates for all that wait, if nobody is missing, and answers them."""
        # a cancelled request has its future cancelled first and leaves when its task runs
        wave = {session: entry for session, entry in self.waiting.items() if not entry[1].done()}
        if not wave or len(wave) < len(self.open_sessions):
            return
        order = sorted(wave, key=lambda session: (len(wave[session][0].token_ids), session))
        futures = [wave[session][1] for session in order]
        try:
            completions = self.generate([wave[session][0] for session in order])
        except Exception as error:
            # Into every dialogue, as nobody else would hear of it. torch reports a lack of memory
            # and the like as RuntimeError: the engine's fault. Anything else is a bug of ours, and
            # stays what it is.
            reported = error
            if isinstance(error, RuntimeError):
                reported = EngineError(f"generation failed: {error}")
                reported.__cause__ = error
            for future in futures:
                future.set_exception(reported)
            return
        for future, completion in zip(futures, completions, strict=True):
            future.set_result(completion)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """A completion for each request, in batches of at most `max_batch` in the order given."""
        if self.weight_version == NO_WEIGHTS:
            raise EngineError("no weights: none were published, or the last update failed")
        completions = []
        for start in range(0, len(requests), self.max_batch):
            completions += generate_batch(
                self.model,
                requests[start : start + self.max_batch],
                weight_version=self.weight_version,
                pad_token_id=self.pad_token_id,
            )
        return completions

    @torch.no_grad()
    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Copies the weights into the model and compares every parameter with what was sent.

        Names are Hugging Face's. Of tied weights one name is enough; if both are sent, they must be
        equal. The tensors are read after the iterable ends, so it must not use a buffer again.
        Names and shapes are checked before anything is touched; if the comparison fails, the engine
        serves nothing until a good update.

        Raises EngineError that lists the names at fault, WeightsMismatchError where they do not
        fit the model.
        """
        sent = collect(named_tensors)
        served = self.model.state_dict()
        check_names(self.model, served, sent)
        self.weight_version = NO_WEIGHTS
        for name, tensor in sent.items():
            served[name].copy_(tensor)
        # after all copies, so that the two names of tied weights are seen to agree
        different = [
            name
            for name, tensor in sent.items()
            if not torch.equal(served[name], tensor.to(served[name]))
        ]
        if different:
            raise EngineError(
                f"after the update to version {version} these weights differ from what was sent "
                f"(NaN, or tied weights that were sent unequal): {listed(different)}"
            )
        self.weight_version = version

    def rest(self) -> None:
        """Its weights stay; nothing else of it does between batches."""

    def end_update(self, version: int | None) -> None:
        """Its own weights are all that it knows of."""

    def take_counts(self) -> dict[str, float]:
        """Nothing here is lost, retried or cached across requests."""
        return {}


def load_model(
    folder: Path, dtype: torch.dtype | str, device: torch.device, weights_from_folder: bool
) -> PreTrainedModel:
    """The model in evaluation mode, without gradients. ValueError names what the folder lacks."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json; give a folder in Hugging Face format")
    # sdpa takes the prepared masks of generation.py as they are
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    if weights_from_folder:
        model = load_weights(folder, options)
    else:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_config(config, **options)
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        raise ValueError(
            f"{folder}: model type {model.config.model_type!r} has layers without full attention "
            "(sliding windows, recurrence), which the local engine does not serve"
        )
    return model.eval().requires_grad_(False).to(device=device)


def load_weights(folder: Path, options: Mapping[str, object]) -> PreTrainedModel:
    """The model with the folder's weights, all of them: transformers would make up missing ones."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: cannot read the weights: {error}") from error
    model, info = loaded  # a pair, because of output_loading_info, which the annotations miss
    if info["missing_keys"]:
        raise ValueError(f"{folder}: weights are missing: {listed(sorted(info['missing_keys']))}")
    return model


def check_request(model: PreTrainedModel, request: Request) -> None:
    """ValueError with the number, the bound and the remedy, before the request joins a wave."""
    positions, words = model.config.max_position_embeddings, model.config.vocab_size
    length, sampling = len(request.token_ids), request.sampling
    if length == 0:
        raise ValueError("the prompt is empty; give at least a begin-of-text token")
    if length + 1 > positions:
        raise ValueError(
            f"the prompt has {length} tokens, the model {positions} positions, and a new token "
            "needs one; end the dialogue or lower rollout.max_context"
        )
    check_ids_and_sampling(request.token_ids, words, sampling)
    if request.seed < 0:
        raise ValueError(f"seed is {request.seed}, must not be negative")


def collect(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    sent: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors:
        if name in sent:
            raise WeightsMismatchError(f"weights were sent twice under the name {name}")
        sent[name] = tensor
    return sent


def check_names(
    model: PreTrainedModel, served: dict[str, torch.Tensor], sent: dict[str, torch.Tensor]
) -> None:
    """WeightsMismatchError unless every weight of the model is there once, in its shape, and
    nothing else."""
    unknown = [name for name in sent if name not in served]
    covered = {served[name].data_ptr() for name in sent if name in served}
    missing = [name for name, tensor in served.items() if tensor.data_ptr() not in covered]
    misshapen = [
        f"{name} {list(tensor.shape)} instead of {list(served[name].shape)}"
        for name, tensor in sent.items()
        if name in served and tensor.shape != served[name].shape
    ]
    faults = {"unknown names": unknown, "missing": missing, "wrong shape": misshapen}
    if any(faults.values()):
        what = "; ".join(f"{fault}: {listed(names)}" for fault, names in faults.items() if names)
        raise WeightsMismatchError(
            f"weights do not fit {type(model).__name__}, the old ones stay: {what}; "
            "the name map and config.json must be of the same model"
        )
