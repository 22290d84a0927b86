"""Real grading servers for tests: started as a user starts them, on a free port."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import rlef_sandbox
from rlef_sandbox import Limits, Test

SANDBOX_PATH = str(Path(rlef_sandbox.__file__).parents[1])
TOKEN = "a-token-of-some-length"
JSON = {"Content-Type": "application/json"}
ONE_JOB = ("--workers", "1", "--jobs", "1")  # so that even programs which sleep run one by one
PATIENT = Limits(cpu_s=5, wall_s=60)


def sleeper(seconds: float, word: object = "done") -> str:
    return f"import time; time.sleep({seconds}); print({word!r})"


def grade_body(source: str, expected: str = "done") -> dict[str, object]:
    return {"source": source, "tests": [{"stdin": "", "expected": expected}]}


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return self.json["error"]


class ServerProcess:
    """`python -m rlef_sandbox serve`; a context manager that kills it at the end."""

    def __init__(
        self,
        *options: str,
        port: int = 0,
        token: str | None = None,
        isolation: str = "default",
        packages: str = "",
    ) -> None:
        environment = {**os.environ, "PYTHONPATH": SANDBOX_PATH}
        environment.pop("RLEF_SANDBOX_TOKEN", None)
        if token:
            environment["RLEF_SANDBOX_TOKEN"] = token
        command = [sys.executable, "-m", "rlef_sandbox", "--isolation", isolation]
        command += ["--packages", packages] if packages else []
        words = [*command, "serve", "--port", str(port), *options]
        self.token = token
        self.process = subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout
        self.first_line = self.process.stdout.readline()
        found = re.search(r"http://[^ :]+:(\d+)", self.first_line)
        assert found, self.first_line + self.process.stdout.read()
        self.url, self.port = found[0], int(found[1])

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    @property
    def child(self) -> int:
        """The process that parses and grades."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}")
        (child,) = (task / "children").read_text().split()
        return int(child)

    def ask(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """Send a request on a new connection: a dict as JSON, anything else unchanged."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        authorization = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            connection.request(method, path, content, {**JSON, **authorization, **(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, dict(response.headers), response.read())
        finally:
            connection.close()

    def grade(self, body: object, request_id: str | None = None) -> Reply:
        headers = {"Idempotency-Key": request_id} if request_id else {}
        return self.ask("POST", "/v1/grade", body, headers)

    def metrics(self) -> dict[str, float]:
        """Return every sample by its name and labels."""
        lines = self.ask("GET", "/metrics").body.decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name.removeprefix("rlef_sandbox_"): float(value) for name, _, value in pairs}


def run_aside(call: Callable[[], Reply]) -> tuple[threading.Thread, list[Reply]]:
    """Make the call in a thread; its reply is in the list once the thread has ended."""
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(call()))
    thread.start()
    return thread, replies


ADD = Test(b"1 2\n", b"3\n")
ADD_PROGRAM = "print(sum(map(int, input().split())))"
