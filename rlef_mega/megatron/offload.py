"""Offloading: tensors free their device memory between the phases that need them, and get it back
with the same contents.

What moves is the storage of a tensor, not the tensor: parameters, Megatron's views into its buffers
and the optimizer's references stay valid objects, which have no memory until `reload`. Host memory
is pinned if there is CUDA, and reused. On a CPU the same code copies host memory to host memory,
which is useless but lets every test run it.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch


class HostMemory:
    """Host memory for the contents of offloaded tensors."""

    def __init__(self) -> None:
        self.waiting: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        self.free: dict[int, list[torch.Tensor]] = defaultdict(list)  # pinned bytes, by size

    def offload(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy the storages of these tensors to the host and free them. A storage that several
        tensors share is moved once, an empty one not at all.
        """
        storages = {
            storage._cdata: storage
            for storage in (tensor.untyped_storage() for tensor in tensors)
            if storage.nbytes()
        }
        for storage in storages.values():
            host = self.take(storage)
            host.copy_(as_bytes(storage), non_blocking=True)
            self.waiting.append((storage, host))
        synchronize(storages.values())
        for storage in storages.values():
            storage.resize_(0)

    def reload(self) -> None:
        """Copy all contents back to the device."""
        storages = [storage for storage, _ in self.waiting]
        for storage, host in self.waiting:
            storage.resize_(host.numel())
            as_bytes(storage).copy_(host, non_blocking=True)
        synchronize(storages)
        for _, host in self.waiting:
            self.free[host.numel()].append(host)
        self.waiting.clear()

    def take(self, storage: torch.UntypedStorage) -> torch.Tensor:
        size = storage.nbytes()
        if self.free[size]:
            return self.free[size].pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")


def as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def synchronize(storages: Iterable[torch.UntypedStorage]) -> None:
    """Wait for copies to and from pinned memory, which return early."""
    if any(storage.device.type == "cuda" for storage in storages):
        torch.cuda.synchronize()
