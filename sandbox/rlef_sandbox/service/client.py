"""`SandboxClient`: the calls of `Sandbox`, answered by servers on other machines.

Theory of operation. Everything runs in the caller's event loop. A call encodes its request once,
gives it an id, and tries servers (`server_choice.py`) until one answers or the deadline passes. A
server that cannot be reached, loses the connection, or answers 502, 503 or 504 is taken out, and
the request goes to another. One that answers 408 or 429 rests for the time it asks for. A request
waits between two tries, with random exponential backoff. Its id is the same in each try, so a
server that already has the work does not repeat it, and a caller gets exactly one answer.
Cancelling the call removes the request from the server's queue.

The client waits for a slow request as long as its server is alive. It asks the server for its
health every `heartbeat_s`, and takes out one that does not answer (it hangs, or its node is gone).
A server that drains still answers the requests that it has.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import uuid
from collections.abc import Sequence
from typing import Any

import aiohttp

from ..verdict import AnyTest, CheckerProgram, Limits, Result, as_bytes
from . import wire
from .command import checked_token
from .server_choice import GradingServer, GradingServers
from .wire import WireError

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0
CONNECT_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 10.0
OUT_OF_SERVICE = (502, 503, 504)
URL_FORM = re.compile("(https?://[^/?# ]+)/*")


class ServiceError(RuntimeError):
    """No server graded the request. This is not a verdict on the program."""


class RequestRefusedError(ValueError):
    """A server refuses this request; retrying is useless. `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class TryAgainError(Exception):
    """This try failed; another may succeed."""


class SandboxClient:
    """Runs and grades programs on servers; an asynchronous context manager of one event loop.

    `urls` are like http://node7:8765. `deadline_s` bounds a call with all its tries, `connections`
    the open requests of each server; further calls wait in the client. `heartbeat_s` is how often a
    server that has not answered yet is asked for its health, and how soon it must answer that.
    """

    def __init__(
        self,
        urls: Sequence[str],
        token: str | None = None,
        *,
        deadline_s: float = 900.0,
        connections: int = 256,
        heartbeat_s: float = 20.0,
    ) -> None:
        if not urls:
            raise ValueError("no servers given; name at least one, like http://127.0.0.1:8765")
        if len(set(urls)) != len(urls):
            raise ValueError(f"a server is named twice in {list(urls)}; name each once")
        for name, seconds in (("deadline_s", deadline_s), ("heartbeat_s", heartbeat_s)):
            if not seconds > 0:
                raise ValueError(f"{name} is {seconds}; it must be above 0")
        if connections < 1:
            raise ValueError(f"connections is {connections}; it must be at least 1")
        self._deadline_s = deadline_s
        self._heartbeat_s = heartbeat_s
        self._headers = (
            {} if token is None else {"Authorization": f"Bearer {checked_token(token, 'use')}"}
        )
        self._servers = GradingServers(
            [checked_url(url) for url in urls], connections=connections, ask_health=self._health_of
        )
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> SandboxClient:
        # GradingServers bounds connections, so no request waits here for one to a failed server
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._servers.close()
        await self._open_session().close()
        self._session = None

    async def run(
        self,
        source: str | bytes,
        stdin: str | bytes = b"",
        limits: Limits | None = None,
        language: str = "python",
    ) -> Result:
        """Do `Sandbox.run` on a server. Raises ServiceError if none answers within the deadline."""
        request = wire.RunRequest(as_bytes(source), as_bytes(stdin), limits, language)
        (result,) = await self._ask(request)
        return result

    async def grade(
        self,
        source: str | bytes,
        tests: Sequence[AnyTest],
        limits: Limits | None = None,
        checker: str | CheckerProgram = "tokens",
        stop_at_first_failure: bool = True,
        language: str = "python",
        run_at_least: int = 0,
    ) -> list[Result]:
        """Do `Sandbox.grade` on a server. Raises ServiceError if none answers in time."""
        request = wire.GradeRequest(
            as_bytes(source),
            list(tests),
            limits,
            checker,
            stop_at_first_failure,
            language,
            run_at_least,
        )
        return await self._ask(request)

    async def health(self) -> dict[str, dict[str, Any]]:
        """Return what each server reports. Raises ServiceError naming those that are not ready."""
        urls = [server.url for server in self._servers.all]
        found = await asyncio.gather(*map(self._health_of, self._servers.all))
        answers = dict(zip(urls, found, strict=True))
        failures = [f"{url}: {why}" for url, why in answers.items() if isinstance(why, str)]
        if failures:
            raise ServiceError(f"grading servers are not ready: {'; '.join(failures)}")
        return {url: about for url, about in answers.items() if not isinstance(about, str)}

    async def _ask(self, request: wire.Request) -> list[Result]:
        """Return the results from the first server that answers."""
        body = wire.encode_request(request)
        headers = {"Content-Type": "application/json", wire.REQUEST_ID: uuid.uuid4().hex}
        pause_s = FIRST_PAUSE_S
        try:
            async with asyncio.timeout(self._deadline_s):
                while True:
                    server = await self._servers.take()
                    try:
                        results = await self._try(server, request.path, body, headers)
                        if request.is_answered_by(results):
                            return results
                        reason = f"it answered with {len(results)} results, not one for each test"
                        self._servers.take_out(server, reason)
                    except TryAgainError:
                        pass
                    finally:
                        self._servers.give_back(server)
                    await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                    pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        except TimeoutError:
            raise ServiceError(
                f"no server answered within {self._deadline_s:g} s ({self._servers.reasons()})"
            ) from None

    async def _try(
        self, server: GradingServer, path: str, body: bytes, headers: dict[str, str]
    ) -> list[Result]:
        """Try one server. Raises TryAgainError if another may succeed."""
        posting = asyncio.create_task(self._exchange("POST", server.url + path, body, headers))
        # marks its exception as retrieved
        posting.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            while not posting.done():
                await asyncio.wait({posting}, timeout=self._heartbeat_s)
                if not posting.done():
                    await self._exchange("GET", server.url + "/health", within_s=self._heartbeat_s)
            status, answer, retry_after = posting.result()
            if status == 200:
                return wire.decode_results(answer)
        except (aiohttp.ClientError, OSError, WireError) as error:
            self._servers.take_out(server, reason_of(error))
            raise TryAgainError from None
        finally:
            posting.cancel()
        reason = f"{status} {refusal_in(answer)}"
        if status in (408, 429):
            self._servers.rest(server, seconds_in(retry_after), reason)
            raise TryAgainError
        if status in OUT_OF_SERVICE:
            self._servers.take_out(server, reason)
            raise TryAgainError
        if status >= 500:
            raise ServiceError(f"{server.url} failed on the request: {reason}")
        raise RequestRefusedError(status, f"{server.url} refused the request: {reason}")

    async def _exchange(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        within_s: float | None = None,
    ) -> tuple[int, bytes, str | None]:
        """Return status, body and Retry-After of the answer. Raises ClientError or OSError."""
        timeout = aiohttp.ClientTimeout(total=within_s, sock_connect=CONNECT_TIMEOUT_S)
        async with self._open_session().request(
            method, url, data=body, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            return response.status, await response.read(), response.headers.get("Retry-After")

    async def _health_of(self, server: GradingServer) -> dict[str, Any] | str:
        """Return what a server reports, or why it is not ready."""
        try:
            status, answer, _ = await self._exchange(
                "GET", server.url + "/health", within_s=HEALTH_TIMEOUT_S
            )
        except (aiohttp.ClientError, OSError) as error:
            return reason_of(error)
        if status != 200:
            return f"{status} {refusal_in(answer)}"
        try:
            about = json.loads(answer)
        except ValueError:
            about = None
        is_ours = isinstance(about, dict) and isinstance(about.get("isolation"), dict)
        return about if is_ours else "it is not a grading server"

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the client is closed; use it within: async with SandboxClient(...)")
        return self._session


def checked_url(url: str) -> str:
    """Return the address without a slash at its end. Raises ValueError if it is malformed."""
    found = URL_FORM.fullmatch(url)
    if found is None:
        raise ValueError(f"{url!r} is not the address of a server; write it like http://node7:8765")
    return found[1]


def reason_of(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect: {error.os_error.strerror or error.os_error}"
    if isinstance(error, TimeoutError):
        return "it does not answer"
    return str(error) or type(error).__name__


def refusal_in(answer: bytes) -> str:
    """Return the reason in a server's refusal, or the start of a proxy's text."""
    try:
        wired = json.loads(answer)
        return str(wired["error"]) if "error" in wired else str(wired["status"])
    except (ValueError, KeyError, TypeError):
        return answer[:200].decode(errors="replace")


def seconds_in(retry_after: str | None) -> float:
    """Return Retry-After in seconds; 1 if it is absent or a date."""
    try:
        return min(60.0, max(0.0, float(retry_after or 1.0)))
    except ValueError:
        return 1.0
