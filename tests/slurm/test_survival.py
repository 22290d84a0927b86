"""Runs on a real Slurm that are disturbed in the ways a cluster disturbs them, and end with exactly
the metrics of an undisturbed run.

Slurm is Debian's, its nodes are on one host: what these tests cannot catch is a fault of a shared
file system or of a network. The engine is the embedded one, so that numbers repeat.
"""

import contextlib

import psutil
import pytest

from tests.slurm.cluster import NODES
from tests.slurm.conftest import STEPS, metrics

pytestmark = pytest.mark.slurm


def processes_of(node: str, words: str) -> list[psutil.Process]:
    """Return the processes of a node whose command line has these words, except srun itself."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            here = process.environ().get("SLURMD_NODENAME") == node
            if here and words in " ".join(process.cmdline()) and process.name() != "srun":
                found.append(process)
    return found


def node_of(runs, job: str, place: int) -> str:
    nodes = runs.cluster.field(job, "NodeList")
    return runs.cluster.run("scontrol", "show", "hostnames", nodes).split()[place]


def test_a_job_that_is_requeued_and_then_preempted_goes_on(runs, undisturbed, tmp_path):
    """scontrol requeue kills it. Then a job of a partition with higher priority wants all nodes:
    Slurm sends SIGTERM to the ranks, which save, and the launcher has the job requeued."""
    run = tmp_path / "requeued"
    job = runs.submit(run)
    runs.wait_for_step(run, 3)
    runs.cluster.run("scontrol", "requeue", job)
    runs.cluster.wait_for(lambda: "attempt 2 of job" in runs.said(run), 200)
    runs.wait_for_step(run, 7)
    words = ["sbatch", "--parsable", "--partition=high", "--nodes=5", "--exclusive"]
    other = runs.cluster.run(*words, "--output=/dev/null", "--wrap=sleep 1").strip()
    runs.cluster.wait_for(lambda: runs.cluster.state(other) == "COMPLETED", 200)
    said = runs.wait(run, job)
    assert "stopped and saved" in said and "the job was preempted" in said, said
    assert runs.cluster.field(job, "Restarts") == "2"
    assert metrics(run) == undisturbed


def test_a_dead_node_is_replaced(runs, undisturbed, tmp_path):
    """All processes of the second training node end at once, its Slurm daemon among them. Slurm or
    the launcher, whichever sees it first, gets the job other nodes."""
    run = tmp_path / "orphaned"
    job = runs.submit(run)
    runs.wait_for_step(run, 3)
    dead = node_of(runs, job, 1)
    runs.cluster.kill_node(dead)
    try:
        said = runs.wait(run, job)
        assert dead not in said.split("attempt ")[-1], said
        assert metrics(run) == undisturbed
    finally:
        runs.cluster.start_node(dead)
        runs.cluster.wait_for(lambda: runs.cluster.idle_nodes() == len(NODES), 60)


def test_a_chain_of_jobs_goes_through_time_limits(runs, undisturbed, tmp_path):
    """Three jobs of the same name, of which the first two are told that their time is up."""
    run = tmp_path / "chained"
    jobs = [runs.submit(run) for _ in range(3)]
    for number, job in enumerate(jobs[:2]):
        runs.wait_for_step(run, 3 + 4 * number)
        # what --signal=B:USR1@120 sends; Slurm looks at the time only every half minute
        runs.cluster.run("scancel", "--batch", "--signal=USR1", job)
        said = runs.wait(run, job, "FAILED")
        assert runs.cluster.field(job, "ExitCode") == "3:0"
        assert said.count("stopped and saved") == number + 1, said
    said = runs.wait(run, jobs[2])
    assert metrics(run) == undisturbed
    again = runs.submit(run)
    assert f"all {STEPS} steps are finished already" in runs.wait(run, again)


def test_what_ends_is_started_again_in_the_same_job(runs, undisturbed, tmp_path):
    """The grading server is killed, and in the second attempt a rank."""
    run = tmp_path / "killed"
    job = runs.submit(run)
    for attempt, (place, words) in enumerate([(2, "-m rlef_sandbox"), (1, "rlef_mega.train")]):
        runs.wait_for_step(run, 3 + 4 * attempt)
        for process in processes_of(node_of(runs, job, place), words):
            process.kill()
        runs.cluster.wait_for(lambda n=attempt: f"attempt {n + 2}" in runs.said(run), 100)
        assert len(metrics(run)) < STEPS
    said = runs.wait(run, job)
    assert "sandbox ended with code" in said and "training ended with code" in said, said
    assert runs.cluster.field(job, "Restarts") == "0"
    assert metrics(run) == undisturbed


def test_a_hang_leaves_the_stacks_of_all_ranks_and_is_restarted(runs, undisturbed, tmp_path):
    """A rank is stopped, so the other one waits for it in a collective."""
    run = tmp_path / "hung"
    job = runs.submit(run, HANG_S=12)
    runs.wait_for_step(run, 5)
    (process,) = processes_of(node_of(runs, job, 1), "rlef_mega.train")
    process.suspend()
    said = runs.wait(run, job)
    assert "no progress for" in said and "attempt 2 of job" in said, said
    stacks = (run / "slurm/attempt_001/stacks/rank_0.txt").read_text()
    assert "rlef_mega/train.py" in stacks and "Thread" in stacks
    assert metrics(run) == undisturbed


def test_a_run_that_gets_nowhere_stops(runs, tmp_path):
    """The guard refuses the policy at the first step of every attempt."""
    run = tmp_path / "nowhere"
    job = runs.submit(run, MAX_FAILURES=2, MORE_SETS="guard.max_logprob_gap=1e-12")
    said = runs.wait(run, job, "FAILED")
    assert "2 attempts have failed at step 0" in said and "logprob_gap_max" in said, said
    assert (run / "slurm/latest").resolve().name == "attempt_002"
