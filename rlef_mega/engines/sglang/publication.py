"""Publish weights to SGLang servers, by disk or in buckets.

Theory of operation. The trainer's thread iterates over the weights and waits; calls to servers run
in the engine's event loop, to all servers concurrently. Each publication pauses sampling (running
requests are retracted), loads the weights and their version, verifies them, and resumes. Nothing is
sampled between pause and verification, so no token comes from unverified weights: each server must
report the version and the checksums of what was sent.

`DiskPublication` writes a Hugging Face folder on a shared file system before it pauses anything,
and every server reads it. The folder stays until the next publication, so that a restarted server
can load it at any time. A server that fails is taken out, and the others continue.

`BucketPublication` sends buckets by broadcast or as shared tensors (transfer.py). The weights are
not kept, so if one server fails the publication fails, and a restarted server waits for the next.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from rlef_mega.engines import EngineError
from rlef_mega.engines.sglang.answers import ServerError
from rlef_mega.engines.sglang.client import Client
from rlef_mega.engines.sglang.fleet import Fleet
from rlef_mega.engines.sglang.members import on_all, on_each, reasons
from rlef_mega.engines.sglang.transfer import Broadcast, SharedTensors
from rlef_mega.engines.sglang.weights import Checksums, SentWeights, differing_parameters
from rlef_mega.run.directory import folder_written_whole
from rlef_mega.run.event_loop import LivesInLoop

SENT_BUCKET_BYTES = 512 * 2**20


class DiskPublication:
    """Publishes through `folder`, which trainer and servers share. Config and tokenizer are copied
    from `model`."""

    def __init__(self, fleet: Fleet, engine: LivesInLoop, folder: Path, model: Path) -> None:
        self.fleet, self.engine = fleet, engine
        self.folder, self.model = folder.absolute(), model

    def publish(self, weights: SentWeights, version: int) -> None:
        """Load the weights on all servers that answer. Raises EngineError if the folder cannot be
        written or no server loads it."""
        folder = self.folder / f"version_{version:06d}"
        try:
            self.write(folder, weights)
        except (OSError, SafetensorError) as error:
            raise EngineError(f"cannot write {folder}: {error}; free space there") from None
        self.engine.wait_for(self.load_everywhere(folder, version, weights.checksums))
        for old in self.folder.glob("version_*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)

    def write(self, folder: Path, weights: SentWeights) -> None:
        """Write a Hugging Face folder, completely or not at all."""
        with folder_written_whole(folder, flush=False) as partial:
            for file in self.model.iterdir():
                if file.suffix == ".json" and not file.name.endswith(".index.json"):
                    shutil.copy(file, partial)
            for number, bucket in enumerate(buckets(weights, SENT_BUCKET_BYTES)):
                tensors = {name: tensor.cpu() for name, tensor in bucket}
                save_file(tensors, partial / f"model-{number:05d}.safetensors")

    async def load_everywhere(self, folder: Path, version: int, expected: Checksums) -> None:
        """Load and verify the folder on every server; those that fail are taken out."""

        async def load(client: Client) -> None:
            await client.pause()
            await client.load_from_disk(str(folder), str(version))
            await verify(client, version, expected)
            await client.resume()

        async with self.fleet.control:
            members = list(await self.fleet.answering())
            done = await on_each(members, load)
            if not done:
                raise EngineError(f"no server loaded version {version}: {reasons(members)}")
            self.fleet.restore = load
            await self.fleet.install(version, done)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class BucketPublication:
    """Publishes in buckets, which `transfer` sends."""

    def __init__(
        self, fleet: Fleet, engine: LivesInLoop, transfer: Broadcast | SharedTensors
    ) -> None:
        self.fleet, self.engine, self.transfer = fleet, engine, transfer

    def publish(self, weights: SentWeights, version: int) -> None:
        """Load the weights on all servers that answer. Raises EngineError if one of them fails."""
        self.engine.wait_for(self.fleet.control.acquire())
        try:
            self.send(weights, version)
        except BaseException:
            self.transfer.close()  # which servers received what is unknown
            raise
        finally:
            self.engine.loop.call_soon_threadsafe(self.fleet.control.release)

    def send(self, weights: SentWeights, version: int) -> None:
        """Pause, send all buckets, verify and resume."""
        versions = self.engine.wait_for(self.fleet.answering())
        members = list(versions)
        # a server that was restarted has the version of its model folder
        same_processes = set(versions.values()) == {str(self.fleet.version)}
        self.transfer.prepare(members, weights.ranks, same_processes=same_processes)

        async def begin(client: Client) -> None:
            await client.pause()
            await client.begin_update()

        async def end(client: Client) -> None:
            await client.end_update(str(version))
            await verify(client, version, weights.checksums)
            await client.resume()

        self.engine.wait_for(on_all(members, begin))
        for bucket in buckets(weights, SENT_BUCKET_BYTES):
            self.transfer.carry(bucket)
        self.engine.wait_for(on_all(members, end))
        self.engine.wait_for(self.fleet.install(version, members))

    def close(self) -> None:
        self.transfer.close()


async def verify(client: Client, version: int, expected: Checksums) -> None:
    """Raise ServerError unless the server has this version and weights with these checksums."""
    found = (await client.info()).weight_version
    if found != str(version):
        raise ServerError(f"{client.url} reports version {found} after the update to {version}")
    if wrong := differing_parameters(expected, await client.checksums()):
        raise ServerError(f"{client.url} holds other weights than were sent: {wrong}")


def buckets(weights: SentWeights, most_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Group tensors in order; a tensor larger than `most_bytes` is a bucket of its own."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > most_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
