"""The engine for SGLang servers: token ids in, exact ids and log-probs out, over HTTP.

Theory of operation. Servers are processes of their own, on this node or others. An event loop in a
thread of its own (`sglang-client`) holds the connections and the fleet (fleet.py); it outlives the
rollouts' event loops, one per step. A dialogue's coroutine hands its request to that loop and waits
for an answer, or for EngineError after several servers were tried.

Each process with rollouts has an engine for the same servers. One of them publishes: it blocks in
`update_weights` until all ready servers have the verified weights. The others wait, and check no
paused server meanwhile. At `end_update` they are told the version and the servers that have it;
they use any other server only once it reports that version. Dialogues may run during a publication:
their requests wait at the paused servers and continue with the new weights.

A process that publishes to servers owns them until it ends; meanwhile their weight version is a
number, not FREE. Other processes refuse them, but a resumed run takes its own back (`take_over`).
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import torch

from rlef_mega.config import ConfigError, ServersConfig
from rlef_mega.engines import Engine, EngineError, GenerationRequest, Session
from rlef_mega.engines.checks import NO_WEIGHTS, check_request
from rlef_mega.engines.sglang.answers import ServerInfo
from rlef_mega.engines.sglang.client import FREE, PROBE_S, SUPPORTED
from rlef_mega.engines.sglang.fleet import Affinity, Fleet
from rlef_mega.engines.sglang.members import Member, on_each
from rlef_mega.engines.sglang.processes import log_file
from rlef_mega.engines.sglang.publication import BucketPublication, DiskPublication
from rlef_mega.engines.sglang.transfer import Broadcast, SharedTensors
from rlef_mega.engines.sglang.weights import SentWeights, ServedModel, check_same_model
from rlef_mega.run.addresses import address_towards
from rlef_mega.run.event_loop import LivesInLoop
from rlef_mega.types import Completion

# How long an idle connection is kept. SGLang's server closes it after 5 s; a connection that it
# closes while a request is being sent would look like a dead server.
KEEP_ALIVE_S = 2.0
OPEN_S = 60.0  # for a running server to report its settings


class SGLangEngine(LivesInLoop, Engine):
    """Samples on `servers`; a context manager, which checks them as it opens.

    `model` is the Hugging Face folder that the servers were started with. With `weights_folder`
    this engine publishes to them, as `servers.publish` says (only "disk" writes to the folder);
    without it, another process does. `take_over` allows servers that another process published to.
    `logs` is the folder that `rlef serve` writes logs to. With `infos`, those of another process's
    engine for the same servers, the servers are not asked again.
    """

    def __init__(
        self,
        servers: ServersConfig,
        model: str | Path,
        *,
        weights_folder: Path | None = None,
        logs: Path | None = None,
        take_over: bool = False,
        infos: Sequence[ServerInfo] = (),
    ) -> None:
        urls = servers.addresses
        if len(set(urls)) != len(urls):
            raise ValueError(f"a server is named twice in {list(urls)}; name each once")
        self.servers, self.urls = servers, [url.rstrip("/") for url in urls]
        self.folder, self.model = Path(model), ServedModel(Path(model))
        self.weights_folder, self.logs, self.take_over = weights_folder, logs, take_over
        self.infos = list(infos)
        self.owns_servers = False  # whether the servers have weights from this engine
        self.released = False  # whether all servers were given back
        self.resting: list[Member] | None = None  # servers that have released their memory
        self.weight_version = NO_WEIGHTS
        self.publication: DiskPublication | BucketPublication | None = None
        self.counted: dict[str, float] = {}  # what `take_counts` has returned so far
        super().__init__("sglang-client")

    async def open(self) -> None:
        """Connect. Raises ValueError unless all servers run a supported version with this model."""
        # without a limit: the fleet bounds requests
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        self.http = aiohttp.ClientSession(connector=connector, trust_env=False)
        publish_s, logs = self.servers.publish_s, self.logs
        members = [
            Member(url, self.http, publish_s, log=log_file(logs, url) if logs else None)
            for url in self.urls
        ]
        self.fleet = Fleet(members, self.servers)
        if not self.infos:
            asked = (member.info(within_s=OPEN_S) for member in members)
            self.infos = list(await asyncio.gather(*asked))
            for url, info in zip(self.urls, self.infos, strict=True):
                self.check_server(url, info)
        kinds = {(info.dtype, info.device, info.tp_size) for info in self.infos}
        if len(kinds) > 1:
            raise ValueError(f"servers differ in (dtype, device, tp size): {sorted(kinds)}")
        self.info = min(self.infos, key=lambda info: info.context_length)
        if self.weights_folder is not None:
            self.publication = self.make_publication(self.weights_folder)

    def check_server(self, url: str, info: ServerInfo) -> None:
        """Raise ValueError if the engine cannot use the server, or must not publish to it."""
        if info.version not in SUPPORTED:
            raise ValueError(f"{url} is SGLang {info.version}; supported: {', '.join(SUPPORTED)}")
        check_same_model(self.folder, Path(info.model_path))
        if self.weights_folder and info.weight_version != FREE and not self.take_over:
            raise ConfigError(
                f"{url} has weights of version {info.weight_version}, so a training run or "
                "another evaluation uses it and would get our weights; use other servers "
                "(`rlef serve` with another rollout.servers.port), or restart it if it is unused"
            )

    def make_publication(self, weights_folder: Path) -> DiskPublication | BucketPublication:
        """Return the publication that `servers.publish` selects."""
        if self.servers.publish == "disk":
            return DiskPublication(self.fleet, self, weights_folder, self.folder)
        if self.servers.publish == "distributed":
            backend = "gloo" if self.info.device == "cpu" else "nccl"
            host = address_towards(urlsplit(self.urls[0]).hostname or "")
            broadcast = Broadcast(self, host, backend, self.servers.publish_s)
            return BucketPublication(self.fleet, self, broadcast)
        return BucketPublication(self.fleet, self, SharedTensors(self))

    def close(self) -> None:
        if self.publication is not None:
            self.publication.close()
        super().close()

    async def shut(self) -> None:
        await self.fleet.close()
        if self.owns_servers:
            freed = await on_each(
                self.fleet.members, lambda client: client.set_version(FREE, within_s=PROBE_S)
            )
            self.released = len(freed) == len(self.fleet.members)
        await self.http.close()

    # ---------------------------------------------------------------- as an Engine

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        yield partial(self.generate, Affinity())

    async def generate(self, affinity: Affinity, request: GenerationRequest) -> Completion:
        """Sample at the dialogue's server, at most as many tokens as the servers have room for.
        Raises ValueError for a request that no server can serve, EngineError if none answered."""
        limited = replace(request.sampling, max_new_tokens=self.token_limit(request))
        asked = self.fleet.generate(affinity, replace(request, sampling=limited))
        return await asyncio.wrap_future(self.submit(asked))

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> Sequence[str]:
        """Load the weights on all servers, and return which have them. If another process
        publishes, only stop the checks of servers, until `end_update`, and return ().

        Raises EngineError unless every server that is ready afterwards has exactly these weights.
        After an error no server is ready, and requests wait until a publication succeeds.
        """
        weights = SentWeights(
            named_tensors,
            self.model,
            getattr(torch, self.info.dtype),
            self.info.tp_size,
            self.info.device,
        )
        try:
            if self.publication is None:
                self.wait_for(self.fleet.control.acquire())  # paused servers are not checked
                return ()
            self.owns_servers = True
            if self.resting is not None:
                self.wait_for(self.wake(self.resting))
            self.publication.publish(weights, version)
        except BaseException:
            self.wait_for(self.fleet.withhold())
            raise
        finally:
            for _ in weights:  # gathered and hashed together with the other ranks
                pass
        self.weight_version = version
        return [member.url for member in self.fleet.members if member.ready]

    def end_update(self, version: int | None, served: Sequence[str] = ()) -> None:
        if self.publication is None:
            self.loop.call_soon_threadsafe(self.fleet.control.release)
            if version is not None:
                self.wait_for(self.fleet.expect(version, served))
                self.weight_version = version

    def rest(self) -> None:
        if self.servers.release_memory and self.publication is not None:
            self.wait_for(self.release())

    async def release(self) -> None:
        """Free the servers' memory. Until `wake`, none is checked or restored."""
        await self.fleet.control.acquire()
        # those that are not ready, because they started without our weights, hold memory too
        freed = await on_each(
            self.fleet.members, lambda client: client.release_memory(self.fleet.heartbeat_s)
        )
        self.resting = list(freed)

    async def wake(self, resting: Sequence[Member]) -> None:
        """Allocate the weights again. A server that fails here fails in the publication too."""
        self.resting = None
        try:
            await on_each(resting, lambda client: client.allocate_weights())
        finally:
            self.fleet.control.release()

    @property
    def counts(self) -> dict[str, float]:
        """Return counts of this process's requests since the engine opened.

        `requests` answered; `failures` of servers, their `returns`, and how often one without the
        current weights was given them (`restored`); `sampled_tokens`; `context_tokens`, of which
        `cached_tokens` came from a server's cache; `follow_up_tokens`, `follow_up_cached_tokens`:
        the same without a dialogue's first request; seconds in which each server had a request
        (BUSY and its address); `paused_s`, the longest pause of a server for our publications.
        """
        return self.wait_for(self.fleet.read_counts())

    def take_counts(self) -> dict[str, float]:
        before, self.counted = self.counted, self.counts
        since = {name: count - before.get(name, 0) for name, count in self.counted.items()}
        return {name: count for name, count in since.items() if count}

    def token_limit(self, request: GenerationRequest) -> int:
        """Return how many tokens the servers have room for, at most `max_new_tokens`.

        Raises ValueError for a request that a server would refuse or, with a token id outside the
        vocabulary, crash on, and EngineError before weights are published.
        """
        if self.weight_version == NO_WEIGHTS:
            raise EngineError("no weights were published")
        vocabulary, longest = self.model.config.vocab_size, self.info.longest_prompt
        check_request(request, vocabulary=vocabulary, longest_prompt=longest)
        room = self.info.context_length - len(request.token_ids)
        return min(request.sampling.max_new_tokens, room)
