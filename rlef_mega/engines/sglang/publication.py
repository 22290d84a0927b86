"""The ways for weights to SGLang servers, behind one interface.

Theory of operation. The trainer's thread draws the weights and waits; what is asked of the
servers runs in the engine's event loop, for all servers at the same time. The order is: pause
(requests under way are taken back, to be computed again), weights with the new version, checks, go
on. Nothing is sampled between a pause and the checks after it, so no token comes from weights that
were not verified: each server must report the version and the checksums of what was sent.

`DiskPublication` writes a Hugging Face folder on a shared file system before it pauses anything,
and every server reads it. The folder stays until the next one, so that a server that was started
again is brought to it at any time. A server that fails meanwhile is out, and the others go on.

`BucketPublication` sends buckets, by broadcast or as shared tensors (sglang_carriers.py). Weights
are gone once sent: a server that fails meanwhile fails the publication, and one that was started
again waits for the next.
"""

import asyncio
import shutil
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rlef_mega.engines import EngineError, EngineLostError
from rlef_mega.engines.sglang.carriers import Carrier, Submit
from rlef_mega.engines.sglang.fleet import FIRST_PROBE_S, Fleet
from rlef_mega.engines.sglang.http import Client, ServerError
from rlef_mega.engines.sglang.members import Member, on_each, reasons
from rlef_mega.engines.sglang.weights import Checksums, SentWeights, differing_parameters

BUCKET_BYTES = 512 * 2**20


class WrongWeightsError(ServerError):
    """A server took the weights and holds others: it is left out, as one that fails."""


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
        try:
            self.write(folder, weights)
        except (OSError, SafetensorError) as error:
            raise EngineError(f"cannot write {folder}: {error}; make room there") from None
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


class BucketPublication:
    """In buckets, which a carrier brings."""

    def __init__(self, carrier: Carrier, *, deadline_s: float) -> None:
        self.carrier, self.deadline_s = carrier, deadline_s

    def publish(
        self, fleet: Fleet, submit: Submit[Any], weights: SentWeights, version: int
    ) -> None:
        submit(fleet.control.acquire()).result()
        try:
            self.publish_alone(fleet, submit, weights, version)
        except BaseException:
            self.carrier.close()  # which servers took what is unknown
            raise
        finally:
            submit(release(fleet.control)).result()

    def publish_alone(
        self, fleet: Fleet, submit: Submit[Any], weights: SentWeights, version: int
    ) -> None:
        members = submit(answering(fleet)).result()
        deadline_s = self.deadline_s
        same_processes = all(m.found_version == str(fleet.version) for m in members)
        self.carrier.prepare(members, submit, weights.ranks, same_processes=same_processes)

        def everywhere(work: Callable[[Client], Coroutine[Any, Any, None]]) -> Future[None]:
            async def on_all() -> None:
                done = await on_each(members, work)
                if failed := [member for member in members if member not in done]:
                    raise EngineError(f"version {version} was not published: {reasons(failed)}")

            return submit(on_all())

        async def begin(client: Client) -> None:
            await client.pause(within_s=deadline_s)
            await client.begin_update(within_s=deadline_s)

        everywhere(begin).result()
        for bucket in buckets(weights, BUCKET_BYTES):
            self.carrier.carry(bucket, everywhere)

        async def end(client: Client) -> None:
            await client.end_update(str(version), within_s=deadline_s)
            await verify(client, version, weights.checksums, deadline_s)
            await client.resume(within_s=deadline_s)

        everywhere(end).result()
        submit(install(fleet, version, members)).result()

    def close(self) -> None:
        self.carrier.close()


async def verify(client: Client, version: int, expected: Checksums, within_s: float) -> None:
    """200 alone is no success: the version, and what the weights hash to."""
    found = await client.weight_version(within_s=within_s)
    if found != str(version):
        raise WrongWeightsError(f"{client.url} says version {found} after update to {version}")
    if wrong := differing_parameters(expected, await client.checksums(within_s=within_s)):
        raise WrongWeightsError(f"{client.url} holds other weights than were sent: {wrong}")


async def answering(fleet: Fleet) -> list[Member]:
    """The servers whose schedulers answer within a heartbeat; the others are out. EngineLostError
    where none does, for as long as one may take to start again."""
    found: dict[str, str] = {}

    async def ask(client: Client) -> None:
        found[client.url] = await client.weight_version(within_s=fleet.heartbeat_s)

    until_s = asyncio.get_running_loop().time() + fleet.lost_s
    while not (members := await on_each(fleet.members, ask)):
        if asyncio.get_running_loop().time() >= until_s:
            raise EngineLostError(fleet.lost_message())
        await asyncio.sleep(FIRST_PROBE_S)
    for member in members:
        member.found_version = found[member.client.url]
    for member in fleet.members:
        if member not in members:
            fleet.take_out(member, member.last_failure)
    return members


async def install(fleet: Fleet, version: int, members: Sequence[Member]) -> None:
    fleet.install(version, members)


async def release(lock: asyncio.Lock) -> None:
    lock.release()


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
