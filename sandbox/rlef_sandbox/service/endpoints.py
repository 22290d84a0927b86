"""The endpoints of the grading service: they turn HTTP requests into work for the queue.

An answer to /v1/run or /v1/grade reports what the program did. A failure of the sandbox is a 503,
which the client retries elsewhere, or a SANDBOX_ERROR result; never a verdict. Every refusal is
JSON, {"error": reason}.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import platform
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from .command import ServerSettings, is_loopback
from .grading_process import GradingProcess
from .grading_queue import SANDBOX_FAULTS, Grading, GradingQueue, GradingRefusedError
from .metrics import GradingMetrics
from .wire import REQUEST_ID, REQUESTS

API_VERSION = 1
REQUEST_ID_FORM = re.compile(r"[\x21-\x7e]{1,128}")
HOST_FORM = re.compile(r"(?:\[([\da-f:.]+)\]|([\w.-]+))(?::\d+)?", re.ASCII | re.IGNORECASE)
# A connection may be without a complete request head this long; aiohttp's client closes after 15 s.
IDLE_TIMEOUT_S = 30.0
BODY_TIMEOUT_S, BODY_BYTES_PER_S = 30.0, 256 << 10  # a body arrives within 30 s, or at this rate
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Body:
    """The content of a request as it arrives, and the work that may still need it later."""

    content: bytearray
    user: asyncio.Future[Any] | None = None


class GradingService:
    """The endpoints, and the state that they share."""

    def __init__(self, grader: GradingProcess, settings: ServerSettings) -> None:
        self.grader = grader
        self.settings = settings
        self.max_body_bytes = settings.max_body_mib << 20
        self.draining = asyncio.Event()
        self.metrics = GradingMetrics()
        self.queue = GradingQueue(settings, self.metrics)
        self._held_bytes = 0
        # by connection: since when it has no request, or never if it has one
        self.idle_since_s: dict[RequestHandler, float] = {}
        for name, read, meaning in (
            ("queue_length", lambda: self.queue.waiting, "Requests that wait for the sandbox."),
            ("running", lambda: self.queue.running, "Requests in the sandbox."),
            ("held_bytes", lambda: self._held_bytes, "Size of the bodies that arrived."),
            ("draining", lambda: self.draining.is_set(), "1 since the first SIGTERM, else 0."),
        ):
            self.metrics.read_when_asked("gauge", name, read, meaning)
        self.metrics.read_when_asked(
            "counter",
            "zygotes_started_total",
            lambda: grader.zygotes_started,
            "Zygotes started: one per worker, and one for each that was lost.",
        )

    def close_idle(self, connections: Iterable[RequestHandler]) -> None:
        """Close those of all connections that have had no request for too long: no deadline of
        aiohttp's bounds the head of a request.
        """
        now_s = time.monotonic()
        known = self.idle_since_s
        self.idle_since_s = {one: known.get(one, now_s) for one in connections}
        for one, since_s in self.idle_since_s.items():
            transport = one.transport
            is_sending = transport is not None and transport.get_write_buffer_size() > 0
            if now_s - since_s > IDLE_TIMEOUT_S and not is_sending:
                one.force_close()

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self.guard])
        application.add_routes(
            [
                *(web.post(path, self.work) for path in REQUESTS),
                web.get("/health", self.health),
                web.get("/metrics", self.metrics_text),
            ]
        )
        return application

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the token, turn refusals into JSON, and count, around every request."""
        arrived_s = time.monotonic()
        self.idle_since_s[request.protocol] = math.inf
        code = "disconnected"
        try:
            try:
                self.authorise(request)
                response = await handler(request)
            except GradingRefusedError as refusal:
                response = refused(refusal.status, str(refusal), refusal.headers)
            except web.HTTPException as error:  # no such path or method
                reason = f"{error.reason}; there are POST /v1/run and /v1/grade, "
                response = refused(error.status, f"{reason}GET /health and /metrics", {})
            code = str(response.status)
            if self.draining.is_set():
                response.force_close()
            return response
        finally:
            self.idle_since_s[request.protocol] = time.monotonic()
            resource = request.match_info.route.resource
            endpoint = resource.canonical if resource else "other"
            self.metrics.requests.add(endpoint, code)
            if code == "200" and endpoint.startswith("/v1/"):
                self.metrics.latency_s.observe(time.monotonic() - arrived_s)

    def authorise(self, request: web.Request) -> None:
        """Raise GradingRefusedError unless the request has the token, compared in constant time.

        Without a token, the loopback address keeps out all but this machine's programs and the web
        pages in its browsers. A page reaches it only under another host name, given in `Host`.
        """
        if self.settings.token is None:
            if request.path == "/metrics" or names_loopback(request.headers.get("Host", "")):
                return
            reason = (
                "a server without a token answers only to 127.0.0.1, [::1] and localhost; use one "
                "of these, or start the server with a token (--token-file)"
            )
            raise GradingRefusedError(403, reason)
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if not hmac.compare_digest(given, f"Bearer {self.settings.token}".encode()):
            reason = "the token is missing or wrong; send it as Authorization: Bearer TOKEN"
            raise GradingRefusedError(401, reason, **{"WWW-Authenticate": "Bearer"})

    async def work(self, request: web.Request) -> web.StreamResponse:
        """Answer a request for work, once for each request id."""
        # A browser sends this type to another site only if that site agrees, and this one does not.
        if request.content_type != "application/json":
            raise GradingRefusedError(415, "send the body as Content-Type: application/json")
        if set(request.headers.getall("Content-Encoding", ())) - {"identity"}:
            raise GradingRefusedError(415, "send the body as it is, without Content-Encoding")
        body = Body(bytearray())
        try:
            grading = await self.accept(request, body)
            try:
                answer = await self.queue.answer(grading)
            except ValueError as error:
                raise GradingRefusedError(400, str(error)) from None
            except SANDBOX_FAULTS as error:
                raise GradingRefusedError(503, f"the sandbox failed: {error!r}") from None
            return web.Response(body=answer.body, content_type="application/json")
        finally:
            size_bytes = len(body.content)
            if body.user is None or body.user.done():
                self.let_go(size_bytes)
            else:
                body.user.add_done_callback(lambda _: self.let_go(size_bytes))

    def let_go(self, size_bytes: int) -> None:
        self._held_bytes -= size_bytes

    async def read(self, request: web.Request, content: bytearray) -> bytes:
        """Append what arrives to `content`, and return a digest of path and content. Bytes count
        as held once they have arrived, not when a client announces them.
        """
        announced_bytes = request.content_length or 0
        self.refuse_large(announced_bytes, self._held_bytes + announced_bytes)
        digest = hashlib.sha256(request.path.encode() + b"\0")
        started_s = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S) as timeout:
                async for chunk in request.content.iter_any():
                    content += chunk
                    self._held_bytes += len(chunk)
                    self.refuse_large(len(content), self._held_bytes)
                    digest.update(chunk)
                    allowed_s = BODY_TIMEOUT_S + len(content) / BODY_BYTES_PER_S
                    timeout.reschedule(started_s + allowed_s)
        except TimeoutError:
            reason = f"the body came too slowly, {len(content)} bytes so far; send it again"
            raise GradingRefusedError(408, reason) from None
        return digest.digest()

    def refuse_large(self, body_bytes: int, held_bytes: int) -> None:
        """Refuse a body that is too large, alone or together with those of other open requests."""
        if body_bytes > self.max_body_bytes:
            raise GradingRefusedError(
                413,
                f"the body has more than {self.max_body_bytes} bytes; split the tests over several "
                "requests, or start the server with a larger --max-body-mib",
            )
        if held_bytes > self.settings.max_held_mib << 20 and held_bytes > body_bytes:
            raise self.queue.full("the bodies of open requests are too large")

    async def accept(self, request: web.Request, body: Body) -> Grading:
        """Return the work of the request id, new or begun by an earlier request."""
        request_id = request.headers.get(REQUEST_ID, "") or uuid.uuid4().hex
        if not REQUEST_ID_FORM.fullmatch(request_id):
            raise GradingRefusedError(
                400, f"{REQUEST_ID}: 1 to 128 printable ASCII characters, no spaces"
            )
        digest = await self.read(request, body.content)
        grading = self.queue.find(request_id, digest)
        if grading is not None:
            self.metrics.joined.add()
            return grading
        if self.draining.is_set():
            raise GradingRefusedError(503, "draining: this server takes no new work")
        path, client = request.path, request.remote or ""
        grading = self.queue.submit(
            request_id, digest, client, lambda: self.grader.answer(path, body.content)
        )
        body.user = grading.answer
        return grading

    async def health(self, request: web.Request) -> web.StreamResponse:
        """Report whether this server takes work (503 if not), and what it is."""
        about = {
            "status": "draining" if self.draining.is_set() else "ready",
            "isolation": self.grader.isolation,
            "versions": versions(),
            "languages": self.grader.languages,
            "workers": self.settings.workers,
            "running": self.queue.running,
            "queued": self.queue.waiting,
            "queue": self.settings.queue,
            "max_body_bytes": self.max_body_bytes,
        }
        return web.json_response(about, status=503 if self.draining.is_set() else 200)

    async def metrics_text(self, request: web.Request) -> web.StreamResponse:
        text = self.metrics.text().encode()
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4"})


def names_loopback(host: str) -> bool:
    """Return whether a Host header names this machine."""
    found = HOST_FORM.fullmatch(host)
    return found is not None and is_loopback((found[1] or found[2]).lower())


def refused(status: int, reason: str, headers: Mapping[str, str]) -> web.Response:
    return web.json_response({"error": reason}, status=status, headers=headers)


def versions() -> dict[str, str | int]:
    try:
        package = version("rlef-mega")
    except PackageNotFoundError:  # run from a folder of sources
        package = "unknown"
    return {
        "api": API_VERSION,
        "rlef_sandbox": package,
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
