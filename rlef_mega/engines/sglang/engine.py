"""The engine for SGLang servers: token ids in, exact ids and log-probs out, over HTTP.

Theory of operation. The servers are processes of their own, on this node or others, and outlive
this one or not. An event loop in a thread of its own (`sglang-client`) holds the connections, knows
which servers are ready (sglang_fleet.py) and goes on while the rollouts' loops come and go, one a
step. A dialogue's coroutine hands its request to that loop and waits. A request ends with an
answer, or with EngineError after other servers were tried; the rollout then starts the dialogue
again, once.

Of several processes that roll out, each has an engine of its own over the same servers, and one
(`publication`) brings the weights: it blocks in `update_weights` until all ready servers have them,
verified. The others wait, and judge no server's silence meanwhile. When all have ended
(`end_update`), they note the new version and send nothing to a server before it says that it has
it. Dialogues may go on all the while: servers pause, requests wait there, and what is sampled after
the pause is by the new weights.

Who publishes to servers holds them until it ends: their version is a number meanwhile. Others do
not take them away, but a run that goes on takes what it held when it was killed (`take_over`).
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import torch

from rlef_mega.config import ConfigError
from rlef_mega.engines import EngineError
from rlef_mega.engines.requests import NO_WEIGHTS, check_ids_and_sampling
from rlef_mega.engines.sglang.carriers import Broadcasts, SharedTensors, own_address
from rlef_mega.engines.sglang.fleet import Fleet
from rlef_mega.engines.sglang.http import (
    FREE,
    PROBE_S,
    SUPPORTED,
    About,
    Client,
    new_http_session,
)
from rlef_mega.engines.sglang.members import Member, Place, on_each
from rlef_mega.engines.sglang.publication import BucketPublication, DiskPublication, Publication
from rlef_mega.engines.sglang.server import log_file
from rlef_mega.engines.sglang.weights import SentWeights, ServedModel, check_same_model
from rlef_mega.run.event_loop import LivesInLoop
from rlef_mega.types import Completion, Sampling

WAYS = ("disk", "distributed", "tensor")
OPEN_S = 60.0  # for a server that is up to say what it is


class SGLangSession:
    """One dialogue's place: its turns go to the server that holds its context."""

    def __init__(self, engine: "SGLangEngine") -> None:
        self.engine, self.place = engine, Place()

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, seed: int) -> Completion:
        """Continues the prompt. ValueError for a request that no server must see, EngineError if
        none answered."""
        engine = self.engine
        sampling = engine.check_request(token_ids, sampling)
        so_far = Completion((), (), (), "length")
        while True:
            context = [*token_ids, *so_far.token_ids]
            rest = replace(sampling, max_new_tokens=sampling.max_new_tokens - len(so_far.token_ids))
            answer = await asyncio.wrap_future(
                engine.submit(engine.fleet.generate(self.place, context, rest, seed))
            )
            so_far = joined(so_far, answer.completion)
            ended = so_far.token_ids[-1] in sampling.stop_token_ids
            # the model's own end-of-text token stops a server too, though it was not asked for
            if so_far.finish_reason == "length" or ended:
                return so_far
            if len(so_far.token_ids) == sampling.max_new_tokens:
                return replace(so_far, finish_reason="length")


