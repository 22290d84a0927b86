"""The SGLang servers of an engine, one by one: what is known of each, and where a dialogue is.

Which of them takes a request is decided in sglang_fleet.py.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from rlef_mega.engines.sglang.http import Client, ServerError
from rlef_mega.engines.sglang.server import log_tail


class Member:
    """One server, and what is known of it."""

    def __init__(self, client: Client, log: Path | None = None) -> None:
        self.client, self.log = client, log
        self.ready = False
        self.failed = False  # since it was ready: it must show that it generates
        self.doubtful = False  # it failed a publication: the version that it reports says nothing
        self.open_requests = 0
        self.waiting: deque[asyncio.Future[bool]] = deque()  # True: a place; False: it is out
        self.heard_at_s = 0.0  # of the loop's clock
        self.checking: asyncio.Task[None] | None = None
        self.last_failure = "no weights were published to it"
        self.found_version = ""  # of its weights, as a publication began
        self.probing: asyncio.Task[None] | None = None
        self.busy_s = 0.0  # with a request open, until `counted_at_s`
        self.counted_at_s = time.monotonic()

    def count_busy(self) -> None:
        """Before the number of open requests changes."""
        now = time.monotonic()
        if self.open_requests:
            self.busy_s += now - self.counted_at_s
        self.counted_at_s = now

    def log_tail(self) -> str:
        return log_tail(self.log)

    @property
    def load(self) -> int:
        return self.open_requests + len(self.waiting)


class Place:
    """Where a dialogue was last answered."""

    def __init__(self) -> None:
        self.member: Member | None = None
        self.version = -1  # the newest weights that sampled in it


async def on_each(
    members: Sequence[Member], work: Callable[[Client], Coroutine[Any, Any, None]]
) -> list[Member]:
    """Those on which it worked, all at the same time. Wrong weights are raised at the end."""
    tasks = [work(member.client) for member in members]
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    good = []
    for member, outcome in zip(members, outcomes, strict=True):
        if outcome is None:
            good.append(member)
        elif isinstance(outcome, ServerError):
            member.last_failure = f"{outcome}{member.log_tail()}"
        else:
            raise outcome
    return good


def reasons(members: Sequence[Member]) -> str:
    return "; ".join(f"{m.client.url}: {m.last_failure}" for m in members)
