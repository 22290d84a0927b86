"""What slurm/ refuses, on a real Slurm."""

import socket

import pytest

from tests.slurm.conftest import metrics

pytestmark = pytest.mark.slurm


def test_a_het_job_gives_the_same_numbers(runs, undisturbed, tmp_path):
    """One component, of two nodes, trains; the other, of one node, grades."""
    run = tmp_path / "het"
    settings = {"HET": 1, "TIME": "5:00", "DISK_GIB": 0.1}
    submitted = runs.start(run, **settings)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = submitted.stdout.split()[-1]
    runs.wait(run, job)
    assert metrics(run) == undisturbed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SANDBOX_NODES": 9}, "need 11 nodes with 0 GPUs, and partition 'the default' has 5"),
        ({"GPUS_PER_NODE": 8}, "need 3 nodes with 8 GPUs, and partition 'the default' has 0"),
        ({"MORE_SETS": "parallel.tensor_model_parallel_size=3"}, "are not divisible by"),
    ],
)
def test_what_cannot_run_is_not_submitted(runs, tmp_path, settings, message):
    refused = runs.start(tmp_path / "refused", **settings)
    assert refused.returncode == 2
    said = refused.stdout + refused.stderr
    assert message in said, said
    assert runs.cluster.run("squeue", "-h", "--name=refused") == ""


def test_a_job_with_the_wrong_number_of_nodes_says_so(runs, tmp_path):
    run = tmp_path / "narrow"
    said = runs.wait(run, runs.submit(run, "--nodes=2"), "FAILED")
    assert "the job has 2 nodes, the run needs 3" in said


def test_unfit_nodes_are_named_before_anything_starts(runs, tmp_path):
    """A taken port and a full disk."""
    run = tmp_path / "unfit"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = runs.submit(run, PORT=port, DISK_GIB=10**6)
        said = runs.wait(run, job, "FAILED")
    assert f"port {port} is taken" in said and "GiB free, 1e+06 are needed" in said, said
    assert "node checks failed" in said and not (run / "config.toml").exists()
