"""How a bucket of weights reaches SGLang servers: by broadcast, or as tensors that they map.

`Broadcasts`: a process group of this process (rank 0) and every rank of every server, NCCL or gloo;
made again when a server came or went, or was started again. `SharedTensors`: for servers on this
node; what goes over HTTP says where the tensors are, CUDA IPC handles on a GPU, names of shared
memory on a CPU.
"""

import base64
import io
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing  # its tensors are pickled as handles

from rlef_mega.engines import EngineError
from rlef_mega.engines.sglang.http import PROBE_S, Client
from rlef_mega.engines.sglang.members import Member, on_each, reasons

Answer = TypeVar("Answer")
Submit = Callable[[Coroutine[Any, Any, Answer]], "Future[Answer]"]
Bucket = Sequence[tuple[str, torch.Tensor]]
# Runs the same on all servers, and ends with EngineError where one fails.
Everywhere = Callable[[Callable[[Client], Coroutine[Any, Any, None]]], "Future[None]"]


class Carrier(Protocol):
    """Brings buckets to servers that are paused and wait for them."""

    def prepare(
        self, members: list[Member], submit: Submit[Any], ranks: int, *, same_processes: bool
    ) -> None:
        """Before a publication to these servers, of so many ranks each; whether they are the
        processes of the last one."""

    def carry(self, bucket: Bucket, everywhere: Everywhere) -> None:
        """Returns when all servers have loaded it."""

    def close(self) -> None: ...


class Broadcasts:
    """`host` is this machine's address for the servers; `backend` nccl or gloo."""

    def __init__(self, host: str, *, backend: str, deadline_s: float) -> None:
        self.host, self.backend, self.deadline_s = host, backend, deadline_s
        self.group: dist.ProcessGroup | None = None
        self.group_name = ""
        self.store: dist.TCPStore | None = None
        self.members: list[Member] = []

    def prepare(
        self, members: list[Member], submit: Submit[Any], ranks: int, *, same_processes: bool
    ) -> None:
        if self.group is not None and members == self.members and same_processes:
            return
        self.leave(submit)
        self.join(members, submit, ranks)

    def carry(self, bucket: Bucket, everywhere: Everywhere) -> None:
        """All servers are told what comes, then it comes, as one run of bytes."""

        async def receive(client: Client) -> None:
            await client.receive_bucket(bucket, self.group_name, within_s=self.deadline_s)

        bytes_of = [tensor.reshape(-1).view(torch.uint8) for _, tensor in bucket]
        receiving = everywhere(receive)
        # group: this process and every rank of every server
        sending = dist.broadcast(torch.cat(bytes_of), group=self.group, group_src=0, async_op=True)
        assert sending is not None
        while not sending.is_completed():
            if receiving.done():
                receiving.result()  # a server that refused will not take part: do not wait for it
            time.sleep(0.001)
        try:
            sending.wait()
        except RuntimeError as error:  # torch's: a server takes nothing, and HTTP says which
            receiving.result()
            raise EngineError(f"a broadcast to the servers failed: {error}") from None
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
        self.group_name = f"rlef_{time.time_ns()}"
        self.members = members
        world_size = 1 + ranks * len(members)
        # NCCL's watchdog ends this process after it, so HTTP's deadline must come before
        longer = 2 if self.backend == "nccl" else 1
        deadline = timedelta(seconds=longer * self.deadline_s)
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
        why = ""
        try:
            self.group = make_group(self.group_name, store, world_size, self.backend, deadline)
        except RuntimeError as error:  # torch's: a server does not come, and HTTP says which
            why = str(error)
        joined = joining.result()
        if failed := [member for member in members if member not in joined]:
            raise EngineError(f"not all servers joined: {reasons(failed)}")
        if why:
            raise EngineError(f"the servers were not joined: {why}")

    def close(self) -> None:
        if self.group is not None and self.backend == "nccl":
            self.group.abort()  # what a server did not take would end this process later
        self.group = self.store = None


class SharedTensors:
    """Of this process, for servers on the same node."""

    def __init__(self, *, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.ranks = 0

    def prepare(
        self, members: list[Member], submit: Submit[Any], ranks: int, *, same_processes: bool
    ) -> None:
        self.ranks = ranks

    def carry(self, bucket: Bucket, everywhere: Everywhere) -> None:
        async def receive(client: Client) -> None:
            # a handle of its own for each process that opens it, which is how they are counted
            handles = [handle_of(bucket) for _ in range(self.ranks)]
            await client.receive_tensors(handles, within_s=self.deadline_s)

        everywhere(receive).result()  # the tensors are kept until then

    def close(self) -> None:
        pass


def handle_of(bucket: Bucket) -> str:
    """How another process of this node opens the tensors, as SGLang reads it."""
    before = torch.multiprocessing.get_sharing_strategy()
    # on a CPU by name: file descriptors do not travel over HTTP
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        pickled = io.BytesIO()
        ForkingPickler(pickled).dump(list(bucket))
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    return base64.b64encode(pickled.getvalue()).decode()


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


def own_address(urls: Sequence[str]) -> str:
    """This machine's address on the way to the servers."""
    host, _, port = urls[0].partition("://")[2].partition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port or 80)))  # no packet is sent
        return str(probe.getsockname()[0])
