"""Send buckets of weights to paused SGLang servers, by broadcast or as shared tensors.

`Broadcast` uses a process group of this process (rank 0) and every rank of every server, over NCCL
or gloo; it is recreated when a server joins, leaves or restarts. `SharedTensors` is for servers on
this node: HTTP carries handles of the tensors (CUDA IPC on a GPU, names of shared memory on a CPU).
"""

import base64
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler

import torch
import torch.distributed as dist
import torch.multiprocessing  # its tensors are pickled as handles

from rlef_mega.engines import EngineError
from rlef_mega.engines.sglang.client import Client
from rlef_mega.engines.sglang.members import Member, on_all, on_each
from rlef_mega.run.addresses import bracketed
from rlef_mega.run.event_loop import LivesInLoop

Bucket = Sequence[tuple[str, torch.Tensor]]


class Broadcast:
    """Sends buckets through a process group. The servers connect to this machine at the address
    `host`; `backend` is nccl or gloo."""

    def __init__(self, engine: LivesInLoop, host: str, backend: str, deadline_s: float) -> None:
        self.engine, self.host, self.backend = engine, host, backend
        self.deadline_s = deadline_s
        self.group: dist.ProcessGroup | None = None
        self.group_name = ""
        self.store: dist.TCPStore | None = None
        self.members: list[Member] = []

    def prepare(self, members: list[Member], ranks: int, *, same_processes: bool) -> None:
        """Make a group with these servers, of `ranks` each, unless the existing one has the same
        servers and their processes have not restarted."""
        if self.group is None or members != self.members or not same_processes:
            self.leave()
            self.join(members, ranks)

    def carry(self, bucket: Bucket) -> None:
        """Announce the bucket to all servers, then send it as one byte tensor. Returns when all
        have loaded it; raises EngineError if one fails."""
        data = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in bucket])
        receiving = self.engine.submit(
            on_all(self.members, lambda client: client.receive_bucket(bucket, self.group_name))
        )
        # group: this process and every rank of every server
        sending = dist.broadcast(data, group=self.group, group_src=0, async_op=True)
        assert sending is not None
        while not sending.is_completed():
            if receiving.done():
                receiving.result()  # raises if a server refused: it will not take part
            time.sleep(0.001)
        try:
            sending.wait()
        except RuntimeError as error:  # torch's; if a server failed, HTTP has the reason
            receiving.result()
            raise EngineError(f"a broadcast to the servers failed: {error}") from None
        receiving.result()

    def leave(self) -> None:
        """Destroy the group, here and on the servers that still answer."""
        if self.group is None:
            return
        self.engine.wait_for(
            on_each(self.members, lambda client: client.leave_group(self.group_name))
        )
        dist.destroy_process_group(self.group)
        self.group = None

    def join(self, members: list[Member], ranks: int) -> None:
        """Make a group with every rank of these servers."""
        self.group_name, self.members = f"rlef_{time.time_ns()}", members
        world_size = 1 + ranks * len(members)
        # NCCL's watchdog ends this process at the group's timeout; HTTP's timeout must come first
        timeout = timedelta(seconds=(2 if self.backend == "nccl" else 1) * self.deadline_s)
        # port 0 is any free one; the servers join as its clients
        self.store = store = dist.TCPStore(
            self.host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False
        )

        async def join(member: Member) -> None:
            await member.join_group(
                self.group_name,
                backend=self.backend,
                master_address=bracketed(self.host),
                master_port=store.port,
                rank_offset=1 + ranks * members.index(member),
                world_size=world_size,
            )

        joining = self.engine.submit(on_all(members, join))
        try:
            self.group = make_group(self.group_name, store, world_size, self.backend, timeout)
        except RuntimeError as error:  # torch's; if a server failed, HTTP has the reason
            joining.result()
            raise EngineError(f"the process group with the servers failed: {error}") from None
        joining.result()

    def close(self) -> None:
        """Drop the group. With NCCL, a broadcast that a server did not receive would otherwise end
        this process later."""
        if self.group is not None and self.backend == "nccl":
            self.group.abort()
        self.group = self.store = None


class SharedTensors:
    """Lets servers on this node map buckets of this process."""

    def __init__(self, engine: LivesInLoop) -> None:
        self.engine = engine
        self.members: list[Member] = []
        self.ranks = 0
        # on a CPU by name: file descriptors cannot be sent over HTTP
        torch.multiprocessing.set_sharing_strategy("file_system")

    def prepare(self, members: list[Member], ranks: int, *, same_processes: bool) -> None:
        self.members, self.ranks = members, ranks

    def carry(self, bucket: Bucket) -> None:
        """Send each server handles of the bucket's memory (CUDA IPC, or shared memory on a CPU).
        Returns when all servers have loaded its tensors."""

        async def receive(client: Client) -> None:
            # handles are counted, so each process that opens one needs its own
            await client.receive_tensors([handle_of(bucket) for _ in range(self.ranks)])

        self.engine.wait_for(on_all(self.members, receive))

    def close(self) -> None:
        pass


def handle_of(bucket: Bucket) -> str:
    """Return what SGLang needs to open the tensors in another process of this node."""
    return base64.b64encode(ForkingPickler.dumps(list(bucket))).decode()


def make_group(
    name: str, store: dist.Store, world_size: int, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Make rank 0's side of a group with processes outside this job, as SGLang makes its own
    (sglang.srt.utils.init_custom_process_group); torch has no public function for it."""
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
