"""A run with every part on nodes of its own, on a real Slurm: 2 nodes train, 1 generates with a
real SGLang server, 1 grades.

Servers do not sample the same tokens again, so the test checks only that the server answered, with
which weights, and that nothing was dropped.
"""

import json
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT

STEPS = 4
SERVER_PYTHON = ROOT / ".venv-sglang/bin/python"
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.sglang,
    pytest.mark.skipif(not SERVER_PYTHON.exists(), reason="no SGLang: `make setup-sglang`"),
]


@pytest.mark.parametrize("het", [0, 1])
def test_servers_on_a_node_of_their_own_sample_with_the_trainers_weights(runs, tmp_path, het):
    run = tmp_path / f"four_nodes_{het}"
    settings = {"STEPS": STEPS, "ROLLOUT_NODES": 1, "HET": het}
    if het:
        submitted = runs.start(run, **settings, MORE_SETS="rollout.mode=async")
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        job = submitted.stdout.split()[-1]
    else:
        job = runs.submit(run, "--nodes=4", **settings)
    said = runs.wait(run, job)
    nodes = next(line for line in said.splitlines() if "attempt 1 of job" in line)
    train, rollout, sandbox = (part.split() for part in nodes.partition(" on ")[2].split("|"))
    assert len({*train, *rollout, sandbox[0].rstrip(";")}) == 4, nodes
    assert "rollout ready after" in said and f"http://{rollout[0]}:" in said, said
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == STEPS
    for step in steps:
        assert step["servers"]["requests"] > 0 and not any(step["dropped"].values()), step
        gap = step["logprob_gap_max"]
        assert gap is None or gap < 1e-3, step
    assert log_of_the_server(run), "the server's log is in the run's folder"


def log_of_the_server(run: Path) -> list[Path]:
    return [path for path in (run / "servers").glob("*.log") if path.stat().st_size]
