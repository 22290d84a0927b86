"""One SGLang server of a fleet, and calls to several of them at the same time."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rlef_mega.engines import EngineError
from rlef_mega.engines.sglang.answers import ServerError
from rlef_mega.engines.sglang.client import Client
from rlef_mega.engines.sglang.processes import log_tail

Result = TypeVar("Result")


@dataclass(eq=False)
class Member(Client):
    """A server, and what the fleet knows of it. Times are of time.monotonic."""

    log: Path | None = None
    slots: asyncio.Semaphore = field(default_factory=asyncio.Semaphore)  # set by the fleet
    ready: bool = False
    failed: bool = False  # since it was ready: it must pass a health check
    doubtful: bool = False  # it failed a publication, so its reported version proves nothing
    last_failure: str = "no weights were published to it"
    load: int = 0  # requests that have a slot or wait for one
    heard_at_s: float = 0.0  # when it last answered
    checking: asyncio.Task[None] | None = None
    probing: asyncio.Task[None] | None = None
    busy_s: float = 0.0  # with a request, until `counted_at_s`
    counted_at_s: float = field(default_factory=time.monotonic)

    def add_load(self, change: int) -> None:
        """Change the load, and count the time until now as busy or idle."""
        now = time.monotonic()
        self.busy_s += now - self.counted_at_s if self.load else 0.0
        self.counted_at_s = now
        self.load += change


async def on_each(
    members: Sequence[Member], work: Callable[[Member], Coroutine[Any, Any, Result]]
) -> dict[Member, Result]:
    """Run `work` on all servers at the same time. Returns those on which it succeeded, each with
    its result.

    A ServerError is noted as the server's last failure; any other error is raised.
    """
    tasks = [work(member) for member in members]
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    results = {}
    for member, outcome in zip(members, outcomes, strict=True):
        if isinstance(outcome, ServerError):
            member.last_failure = f"{outcome}{log_tail(member.log)}"
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            results[member] = outcome
    return results


async def on_all(
    members: Sequence[Member], work: Callable[[Member], Coroutine[Any, Any, None]]
) -> None:
    """Run `work` on all servers at the same time. Raises EngineError if it fails on any."""
    done = await on_each(members, work)
    if failed := [member for member in members if member not in done]:
        raise EngineError(f"{len(failed)} of {len(members)} servers failed: {reasons(failed)}")


def reasons(members: Sequence[Member]) -> str:
    """Return a text that names each server and its last failure."""
    return "; ".join(f"{m.url}: {m.last_failure}" for m in members)
