"""Two ways for weights to SGLang servers, behind one interface.

Theory of operation. The trainer's thread draws the weights and waits; what is asked of the
servers runs in the engine's event loop, for all servers at the same time. The order is: pause
(requests under way are taken back, to be computed again), weights with the new version, checks, go
on. Nothing is sampled between a pause and the checks after it, so no token comes from weights that
were not verified: each server must report the version and the checksums of what was sent.

`DiskPublication` writes a Hugging Face folder on a shared file system before it pauses anything,
and every server reads it. The folder stays until the next one, so that a server that was started
again is brought to it at any time. A server that fails meanwhile is out, and the others go on.

`DistributedPublication` broadcasts buckets over a process group of this process (rank 0) and every
rank of every server, which is made again when a server came or went, or was started again. Weights
are gone once sent: a server that fails meanwhile fails the publication, and one that was started
again waits for the next.
"""

import asyncio
import shutil
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from rlef_mega.engines import EngineError
from rlef_mega.engines.sglang_fleet import PROBE_S, Fleet, Member
from rlef_mega.engines.sglang_http import Client, ServerError
from rlef_mega.engines.sglang_weights import Checksums, SentWeights, differences

Answer = TypeVar("Answer")
Submit = Callable[[Coroutine[Any, Any, Answer]], "Future[Answer]"]

BUCKET_BYTES = 512 * 2**20


class WrongWeightsError(EngineError):
    """A server took the weights and holds others."""


class Publication(Protocol):
    """A way for weights from this process to the servers."""

    def publish(
        self, fleet: Fleet, submit: Submit[Any], weights: SentWeights, version: int
    ) -> None:
        """Returns when every server of the fleet that is ready serves these weights. EngineError
        if none does, or one holds others."""

    def close(self) -> None: ...


