"""Choose the server of each request: of those that are up, the one with the fewest open requests.

Theory of operation. A request takes a server for one try, and gives it back when the try is over. A
server that failed is out: no request takes it, and a task asks for its health, less and less often,
until it is ready again. A server whose queue is full rests for the time that it asked for. If every
server is out, rests, or has its maximum of open requests, requests wait until one is free.
Everything runs in one event loop.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

FIRST_PROBE_S = 0.1
SLOWEST_PROBE_S = 15.0


class GradingServer:
    """The address of one server, and its state as the client knows it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.open_requests = 0
        self.rests_until_s = 0.0  # of the loop's clock
        self.last_failure = "no failure"
        self.probing: asyncio.Task[None] | None = None  # while it is out


class GradingServers:
    """The servers of one client. `ask_health` returns what a server reports, or, as a string, why
    it is not ready.
    """

    def __init__(
        self,
        urls: Iterable[str],
        *,
        connections: int,
        ask_health: Callable[[GradingServer], Awaitable[object]],
    ) -> None:
        self.all = [GradingServer(url) for url in urls]
        self._connections = connections
        self._ask_health = ask_health
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> GradingServer:
        """Wait for a free server and return the least busy. The caller gives it back."""
        while (server := self._least_busy()) is None:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._wake(1)  # this one was woken but leaves
                raise
        server.open_requests += 1
        return server

    def give_back(self, server: GradingServer) -> None:
        server.open_requests -= 1
        self._wake(1)

    def rest(self, server: GradingServer, seconds: float, reason: str) -> None:
        """Send nothing to a busy server for as long as it asked for, plus a random part, so that
        clients do not return all at once.
        """
        loop = asyncio.get_running_loop()
        seconds *= random.uniform(1.0, 1.25)
        server.last_failure = reason
        server.rests_until_s = max(server.rests_until_s, loop.time() + seconds)
        loop.call_at(server.rests_until_s + 0.001, self._wake_all)

    def take_out(self, server: GradingServer, reason: str) -> None:
        """Send nothing to this server until it is ready again."""
        server.last_failure = reason
        if server.probing is None:
            server.probing = asyncio.create_task(self._probe(server))

    def reasons(self) -> str:
        """Return each server and how it last failed."""
        return "; ".join(f"{server.url}: {server.last_failure}" for server in self.all)

    async def close(self) -> None:
        probes = [server.probing for server in self.all if server.probing is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    def _least_busy(self) -> GradingServer | None:
        now_s = asyncio.get_running_loop().time()
        free = [
            server
            for server in self.all
            if server.probing is None
            and server.open_requests < self._connections
            and server.rests_until_s <= now_s
        ]
        # chosen at random among equals, or many clients would all begin with the first
        return min(free, key=lambda s: (s.open_requests, random.random()), default=None)

    async def _probe(self, server: GradingServer) -> None:
        pause_s = FIRST_PROBE_S
        while isinstance(reason := await self._ask_health(server), str):
            server.last_failure = reason
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(SLOWEST_PROBE_S, 2 * pause_s)
        server.probing = None
        self._wake_all()

    def _wake(self, most: int) -> None:
        """Let this many requests choose again, of those that wait for a server."""
        while self._waiting and most:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                most -= 1

    def _wake_all(self) -> None:
        self._wake(len(self._waiting))
