"""`rlef bench kernels` without a GPU: that it says so, and a miniature of it on the CPU, from the
measurements through the JSON to the tables and the plot. Speeds are not asserted.
"""

import json
import subprocess
import sys

import pytest
import torch

from rlef_mega.bench.figures import write
from rlef_mega.bench.kernel_methods import METHODS, UnavailableError, import_without_parents
from rlef_mega.bench.kernels import Case, Run, Shape, benchmark, compare, make_problem
from rlef_mega.bench.measure import measure_call
from rlef_mega.bench.roofline import draw, read_rows, tables
from rlef_mega.config import ConfigError

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 16, 200)


@pytest.fixture(scope="module")
def report():
    run = Run(CPU, torch.float32, limit_s=100, sample_s=0.0)
    return compare(run, (Case(SHAPE, 64), Case(SHAPE, 64, masked=0.5)), METHODS, "tiny")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_and_fails():
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        benchmark("demo")
    command = [sys.executable, "-c", "from rlef_mega.cli import main; main()", "bench", "kernels"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0 and "needs an NVIDIA GPU" in run.stderr and not run.stdout


def test_every_method_is_measured_or_said_to_be_left_out(report):
    measured = {name.split(" | ")[3] for name in (f.name for f in report.figures) if "tiny" in name}
    left_out = {method.name for method in METHODS} - measured
    assert {"rlef in PyTorch", "rlef loss in head, in PyTorch"} <= measured
    assert {"rlef fused", "verl linear cross entropy"} <= left_out
    for name in left_out:
        assert any(f"not measured: {name}: " in note for note in report.notes), name
    assert all(sample > 0 for figure in report.figures for sample in figure.samples)


def test_tables_and_plot_come_from_the_file(report, tmp_path):
    write(report, tmp_path / "kernels.json")
    results = json.loads((tmp_path / "kernels.json").read_text())
    rows = read_rows(results)
    assert {(row.shape, row.tokens, row.masked) for row in rows} == {
        ("tiny", 64, "0%"),
        ("tiny", 64, "50%"),
    }
    shown = tables(results)
    assert "tiny (16 x 200), 64 tokens, 50% masked:" in shown
    assert shown.count("| rlef loss in head, in PyTorch |") == 2
    draw(results, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_methods_agree_on_log_probs_and_entropies():
    """All that give both outputs have the same loss and gradients, masked or not."""
    run = Run(CPU, torch.float32, limit_s=100)
    for masked in (0.0, 0.5):
        found = {}
        for method in METHODS:
            try:
                function = method.prepare(CPU)
            except UnavailableError:
                continue
            if method.name.startswith(("product", "rlef loss")):
                continue
            problem = make_problem(run, Case(SHAPE, 64, masked))
            loss = function(problem)
            loss.backward()
            weight = problem.weight_VD
            gradient = weight.main_grad if weight.grad is None else weight.grad
            found[method.name] = loss.detach(), problem.hidden_TD.grad, gradient
        assert len(found) >= 3
        expected = found.pop("PyTorch, logits stored")
        for name, values in found.items():
            torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-4, msg=name)


def test_nothing_is_measured_once_the_time_is_up():
    run = Run(CPU, torch.float32, limit_s=-1.0, sample_s=0.0)
    report = compare(run, (Case(SHAPE, 64),), METHODS, "late")
    assert not any("tiny" in figure.name for figure in report.figures)
    assert "not measured: tiny | 64 | 0%: the time was up" in report.notes


def test_memory_is_the_peak_and_not_the_sum():
    def call() -> None:
        for _ in range(5):
            torch.zeros(1000, dtype=torch.float32)

    assert measure_call(call, CPU, 0.0).peak_bytes == 4000


def test_a_package_that_cannot_be_imported_gives_up_its_modules(tmp_path, monkeypatch):
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