class DiskPublication:
    """By way of `folder`, which trainer and servers share; `model` has config and tokenizer."""

    def __init__(self, folder: Path, model: Path, *, deadline_s: float) -> None:
        self.folder, self.model, self.deadline_s = folder.absolute(), model, deadline_s

    def publish(
        self, fleet: Fleet, submit: Submit[Any], weights: SentWeights, version: int
    ) -> None:
        folder = self.folder / f"version_{version:06d}"
        self.write(folder, weights)
        submit(self.load_everywhere(fleet, folder, version, weights.checksums)).result()
        for old in self.folder.glob("version_*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    def write(self, folder: Path, weights: SentWeights) -> None:
        """A Hugging Face folder, whole or not at all."""
        partial = folder.with_suffix(".partial")
        for left_over in (partial, folder):
            shutil.rmtree(left_over, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in self.model.iterdir():
            if file.suffix == ".json" and not file.name.endswith(".index.json"):
                shutil.copy(file, partial)
        for number, bucket in enumerate(buckets(weights, BUCKET_BYTES)):
            tensors = {name: tensor.cpu() for name, tensor in bucket}
            save_file(tensors, partial / f"model-{number:05d}.safetensors")
        partial.rename(folder)

    async def load_everywhere(
        self, fleet: Fleet, folder: Path, version: int, expected: Checksums
    ) -> None:
        async with fleet.control:
            members = await answering(fleet)

            async def load(client: Client) -> None:
                await client.pause(within_s=self.deadline_s)
                path = str(folder)
                await client.load_from_disk(path, str(version), within_s=self.deadline_s)
                await verify(client, version, expected, self.deadline_s)
                await client.resume(within_s=self.deadline_s)

            done = await on_each(members, load)
            if not done:
                raise EngineError(f"no server took version {version}: {reasons(members)}")
            fleet.restore = load
            fleet.install(version, done)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class DistributedPublication:
    """By broadcasts. `host` is this machine's address for the servers; `backend` nccl or gloo."""

    def __init__(self, host: str, *, backend: str, deadline_s: float) -> None:
        self.host, self.backend, self.deadline_s = host, backend, deadline_s
        self.group: dist.ProcessGroup | None = None
        self.group_name = ""
        self.store: dist.TCPStore | None = None
        self.groups_made = 0
        self.members: list[Member] = []

    def publish(
        self, fleet: Fleet, submit: Submit[Any], weights: SentWeights, version: int
    ) -> None:
        submit(fleet.control.acquire()).result()
        try:
            self.publish_alone(fleet, submit, weights, version)
        except BaseException:
            self.group = None  # who of it has failed is unknown
            raise
        finally:
            submit(release(fleet.control)).result()

    def publish_alone(
        self, fleet: Fleet, submit: Submit[Any], weights: SentWeights, version: int
    ) -> None:
        members = submit(answering(fleet)).result()
        deadline_s = self.deadline_s
        same_processes = all(m.found_version == str(fleet.version) for m in members)
        if self.group is None or members != self.members or not same_processes:
            self.leave(submit)
            self.join(members, submit, weights.ranks)

        async def everywhere(work: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
            done = await on_each(members, work)
            if failed := [member for member in members if member not in done]:
                raise EngineError(f"version {version} was not published: {reasons(failed)}")

        async def begin(client: Client) -> None:
            await client.pause(within_s=deadline_s)
            await client.begin_update(within_s=deadline_s)

        submit(everywhere(begin)).result()
        for bucket in buckets(weights, BUCKET_BYTES):
            self.broadcast(bucket, submit, everywhere)

        async def end(client: Client) -> None:
            await client.end_update(str(version), within_s=deadline_s)
            await verify(client, version, weights.checksums, deadline_s)
            await client.resume(within_s=deadline_s)

        submit(everywhere(end)).result()
        submit(install(fleet, version, members)).result()

    def broadcast(
        self,
        bucket: Sequence[tuple[str, torch.Tensor]],
        submit: Submit[Any],
        everywhere: Callable[..., Coroutine[Any, Any, None]],
    ) -> None:
        """All servers are told what comes, then it comes, as one run of bytes."""

        async def receive(client: Client) -> None:
            await client.receive_bucket(bucket, self.group_name, within_s=self.deadline_s)

        bytes_of = [tensor.reshape(-1).view(torch.uint8) for _, tensor in bucket]
        receiving = submit(everywhere(receive))
        # group: this process and every rank of every server
        sending = dist.broadcast(torch.cat(bytes_of), group=self.group, group_src=0, async_op=True)
        assert sending is not None
        while not sending.is_completed():
            if receiving.done():
                receiving.result()  # a server that refused will not take part: do not wait for it
            time.sleep(0.001)
        sending.wait()
        receiving.result()

    def leave(self, submit: Submit[Any]) -> None:
        """Who of the old group is still there need not keep it."""
        if self.group is None:
            return

        async def leave(client: Client) -> None:
            await client.leave_group(self.group_name, within_s=PROBE_S)

        submit(on_each(self.members, leave)).result()
        dist.destroy_process_group(self.group)
        self.group = None

    def join(self, members: list[Member], submit: Submit[Any], ranks: int) -> None:
        """A group with every rank of these servers."""
        self.groups_made += 1
        self.group_name = f"rlef_{time.time_ns()}_{self.groups_made}"
        self.members = members
        world_size = 1 + ranks * len(members)
        deadline = timedelta(seconds=self.deadline_s)
        # port 0: any free one; the servers join as its clients
        store = dist.TCPStore(
            self.host, 0, world_size, is_master=True, timeout=deadline, wait_for_workers=False
        )
        offsets = {m.client.url: 1 + ranks * place for place, m in enumerate(members)}

        async def join(client: Client) -> None:
            await client.join_group(
                self.group_name,
                address=self.host,
                port=store.port,
                rank_offset=offsets[client.url],
                world_size=world_size,
                backend=self.backend,
                within_s=self.deadline_s,
            )

        joining = submit(on_each(members, join))
        self.store = store
        self.group = make_group(self.group_name, store, world_size, self.backend, deadline)
        joined = joining.result()
        if failed := [member for member in members if member not in joined]:
            raise EngineError(f"not all servers joined: {reasons(failed)}")

    def close(self) -> None:
        self.group = self.store = None


def make_group(
    name: str, store: dist.Store, world_size: int, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Rank 0 of a group beside the default one, with processes that are not of this job. It is made
    as SGLang makes its side (sglang.srt.utils.init_custom_process_group); torch has no public
    way."""
    from torch.distributed import distributed_c10d as c10d

    group, _ = c10d._new_process_group_helper(
        world_size,
        0,
        [],
        dist.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=c10d.GroupName(name),
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


async def verify(client: Client, version: int, expected: Checksums, within_s: float) -> None:
    """200 alone is no success: the version, and what the weights hash to."""
    found = await client.weight_version(within_s=within_s)
    if found != str(version):
        raise WrongWeightsError(f"{client.url} says version {found} after update to {version}")
    if wrong := differences(expected, await client.checksums(within_s=within_s)):
        raise WrongWeightsError(f"{client.url} holds other weights than were sent: {wrong}")


async def answering(fleet: Fleet) -> list[Member]:
    """The servers that are there at all; the others are out."""

    found: dict[str, str] = {}

    async def ask(client: Client) -> None:
        found[client.url] = await client.weight_version(within_s=PROBE_S)

    members = await on_each(fleet.members, ask)
    for member in members:
        member.found_version = found[member.client.url]
    if not members:
        raise EngineError(f"no server answers: {reasons(fleet.members)}")
    for member in fleet.members:
        if member not in members:
            fleet.take_out(member, member.last_failure)
    return members


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


async def install(fleet: Fleet, version: int, members: Sequence[Member]) -> None:
    fleet.install(version, members)


async def release(lock: asyncio.Lock) -> None:
    lock.release()


def reasons(members: Sequence[Member]) -> str:
    return "; ".join(f"{m.client.url}: {m.last_failure}" for m in members)


def buckets(weights: SentWeights, most_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """In the order of the weights; a tensor that is larger is a bucket of its own. Copies are made,
    because whoever gathers the weights may use a buffer again."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > most_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.clone()))
        size += tensor.nbytes
    if bucket:
        yield bucket


def own_address(urls: Sequence[str]) -> str:
    """This machine's address on the way to the servers."""
    host, _, port = urls[0].partition("://")[2].partition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port or 80)))  # no packet is sent
        return str(probe.getsockname()[0])
