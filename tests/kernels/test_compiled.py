"""The kernels' machine code: no register spilled, tensor cores and the tensor memory accelerator
used where meant, shared memory within the hardware's limits. And the memory that is allocated.

All at the sizes of Llama 3.1 8B's head (4,096 x 128,256) with 8,192 tokens, on tensors without
memory (`compiler.py`). What this cannot show: speed, and that the machine code computes rightly;
tests/kernels/device does the latter, in the interpreter and on a GPU.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))
from compiler import SHARED_MEMORY, AllocatedBytes, compiled_for

from rlef_kernels.gpu.linear_logprob import linear_logprob_kernels
from rlef_kernels.gpu.plan import CUBLAS, FUSED, MIB

TOKENS, WIDTH, VOCABULARY = 8192, 4096, 128256
SPILLS = ("STL", "LDL")  # stores to and loads from local memory


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def head(main_grad=True):
    hidden, weight = empty(TOKENS, WIDTH).requires_grad_(), empty(VOCABULARY, WIDTH)
    weight.requires_grad_()
    if main_grad:
        weight.main_grad = empty(VOCABULARY, WIDTH, dtype=torch.float32)
    return hidden, weight, empty(TOKENS, dtype=torch.int64)


def run_linear_logprob(plan, with_entropy=True):
    hidden, weight, target = head()
    with AllocatedBytes() as forward:
        logprob, entropy, _ = linear_logprob_kernels(
            hidden, weight, target, accumulate_main_grad=True, plan=plan
        )
    loss = (logprob + entropy).sum() if with_entropy else logprob.sum()
    with AllocatedBytes() as backward:
        loss.backward()
    return forward, backward


OPERATIONS = {
    "linear_logprob fused": lambda: run_linear_logprob(FUSED),
    "linear_logprob fused, no entropy": lambda: run_linear_logprob(FUSED, with_entropy=False),
    "linear_logprob cublas": lambda: run_linear_logprob(CUBLAS),
}
NEED_HOPPER = [name for name in OPERATIONS if "fused" in name]


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
        if code.name.startswith("product_"):
            assert code.count("HGMMA") and code.count("UTMALDG"), code.name
        else:
            assert not code.count("HMMA") and not code.count("HGMMA")
    products = [name for name in found if name.startswith("product_")]
    assert len(products) == (2 if operation in NEED_HOPPER else 0)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_on_sm_100_products_use_its_tensor_cores(operation, tmp_path):
    with compiled_for(100, tmp_path) as found:
        OPERATIONS[operation]()
    for code in found.values():
        assert code.shared_bytes <= SHARED_MEMORY
        if code.name.startswith("product_"):
            assert code.count("UTCHMMA") and code.count("UTMALDG"), code.name
        else:
            check_budgets(code)


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
