"""The kernels' machine code: no register is spilled, products use tensor cores and the tensor
memory accelerator and overlap with each other, shared memory is within the hardware's limits. And
the memory that is allocated.

All at the sizes of Llama 3.1 8B's head (4,096 x 128,256) with 8,192 tokens, on meta tensors
(`compiler.py`). What this cannot show: speed, and that the machine code computes the right
numbers; tests/kernels/device tests those, in the interpreter and on a GPU.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))
from compiler import SHARED_MEMORY, AllocatedOnMeta, compiled_for

from rlef_kernels.gpu.linear_logprob import linear_logprob_kernels
from rlef_kernels.gpu.linear_ppo_loss import linear_ppo_loss_kernels
from rlef_kernels.gpu.linear_score import linear_score_kernels
from rlef_kernels.gpu.plan import CUBLAS, FUSED, MIB

TOKENS, WIDTH, VOCABULARY = 8192, 4096, 128256
SIZES = (TOKENS, WIDTH, VOCABULARY)
# No size is a multiple of a tile; the width is a multiple of 8, as the fused way needs.
RAGGED = (8191, 4104, 128257)
SPILLS = ("STL", "LDL")  # stores to and loads from local memory
WAIT_FOR_ALL = "DEPBAR.LE gsb0, 0x0"


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def head(main_grad=True, sizes=SIZES):
    tokens, width, vocabulary = sizes
    hidden, weight = empty(tokens, width).requires_grad_(), empty(vocabulary, width)
    weight.requires_grad_()
    if main_grad:
        weight.main_grad = empty(vocabulary, width, dtype=torch.float32)
        weight.grad_added_to_main_grad = False  # as with Megatron: backward returns zeros
    return hidden, weight, empty(tokens, dtype=torch.int64)


def run_linear_logprob(plan, with_entropy=True, sizes=SIZES):
    hidden, weight, target = head(sizes=sizes)
    with AllocatedOnMeta() as forward:
        logprob, entropy = linear_logprob_kernels(
            hidden, weight, target, accumulate_main_grad=True, plan=plan
        )
    loss = (logprob + entropy).sum() if with_entropy else logprob.sum()
    with AllocatedOnMeta() as backward:
        loss.backward()
    return forward, backward


def run_linear_ppo_loss(plan, group=None):
    hidden, weight, target = head()
    policy = tuple(empty(TOKENS, dtype=torch.float32) for _ in range(3))
    with AllocatedOnMeta() as memory:
        metrics = linear_ppo_loss_kernels(
            hidden,
            weight,
            target,
            policy,
            clip_eps=0.2,
            group=group,
            denominator=8000,
            accumulate_main_grad=True,
            plan=plan,
        )
        metrics[0].backward()
    return memory


def run_linear_score(plan, sizes=SIZES):
    hidden, weight, target = (tensor.detach() for tensor in head(main_grad=False, sizes=sizes))
    with AllocatedOnMeta() as memory:
        linear_score_kernels(hidden, weight, hidden, weight, target, plan=plan)
    return memory


OPERATIONS = {
    "linear_logprob fused": lambda: run_linear_logprob(FUSED),
    "linear_logprob fused, no entropy": lambda: run_linear_logprob(FUSED, with_entropy=False),
    "linear_logprob fused, ragged": lambda: run_linear_logprob(FUSED, sizes=RAGGED),
    "linear_logprob cublas": lambda: run_linear_logprob(CUBLAS),
    "linear_ppo_loss fused": lambda: run_linear_ppo_loss(FUSED),
    "linear_ppo_loss cublas": lambda: run_linear_ppo_loss(CUBLAS),
    "linear_score fused": lambda: run_linear_score(FUSED),
    "linear_score fused, ragged": lambda: run_linear_score(FUSED, sizes=RAGGED),
    "linear_score cublas": lambda: run_linear_score(CUBLAS),
}
NEED_HOPPER = [name for name in OPERATIONS if "fused" in name]
PRODUCT_KERNELS = {"linear_logprob fused": 2, "linear_logprob fused, no entropy": 2}
PRODUCT_KERNELS |= {"linear_logprob fused, ragged": 2}
PRODUCT_KERNELS |= {"linear_ppo_loss fused": 1}
PRODUCT_KERNELS |= {"linear_score fused": 1, "linear_score fused, ragged": 1}


def check_budgets(code):
    assert code.usage["STACK"] == 0 and code.usage["LOCAL"] == 0, code.usage
    assert {spill: code.count(spill) for spill in SPILLS} == dict.fromkeys(SPILLS, 0)
    assert code.shared_bytes <= SHARED_MEMORY


@pytest.mark.parametrize("operation", OPERATIONS)
def test_on_sm_90_nothing_spills_and_products_use_tensor_cores_and_tma(operation, tmp_path):
    with compiled_for(90, tmp_path) as found:
        OPERATIONS[operation]()
    assert found
    for code in found.values():
        check_budgets(code)
        if "product" in code.name:
            assert code.count("HGMMA") and code.count("UTMALDG"), code.name
            # A wait for all products, only at the end of each loop. ptxas inserts one after each
            # product ("wgmma will be serialized", C7515) if it cannot follow the accumulator.
            assert code.count(WAIT_FOR_ALL) == code.name.startswith("two_products") + 1, code.name
            assert code.count("HGMMA") == 4 * code.count(WAIT_FOR_ALL)
        else:
            assert not code.count("HMMA") and not code.count("HGMMA")
    products = [name for name in found if "product" in name]
    assert len(products) == PRODUCT_KERNELS.get(operation, 0)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_on_sm_100_products_use_its_tensor_cores(operation, tmp_path):
    with compiled_for(100, tmp_path) as found:
        OPERATIONS[operation]()
    for code in found.values():
        assert code.shared_bytes <= SHARED_MEMORY
        if "product" in code.name:
            assert code.count("UTCHMMA") and code.count("UTMALDG"), code.name
        else:
            check_budgets(code)


@pytest.mark.slow
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in NEED_HOPPER])
def test_on_sm_80_nothing_spills(operation, tmp_path):
    with compiled_for(80, tmp_path) as found:
        OPERATIONS[operation]()
    assert found
    for code in found.values():
        check_budgets(code)


@pytest.mark.parametrize("plan", [FUSED, CUBLAS], ids=["fused", "cublas"])
def test_linear_logprob_stays_within_64_mib_forward_and_1_1_gib_backward(plan, tmp_path):
    with compiled_for(90, tmp_path):
        forward, backward = run_linear_logprob(plan)
    assert 8 * MIB < forward.peak <= 64 * MIB
    assert 512 * MIB < backward.peak <= 1.1 * 1024 * MIB


@pytest.mark.parametrize(("plan", "most"), [(FUSED, 64), (CUBLAS, 96)], ids=["fused", "cublas"])
def test_linear_score_stays_within_64_mib_and_with_cublas_within_96(plan, most, tmp_path):
    with compiled_for(90, tmp_path):
        memory = run_linear_score(plan)
    assert 16 * MIB < memory.peak <= most * MIB


@pytest.mark.parametrize("plan", [FUSED, CUBLAS], ids=["fused", "cublas"])
def test_linear_ppo_loss_stays_within_1_1_gib_and_the_gradient_of_hidden(plan, tmp_path):
    with compiled_for(90, tmp_path):
        memory = run_linear_ppo_loss(plan)
    gradient_of_hidden = 2 * TOKENS * WIDTH
    assert 900 * MIB < memory.peak - gradient_of_hidden <= 1.1 * 1024 * MIB


def test_a_group_of_one_rank_costs_no_memory(tmp_path):
    """Only a sum over ranks needs the gradient of hidden in fp32."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with compiled_for(90, tmp_path):
            alone, of_one = (
                run_linear_ppo_loss(FUSED, group) for group in (None, dist.group.WORLD)
            )
    finally:
        dist.destroy_process_group()
    assert of_one.peak == alone.peak
