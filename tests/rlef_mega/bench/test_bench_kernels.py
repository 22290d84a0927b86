"""`rlef bench kernels` without a GPU: its error, and a miniature of it on the CPU. Speeds are not
asserted.
"""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from rlef_mega.bench.kernel_methods import (
    LIGER_CUTE,
    METHODS,
    import_without_parents,
    logprob_and_entropy,
    stored_logits,
)
from rlef_mega.bench.kernels import (
    HeadCase,
    Measurements,
    make_inputs,
    measure_heads,
)
from rlef_mega.bench.measure import measure_call
from rlef_mega.cli import app
from rlef_mega.config import ConfigError

CPU = torch.device("cpu")
CASE = HeadCase("tiny", 16, 200, 64)


@pytest.fixture(scope="module")
def results():
    run = Measurements(CPU, torch.float32, sample_s=0.0)
    cases = (CASE, replace(CASE, masked=0.5))
    return measure_heads(run, cases, METHODS, "tiny")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_and_fails():
    done = CliRunner().invoke(app, ["bench", "kernels"])
    assert isinstance(done.exception, ConfigError) and not done.stdout
    assert "needs an NVIDIA GPU" in str(done.exception)


def test_cases_and_minutes_limit_what_is_measured():
    asked = ["bench", "kernels", "cpu", "--cases", "demo | 2048 | 50%, SmolLM2", "--minutes", "0"]
    done = CliRunner().invoke(app, asked)
    late = [line for line in done.stdout.splitlines() if line.endswith("the time was up")]
    assert [line.split(": ")[1] for line in late] == [
        "demo | 2048 | 50%",
        "SmolLM2 | 1024 | 0%",
    ]
    done = CliRunner().invoke(app, ["bench", "kernels", "cpu", "--cases", "70B"])
    assert "'70B' is in no case's name; they are 'demo | 2048 | 0%'," in str(done.exception)


def test_chosen_methods_are_measured_alone():
    options = ["--cases", "demo | 2048 | 0%", "--methods", "logits stored, rlef scores"]
    done = CliRunner().invoke(app, ["bench", "kernels", "cpu", *options])
    rows = [line for line in done.stdout.splitlines() if line.startswith("| demo")]
    assert ["logits stored" in row or "rlef scores" in row for row in rows] == [True] * 2
    done = CliRunner().invoke(app, ["bench", "kernels", "cpu", "--methods", "Triton"])
    assert "'Triton' is in no method's name; they are 'product alone" in str(done.exception)


def test_make_bench_gpu_has_limits_and_needs_no_network():
    makefile = (Path(__file__).parents[3] / "Makefile").read_text()
    commands = makefile.partition("\nbench-gpu:\n")[2].partition("\n\n")[0].splitlines()
    assert len(commands) == 3 and all("--minutes $(MINUTES)" in line for line in commands)
    assert "pip" not in "".join(commands)


def test_every_method_is_measured_or_listed_as_left_out(results):
    measured = {
        name.split(" | ")[3] for name in (f.name for f in results.figures) if "tiny" in name
    }
    left_out = {method.name for method in METHODS} - measured
    assert {"rlef in PyTorch", "rlef loss in head, in PyTorch"} <= measured
    assert {"rlef fused", "verl linear cross entropy"} <= left_out
    for name in left_out:
        assert any(f"not measured: {name}: " in note for note in results.notes), name
    assert all(sample > 0 for figure in results.figures for sample in figure.samples)


def test_rates_count_the_products_of_the_unmasked_tokens(results):
    figures = {figure.name: figure.samples for figure in results.figures}
    for masked, tokens in (("0%", 64), ("50%", 32)):
        name = f"tiny | 64 | {masked} | PyTorch, logits stored"
        for what, products in (("forward", 1), ("forward and backward", 3)):
            flops = products * 2 * tokens * 16 * 200
            expected = [flops / (ms / 1e3) / 1e12 for ms in figures[f"{name} | {what}"]]
            assert list(figures[f"{name} | {what}, rate"]) == pytest.approx(expected)


