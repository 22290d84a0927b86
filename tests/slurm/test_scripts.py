"""The scripts of slurm/ without a Slurm."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(map(str, [*(ROOT / "slurm").glob("*.sh"), *(ROOT / "slurm/lib").glob("*.sh")]))


def test_scripts_pass_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck; `make test-slurm` installs it on Debian as root")
    checked = subprocess.run(
        ["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


def test_the_newest_checkpoint_is_never_a_refused_one(tmp_path):
    for name in ("step_000010", "step_000020.refused", "step_000020.refused2", "step_000015.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    script = f"RUN='{tmp_path}'; . '{ROOT}/slurm/lib/attempt.sh'; newest_checkpoint"
    said = subprocess.run(["bash", "-uc", script], capture_output=True, text=True, check=True)
    assert said.stdout == "10\n"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "train_8b.sh",
            [
                "16 nodes x 8 ranks = 128 ranks",
                "20 nodes x 8 SGLang servers x 1 GPUs",
                "GiB per GPU",
                "160 servers of 1 GPUs",
            ],
        ),
        (
            "train_node.sh",
            [
                "1 nodes x 8 ranks = 8 ranks",
                "0 nodes x 2 SGLang servers x 4 GPUs",
                "on the training nodes",
                "GiB per GPU",
                "2 servers of 4 GPUs",
            ],
        ),
        (
            "train_70b.sh",
            [
                "128 nodes x 8 ranks = 1024 ranks",
                "160 nodes x 1 SGLang servers x 8",
                "a het job",
                "GiB per GPU",
                "160 servers of 8 GPUs",
            ],
        ),
    ],
)
def test_a_dry_run_prints_the_plan_of_the_nodes_that_sbatch_asks_for(script, expected):
    environment = {**os.environ, "DRY_RUN": "1", "VENV": sys.prefix, "RLEF_ROOT": str(ROOT)}
    path = ROOT / "slurm" / script
    plan = subprocess.run(
        ["bash", str(path)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert plan.returncode == 0, plan.stdout + plan.stderr
    for words in expected:
        assert words in plan.stdout, plan.stdout
    asked = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH --nodes=")]
    nodes = sum(int(line.partition("=")[2]) for line in asked)
    roles = [line.split() for line in plan.stdout.splitlines() if " nodes " in line]
    dealt = sum(int(r[1]) for r in roles if r[0] in ("train", "rollout", "sandbox"))
    assert nodes == dealt


def test_servers_on_the_training_node_need_gpus_that_no_rank_uses():
    environment = {**os.environ, "DRY_RUN": "1", "VENV": sys.prefix, "RLEF_ROOT": str(ROOT)}
    environment["MORE_SETS"] = "rollout.servers.release_memory=false"
    refused = subprocess.run(
        ["bash", str(ROOT / "slurm/train_node.sh")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert refused.returncode == 2
    assert "the ranks take GPUs 0 to 7" in refused.stdout and "ROLLOUT_NODES" in refused.stdout
