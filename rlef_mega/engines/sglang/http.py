"""What one SGLang server is asked over HTTP, and what its answers must be.

The only place that knows paths and fields of SGLang's interface. Seen to hold for the versions in
SUPPORTED; another one is refused, because a weight update that a server takes with 200 and does not
do is not seen otherwise before training has gone wrong.
"""

import asyncio
import contextlib
import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import aiohttp
import torch

from rlef_mega.engines import EngineError
from rlef_mega.types import Completion, Sampling

SUPPORTED = ("0.5.23",)
FREE = "default"  # the version of a server that nobody has published to since it started
WEIGHTS, CACHE = "weights", "kv_cache"  # what its memory saver calls the two
CONNECT_S = 10.0
ABORT_S = 2.0
PROBE_S = 10.0  # for whoever is idle to say how it is
# Of idle connections. The server closes them after 5 s; one that it closes as we send looks like a
# dead server.
KEEP_ALIVE_S = 2.0


class ServerError(EngineError):
    """This server did not do it; another one may."""


@dataclass(frozen=True)
class About:
    """What a server says of itself."""

    version: str
    model_path: str
    dtype: str
    device: str
    tensor_parallel_size: int
    context_length: int  # tokens of a request with its answer
    longest_prompt: int
    weight_version: str


@dataclass(frozen=True)
class Answer:
    """A completion, and how many tokens of its context the server had in its cache."""

    completion: Completion
    context_tokens: int
    cached_tokens: int


