"""What training costs a GPU's memory, the host's pinned memory and the device's queue, as far as a
CPU can show it: which tensors are kept, how much is pinned, and where Python needs a value.
"""

import gc
import mmap
from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer import clip_grads
from torch.utils._python_dispatch import TorchDispatchMode

from rlef_mega.megatron.checkpoints.state import make_adam_state
from rlef_mega.megatron.cpu_shim import device_mode
from rlef_mega.megatron.network.attention import PackedAttention, packed_sequences
from rlef_mega.megatron.offload import HostMemory, host_bytes
from rlef_mega.megatron.trained_model import fuse_adam


class Driver:
    """Stands in for `torch.cuda.cudart()`, and knows which bytes are pinned."""

    cudaError = SimpleNamespace(success=0)

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        ends = [(start, start + other) for start, other in self.pinned.items()]
        if any(address < end and start < address + size for start, end in ends):
            return 712  # already registered
        if sum(self.pinned.values()) + size > 8 * 2**20:
            return 2  # out of memory
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    return driver


def test_pinned_memory_is_as_large_as_asked_and_pinned_until_its_last_view_is_gone(driver):
    page = mmap.PAGESIZE
    kept = [host_bytes(size, pinned=True) for size in (5 * 2**20, page, 3, page + 1)]
    assert sorted(driver.pinned.values()) == [page, page, 2 * page, 5 * 2**20]
    assert all(address % page == 0 for address in driver.pinned)
    assert [tensor.numel() for tensor in kept] == [5 * 2**20, page, 3, page + 1]
    view = kept[0][100:200].view(torch.float32)
    del kept
    gc.collect()
    assert list(driver.pinned.values()) == [5 * 2**20]
    with pytest.raises(RuntimeError, match=r"cannot pin 0.00 GiB .* learner.offload"):
        host_bytes(4 * 2**20, pinned=True)
    del view
    gc.collect()
    assert not driver.pinned


def test_offloaded_state_is_one_piece_of_host_memory_that_is_reused():
    memory = HostMemory()
    shared = torch.arange(100.0)
    tensors = [shared[:50], shared[50:], torch.ones(7, dtype=torch.bfloat16)]
    before = [tensor.clone() for tensor in tensors]
    for _ in range(2):
        memory.offload(tensors)
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
        memory.offload(tensors)  # nothing is left to move
        place = memory.buffer.memory.data_ptr()
        memory.reload()
        for tensor, old in zip(tensors, before, strict=True):
            assert torch.equal(tensor, old)
    assert memory.buffer.memory.data_ptr() == place
    assert memory.buffer.memory.numel() == 448 + 64  # 400 and 14 bytes, aligned


def test_adam_is_fused_on_a_gpu_and_counts_its_steps_there():
    """On the device "meta", which stands for any device but a CPU."""
    for device, fused in (("cpu", None), ("meta", True)):
        weight = torch.zeros(3, device=device, requires_grad=True)
        adam = torch.optim.AdamW([weight])
        fuse_adam(adam, weight.device)
        assert adam.param_groups[0]["fused"] is fused
        make_adam_state(adam)
        step = adam.state[weight]["step"]
        assert (step.device.type, step.dtype, step.dim()) == (device, torch.float32, 0)


class ValuesRead(TorchDispatchMode):
    """Counts the tensors whose value Python reads: each is a wait for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_a_gradient_norm_waits_for_the_device_once_and_not_once_per_parameter():
    gradients = [torch.randn(number + 1) for number in range(9)]
    with device_mode(), ValuesRead() as read:
        norm, _ = clip_grads.multi_tensor_applier(
            clip_grads.l2_norm_impl, torch.zeros(1), [gradients], False
        )
    assert read.count == 0 and norm.shape == (1,)
    torch.testing.assert_close(norm[0], torch.cat(gradients).norm())


def test_attention_keeps_its_value_but_not_the_product_that_it_is_part_of():
    product = torch.randn(26, 4 * 8 + 2 * 2 * 8, requires_grad=True) * 1.0
    query, key, value = product.view(26, 8, 8).split([4, 2, 2], dim=1)
    attention = PackedAttention.__new__(PackedAttention)
    torch.nn.Module.__init__(attention)
    attention.frequencies_E = torch.ones(4)
    packed, kept = packed_sequences([20, 6], torch.device("cpu")), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        attention(query, key, value, None, packed_seq_params=packed)
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert kept and product.untyped_storage().data_ptr() not in storages
