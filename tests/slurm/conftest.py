"""One cluster for all tests here, and a tiny model."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlef_mega.config import SFTConfig, find_recipe, load_config
from rlef_mega.demo.base_model import make_initial_model
from tests.slurm.cluster import Cluster, why_not

ROOT = Path(__file__).parents[2]
STEPS = 12


class Runs:
    """`slurm/train_tiny.sh` on the cluster."""

    def __init__(self, cluster: Cluster, model: Path) -> None:
        self.cluster, self.model = cluster, model

    def settings(self, run: Path, **settings: object) -> dict[str, str]:
        path = ":".join(map(str, (ROOT, ROOT / "kernels", ROOT / "sandbox")))
        ours = {
            "RUN_DIR": run,
            "MODEL": self.model,
            "STEPS": STEPS,
            "VENV": sys.prefix,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": 1,
            "RESTART_WAIT_S": 0,
            "ALLREDUCE_GBPS": 0,  # measured once, in the first test
            "RLEF_ROOT": ROOT,
        }
        return {name: str(value) for name, value in (ours | settings).items()}

    def submit(
        self, run: Path, *options: str, script: str = "train_tiny.sh", **more: object
    ) -> str:
        """Submit a script as a user does. Returns the job's number."""
        words = ["sbatch", "--parsable", f"--chdir={run.parent}", f"--job-name={run.name}"]
        words += [f"--output={self.log(run)}", *options, str(ROOT / "slurm" / script)]
        return self.cluster.run(*words, **self.settings(run, **more)).strip()

    def start(self, run: Path, **more: object) -> subprocess.CompletedProcess[str]:
        """Run `bash slurm/train_tiny.sh`, which checks the run before it submits it."""
        named = {"JOB_NAME": run.name, "JOB_LOG": self.log(run)}
        return subprocess.run(
            ["bash", str(ROOT / "slurm/train_tiny.sh")],
            env={
                **self.cluster.environment,
                **self.settings(run, **named, **more),
            },
            cwd=run.parent,
            capture_output=True,
            text=True,
            timeout=200,
        )

    def log(self, run: Path) -> Path:
        return run.with_suffix(".log")

    def said(self, run: Path) -> str:
        """Return all that the launcher has printed; nothing before the job begins."""
        return self.log(run).read_text() if self.log(run).exists() else ""

    def wait(self, run: Path, job: str, state: str = "COMPLETED", timeout_s: float = 400) -> str:
        ended = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED")
        self.cluster.wait_for(lambda: self.cluster.state(job) in ended, timeout_s)
        assert self.cluster.state(job) == state, self.said(run)
        return self.said(run)

    def wait_for_step(self, run: Path, step: int) -> None:
        """Wait until this many steps are recorded."""
        self.cluster.wait_for(lambda: len(metrics(run)) >= step, 300)


def metrics(run: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without times."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if "time" not in k} for line in lines]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes = ("hidden_size=32", "num_layers=2", "ffn_hidden_size=64")
    overrides = [f"dir={json.dumps(str(folder))}", *sizes]
    make_initial_model(load_config(find_recipe("demo_base"), overrides, SFTConfig))
    return folder / "init"


@pytest.fixture(scope="session")
def runs(tiny_model) -> Iterator[Runs]:
    if reason := why_not():
        pytest.skip(reason)
    os.umask(0o022)
    with Cluster() as cluster:
        yield Runs(cluster, tiny_model)


@pytest.fixture(scope="session")
def undisturbed_run(runs, tmp_path_factory) -> Path:
    """Submit a run with sbatch in one allocation: 2 nodes train and 1 grades."""
    run = tmp_path_factory.mktemp("whole") / "undisturbed"
    said = runs.wait(run, runs.submit(run, ALLREDUCE_GBPS=0.001))
    assert "all-reduce over 2 ranks" in said and "done: 12 steps" in said, said
    return run


@pytest.fixture(scope="session")
def undisturbed(undisturbed_run) -> list[dict]:
    """Return the metrics of a run that was not interrupted."""
    found = metrics(undisturbed_run)
    assert len(found) == STEPS
    return found
