"""`SandboxClient`: the calls of `Sandbox`, answered by servers on other machines.

Theory of operation. Everything runs in the caller's event loop. A call encodes its request once,
gives it an id, and tries servers (`fleet.py`) until one answers or the deadline passes. A server
that cannot be reached, loses the connection, or says 502, 503 or 504 is taken out and the request
goes to another; one that says 429 rests for as long as it says. Between two tries a request waits,
twice as long each time, by a random part of it. The id is the same in each try, so a server that
has the work already does not do it twice, and a caller gets exactly one answer. Whoever cancels the
call frees its place in the server's queue.

A peer that vanished without a word (its node died) is noticed by TCP keepalive within a
minute, while a request that merely takes long is waited for.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import aiohttp

from ..verdict import CallTest, Limits, Result, Test, as_bytes
from . import wire
from .command import checked_token
from .fleet import Fleet, Server
from .record import Record, WireError

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0
CONNECT_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 10.0
OUT_OF_SERVICE = (502, 503, 504)
# Idle seconds before a probe and between probes; milliseconds that anything sent may go unanswered.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_USER_TIMEOUT": 30_000}


class ServiceError(RuntimeError):
    """No server graded the request: says nothing about the program."""


class RequestRefusedError(ValueError):
    """A server will not serve this request, however often it is asked. `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class TryAgainError(Exception):
    """This try failed; the message says how."""


class SandboxClient:
    """Runs and grades programs on servers; an asynchronous context manager of one event loop.

    `urls` are like http://node7:8765. `deadline_s` bounds a call with all its tries, `connections`
    the open requests a server; more calls than that wait here for their turn.
    """

    def __init__(
        self,
        urls: Sequence[str],
        token: str | None = None,
        *,
        deadline_s: float = 900.0,
        connections: int = 64,
    ) -> None:
        if not urls:
            raise ValueError("no servers given; name at least one, like http://127.0.0.1:8765")
        if len(set(urls)) != len(urls):
            raise ValueError(f"a server is named twice in {list(urls)}; name each once")
        if not deadline_s > 0:
            raise ValueError(f"deadline_s is {deadline_s}; it must be above 0")
        if connections < 1:
            raise ValueError(f"connections is {connections}; it must be at least 1")
        self._deadline_s = deadline_s
        self._headers = (
            {} if token is None else {"Authorization": f"Bearer {checked_token(token, 'use')}"}
        )
        self._fleet = Fleet(
            [checked_url(url) for url in urls], connections=connections, is_ready=self._is_ready
        )
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> SandboxClient:
        # the fleet bounds connections, so that a request never waits for one at a server gone bad
        connector = aiohttp.TCPConnector(limit=0, socket_factory=kept_alive_socket)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=self._headers
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._fleet.close()
        await self._open_session().close()
        self._session = None

    async def run(
        self,
        source: str | bytes,
        stdin: str | bytes = b"",
        limits: Limits | None = None,
        language: str = "python",
    ) -> Result:
        """As `Sandbox.run`. ServiceError where no server did it before the deadline."""
        request = wire.RunRequest(as_bytes(source), as_bytes(stdin), limits, language)
        (result,) = await self._ask("/v1/run", wire.RUN, request)
        return result

    async def grade(
        self,
        source: str | bytes,
        tests: Sequence[Test | CallTest],
        limits: Limits | None = None,
        checker: str = "tokens",
        stop_at_first_failure: bool = True,
        language: str = "python",
    ) -> list[Result]:
        """As `Sandbox.grade`. ServiceError where no server did it before the deadline."""
        request = wire.GradeRequest(
            as_bytes(source), tests, limits, checker, stop_at_first_failure, language
        )
        return await self._ask("/v1/grade", wire.GRADE, request)

    async def health(self) -> dict[str, dict[str, Any]]:
        """What each server says of itself. ServiceError naming those that are not ready."""
        servers = self._fleet.servers
        found = await asyncio.gather(*map(self._health_of, servers))
        failures = [
            f"{server.url}: {answer}"
            for server, answer in zip(servers, found, strict=True)
            if isinstance(answer, str)
        ]
        if failures:
            raise ServiceError(f"grading servers are not ready: {'; '.join(failures)}")
        return {
            server.url: answer
            for server, answer in zip(servers, found, strict=True)
            if not isinstance(answer, str)
        }

    async def _ask(
        self, path: str, record: Record, request: wire.RunRequest | wire.GradeRequest
    ) -> list[Result]:
        """The results, from whichever server answers first that does."""
        body = wire.encode_request(record, request)
        headers = {"Content-Type": "application/json", wire.REQUEST_ID: uuid.uuid4().hex}
        pause_s = FIRST_PAUSE_S
        try:
            async with asyncio.timeout(self._deadline_s):
                while True:
                    server = await self._fleet.take()
                    try:
                        return await self._try(server, path, body, headers)
                    except TryAgainError:
                        pass
                    finally:
                        self._fleet.give_back(server)
                    await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                    pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        except TimeoutError:
            raise ServiceError(
                f"no server answered within {self._deadline_s:g} s ({self._fleet.reasons()})"
            ) from None

    async def _try(
        self, server: Server, path: str, body: bytes, headers: dict[str, str]
    ) -> list[Result]:
        """One try at one server. TryAgainError where another may do better."""
        try:
            async with self._open_session().post(
                server.url + path, data=body, headers=headers, allow_redirects=False
            ) as response:
                answer = await response.read()
            if response.status == 200:
                return wire.decode_results(answer)
        except (aiohttp.ClientError, OSError, WireError) as error:
            self._fleet.take_out(server, reason_of(error))
            raise TryAgainError from None
        reason = f"{response.status} {refusal_in(answer)}"
        if response.status == 429:
            self._fleet.rest(server, seconds_in(response.headers.get("Retry-After")), reason)
            raise TryAgainError
        if response.status in OUT_OF_SERVICE:
            self._fleet.take_out(server, reason)
            raise TryAgainError
        raise RequestRefusedError(response.status, f"{server.url} refused the request: {reason}")

    async def _is_ready(self, server: Server) -> str | None:
        answer = await self._health_of(server)
        return answer if isinstance(answer, str) else None

    async def _health_of(self, server: Server) -> dict[str, Any] | str:
        """What a server says of itself, or why it is not ready."""
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        try:
            async with self._open_session().get(
                server.url + "/health", timeout=timeout, allow_redirects=False
            ) as response:
                answer = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            return reason_of(error)
        if response.status != 200:
            return f"{response.status} {refusal_in(answer)}"
        try:
            about = json.loads(answer)
        except ValueError:
            about = None
        is_ours = isinstance(about, dict) and isinstance(about.get("isolation"), dict)
        return about if is_ours else "it is no grading server"

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the client is closed; use it within: async with SandboxClient(...)")
        return self._session


def checked_url(url: str) -> str:
    """The address without a slash at its end. ValueError if it is none."""
    scheme, separator, rest = url.partition("://")
    host = rest.rstrip("/")
    if (
        scheme not in ("http", "https")
        or not separator
        or not host
        or any(c in host for c in "/?# ")
    ):
        raise ValueError(f"{url!r} is not the address of a server; write it like http://node7:8765")
    return f"{scheme}://{host}"


def kept_alive_socket(address: Any) -> socket.socket:
    """A socket whose peer's silent death is noticed within a minute."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # Linux has all three
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made


def reason_of(error: Exception) -> str:
    return str(error) or type(error).__name__


def refusal_in(answer: bytes) -> str:
    """The reason in a server's refusal; the start of the text where a proxy sent it."""
    try:
        wired = json.loads(answer)
        return str(wired["error"]) if "error" in wired else str(wired["status"])
    except (ValueError, KeyError, TypeError):
        return answer[:200].decode(errors="replace")


def seconds_in(retry_after: str | None) -> float:
    """Retry-After in seconds; 1 where it is absent or a date."""
    try:
        return min(60.0, max(0.0, float(retry_after or 1.0)))
    except ValueError:
        return 1.0
