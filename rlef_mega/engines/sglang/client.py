"""Requests to one SGLang server over HTTP.

Only this file knows the paths of SGLang's interface (processes.py polls two of them); its fields
are here and in answers.py. Both were verified for the versions in SUPPORTED; others are refused: a
weight update that a server accepts with status 200 but does not perform would be noticed too late.
"""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import torch

from rlef_mega.engines import GenerationRequest
from rlef_mega.engines.sglang.answers import (
    ServerError,
    ServerInfo,
    completion_of,
    sampling_parameters,
)
from rlef_mega.types import Completion

SUPPORTED = ("0.5.23",)
FREE = "default"  # the weight version of a server that no process owns (engine.py)
WEIGHTS, CACHE = "weights", "kv_cache"  # tags of SGLang's memory saver
ABORT_S = 2.0
CONNECT_S = 10.0
NO_LIMIT = 0.0  # seconds, as aiohttp reads it
PROBE_S = 10.0  # for a short request to an idle server

T = TypeVar("T")


@dataclass(eq=False)
class Client:
    """One server. `publish_s` bounds each call that belongs to a publication."""

    url: str
    http: aiohttp.ClientSession
    publish_s: float
    paused_s: float = 0.0  # total time paused for weights
    paused_at_s: float = 0.0  # of time.monotonic, when it was paused last
    cache_released: bool = False  # True while it has its weights again, but not its cache
    resting_version: str = FREE  # its weights' version when it released them
    aborting: set[asyncio.Task[None]] = field(default_factory=set)

    async def call(
        self, path: str, body: Mapping[str, Any] | None = None, *, within_s: float | None = None
    ) -> dict[str, Any]:
        """POST the body, or GET without one. Returns the answer's JSON object; any other answer is
        returned as {"text": ...}.

        Raises ServerError if no answer comes in time (default: `publish_s`) or its status is not
        200.
        """
        total_s = self.publish_s if within_s is None else within_s
        timeout = aiohttp.ClientTimeout(total=total_s, sock_connect=CONNECT_S)
        method, address = "GET" if body is None else "POST", self.url + path
        try:
            async with self.http.request(method, address, json=body, timeout=timeout) as response:
                status, text = response.status, await response.text(errors="replace")
        except TimeoutError:
            raise ServerError(f"{address}: no answer in time") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(f"{address}: {str(error) or type(error).__name__}") from None
        if status != 200:
            raise ServerError(f"{address}: {status} {text[:500]}", status)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        return answer if isinstance(answer, dict) else {"text": text}

    async def read(
        self,
        path: str,
        reader: Callable[[Any], T],
        body: Mapping[str, Any] | None = None,
        *,
        within_s: float | None = None,
    ) -> T:
        """Return `reader(answer)`. Raises ServerError if the answer is malformed."""
        answer = await self.call(path, body, within_s=within_s)
        try:
            return reader(answer)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ServerError(
                f"{self.url}{path}: malformed answer ({error!r}): {str(answer)[:200]}"
            ) from None

    async def succeed(
        self, path: str, body: Mapping[str, Any], *, within_s: float | None = None
    ) -> None:
        """Make a call whose answer reports success in its body, besides HTTP's status."""
        answer = await self.call(path, body, within_s=within_s)
        if answer.get("success") is not True:
            raise ServerError(f"{self.url}{path}: {answer}")

    async def info(self, *, within_s: float | None = None) -> ServerInfo:
        """Return the scheduler's report. A scheduler that hangs does not answer, though its HTTP
        process does; a paused one answers."""
        return await self.read("/server_info", ServerInfo.model_validate, within_s=within_s)

    async def reported_version(self, *, within_s: float) -> str:
        """Return the version known to the HTTP process, which is cheap to ask."""
        return await self.read(
            "/model_info", lambda answer: str(answer["weight_version"]), within_s=within_s
        )

    async def check_health(self, *, within_s: float) -> None:
        """Raise ServerError unless the scheduler is alive. Takes at least a second, because an idle
        server generates a token for it."""
        await self.call("/health", within_s=within_s)

    async def generate(self, request: GenerationRequest) -> tuple[Completion, int]:
        """Return a response and how many tokens of its prompt the server had cached. There is no
        time limit: the caller watches the server's health.

        When cancelled, also ends the request on the server, which notices a closed connection only
        after up to 4 s. Raises ValueError if the server refuses the request as wrong.
        """
        request_id = uuid.uuid4().hex
        body = {
            "rid": request_id,
            "input_ids": request.token_ids,
            "sampling_params": sampling_parameters(request),
            "return_logprob": True,
        }
        try:
            return await self.read(
                "/generate", lambda a: completion_of(a, request), body, within_s=NO_LIMIT
            )
        except asyncio.CancelledError:
            self.begin_abort(request_id)  # in the background, since the server may hang
            raise
        except ServerError as error:
            if error.status == 400:  # any other server would refuse it too
                raise ValueError(f"the server refused the request: {error}") from None
            raise

    def begin_abort(self, request_id: str) -> None:
        """End a request on the server, by a task that `Fleet.close` waits for."""

        async def abort() -> None:
            with contextlib.suppress(ServerError):  # the server will see the closed connection
                await self.call("/abort_request", {"rid": request_id}, within_s=ABORT_S)

        task = asyncio.create_task(abort())
        self.aborting.add(task)
        task.add_done_callback(self.aborting.discard)

    # ----------------------------------------------------------------- weights

    async def pause(self) -> None:
        """Retract running requests: they keep their tokens, and their context is computed again on
        `resume`, so that what follows comes only from the new weights."""
        self.paused_at_s = time.monotonic()
        await self.call("/pause_generation", {"mode": "retract"})

    async def resume(self) -> None:
        """Continue sampling after `pause`; first allocate the cache again if it was released."""
        if self.cache_released:
            await self.call("/resume_memory_occupation", {"tags": [CACHE]})
            self.cache_released = False
        # the option would empty the cache of a CUDA allocator, which a CPU build lacks
        await self.call("/continue_generation", {"torch_empty_cache": False})
        self.paused_s += time.monotonic() - self.paused_at_s

    async def release_memory(self, within_s: float) -> None:
        """Pause the server if it answers in time, and free the memory of weights and cache. No
        request may be running.

        The pause prevents health checks, which would make the server generate without weights.
        Needs SGLang's memory saver, which needs a GPU.
        """
        self.resting_version = (await self.info(within_s=within_s)).weight_version
        await self.pause()
        # A server that frees its cache twice dies; one that was restarted has its cache again.
        freed = self.cache_released and self.resting_version != FREE
        tags = [WEIGHTS] if freed else [CACHE, WEIGHTS]
        await self.call("/release_memory_occupation", {"tags": tags})

    async def allocate_weights(self) -> None:
        """Allocate the weights' memory again, with undefined contents; `resume` allocates the
        cache's, which is larger.

        A server that released nothing would crash on this call, so it is not sent to a server that
        was restarted and therefore has weights of another version.
        """
        self.cache_released = False
        if (await self.info()).weight_version == self.resting_version:
            await self.call("/resume_memory_occupation", {"tags": [WEIGHTS]})
            self.cache_released = True

    async def load_from_disk(self, folder: str, version: str) -> None:
        body = {"model_path": folder, "weight_version": version, "flush_cache": True}
        await self.succeed("/update_weights_from_disk", body)

    async def join_group(self, name: str, **rendezvous: str | int) -> None:
        """Join the trainer's process group; the server's first rank gets `rank_offset`."""
        await self.succeed("/init_weights_update_group", {"group_name": name, **rendezvous})

    async def leave_group(self, name: str) -> None:
        await self.call("/destroy_weights_update_group", {"group_name": name}, within_s=PROBE_S)

    async def begin_update(self) -> None:
        """Open an update, which SGLang requires since 0.5.22."""
        try:
            await self.succeed("/begin_weight_update", {})
        except ServerError:  # perhaps one is still open, after an update that failed
            await self.succeed("/end_weight_update", {})
            await self.succeed("/begin_weight_update", {})

    async def receive_bucket(self, bucket: Sequence[tuple[str, torch.Tensor]], group: str) -> None:
        """Receive a broadcast and load it; returns when the server has done so."""
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self.succeed("/update_weights_from_distributed", body)

    async def receive_tensors(self, handles: Sequence[str]) -> None:
        """Map and load shared tensors, by one handle for each rank of the server."""
        body = {"serialized_named_tensors": list(handles), "flush_cache": False}
        await self.succeed("/update_weights_from_tensor", body)

    async def end_update(self, version: str) -> None:
        """Set the new version, close the update and empty the cache of the old weights."""
        await self.set_version(version)
        await self.succeed("/end_weight_update", {})
        await self.call("/flush_cache", {})

    async def set_version(self, version: str, *, within_s: float | None = None) -> None:
        body = {"new_version": version, "abort_all_requests": False}
        await self.succeed("/update_weight_version", body, within_s=within_s)

    async def checksums(self) -> list[dict[str, str]]:
        """Return the hash of each parameter, one dictionary for each tensor-parallel rank."""

        def read(answer: Any) -> list[dict[str, str]]:
            ranks = sorted(answer["ranks"], key=lambda r: r["parallelism_info"][0]["tp_rank"])
            return [dict(rank["checksums"]) for rank in ranks]

        return await self.read("/weights_checker", read, {"action": "checksum"})