class Client:
    """One server, at `url`, over a shared connection pool."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url, self.http = url, http
        self.paused_s = 0.0  # for weights, until now
        self.paused_at_s: float | None = None
        self.released: list[str] = []  # what has no room on its device
        self.aborting: set[asyncio.Task[None]] = set()

    async def call(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        within_s: float | None,
        json_answer: bool = True,
    ) -> Any:
        """The answer's JSON, if it has one; GET without a body. ServerError for whatever is no 200,
        but ValueError for a request to generate that the server refuses as wrong."""
        timeout = aiohttp.ClientTimeout(total=within_s, sock_connect=CONNECT_S)
        method = "GET" if body is None else "POST"
        try:
            async with self.http.request(
                method, self.url + path, json=body, timeout=timeout, allow_redirects=False
            ) as response:
                status, text = response.status, await response.text(errors="replace")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ServerError(f"{self.url}{path}: {reason_of(error)}") from None
        if status == 400 and path == "/generate":  # any other server would refuse it too
            raise ValueError(f"{self.url} refused the request: {text[:500]}")
        if status != 200:
            raise ServerError(f"{self.url}{path}: {status} {text[:500]}")
        if not text or not json_answer:
            return None
        try:
            return json.loads(text)
        except ValueError:
            raise ServerError(f"{self.url}{path}: no JSON: {text[:200]!r}") from None

    async def about(self, *, within_s: float) -> About:
        said = await self.call("/server_info", within_s=within_s)
        model = await self.call("/model_info", within_s=within_s)
        try:
            return About(
                version=said["version"],
                # where it started from; /model_info has where an update came from
                model_path=said["model_path"],
                dtype=said["dtype"],
                device=said["device"],
                tensor_parallel_size=int(said["tp_size"]),
                # it reports its longest request, of which it uses all but one token, less 5
                context_length=int(said["max_req_input_len"]) + 4,
                longest_prompt=int(said["max_req_input_len"]) - 1,  # it must be shorter
                weight_version=str(model["weight_version"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"{self.url} is no SGLang server that we know: {error!r}") from None

    async def weight_version(self, *, within_s: float) -> str:
        """Its scheduler's, which stamps tokens with it. One that hangs does not answer, though the
        process that speaks HTTP goes on; one that is paused does."""
        said = await self.call("/server_info", within_s=within_s)
        try:
            return str(said["internal_states"][0]["weight_version"])
        except (KeyError, TypeError, IndexError) as error:
            raise ServerError(f"{self.url}/server_info: malformed: {error!r}") from None

    async def reported_version(self, *, within_s: float) -> str:
        """As the process that speaks HTTP knows it, which is cheap to ask."""
        said = await self.call("/model_info", within_s=within_s)
        return str(said.get("weight_version") if isinstance(said, dict) else None)

    async def check_health(self, *, within_s: float) -> None:
        """ServerError unless its scheduler is alive; an idle server generates a token for it. Takes
        a second at least."""
        timeout = aiohttp.ClientTimeout(total=within_s, sock_connect=CONNECT_S)
        try:
            async with self.http.get(f"{self.url}/health", timeout=timeout) as response:
                if response.status != 200:
                    raise ServerError(f"{self.url}/health: {response.status}")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ServerError(f"{self.url}/health: {reason_of(error)}") from None

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, seed: int) -> Answer:
        """Waits as long as it takes: whoever calls watches the server's health meanwhile. If it is
        cancelled, it ends the request on the server too, which sees a closed connection after up to
        4 s only."""
        request_id = uuid.uuid4().hex
        body = {
            "rid": request_id,
            "input_ids": list(token_ids),
            "sampling_params": sampling_parameters(sampling, seed),
            "return_logprob": True,
        }
        try:
            said = await self.call("/generate", body, within_s=None)
        except asyncio.CancelledError:
            self.begin_abort(request_id)  # beside: nobody waits for a server that hangs
            raise
        try:
            return read_answer(said, len(token_ids), sampling)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ServerError(f"{self.url}/generate: malformed answer: {error!r}") from None

    def begin_abort(self, request_id: str) -> None:
        async def abort() -> None:
            with contextlib.suppress(ServerError):  # it sees the closed connection
                await self.call("/abort_request", {"rid": request_id}, within_s=ABORT_S)

        task = asyncio.create_task(abort())
        self.aborting.add(task)
        task.add_done_callback(self.aborting.discard)

    # ----------------------------------------------------------------- weights

    async def pause(self, *, within_s: float) -> None:
        """Requests under way are taken back; their cached context is computed again when they go
        on, so that what follows is by the new weights alone."""
        self.paused_at_s = time.monotonic()
        await self.call("/pause_generation", {"mode": "retract"}, within_s=within_s)

    async def resume(self, *, within_s: float) -> None:
        """Goes on, with a cache if it has none."""
        if self.released:
            await self.occupy(CACHE, within_s=within_s)
        # its only option empties the cache of a CUDA allocator, which a CPU build lacks
        body = {"torch_empty_cache": False}
        await self.call("/continue_generation", body, within_s=within_s)
        if self.paused_at_s is not None:
            self.paused_s += time.monotonic() - self.paused_at_s
            self.paused_at_s = None

    async def release_memory(self, *, within_s: float) -> None:
        """Weights and cache leave the device; nothing may be under way. Paused, or whoever asks
        whether it is healthy would have it generate without them. Only of servers with the memory
        saver, on a GPU."""
        await self.pause(within_s=within_s)
        tags = [CACHE, WEIGHTS]
        await self.call("/release_memory_occupation", {"tags": tags}, within_s=within_s)
        self.released = tags

    async def make_room_for_weights(self, version: str, *, within_s: float) -> None:
        """For those that come; the cache's room, which is large, comes with `resume`, when they
        have come. A process that released nothing would die of it: `version` is what the one that
        did holds, and one that was started again does not."""
        released, self.released = self.released, []
        if released and await self.weight_version(within_s=within_s) == version:
            await self.occupy(WEIGHTS, within_s=within_s)
            self.released = [CACHE]

    async def occupy(self, tag: str, *, within_s: float) -> None:
        """What was in this memory is not there again."""
        await self.call("/resume_memory_occupation", {"tags": [tag]}, within_s=within_s)
        self.released = [other for other in self.released if other != tag]

    async def load_from_disk(self, folder: str, version: str, *, within_s: float) -> None:
        body = {"model_path": folder, "weight_version": version, "flush_cache": True}
        await self.succeed("/update_weights_from_disk", body, within_s=within_s)

    async def join_group(
        self,
        name: str,
        *,
        address: str,
        port: int,
        rank_offset: int,
        world_size: int,
        backend: str,
        within_s: float,
    ) -> None:
        """Its ranks join a process group of the trainer's, from `rank_offset` on."""
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": name,
            "backend": backend,
        }
        await self.succeed("/init_weights_update_group", body, within_s=within_s)

    async def leave_group(self, name: str, *, within_s: float) -> None:
        body = {"group_name": name}
        await self.succeed("/destroy_weights_update_group", body, within_s=within_s)

    async def begin_update(self, *, within_s: float) -> None:
        """Since 0.5.22 weights are received between a beginning and an end."""
        try:
            await self.succeed("/begin_weight_update", {}, within_s=within_s)
        except ServerError:
            # open still, after an update that failed; closed, or the server is the one that fails
            await self.succeed("/end_weight_update", {}, within_s=within_s)
            await self.succeed("/begin_weight_update", {}, within_s=within_s)

    async def receive_bucket(
        self, bucket: Sequence[tuple[str, torch.Tensor]], group: str, *, within_s: float
    ) -> None:
        """Waits for the broadcast and loads it. Answers when that is done."""
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self.succeed("/update_weights_from_distributed", body, within_s=within_s)

    async def receive_tensors(self, handles: Sequence[str], *, within_s: float) -> None:
        """Of each rank, what it shall open and load. Answers when that is done."""
        body = {"serialized_named_tensors": list(handles), "flush_cache": False}
        await self.succeed("/update_weights_from_tensor", body, within_s=within_s)

    async def end_update(self, version: str, *, within_s: float) -> None:
        """The new version, the end, and an empty cache: what it holds is of the old weights."""
        await self.set_version(version, within_s=within_s)
        await self.succeed("/end_weight_update", {}, within_s=within_s)
        await self.call("/flush_cache", {}, within_s=within_s, json_answer=False)

    async def set_version(self, version: str, *, within_s: float) -> None:
        body = {"new_version": version, "abort_all_requests": False}
        await self.succeed("/update_weight_version", body, within_s=within_s)

    async def checksums(self, *, within_s: float) -> list[dict[str, str]]:
        """Of each tensor-parallel rank: its parameters' names and hashes."""
        said = await self.call("/weights_checker", {"action": "checksum"}, within_s=within_s)
        try:
            ranks = sorted(said["ranks"], key=lambda r: r["parallelism_info"][0]["tp_rank"])
            return [dict(rank["checksums"]) for rank in ranks]
        except (KeyError, TypeError, IndexError) as error:
            raise ServerError(f"{self.url}/weights_checker: malformed: {error!r}") from None

    async def succeed(self, path: str, body: Mapping[str, Any], *, within_s: float) -> None:
        """A call whose answer says whether it succeeded, beside HTTP's status."""
        said = await self.call(path, body, within_s=within_s)
        if not (isinstance(said, dict) and said.get("success") is True):
            raise ServerError(f"{self.url}{path}: {said}")


