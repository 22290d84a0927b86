"""Serve the report page of a run, while it continues, on this machine.

Theory of operation: each request has a thread. One thread at a time renders the page, and only if a
file of the run has changed since. The page requests `state` every few seconds, and reloads when the
stamp there differs from its own. Nothing is written. The server listens on the loopback address and
answers only requests addressed to it, so that a page of another site, whose name resolves to this
address (DNS rebinding), reads nothing.
"""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from rlef_mega.report.page import render
from rlef_mega.report.run_files import Json, read_runs

FILES = ("config.toml", "manifest.json", "metrics.jsonl", "eval/*", "episodes/*.zst")


class LiveServer(ThreadingHTTPServer):
    """Serve the page of these runs, with `serve_forever`.

    Raises ValueError if a run is not a directory, OSError if the port is in use.
    """

    daemon_threads = True

    def __init__(self, runs: Sequence[Path], *, port: int, episodes: int) -> None:
        read_runs(runs)  # report errors at once
        self.runs, self.episodes = runs, episodes
        self.rendering, self.rendered = Lock(), ("", "")
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the browser left
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def page(self) -> str:
        with self.rendering:
            stamp = stamp_of(self.runs)  # before the files are read: they may change meanwhile
            if self.rendered[0] != stamp:
                html = render(read_runs(self.runs), episodes=self.episodes, stamp=stamp)
                self.rendered = stamp, html
            return self.rendered[1]

    def state(self) -> Json:
        """Return the current files' stamp, and text and age of the (last) run's file `progress`."""
        state: Json = {"stamp": stamp_of(self.runs), "doing": "not started yet", "seconds": None}
        for run in self.runs:
            with suppress(FileNotFoundError):
                state["doing"] = (run / "progress").read_text(errors="replace").strip()[:100]
                state["seconds"] = max(0.0, time.time() - (run / "progress").stat().st_mtime)
        return state


class Handler(BaseHTTPRequestHandler):
    server: LiveServer

    def do_GET(self) -> None:
        port = self.server.server_port
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            self.send_error(403, "open the page by the name 127.0.0.1 or localhost")
        elif self.path == "/":
            self.answer("text/html; charset=utf-8", self.server.page())
        elif self.path == "/state":
            self.answer("application/json", json.dumps(self.server.state()))
        else:
            self.send_error(404)

    def answer(self, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: there is a request every few seconds."""


def stamp_of(runs: Sequence[Path]) -> str:
    """Return a digest that changes when a file that the page is made of changes."""
    found = [path for run in runs for pattern in FILES for path in sorted(run.glob(pattern))]
    facts = [(str(path), (stat := path.stat()).st_mtime_ns, stat.st_size) for path in found]
    return blake2b(repr(facts).encode(), digest_size=8).hexdigest()