class SGLangEngine(LivesInLoop):
    """Samples on the servers at `urls`; a context manager, which checks them as it opens.

    `model` is the Hugging Face folder that the servers were started with. With `way` (of WAYS)
    this engine publishes weights to them, by way of `weights_folder` for disk; without, another
    process does. `concurrency` bounds the open requests a server, `deadline_s` a request with all
    its tries, `lost_s` how long there may be no server at all, `publish_s` each step of a
    publication. `heartbeat_s` is how often a server that has not answered yet must say that it is
    healthy. With `release_memory` servers give theirs back while they `rest`. Whoever publishes
    with `take_over` does so to servers that somebody else holds. `logs` is where `rlef serve`
    writes.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str | Path,
        *,
        way: str | None = None,
        weights_folder: Path | None = None,
        logs: Path | None = None,
        concurrency: int = 256,
        deadline_s: float = 1800.0,
        lost_s: float = 900.0,
        publish_s: float = 600.0,
        heartbeat_s: float = 30.0,
        release_memory: bool = False,
        take_over: bool = False,
    ) -> None:
        if not urls:
            raise ValueError("no SGLang servers given; start some with `rlef serve`")
        if len(set(urls)) != len(urls):
            raise ValueError(f"a server is named twice in {list(urls)}; name each once")
        self.urls = [url.rstrip("/") for url in urls]
        self.folder, self.model = Path(model), ServedModel(Path(model))
        self.way, self.weights_folder, self.logs = way, weights_folder, logs
        self.concurrency, self.deadline_s, self.lost_s = concurrency, deadline_s, lost_s
        self.publish_s, self.heartbeat_s = publish_s, heartbeat_s
        self.release_memory, self.take_over = release_memory, take_over
        self.holds = False  # servers whose weights are ours
        self.resting: list[Member] | None = None  # those that gave their memory back
        self.weight_version = NO_WEIGHTS
        self.publication: Publication | None = None
        self.waits = False  # for the process that publishes
        self.counted: dict[str, float] = {}  # what `take_counts` has told
        super().__init__("sglang-client")
        self.submit = self.thread.submit

    async def open(self) -> None:
        """Every server must be there, of a known version, and of this model."""
        self.http: aiohttp.ClientSession = new_http_session()
        members = [
            Member(Client(url, self.http), log_file(self.logs, url) if self.logs else None)
            for url in self.urls
        ]
        self.fleet = Fleet(
            members,
            concurrency=self.concurrency,
            deadline_s=self.deadline_s,
            lost_s=self.lost_s,
            heartbeat_s=self.heartbeat_s,
        )
        abouts = await asyncio.gather(*(m.client.about(within_s=OPEN_S) for m in members))
        for member, about in zip(members, abouts, strict=True):
            await self.check_server(member.client, about)
        self.about = abouts[0]
        self.context_length = min(about.context_length for about in abouts)
        self.longest_prompt = min(about.longest_prompt for about in abouts)
        alike = {(a.dtype, a.device, a.tensor_parallel_size) for a in abouts}
        if len(alike) > 1:
            raise ValueError(f"servers differ in (dtype, device, tp size): {sorted(alike)}")
        self.publication = self.make_publication() if self.way else None

    async def check_server(self, client: Client, about: About) -> None:
        if about.version not in SUPPORTED:
            raise ValueError(
                f"{client.url} is SGLang {about.version}; supported: {', '.join(SUPPORTED)}"
            )
        check_same_model(self.folder, Path(about.model_path))
        if not self.way:
            return
        if about.weight_version != FREE and not self.take_over:
            raise ConfigError(
                f"{client.url} has weights of version {about.weight_version}: a training run or "
                "another evaluation uses it, and would go on with ours; give servers of its own "
                "(`rlef serve` with another rollout.servers.port), or, where nobody uses it any "
                "more, start it again"
            )
        expected = self.model.served_names()
        for rank in await client.checksums(within_s=self.publish_s):
            if rank.keys() != expected:
                unlike = sorted(rank.keys() ^ expected)
                raise ValueError(
                    f"{client.url} holds parameters that we would not know how to verify: {unlike}"
                )

    def make_publication(self) -> Publication:
        if self.way == "disk":
            if self.weights_folder is None:
                raise ValueError("publication by disk needs a folder that servers can read")
            return DiskPublication(self.weights_folder, self.folder, deadline_s=self.publish_s)
        if self.way == "distributed":
            backend = "gloo" if self.about.device == "cpu" else "nccl"
            host = own_address(self.urls)
            carrier = Broadcasts(host, backend=backend, deadline_s=self.publish_s)
            return BucketPublication(carrier, deadline_s=self.publish_s)
        if self.way == "tensor":
            shared = SharedTensors(deadline_s=self.publish_s)
            return BucketPublication(shared, deadline_s=self.publish_s)
        raise ValueError(f"unknown way to publish weights {self.way!r}; known: {', '.join(WAYS)}")

    def close(self) -> None:
        if self.publication is not None:
            self.publication.close()
        super().close()

    async def shut(self) -> None:
        await self.fleet.close()
        if self.holds:
            await on_each(
                self.fleet.members, lambda client: client.set_version(FREE, within_s=PROBE_S)
            )
        await self.http.close()

    # ---------------------------------------------------------------- protocol

    @asynccontextmanager
    async def session(self) -> AsyncIterator[SGLangSession]:
        yield SGLangSession(self)

    def update_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Brings the weights to all servers, or leaves it to the process that does, until
        `end_update`.

        EngineError unless every server that is ready afterwards holds exactly what was sent: then
        none is, and requests wait until a publication succeeds.
        """
        if self.publication is None:
            self.submit(self.fleet.control.acquire()).result()  # paused servers are not judged
            self.waits = True
            for _ in named_tensors:  # gathered over all ranks
                pass
        else:
            self.holds = True
            if self.resting is not None:
                self.submit(self.wake()).result()
            weights = SentWeights(
                named_tensors,
                self.model,
                getattr(torch, self.about.dtype),
                self.about.tensor_parallel_size,
                self.about.device,
            )
            try:
                self.publication.publish(self.fleet, self.submit, weights, version)
            except BaseException:
                self.submit(self.withhold()).result()
                raise
            self.weight_version = version

    def rest(self) -> None:
        if self.release_memory and self.publication is not None:
            self.submit(self.release()).result()

    async def release(self) -> None:
        """Until `wake`, nobody is judged or brought to weights, for which there is no room."""
        await self.fleet.control.acquire()
        ready = [member for member in self.fleet.members if member.ready]
        self.resting = await on_each(
            ready, lambda client: client.release_memory(within_s=self.publish_s)
        )

    async def wake(self) -> None:
        """They have room for weights again. What fails here is left out of the publication, or
        fails it."""
        assert self.resting is not None
        held = str(self.fleet.version)
        try:
            await on_each(
                self.resting,
                lambda client: client.make_room_for_weights(held, within_s=self.publish_s),
            )
        finally:
            self.resting = None
            self.fleet.control.release()

    def end_update(self, version: int | None) -> None:
        if self.waits:
            self.waits = False
            self.submit(self.expect(version)).result()

    async def withhold(self) -> None:
        self.fleet.withhold()

    async def expect(self, version: int | None) -> None:
        self.fleet.control.release()
        if version is not None:
            self.fleet.expect(version)
            self.weight_version = version

    @property
    def counts(self) -> dict[str, float]:
        """Since the start: requests answered, failures of servers, how often one returned and how
        often it had to be brought to the current weights for that, tokens sampled, tokens of
        contexts, and of these the ones that came from a server's cache, all of them and those of
        requests after a dialogue's first (`follow_up_`); seconds in which each
        server had a request of this process (`BUSY` and its address), and in which publications of
        this process held them up (`paused_s`, the longest of a server)."""
        return self.submit(self.fleet.take_stock()).result()

    def take_counts(self) -> dict[str, float]:
        before, self.counted = self.counted, self.counts
        since = {name: count - before.get(name, 0) for name, count in self.counted.items()}
        return {name: count for name, count in since.items() if count}

    def check_request(self, token_ids: Sequence[int], sampling: Sampling) -> Sampling:
        """The sampling, with at most as many tokens as there is room for. ValueError for what a
        server refuses, or dies of: a token id outside the vocabulary ends it."""
        if self.weight_version == NO_WEIGHTS:
            raise EngineError("no weights were published")
        words, length = self.model.config.vocab_size, len(token_ids)
        if length == 0:
            raise ValueError("the prompt is empty; give at least a begin-of-text token")
        room = self.context_length - length
        if room < 1 or length > self.longest_prompt:
            raise ValueError(
                f"the prompt has {length} tokens, the servers take {self.longest_prompt} and "
                f"{self.context_length} with the answer; lower rollout.max_context, or start them "
                "with a longer context"
            )
        check_ids_and_sampling(token_ids, words, sampling)
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))


def joined(first: Completion, then: Completion) -> Completion:
    return Completion(
        first.token_ids + then.token_ids,
        first.logprobs + then.logprobs,
        first.weight_versions + then.weight_versions,
        then.finish_reason,
    )
