"""How many bytes of tensors are alive: counted where PyTorch makes them, on any device."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class AllocatedBytes(TorchDispatchMode):
    """`peak`: the most bytes alive at once among the tensors made under it. What an operation takes
    and frees within itself does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.from_before: set[int] = set()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                key = tensor.untyped_storage()._cdata
                if key not in self.alive:
                    self.from_before.add(key)
        result = self.call(func, args, kwargs)
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def call(self, func, args, kwargs):
        return func(*args, **kwargs)

    def count(self, storage: torch.UntypedStorage) -> None:
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        if storage._cdata in self.from_before:
            return
        self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