def new_http_session() -> aiohttp.ClientSession:
    """Without a limit of connections: who may ask how much is decided elsewhere."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    return aiohttp.ClientSession(connector=connector, trust_env=False)


def sampling_parameters(sampling: Sampling, seed: int) -> dict[str, Any]:
    """Exactly what is asked; the seed counts where the server runs deterministically."""
    parameters: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(sampling.stop_token_ids),
        # without it the model's own end-of-text token would stop it too
        "ignore_eos": not sampling.stop_token_ids,
        "skip_special_tokens": False,
        "sampling_seed": seed,
    }
    return parameters


def read_answer(said: Any, context_tokens: int, sampling: Sampling) -> Answer:
    """What was sampled. ValueError, KeyError or TypeError if the answer is not whole."""
    about = said["meta_info"]
    rows = about["output_token_logprobs"]
    token_ids = tuple(int(row[1]) for row in rows)
    logprobs = tuple(float(row[0]) for row in rows)
    if list(token_ids) != list(said["output_ids"]):
        raise ValueError("the ids beside the log-probs are not those of the output")
    if not token_ids or len(token_ids) > sampling.max_new_tokens:
        raise ValueError(f"{len(token_ids)} tokens for at most {sampling.max_new_tokens}")
    if not all(math.isfinite(logprob) and logprob <= 1e-3 for logprob in logprobs):
        raise ValueError("log-probs that are none (NaN, infinite or positive)")
    reason = about["finish_reason"]["type"]
    if reason not in ("stop", "length"):
        raise ValueError(f"it ended by {reason!r}")
    completion = Completion(
        token_ids, logprobs, read_versions(about["weight_versions"], len(token_ids)), reason
    )
    return Answer(completion, context_tokens, int(about["cached_tokens"]))


def read_versions(spans: Sequence[Mapping[str, Any]], tokens: int) -> tuple[int, ...]:
    """The version of each token. ValueError unless the spans cover all tokens once, in order."""
    bounds = [(int(span["start"]), int(span["end"])) for span in spans]
    whole = bounds and bounds[0][0] == 0 and bounds[-1][1] == tokens
    if not whole or any(left[1] != right[0] for left, right in pairwise(bounds)):
        raise ValueError(f"weight versions {bounds} do not cover {tokens} tokens")
    versions = [int(span["version"]) for span in spans]  # "default" where none was published
    return tuple(
        version
        for version, (start, end) in zip(versions, bounds, strict=True)
        for _ in range(start, end)
    )


def reason_of(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect: {error.os_error.strerror or error.os_error}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__
