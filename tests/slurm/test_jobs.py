"""The jobs other than training, by sbatch: export of a run, evaluation of the exported model, a
benchmark."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.slurm.conftest import ROOT, metrics

pytestmark = pytest.mark.slurm
OPTIONS = ("--gpus-per-node=0", "--cpus-per-task=2", "--mem=2G")  # nodes are small


def submit(runs, folder: Path, script: str, *arguments: object, **settings: object) -> str:
    """Run a script as a job. Returns what it printed."""
    log = folder / f"{script}.log"
    words = ["sbatch", "--parsable", f"--output={log}", *OPTIONS]
    script_path = str(ROOT / "slurm" / script)
    ours = {"RLEF_ROOT": ROOT, "VENV": sys.prefix, "GPUS_PER_NODE": 0, "OMP_NUM_THREADS": 1}
    settings = {name: str(value) for name, value in (ours | settings).items()}
    job = runs.cluster.run(*words, script_path, *map(str, arguments), **settings).strip()
    runs.cluster.wait_for(lambda: runs.cluster.state(job) in ("COMPLETED", "FAILED"), 300)
    said = log.read_text()
    assert runs.cluster.state(job) == "COMPLETED", said
    return said


def test_a_run_is_exported_and_evaluated(runs, undisturbed_run, tmp_path):
    submit(runs, tmp_path, "export_hf.sh", undisturbed_run, tmp_path / "hf")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").num_parameters() > 0
    words = ["--problems", 4, "--n-at-k", "1@3", "--max-new-tokens", 40, "--max-context", 320]
    submit(
        runs,
        tmp_path,
        "eval.sh",
        tmp_path / "hf",
        *words,
        DATA="curriculum:test",
        OUT=tmp_path / "eval",
        DTYPE="float32",
    )
    (found,) = (tmp_path / "eval").rglob("*.json")
    assert len(json.loads(found.read_text())["protocols"]["multi_turn"]["outcomes"]) == 4


def test_a_benchmark_writes_its_figures(runs, tmp_path):
    submit(runs, tmp_path, "bench.sh", "slice", "demo", OUT=tmp_path / "figures/slice.json")
    assert json.loads((tmp_path / "figures/slice.json").read_text())["figures"]


def test_a_job_without_arguments_says_what_it_wants(runs, tmp_path):
    log = tmp_path / "eval.log"
    words = ["sbatch", "--parsable", f"--output={log}", *OPTIONS]
    settings = {"RLEF_ROOT": str(ROOT), "VENV": sys.prefix, "GPUS_PER_NODE": "0"}
    job = runs.cluster.run(*words, str(ROOT / "slurm/eval.sh"), **settings).strip()
    runs.cluster.wait_for(lambda: runs.cluster.state(job) == "FAILED", 60)
    assert "name a model: sbatch slurm/eval.sh MODEL" in log.read_text()


def test_one_node_trains_samples_and_grades_by_its_script(runs, tmp_path):
    """`slurm/train_node.sh`, with a recipe of two ranks that sample in their own processes."""
    recipe, run = tmp_path / "one.toml", tmp_path / "one-node"
    recipe.write_text(
        f"extends = 'demo'\n[run]\ndir = '{run}'\nsteps = 2\n[model]\npath = '{runs.model}'\n"
        "[rollout]\nepisodes_per_batch = 8\n[ppo]\nupdates_per_batch = 2\n"
        "[eval]\nproblems = 4\n[guard]\nmax_invalid_fraction = 1.0\n"
    )
    small = {"GPUS_PER_NODE": 0, "DISK_GIB": 1, "TMP_GIB": 0.5, "SHM_GIB": 0.1}
    job = runs.submit(run, *OPTIONS, script="train_node.sh", RECIPE=recipe, **small)
    said = runs.wait(run, job)
    assert "done: 2 steps" in said and len(metrics(run)) == 2, said
