"""Which installed packages are used, and that broken ones are reported and skipped.

No GPU is needed: where one matters, `torch.cuda.is_available` is made to return True while packages
are probed, and nothing is computed there.
"""

import inspect
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from rlef_mega.megatron.network import accelerations
from rlef_mega.megatron.network.accelerations import (
    NOT_INSTALLED,
    attention_kernel,
    fault,
    hide_unusable,
    report,
    uses,
)
from rlef_mega.megatron.network.attention import (
    attention_by_sequence,
    packed_sequences,
    torch_varlen,
)

ROOT = Path(__file__).parents[4]
CACHED = (attention_kernel, fault)
CUDA = torch.device("cuda")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Yield a folder on Python's path for fake packages, and clear cached decisions."""
    monkeypatch.syspath_prepend(tmp_path)
    for function in CACHED:
        function.cache_clear()
    yield tmp_path
    for function in CACHED:
        function.cache_clear()


def package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)


def forget(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Remove sys.modules[name]; restore it after the test."""
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    del sys.modules[name]


def test_a_package_that_cannot_be_imported_is_reported_and_skipped(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(fresh, "flash_attn", "raise OSError('undefined symbol: _ZN3c105ErrorC2E')")
    forget(monkeypatch, "flash_attn")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attention_kernel("cuda", torch.bfloat16) == accelerations.TORCH_VARLEN
    unused = report(CUDA, torch.bfloat16)["flash_attn"]
    assert "cannot be imported: OSError: undefined symbol" in unused
    assert unused.endswith("; pip install 'rlef-mega[gpu]'")
    hide_unusable()
    with pytest.raises(ImportError):  # which megatron-core and transformers handle
        import flash_attn  # noqa: F401


def test_a_package_that_works_is_used(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(fresh, "flash_attn", "")
    package(fresh, "fused_weight_gradient_mlp_cuda", "")
    for name in ("flash_attn", "fused_weight_gradient_mlp_cuda"):
        forget(monkeypatch, name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert attention_kernel("cuda", torch.bfloat16) == accelerations.FLASH_ATTN
    assert attention_kernel("cuda", torch.float32) == accelerations.SDPA
    assert uses("fused_weight_gradient_mlp_cuda", CUDA)
    hide_unusable()
    assert "flash_attn" in sys.modules


def test_packages_that_need_a_gpu_are_not_imported_without_one(tmp_path: Path) -> None:
    """In a process of its own: megatron-core imports these when it is imported, and handles only
    an ImportError."""
    package(tmp_path, "flash_attn", "raise RuntimeError('no CUDA driver')")
    for name in ("transformer_engine", "apex"):  # hidden with a GPU, too
        package(tmp_path, name, "raise RuntimeError('was imported')")
    script = (
        "import torch; from rlef_mega.megatron.network.accelerations import announce\n"
        "import rlef_mega.megatron.network.packed_llama\n"
        "announce(torch.device('cpu'), torch.float32)\n"
        "from megatron.core.optimizer import Adam; print(Adam)"
    )
    paths = [str(tmp_path), str(ROOT), str(ROOT / "kernels"), str(ROOT / "sandbox")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "flash_attn        not used: installed, but there is no NVIDIA GPU" in done.stdout
    assert "torch.optim.adamw.AdamW" in done.stdout


def test_what_is_missing_on_a_gpu_is_named_with_its_remedy(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerations, "fault", lambda package: NOT_INSTALLED)
    found = report(CUDA, torch.bfloat16)
    assert (found["attention"], found["head"]) == ("torch varlen_attn", "PyTorch")
    assert (found["optimizer"], found["weight gradients"]) == ("PyTorch AdamW, fused", "PyTorch")
    for name, remedy in accelerations.INSTALL.items():
        assert found[name] == f"not used: not installed; {remedy}"


def sequence_by_sequence(query, key, value, bounds, *, causal: bool) -> torch.Tensor:
    parts = []
    for start, end in pairwise(bounds.tolist()):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=q.shape[0] != k.shape[0]
            ).transpose(0, 1)
        )
    return torch.cat(parts)


def torch_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    assert query.shape[1] == key.shape[1], "no grouped heads"
    return sequence_by_sequence(query, key, value, cu_seq_q, causal=is_causal)


def torch_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    assert query.shape[1] == 2 * key.shape[1], "grouped heads need no copies"
    return sequence_by_sequence(query, key, value, cu_seq_q, causal=window_size == (-1, 0))


def torch_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa and query.shape[1] == 2 * key.shape[1]
    return sequence_by_sequence(query, key, value, cu_seq_q, causal=window_size == (-1, 0))


def test_the_newest_signature_below_is_the_installed_one() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    installed = inspect.signature(varlen.varlen_attn).parameters
    if "enable_gqa" in installed:
        assert list(inspect.signature(torch_2_12).parameters) == list(installed)


@pytest.mark.parametrize("varlen_attn", [torch_2_10, torch_2_11, torch_2_12])
def test_pytorchs_varlen_attention_is_called_by_its_signature(
    varlen_attn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins with the signatures of PyTorch 2.10 to 2.13, whose kernel needs a GPU, against
    SDPA sequence by sequence; two query heads per key head."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(17, 4, 8, generator=generator)
    key, value = (torch.randn(17, 2, 8, generator=generator) for _ in range(2))
    packed = packed_sequences([9, 5, 3], torch.device("cpu"))
    expected = attention_by_sequence(query, key, value, packed)
    found = torch_varlen(query, key, value, packed)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
