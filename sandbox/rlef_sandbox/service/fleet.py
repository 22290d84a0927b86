"""Which server takes the next request: the one with the fewest open, among those that are up.

Theory of operation. A request takes a server, and gives it back when the try is over, however it
ended. A server that failed is out: no request takes it, and a task of its own asks for its health,
more and more rarely, until it is ready again. A server whose queue is full rests for as long as it
said. Where no server is to be had, or all have as many open requests as they may, requests wait;
whatever changes that wakes them. Everything is of one event loop.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

FIRST_PROBE_S = 0.1
SLOWEST_PROBE_S = 15.0


class Server:
    """One address, and what is known of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.open_requests = 0
        self.rests_until_s = 0.0  # of the loop's clock
        self.last_failure = "no failure"
        self.probing: asyncio.Task[None] | None = None

    @property
    def out(self) -> bool:
        return self.probing is not None


class Fleet:
    """The servers of one client. `is_ready` asks one of them, and says why not, or None."""

    def __init__(
        self,
        urls: Iterable[str],
        *,
        connections: int,
        is_ready: Callable[[Server], Awaitable[str | None]],
    ) -> None:
        self.servers = [Server(url) for url in urls]
        self._connections = connections
        self._is_ready = is_ready
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> Server:
        """The least busy server that is up; waits until there is one. To be given back."""
        while (server := self._least_busy()) is None:
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():
                    self._wake_one()  # its turn is another's now
                raise
        server.open_requests += 1
        return server

    def give_back(self, server: Server) -> None:
        server.open_requests -= 1
        self._wake_one()

    def rest(self, server: Server, seconds: float, reason: str) -> None:
        """Leave a busy server alone; a little longer than it said, so that clients spread."""
        loop = asyncio.get_running_loop()
        seconds *= random.uniform(1.0, 1.25)
        server.last_failure = reason
        server.rests_until_s = max(server.rests_until_s, loop.time() + seconds)
        loop.call_at(server.rests_until_s + 0.001, self._wake_all)

    def take_out(self, server: Server, reason: str) -> None:
        """No more requests for this server until it is ready again."""
        server.last_failure = reason
        if not server.out:
            server.probing = asyncio.create_task(self._probe(server))

    def reasons(self) -> str:
        """Each server and how it last failed."""
        return "; ".join(f"{server.url}: {server.last_failure}" for server in self.servers)

    async def close(self) -> None:
        probes = [server.probing for server in self.servers if server.probing is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    def _least_busy(self) -> Server | None:
        now_s = asyncio.get_running_loop().time()
        free = [
            server
            for server in self.servers
            if not server.out
            and server.open_requests < self._connections
            and server.rests_until_s <= now_s
        ]
        # among equals by chance, or many clients would all begin with the first
        return min(free, key=lambda s: (s.open_requests, random.random()), default=None)

    async def _probe(self, server: Server) -> None:
        pause_s = FIRST_PROBE_S
        while (reason := await self._is_ready(server)) is not None:
            server.last_failure = reason
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(SLOWEST_PROBE_S, 2 * pause_s)
        server.probing = None
        self._wake_all()

    def _wake_one(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return

    def _wake_all(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for place in waiting:
            if not place.done():
                place.set_result(None)
