"""Which SGLang server takes a request, and what happens when one fails.

Theory of operation. Everything is of one event loop. A dialogue's first request goes to the server
with the fewest open ones, its later requests to the same one, which holds the dialogue so far in
its cache. A server has at most `concurrency` requests open; more wait for their turn there.
A request waits for its answer as long as the server is healthy: one that was silent for
`heartbeat_s` is asked. A server that cannot be reached, breaks the connection, answers nonsense or
with weights that are not the current ones, or does not say that it is healthy, is taken out:
whoever waits there goes to another one, and so does the request that failed, up to `MOST_TRIES`
times within `deadline_s`. When no server has been ready for `lost_s`, all who wait are told so.

A server that is out is asked by a task of its own, more and more rarely, for the version of its
weights. With the current ones it is back. With others (it was started again) it is brought to them
by `restore`, if there is a way, else it stays out until the next publication. So no server serves
before it has the current weights. Publication and restoring exclude each other (`control`).
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from rlef_mega.engines import BUSY, EngineError, EngineLostError
from rlef_mega.engines.sglang.http import PROBE_S, Answer, Client, ServerError
from rlef_mega.engines.sglang.members import Member, Place
from rlef_mega.types import Sampling

MOST_TRIES = 4  # of a request: one that kills servers must not kill them all for ever
FIRST_PROBE_S = 0.2
SLOWEST_PROBE_S = 5.0
SETTLE_S = 2.0  # for the other servers, once the first has new weights


class Fleet:
    """The servers of one engine. None is ready before it serves `version`."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        concurrency: int,
        deadline_s: float,
        lost_s: float,
        heartbeat_s: float,
    ) -> None:
        self.members = list(members)
        self.concurrency, self.deadline_s = concurrency, deadline_s
        self.lost_s, self.heartbeat_s = lost_s, heartbeat_s
        self.none_since_s: float | None = None  # of the loop's clock; None: one is ready
        self.version: int | None = None
        self.restore: Callable[[Client], Awaitable[None]] | None = None
        self.control = asyncio.Lock()
        self.some_ready = asyncio.Event()
        self.settled = asyncio.Event()
        self.settled.set()
        self.settling: asyncio.Task[None] | None = None
        self.asking: set[asyncio.Task[Answer]] = set()
        self.counts: Counter[str] = Counter()  # see SGLangEngine.counts

    # ---------------------------------------------------------------- requests

    async def generate(
        self, place: Place, token_ids: Sequence[int], sampling: Sampling, seed: int
    ) -> Answer:
        """From the dialogue's server, or another. EngineError if none did it in time,
        EngineLostError if there was none for so long that none is expected."""
        failures: list[str] = []
        try:
            async with asyncio.timeout(self.deadline_s):
                while len(failures) < MOST_TRIES:
                    member = await self.take(place)
                    try:
                        answer = await self.ask(member, token_ids, sampling, seed)
                        versions = answer.completion.weight_versions
                        if versions[0] < place.version:  # others took new ones before it
                            raise ServerError(
                                f"{member.client.url} serves version {versions[0]}, the dialogue "
                                f"has had {place.version}"
                            )
                        self.count(answer, follow_up=place.version >= 0)
                        place.member, place.version = member, versions[-1]
                        return answer
                    except ServerError as error:
                        failures.append(str(error))
                        self.take_out(member, str(error))
                    finally:
                        self.give_back(member)
        except TimeoutError:
            raise EngineError(
                f"no server answered within {self.deadline_s:g} s ({self.reasons()})"
            ) from None
        raise EngineError(f"{MOST_TRIES} tries failed: {'; '.join(failures)}")

    async def ask(
        self, member: Member, token_ids: Sequence[int], sampling: Sampling, seed: int
    ) -> Answer:
        """One try at one server, as long as it is healthy."""
        version = self.version
        asking = asyncio.create_task(member.client.generate(token_ids, sampling, seed))
        self.asking.add(asking)
        asking.add_done_callback(self.asking.discard)
        try:
            while not asking.done():
                await asyncio.wait({asking}, timeout=self.heartbeat_s)
                if not asking.done():
                    await self.require_alive(member)
            answer = asking.result()
            member.heard_at_s = asyncio.get_running_loop().time()
        finally:
            asking.cancel()  # which ends the request there
            await asyncio.gather(asking, return_exceptions=True)
        newest = answer.completion.weight_versions[-1]
        if version is None or newest < version:
            raise ServerError(f"{member.client.url} serves version {newest}, not {version}")
        return answer

    def count(self, answer: Answer, *, follow_up: bool) -> None:
        self.counts["requests"] += 1
        self.counts["sampled_tokens"] += len(answer.completion.token_ids)
        self.counts["context_tokens"] += answer.context_tokens
        self.counts["cached_tokens"] += answer.cached_tokens
        if follow_up:
            self.counts["follow_up_tokens"] += answer.context_tokens
            self.counts["follow_up_cached_tokens"] += answer.cached_tokens

    async def take_stock(self) -> dict[str, float]:
        """`counts`, how long each server has been busy, and the longest one paused, until now."""
        for member in self.members:
            member.count_busy()
        busy = {f"{BUSY}{member.client.url}": member.busy_s for member in self.members}
        paused_s = max(member.client.paused_s for member in self.members)
        return {**self.counts, **busy, "paused_s": paused_s}

    async def require_alive(self, member: Member) -> None:
        """ServerError unless it was heard of lately; one question for all who wait there. While
        weights are published, servers stand still and none is judged."""
        silent_s = asyncio.get_running_loop().time() - member.heard_at_s
        if silent_s < self.heartbeat_s or self.control.locked():
            return
        if member.checking is None or member.checking.done():
            member.checking = asyncio.create_task(self.check(member))
        await asyncio.shield(member.checking)

    async def check(self, member: Member) -> None:
        await member.client.check_health(within_s=self.heartbeat_s)
        member.heard_at_s = asyncio.get_running_loop().time()

    async def take(self, place: Place) -> Member:
        """A place at a server that is ready: the dialogue's own, or the one with the least to do.
        To be given back."""
        while True:
            while not (self.settled.is_set() and self.some_ready.is_set()):
                await self.wait_for_some()
                await self.settled.wait()
            ready = [member for member in self.members if member.ready]
            if place.member is None or not place.member.ready:
                # among equals by chance, or all ranks would begin with the first
                place.member = min(ready, key=lambda m: (m.load, random.random()))
            member = place.member
            if member.open_requests < self.concurrency:
                member.count_busy()
                member.open_requests += 1
                return member
            turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            member.waiting.append(turn)
            try:
                if await turn:
                    return member
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled() and turn.result():
                    self.give_back(member)
                raise

    async def wait_for_some(self) -> None:
        """Until a server is ready. EngineLostError where none was for `lost_s`; publications, while
        which all stand still, do not count."""
        while not self.some_ready.is_set():
            now = asyncio.get_running_loop().time()
            if self.none_since_s is None or self.control.locked():
                self.none_since_s = now
            if now - self.none_since_s >= self.lost_s:
                raise EngineLostError(self.lost_message())
            rest_s = self.none_since_s + self.lost_s - now
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.some_ready.wait(), min(rest_s, self.heartbeat_s))

    def lost_message(self) -> str:
        tails = "".join(member.log_tail() for member in self.members)
        return f"no server was ready for {self.lost_s:g} s ({self.reasons()}){tails}"

    def give_back(self, member: Member) -> None:
        """To who waits longest there, or to nobody."""
        while member.ready and member.waiting:
            turn = member.waiting.popleft()
            if not turn.done():
                turn.set_result(True)
                return
        member.count_busy()
        member.open_requests -= 1

    # ------------------------------------------------------------ who is ready

    def expect(self, version: int) -> None:
        """From now on only servers with these weights serve; each is asked. Requests wait for those
        that were ready until now, or all would go to the first that has the weights."""
        awaited = [member for member in self.members if member.ready] or self.members
        self.version = version
        for member in self.members:
            self.put_aside(member)
            self.probe(member)
        self.settled.clear()
        if self.settling is not None:
            self.settling.cancel()
        self.settling = asyncio.create_task(self.settle(awaited))

    async def settle(self, awaited: Sequence[Member]) -> None:
        probes = [member.probing for member in awaited if member.probing is not None]
        await self.some_ready.wait()
        await asyncio.wait(probes, timeout=SETTLE_S)
        self.settled.set()

    def install(self, version: int, members: Sequence[Member]) -> None:
        """These were brought to the version and verified; the others are not ready."""
        self.version = version
        for member in self.members:
            if member in members:
                self.bring_back(member)
            else:
                member.doubtful = True
                self.take_out(member, member.last_failure)

    def withhold(self) -> None:
        """A publication failed, and what servers hold is unknown: none serves before the next."""
        self.version = self.restore = None
        for member in self.members:
            if member.ready:
                member.last_failure = "the last publication failed"
            self.put_aside(member)

    def put_aside(self, member: Member) -> None:
        """It gets no requests until it is `bring_back`; who waits there goes elsewhere."""
        member.ready = False
        if not any(m.ready for m in self.members):
            self.some_ready.clear()
        while member.waiting:
            turn = member.waiting.popleft()
            if not turn.done():
                turn.set_result(False)

    def take_out(self, member: Member, reason: str) -> None:
        member.last_failure, member.failed = reason, True
        if member.ready:
            self.counts["failures"] += 1
        self.put_aside(member)
        self.probe(member)

    def bring_back(self, member: Member) -> None:
        member.ready, member.failed, member.doubtful = True, False, False
        self.none_since_s = None
        self.some_ready.set()

    def probe(self, member: Member) -> None:
        if member.probing is None:
            member.probing = asyncio.create_task(self.probe_until_ready(member))

    async def probe_until_ready(self, member: Member) -> None:
        pause_s = FIRST_PROBE_S
        try:
            while not member.ready:
                try:
                    await self.require_current(member)
                    self.bring_back(member)
                    self.counts["returns"] += 1
                except EngineError as error:
                    member.last_failure = str(error)
                    await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                    pause_s = min(SLOWEST_PROBE_S, 2 * pause_s)
        finally:
            member.probing = None

    async def require_current(self, member: Member) -> None:
        """Returns when it has the current weights, to which it is brought if need be, and, after a
        failure, is healthy; else ServerError."""
        client = member.client
        if member.doubtful:  # paused perhaps, and then it generates nothing
            found = await client.weight_version(within_s=PROBE_S)
        else:
            if member.failed:  # not always: it takes a server a second to say so
                await client.check_health(within_s=PROBE_S)
            found = await client.reported_version(within_s=PROBE_S)
        # which may have changed while we waited
        if found == str(self.version) and not member.doubtful:
            return
        if self.restore is None:
            raise ServerError(f"{client.url} serves weights {found!r}, not {self.version}")
        async with self.control:  # a publication may have come and gone while we waited
            restore, version = self.restore, self.version
            if member.ready:
                return
            if restore is None:
                raise ServerError(f"{client.url}: the last publication failed")
            await restore(client)
            if self.version != version:
                raise ServerError(f"{client.url} has weights {version}, not {self.version}")
        self.counts["restored"] += 1

    def reasons(self) -> str:
        """Each server that is not ready, and why; or that all are."""
        out = [f"{m.client.url}: {m.last_failure}" for m in self.members if not m.ready]
        return "; ".join(out) or "all servers are busy"

    async def close(self) -> None:
        """Ends what is under way, on the servers too."""
        probes = [member.probing for member in self.members]
        tasks = [self.settling, *probes, *(member.checking for member in self.members)]
        running = [task for task in tasks if task is not None]
        for task in (*running, *self.asking):
            task.cancel()
        await asyncio.gather(*running, *self.asking, return_exceptions=True)
        aborts = [task for member in self.members for task in member.client.aborting]
        await asyncio.gather(*aborts)
