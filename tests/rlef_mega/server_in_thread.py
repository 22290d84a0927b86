"""An aiohttp application that answers on a port of this machine, in a thread of its own."""

import asyncio
import threading
from typing import Self

from aiohttp import web


class ServerInThread:
    """A context manager that serves at `url` the routes that subclasses add in `routes`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def routes(self, app: web.Application) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.thread.start()
        self.wait(self.start())
        return self

    def __exit__(self, *error) -> None:
        self.wait(self.runner.cleanup())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def wait(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    async def start(self) -> None:
        app = web.Application()
        self.routes(app)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
