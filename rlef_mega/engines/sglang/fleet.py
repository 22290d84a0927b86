"""Which SGLang server serves a request, and what happens to servers that fail and come back.

Theory of operation. All of this runs in one event loop (engine.py).

A dialogue's first request goes to a ready server with the fewest requests, its later ones to the
same server, which has the context in its cache. At most `concurrency` requests are open at a
server; further ones queue there. `deadline_s` bounds a request with all its tries and waits; a
single try has no limit while its server is healthy: a server that was silent for `heartbeat_s` gets
a health check.

Failures. A server is taken out if it cannot be reached, breaks the connection, returns a malformed
answer or one from old weights, or fails its health check. Requests that queue there move to another
server. The request that failed is tried again elsewhere, MOST_TRIES tries in all. If no server was
ready for `lost_s`, all waiting requests fail with EngineLostError.

Recovery. A task for each server that is out asks for its health and its weight version, at growing
intervals (`probe_until_ready`). With the current version it is ready again. With another version,
as after a restart, it first loads the current weights through `restore`, if the publication left
something to load, and otherwise stays out until the next publication. So no server serves before it
has the current weights. The lock `control` is held by a publication or one restoring probe.
"""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlef_mega.config import ServersConfig
from rlef_mega.engines import BUSY, EngineError, EngineLostError, GenerationRequest
from rlef_mega.engines.sglang.answers import ServerError
from rlef_mega.engines.sglang.client import PROBE_S, Client
from rlef_mega.engines.sglang.members import Member, on_each, reasons
from rlef_mega.engines.sglang.processes import log_tail
from rlef_mega.types import Completion

MOST_TRIES = 4  # of a request: one that kills servers must not kill all of them
FIRST_PROBE_S = 0.2
SLOWEST_PROBE_S = 5.0


@dataclass(eq=False)
class Affinity:
    """The server that answered a dialogue last, and the newest version that sampled in it."""

    member: Member | None = None
    version: int = -1


