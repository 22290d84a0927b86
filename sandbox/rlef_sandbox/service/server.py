"""A grading server, one Sandbox behind HTTP, from its start to its drain.

Theory of operation. The event loop's thread speaks HTTP, checks tokens and requests
(`endpoints.py`), and keeps the queue (`grading_queue.py`). Bodies are read whole. A pool of
threads, one for each program under way, passes them to a child process (`grading_process.py`),
which parses them and waits in the Sandbox, whose zygotes do the work.

SIGTERM or SIGINT drains: new work is refused (503, Connection: close), /health reports it, queued
and running work is finished, its answers are sent, and the process exits with 0. A second signal
ends it at once; the child and its zygotes, which watch their parents, end too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket

from aiohttp import web

from .. import Sandbox
from .command import ServerSettings
from .endpoints import GradingService
from .grading_process import PING, GradingProcess

SEND_TIMEOUT_S = 30.0  # to send the last answers, once all work is finished
UNREAD_TIMEOUT_MS = 120_000
PING_EVERY_S = 10.0
CLOSE_IDLE_EVERY_S = 5.0
CHILD_TIMEOUT_S = 300.0  # longer than one C call takes on the largest body allowed by default
BACKLOG = 4096  # connections not yet accepted: a client may open all of its own at once


def serve(settings: ServerSettings) -> int:
    """Serve until a signal, then drain. Raises OSError if the address cannot be bound."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # each connection needs a descriptor
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with (
        GradingProcess(
            lambda: Sandbox(settings.workers, settings.isolation, packages=settings.packages)
        ) as grader,
        contextlib.closing(listening_socket(settings.host, settings.port)) as listener,
    ):
        return asyncio.run(serve_and_drain(grader, settings, listener))


async def serve_and_drain(
    grader: GradingProcess, settings: ServerSettings, listener: socket.socket
) -> int:
    """Serve, then drain. Returns the exit code: 0, or 1 if the child ended."""
    service = GradingService(grader, settings)
    exit_code = 0

    def stop(number: int) -> None:
        if service.draining.is_set():
            os._exit(128 + number)
        service.draining.set()

    def lose_child() -> None:
        nonlocal exit_code
        exit_code = 1
        loop.remove_reader(grader.ended)
        print("the process that grades ended, perhaps for lack of memory", flush=True)
        service.draining.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    loop.add_reader(grader.ended, lose_child)
    # Without handler_cancellation the work of a client that left would stay in the queue.
    runner = web.AppRunner(
        service.application(),
        access_log=None,
        handler_cancellation=True,
        auto_decompress=False,  # a body is never larger than what arrived
        shutdown_timeout=SEND_TIMEOUT_S,
    )
    await runner.setup()
    tasks = [asyncio.create_task(watch(grader)), asyncio.create_task(close_idle(service, runner))]
    await web.SockSite(runner, listener, backlog=BACKLOG).start()
    print(
        f"serving on {address_of(listener)}: {settings.workers} workers, queue {settings.queue}, "
        f"{'with' if settings.token else 'without'} a token",
        flush=True,
    )
    await service.draining.wait()
    print(
        f"draining: {service.queue.running} running, {service.queue.waiting} queued; "
        "a second signal ends at once",
        flush=True,
    )
    await service.queue.idle.wait()
    for task in tasks:
        task.cancel()
    await runner.cleanup()
    service.queue.shut_down()
    return exit_code


async def watch(grader: GradingProcess) -> None:
    """Kill the child if it hangs, so that clients use another server. Return once it has ended."""
    with contextlib.suppress(OSError):
        while True:
            await asyncio.sleep(PING_EVERY_S)
            try:
                async with asyncio.timeout(CHILD_TIMEOUT_S):
                    await asyncio.to_thread(grader.answer, PING, bytearray())
            except TimeoutError:
                print(f"the process that grades has hung for {CHILD_TIMEOUT_S:g} s", flush=True)
                grader.kill()


async def close_idle(service: GradingService, runner: web.AppRunner) -> None:
    """Close connections that wait too long for a request, for as long as the server runs."""
    while runner.server is not None:
        await asyncio.sleep(CLOSE_IDLE_EVERY_S)
        service.close_idle(runner.server.connections)


def listening_socket(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    try:
        listener = socket.create_server(
            address, family=family, backlog=BACKLOG, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise OSError(f"cannot listen on {host} port {port}: {reason}") from None
    # inherited by connections: the answer to a client that stops reading is dropped
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_TIMEOUT_MS)
    return listener


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
