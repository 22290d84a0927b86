"""Offloading: tensors free their device memory between the phases that need them, and get it back
with the same contents.

What moves is the storage of a tensor, not the tensor: parameters, Megatron's views into its buffers
and the optimizer's references stay valid objects, which have no memory until `reload`. Host memory
is pinned if there is CUDA, and reused. On a CPU the same code copies host memory to host memory,
which is useless but lets every test run it.
"""

import mmap
import weakref
from collections.abc import Iterable, Sequence

import torch

ALIGNMENT = 64  # bytes, of the tensors in a host buffer
# A flag of Linux's mmap: no memory is reserved before pages are pinned, because a rehearsal may map
# more than the host has.
MAP_NORESERVE = 0x4000


class HostBuffer:
    """Host memory for copies of tensors. It is kept for the next copies, because the first use of
    fresh pages costs more than the copy.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy tensors to the host. The copies are valid until the next call."""
        starts = [0]
        for tensor in tensors:
            starts.append(starts[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if self.memory.numel() < starts[-1]:
            self.memory = self.memory.new_empty(0)  # frees the old memory first
            self.memory = host_bytes(starts[-1], pinned=on_gpu)
        copies = []
        for tensor, start in zip(tensors, starts[:-1], strict=True):
            room = self.memory[start : start + tensor.nbytes]
            copies.append(room.view(tensor.dtype).view(tensor.shape))
            copies[-1].copy_(tensor, non_blocking=True)
        if on_gpu:  # copies to pinned memory return early
            torch.cuda.synchronize()
        return copies


def host_bytes(size: int, *, pinned: bool) -> torch.Tensor:
    """Return uninitialised host memory, which is unpinned before it is freed.

    PyTorch rounds its own pinned memory up to a power of two: 8 GiB for 5. Here whole pages are
    pinned, and no two pieces of memory share one. Raises RuntimeError if they cannot be pinned.
    """
    if not pinned:
        return torch.empty(size, dtype=torch.uint8)
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, pages, flags=flags), dtype=torch.uint8)
    driver, address = torch.cuda.cudart(), memory.data_ptr()
    if (fault := driver.cudaHostRegister(address, pages, 0)) != driver.cudaError.success:
        raise RuntimeError(
            f"cannot pin {pages / 2**30:.2f} GiB of host memory ({fault}): raise the limit "
            '`ulimit -l`, free host memory, use more ranks, or set learner.offload = "none"'
        )
    unpin = weakref.finalize(memory.untyped_storage(), driver.cudaHostUnregister, address)
    unpin.atexit = False
    return memory[:size]


class HostMemory:
    """Host memory for the contents of offloaded tensors."""

    def __init__(self) -> None:
        self.waiting: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        self.buffer = HostBuffer()

    def offload(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy the storages of these tensors to the host and free them. A storage that several
        tensors share is moved once, an empty one not at all.
        """
        storages = {
            storage._cdata: storage
            for storage in (tensor.untyped_storage() for tensor in tensors)
            if storage.nbytes()
        }
        if not storages:
            return
        assert not self.waiting, "reload what is on the host first"
        copies = self.buffer.copy([as_bytes(storage) for storage in storages.values()])
        self.waiting = list(zip(storages.values(), copies, strict=True))
        for storage in storages.values():
            storage.resize_(0)

    def reload(self) -> None:
        """Copy all contents back to the device."""
        for storage, host in self.waiting:
            storage.resize_(host.numel())
            as_bytes(storage).copy_(host, non_blocking=True)
        if any(storage.is_cuda for storage, _ in self.waiting):
            torch.cuda.synchronize()
        self.waiting.clear()


def as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
