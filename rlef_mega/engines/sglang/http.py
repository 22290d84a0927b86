"""JSON over HTTP to servers that sample: one call, and what its failure means."""

import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from rlef_mega.engines import EngineError

CONNECT_S = 10.0
# How long an idle connection is kept. SGLang's server closes it after 5 s; a connection that it
# closes while a request is being sent would look like a dead server.
KEEP_ALIVE_S = 2.0


class ServerError(EngineError):
    """A server failed a request; another server may succeed.

    `status` is the HTTP status if it was not 200.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def new_http_session() -> aiohttp.ClientSession:
    """Return a connection pool without a limit: callers bound their own requests."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    return aiohttp.ClientSession(connector=connector, trust_env=False)


async def call(
    http: aiohttp.ClientSession,
    url: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    within_s: float,
) -> dict[str, Any]:
    """POST the body, or GET without one. Returns the answer's JSON object; another answer is
    returned as {"text": ...}.

    Raises ServerError if no answer comes `within_s` (0: no limit) or its status is not 200.
    """
    timeout = aiohttp.ClientTimeout(total=within_s, sock_connect=CONNECT_S)
    method = "GET" if body is None else "POST"
    try:
        async with http.request(method, url + path, json=body, timeout=timeout) as response:
            status, text = response.status, await response.text(errors="replace")
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise ServerError(f"{url}{path}: {reason_of(error)}") from None
    if status != 200:
        raise ServerError(f"{url}{path}: {status} {text[:500]}", status)
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {"text": text}


def reason_of(error: Exception) -> str:
    """Return a short cause for a failed connection."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect: {error.os_error.strerror or error.os_error}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__
