"""`rlef bench compare`, on small files whose answer was worked out by hand."""

import json

import pytest
from typer.testing import CliRunner

from rlef_mega.bench.compare import compare
from rlef_mega.cli import app
from rlef_mega.config import ConfigError
from rlef_mega.run.launch import FAILED


def write(path, device="CPU", critic_layout=None, **figures):
    """Write a benchmark's file. A figure is (unit, samples); its median is the middle sample."""
    content = {
        name: {"unit": unit, "low": min(s), "median": sorted(s)[len(s) // 2], "high": max(s)}
        for name, (unit, s) in figures.items()
    }
    about = {"device": device, "critic_layout": critic_layout}
    path.write_text(json.dumps({**about, "figures": content}))
    return path


OLD = {
    "speed": ("tokens/s", [90.0, 100.0, 110.0]),
    "step": ("s", [9.0, 10.0, 11.0]),
    "memory": ("GB", [2.0, 2.1, 2.2]),
    "idle": ("share", [0.1, 0.1, 0.1]),
}


@pytest.mark.parametrize(
    ("changed", "worse"),
    [
        ({}, []),
        ({"speed": ("tokens/s", [70.0, 80.0, 89.0])}, ["speed"]),
        ({"speed": ("tokens/s", [120.0, 130.0, 140.0])}, []),  # better
        ({"step": ("s", [12.0, 13.0, 14.0])}, ["step"]),
        ({"step": ("s", [5.0, 6.0, 7.0])}, []),  # better
        ({"memory": ("GB", [3.0, 3.1, 3.2])}, ["memory"]),
        ({"speed": ("tokens/s", [70.0, 80.0, 95.0])}, []),  # samples overlap: nothing is said
        ({"idle": ("share", [0.9, 0.9, 0.9])}, []),  # a share is neither good nor bad
    ],
)
def test_what_became_worse(tmp_path, changed, worse):
    old, new = write(tmp_path / "old", **OLD), write(tmp_path / "new", **{**OLD, **changed})
    assert compare(old, new, tolerance=0.05) == worse


def test_a_change_within_the_tolerance_is_not_reported(tmp_path):
    old = write(tmp_path / "old", step=("s", [10.0, 10.0]))
    new = write(tmp_path / "new", step=("s", [10.8, 10.8]))
    assert compare(old, new, tolerance=0.1) == []
    assert compare(old, new, tolerance=0.05) == ["step"]


def test_the_command_fails_when_something_became_slower(tmp_path):
    old = write(tmp_path / "old.json", **OLD)
    slower = {**OLD, "step": ("s", [20.0] * 3)}
    new = write(tmp_path / "new.json", device="another", critic_layout={}, **slower)
    ended = CliRunner().invoke(app, ["bench", "compare", str(old), str(new)])
    assert ended.exit_code == FAILED
    assert "WARNING: device differs: CPU and another" in ended.output
    assert "WARNING: critic_layout differs: None and {}" in ended.output
    assert "worse by more than 5%: step" in ended.output


def test_files_without_common_figures_are_refused(tmp_path):
    old = write(tmp_path / "old", **OLD)
    other = write(tmp_path / "other", throughput=("tokens/s", [1.0]))
    (tmp_path / "text").write_text("not JSON")
    with pytest.raises(ConfigError, match="no figure in common"):
        compare(old, other, tolerance=0.05)
    for bad in ("text", "missing"):
        with pytest.raises(ConfigError, match="holds no figures"):
            compare(old, tmp_path / bad, tolerance=0.05)