def test_methods_agree_on_log_probs_and_entropies():
    """All that give both outputs have the same loss and gradients, masked or not."""
    for masked in (0.0, 0.5):
        found = {}
        for method in METHODS:
            if method.unavailable(CPU) or method.name.startswith(
                ("product", "rlef loss", "rlef scores")
            ):
                continue
            inputs = make_inputs(CPU, torch.float32, replace(CASE, masked=masked))
            loss = method.loss(inputs)
            loss.backward()
            weight = inputs.weight_VD
            gradient = weight.main_grad if weight.grad is None else weight.grad
            found[method.name] = loss.detach(), inputs.hidden_TD.grad, gradient
        assert len(found) >= 3
        expected = found.pop("PyTorch, logits stored")
        for name, values in found.items():
            torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-4, msg=name)


class LigerFusedScaledCrossEntropySM90Function:
    """Stands in for Liger 0.8.5's, whose kernels need a GPU; `apply` has the arguments of its
    `forward`."""

    @staticmethod
    def apply(
        _input,
        weight,
        target,
        temperature=1.0,
        ignore_index=-100,
        m_tiles_per_cluster=1,
        return_entropy=False,
        selected_token_ids=None,
    ):
        assert (temperature, return_entropy) == (1.0, True)
        logprob, entropy = logprob_and_entropy(_input, weight, target)
        return -logprob, entropy


def liger_fused_linear_cross_entropy_sm90(
    _input, weight, target, ignore_index=-100, reduction="mean"
):
    assert reduction == "sum"
    return -logprob_and_entropy(_input, weight, target)[0].sum()


def test_liger_is_measured_by_its_kernels_for_hopper(monkeypatch):
    """Not only by its tensor-parallel function, which computes chunks of tokens in PyTorch where a
    package of Liger's is missing."""
    functions = (LigerFusedScaledCrossEntropySM90Function, liger_fused_linear_cross_entropy_sm90)
    modules = {
        name: SimpleNamespace(**{each.__name__: each for each in functions})
        for name in ("fused_scaled_cross_entropy_sm90", "fused_linear_cross_entropy_sm90")
    }
    monkeypatch.setitem(sys.modules, LIGER_CUTE, SimpleNamespace(**modules))
    inputs = make_inputs(CPU, torch.float32, CASE)
    logprob, _ = logprob_and_entropy(inputs.hidden_TD, inputs.weight_VD, inputs.target_T)
    losses = {
        "Liger, CuTe": stored_logits(inputs),
        "Liger loss in head, CuTe (no entropy)": -logprob.sum(),
    }
    found = {method.name: method for method in METHODS if method.module == LIGER_CUTE}
    assert found.keys() == losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(found[name].loss(inputs), loss)
        assert found[name].unavailable(CPU) == "needs a GPU"


def test_nothing_is_measured_once_the_time_is_up():
    run = Measurements(CPU, torch.float32, limit_s=-1.0, sample_s=0.0)
    late = measure_heads(run, (CASE,), METHODS, "late")
    assert not late.figures
    assert "not measured: tiny | 64 | 0%: the time was up" in late.notes


def test_memory_is_the_peak_and_not_the_sum():
    def call() -> None:
        for _ in range(5):
            torch.zeros(1000, dtype=torch.float32)

    assert measure_call(call, CPU, 0.0).peak_bytes == 4000


def test_modules_of_a_package_that_fails_to_import_can_be_imported(tmp_path, monkeypatch):
    """verl's own __init__ needs Ray; its kernels do not."""
    inner = tmp_path / "needs_ray" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "needs_ray/__init__.py").write_text("raise ImportError('no ray')")
    (inner / "__init__.py").write_text("raise ImportError('no ray')")
    (inner / "kernels.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("needs_ray", "needs_ray.inner", "needs_ray.inner.kernels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import_without_parents("needs_ray", "needs_ray.inner")
    import needs_ray.inner.kernels

    assert needs_ray.inner.kernels.answer == 42