class Fleet:
    """The servers of one engine. A server is ready only while it serves `version`."""

    heartbeat_s = 30.0  # silence of a server before it gets a health check

    def __init__(self, members: Iterable[Member], limits: ServersConfig) -> None:
        self.members, self.limits = list(members), limits
        for member in self.members:
            member.slots = asyncio.Semaphore(limits.concurrency)
        self.none_since_s: float | None = None  # since when requests have found no ready server
        self.version: int | None = None
        # loads the current weights into one server; None if the publication left nothing to load
        self.restore: Callable[[Client], Awaitable[None]] | None = None
        self.control = asyncio.Lock()
        self.some_ready = asyncio.Event()
        self.tasks: set[asyncio.Task[Any]] = set()  # all running tasks
        self.counts: Counter[str] = Counter()  # see SGLangEngine.counts

    # ---------------------------------------------------------------- requests

    async def generate(self, affinity: Affinity, request: GenerationRequest) -> Completion:
        """Sample at the dialogue's server or, if that fails, at another.

        Raises EngineError if no server succeeded in time, EngineLostError if none was ready.
        """
        failures: list[str] = []
        try:
            async with asyncio.timeout(self.limits.deadline_s):
                while len(failures) < MOST_TRIES:
                    async with self.slot(affinity) as member:
                        try:
                            return await self.ask(member, affinity, request)
                        except ServerError as error:
                            failures.append(str(error))
                            self.take_out(member, str(error))
        except TimeoutError:
            raise EngineError(
                f"no server answered within {self.limits.deadline_s:g} s ({self.reasons()})"
            ) from None
        raise EngineError(f"{MOST_TRIES} tries failed: {'; '.join(failures)}")

    async def ask(
        self, member: Member, affinity: Affinity, request: GenerationRequest
    ) -> Completion:
        """Ask one server, and wait as long as it is healthy. Raises ServerError if it fails, or
        samples from weights older than the current ones or the dialogue's newest."""
        expected = self.version
        asking = self.start(member.generate(request))
        try:
            while not asking.done():
                await asyncio.wait({asking}, timeout=self.heartbeat_s)
                if not asking.done():
                    await self.require_alive(member)
            completion, cached = asking.result()
        finally:
            asking.cancel()  # which ends the request on the server
            await asyncio.gather(asking, return_exceptions=True)
        member.heard_at_s = time.monotonic()
        first, newest = completion.weight_versions[0], completion.weight_versions[-1]
        if expected is None or newest < expected:
            raise ServerError(f"{member.url} serves version {newest}, not {expected}")
        if first < affinity.version:  # other servers were updated before it
            raise ServerError(
                f"{member.url} serves version {first}, but the dialogue already has tokens "
                f"of version {affinity.version}"
            )
        context, sampled = len(request.token_ids), len(completion.token_ids)
        self.counts.update(requests=1, sampled_tokens=sampled)
        self.counts.update(context_tokens=context, cached_tokens=cached)
        if affinity.version >= 0:
            self.counts.update(follow_up_tokens=context, follow_up_cached_tokens=cached)
        affinity.member, affinity.version = member, newest
        return completion

    async def read_counts(self) -> dict[str, float]:
        """Return the counts, each server's busy time, and the longest paused time of a server."""
        for member in self.members:
            member.add_load(0)
        busy = {f"{BUSY}{member.url}": member.busy_s for member in self.members}
        paused_s = max(member.paused_s for member in self.members)
        return {**self.counts, **busy, "paused_s": paused_s}

    async def require_alive(self, member: Member) -> None:
        """Raise ServerError if a silent server fails its health check, which all its requests
        share. Servers that are paused for a publication are not checked."""
        silent_s = time.monotonic() - member.heard_at_s
        if silent_s < self.heartbeat_s or self.control.locked():
            return
        if member.checking is None or member.checking.done():
            member.checking = self.start(self.check(member))
        await asyncio.shield(member.checking)

    async def check(self, member: Member) -> None:
        await member.check_health(within_s=self.heartbeat_s)
        member.heard_at_s = time.monotonic()

    @asynccontextmanager
    async def slot(self, affinity: Affinity) -> AsyncIterator[Member]:
        """Wait for a slot at the dialogue's server, or at the least loaded one if that is out."""
        while True:
            await self.wait_for_some()
            if affinity.member is None or not affinity.member.ready:
                ready = [member for member in self.members if member.ready]
                # ties are broken by chance, or all ranks would begin with the first server
                affinity.member = min(ready, key=lambda m: (m.load, random.random()))
            member = affinity.member
            member.add_load(1)
            try:
                async with member.slots:
                    if member.ready:  # it may have failed while the request waited
                        yield member
                        return
            finally:
                member.add_load(-1)

    async def wait_for_some(self) -> None:
        """Wait until a server is ready. Raises EngineLostError if none was for `lost_s`, not
        counting publications, in which all servers are paused."""
        while not self.some_ready.is_set():
            now = time.monotonic()
            if self.none_since_s is None or self.control.locked():
                self.none_since_s = now
            left_s = self.none_since_s + self.limits.lost_s - now
            if left_s <= 0:
                raise self.lost()
            with contextlib.suppress(TimeoutError):
                limit_s = min(left_s, self.heartbeat_s)
                await asyncio.wait_for(self.some_ready.wait(), limit_s)

    def lost(self) -> EngineLostError:
        """Return the error for a fleet without any ready server, with the end of each log."""
        tails = "".join(log_tail(member.log) for member in self.members)
        return EngineLostError(
            f"no server was ready for {self.limits.lost_s:g} s ({self.reasons()}){tails}"
        )

    # ------------------------------------------------------------ readiness

    async def expect(self, version: int, served: Collection[str]) -> None:
        """Use only servers that have this version, which another process published. Those in
        `served` have it; every other server is asked for its version before it is used."""
        self.version = version
        for member in self.members:
            if member.url in served:
                self.bring_back(member)
            else:
                self.put_aside(member)
                self.probe(member)

    async def install(self, version: int, members: Collection[Member]) -> None:
        """Note that these servers have the version, verified; the others are taken out."""
        self.version = version
        for member in self.members:
            if member in members:
                self.bring_back(member)
            else:
                member.doubtful = True
                self.take_out(member, member.last_failure)

    async def withhold(self) -> None:
        """Use no server before the next publication: the last one failed; weights are unknown."""
        self.version = self.restore = None
        for member in self.members:
            if member.ready:
                member.last_failure = "the last publication failed"
            self.put_aside(member)

    def put_aside(self, member: Member) -> None:
        """Send the server no requests until `bring_back`; those that queue go elsewhere."""
        member.ready = False
        if not any(m.ready for m in self.members):
            self.some_ready.clear()

    def take_out(self, member: Member, reason: str) -> None:
        """Put a server that failed aside, and start asking whether it has come back."""
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
        if member.probing is None or member.probing.done():
            member.probing = self.start(self.probe_until_ready(member))

    async def probe_until_ready(self, member: Member) -> None:
        """Check a server that is out, at growing intervals, until it answers and has the current
        weights; then use it again."""
        pause_s = FIRST_PROBE_S
        while not member.ready:
            try:
                await self.require_current(member)
                self.bring_back(member)
                self.counts["returns"] += 1
            except EngineError as error:
                member.last_failure = str(error)
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(SLOWEST_PROBE_S, 2 * pause_s)

    async def require_current(self, member: Member) -> None:
        """Load the current weights into the server if it has others.

        Raises ServerError unless it has them afterwards and, after a failure, is healthy.
        """
        if member.doubtful:  # perhaps paused, and a paused server fails its health check
            found = (await member.info(within_s=PROBE_S)).weight_version
        else:
            if member.failed:  # only then, because a health check takes a second
                await member.check_health(within_s=PROBE_S)
            found = await member.reported_version(within_s=PROBE_S)
        # compared with `self.version` as it is after the wait
        if found == str(self.version) and not member.doubtful:
            return
        if self.restore is None:
            raise ServerError(f"{member.url} serves weights {found!r}, not {self.version}")
        async with self.control:  # a publication may have ended while we waited
            restore, version = self.restore, self.version
            if member.ready:
                return
            if restore is None:
                raise ServerError(f"{member.url}: the last publication failed")
            await restore(member)
            if self.version != version:
                raise ServerError(f"{member.url} has weights {version}, not {self.version}")
        self.counts["restored"] += 1

    async def answering(self) -> dict[Member, str]:
        """Return the servers whose schedulers answer within a heartbeat, and their weight versions;
        take the others out. Raises EngineLostError if none answers for `lost_s`."""
        until_s = time.monotonic() + self.limits.lost_s
        ask = partial(Client.info, within_s=self.heartbeat_s)
        while not (infos := await on_each(self.members, ask)):
            if time.monotonic() >= until_s:
                raise self.lost()
            await asyncio.sleep(FIRST_PROBE_S)
        for member in self.members:
            if member not in infos:
                self.take_out(member, member.last_failure)
        return {member: info.weight_version for member, info in infos.items()}

    def reasons(self) -> str:
        """Say why no server takes a request: why each is not ready, or that all are busy."""
        return reasons([m for m in self.members if not m.ready]) or "all servers are busy"

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def close(self) -> None:
        """Cancel all tasks, and end their requests on the servers."""
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(task for m in self.members for task in m.aborting))
