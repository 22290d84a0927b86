"""What the scripts ask of a cluster, on one of paper: sinfo, sbatch, scontrol and srun are programs
that write down their arguments and their environment, and answer as a file says.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.test_scripts import ROOT

PROGRAMS = {
    "sinfo": """
case "$*" in *%P*) echo "small"; echo "main*"; exit;; esac
for n in $(seq 0 "${LAST_NODE:-399}"); do echo "n$n gpu:h100:8(S:0-1) ${STATE:-idle}"; done
[ -z "$DRAINED" ] || echo "n400 gpu:h100:8(S:0-1) drained*"
""",
    "sbatch": """
case " $* " in *" --test-only "*)
    echo "$@" >>"$PAPER/tested"
    [[ -n $REFUSE && " $* " = *" $REFUSE"* ]] || exit 0
    echo "allocation failure: $WHY" >&2; exit 1;;
esac
echo "$@" >>"$PAPER/sbatch"; env >>"$PAPER/sbatch.env"; echo "Submitted batch job 1"
""",
    "scontrol": """
case "$*" in
    *hostnames*) printf 'n0\nn1\n';;
    *config*) echo "TaskPlugin = task/none";;
    *partition*) printf 'PartitionName=main\n   MaxNodes=%s MaxTime=%s\n   State=%s Total=1\n' \
        "${MAX_NODES:-UNLIMITED}" "${MAX_TIME:-UNLIMITED}" "${UP:-UP}";;
    requeue*) exit "$REQUEUE_CODE";;
esac
""",
    "srun": """
echo "$@" >>"$PAPER/srun"; env >>"$PAPER/srun.env"
ulimit -Sn >>"$PAPER/nofile"; ulimit -c >>"$PAPER/core"
case "$*" in
    *"node_check "*)
        words=$*; folder=${words##*node_check }; folder=${folder%% *}; mkdir -p "$folder"
        for node in n0 n1; do echo "0.0 10.0.0.${node#n}" >"$folder/$node"; done;;
    *"cluster.slurm check"*) exit "${CHECK_CODE:-0}";;
esac
""",
}
STEP = """
LOGS=$PAPER STATE=$PAPER TRAIN_NODES=2 ROLLOUT_NODES=0 SANDBOX_NODES=0 GPUS_PER_NODE=8
. "$ROOT/slurm/site.sh"; . "$ROOT/slurm/lib/steps.sh"
set_software; set_binding; assign_nodes; (step train train 8 rank)
"""


# a Python that answers the same question once
PYTHON = """#!/bin/bash
answer=$ANSWERS/$(md5sum <<<"$*" | cut -c-32)
if [ ! -e "$answer.code" ]; then
    "$REAL_PYTHON" "$@" >"$answer" 2>"$answer.error"
    echo $? >"$answer.code"
fi
cat "$answer"; cat "$answer.error" >&2; exit "$(cat "$answer.code")"
"""


class Paper:
    """A cluster of paper in a folder."""

    def __init__(self, folder: Path, answers: Path) -> None:
        self.folder = folder
        (answers / "bin").mkdir(exist_ok=True)
        (answers / "bin/python").write_text(PYTHON)
        (answers / "bin/python").chmod(0o755)
        (folder / "bin").mkdir()
        for name, program in PROGRAMS.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{program}")
            (folder / "bin" / name).chmod(0o755)
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.environment = ours | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PAPER": str(folder),
            "VENV": str(answers),
            "ANSWERS": str(answers),
            "REAL_PYTHON": sys.executable,
            "RLEF_ROOT": str(ROOT),
            "ROOT": str(ROOT),
        }

    def run(self, *words: object, **settings: object) -> str:
        """Run a command; returns what it printed, and notes its exit code."""
        done = subprocess.run(
            list(map(str, words)),
            cwd=self.folder,
            env=self.environment | {name: str(value) for name, value in settings.items()},
            capture_output=True,
            text=True,
            timeout=300,
        )
        self.code = done.returncode
        return done.stdout + done.stderr

    def read(self, name: str) -> str:
        """Return what a program has written down; empty if it was not called."""
        path = self.folder / name
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("answers")


@pytest.fixture
def paper(tmp_path, answers) -> Paper:
    return Paper(tmp_path, answers)


@pytest.fixture
def submit(paper, tiny_model):
    def start(*options: str, **settings: object) -> str:
        ours = {"MODEL": tiny_model, "RUN_DIR": "/tmp/never-made"}
        return paper.run("bash", ROOT / "slurm/train_tiny.sh", *options, **ours | settings)

    return start


@pytest.fixture
def step(paper):
    def start(before: str = "", **settings: object) -> str:
        """Start a step as the launcher does. Returns srun's arguments."""
        inside = {"SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "n[0-1]"}
        said = paper.run("bash", "-c", before + STEP, **inside | settings)
        assert paper.code == 0, said
        return paper.read("srun")

    return start


def test_a_job_gets_the_environment_that_was_checked(paper, submit):
    submit(SBATCH_EXPORT="NONE", SBATCH_GPUS_PER_TASK="1", SBATCH_QOS="long")
    assert "--export=ALL" in paper.read("sbatch") and "--propagate=NONE" in paper.read("sbatch")
    assert "SBATCH_GPUS_PER_TASK" not in paper.read("sbatch.env")
    assert "SBATCH_QOS=long" in paper.read("sbatch.env")


def test_a_step_reads_no_options_from_the_environment(paper, step):
    inherited = {
        "SLURM_EXPORT_ENV": "NONE",
        "SLURM_GPUS_PER_TASK": "1",
        "SLURM_GPU_BIND": "single:1",
        "SLURM_DISTRIBUTION": "cyclic",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_HINT": "nomultithread",
        "SLURM_MPI_TYPE": "pmix",
        "SRUN_CPUS_PER_TASK": "1",
        "SLURM_CONF": "/etc/slurm.conf",
    }
    asked = step(**inherited)
    for option in ("--export=ALL", "--distribution=block", "--mpi=none", "--nodes=2"):
        assert option in asked.split()
    names = {line.partition("=")[0] for line in paper.read("srun.env").splitlines()}
    assert names & inherited.keys() == {"SLURM_CONF"}
    assert "SLURM_JOB_ID" in names


def test_limits_and_caches_of_a_step_are_those_of_a_job(paper, step):
    step("ulimit -Sn 256; ulimit -c unlimited; ")
    assert paper.read("core") == "0\n" and int(paper.read("nofile")) > 256
    assert "--propagate=NOFILE,CORE" in paper.read("srun")
    kept = dict(line.split("=", 1) for line in paper.read("srun.env").splitlines() if "=" in line)
    for name in ("TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "FLASHINFER_WORKSPACE_BASE"):
        assert kept[name].startswith(f"/tmp/rlef-{os.getuid()}-7/")


def test_an_images_own_variables_do_not_hide_ours(paper, step):
    asked = step(CONTAINER="/x.sqsh", NCCL_DEBUG="INFO", SECRET_TOKEN="s")
    (carried,) = (w for w in asked.split() if w.startswith("--container-env="))
    names = carried.partition("=")[2].split(",")
    assert {"PYTHONPATH", "NCCL_DEBUG", "TRITON_CACHE_DIR", "HF_HUB_OFFLINE"} <= set(names)
    assert "PATH" not in names and "SECRET_TOKEN" not in names
    assert "--container-name=rlef-7" in asked.split()
    step(CONTAINER="/x.sif", CONTAINER_RUNTIME="apptainer")
    assert "APPTAINERENV_PYTHONPATH=" in paper.read("srun.env")


def test_what_python_says_on_stderr_is_no_shell(paper, submit):
    venv = paper.folder / "noisy/bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text(
        "#!/bin/bash\necho 'pyxis: imported docker://x#y (cached)' >&2\n"
        f"echo 'NVIDIA (c) $(touch {paper.folder}/evaluated)'\n"
        'exec "$ANSWERS/bin/python" "$@"\n'
    )
    (venv / "python").chmod(0o755)
    said = submit(VENV=venv.parent, DRY_RUN=1)
    assert paper.code == 0 and "2 nodes x 1 ranks = 2 ranks" in said, said
    assert not (paper.folder / "evaluated").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"LAST_NODE": 1}, "need 3 nodes with 0 GPUs, and partition 'the default' has 2"),
        ({"STATE": "inval"}, "has 0"),
        ({"MAX_TIME": "00:05:00"}, "TIME=10:00, and partition 'main' allows 00:05:00"),
        ({"MAX_TIME": "1-0", "TIME": "UNLIMITED"}, "TIME=UNLIMITED"),
        ({"MAX_NODES": 2}, "3 nodes, and a job in partition 'main' may have 2"),
        ({"UP": "INACTIVE"}, "whose state is INACTIVE"),
        ({"TIME": "2:00"}, "TIME=2:00 leaves nothing before GRACE_S=120 s"),
        ({"HET": 1, "REFUSE": "--nodes=1", "WHY": "no such node"}, "no such node"),
        ({"MODEL": "/nowhere/model"}, "/nowhere/model"),
        pytest.param(
            {"MORE_SETS": "data.train=codecontests:/nowhere.jsonl"},
            "/nowhere.jsonl",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_could_never_start_is_not_submitted(paper, submit, settings, message):
    said = submit(**settings)
    assert paper.code == 2 and message in said, said
    assert not paper.read("sbatch")


def test_each_component_of_a_het_job_is_tested(paper, submit):
    said = submit(HET=1)
    assert paper.code == 0, said
    assert "--nodes=2" in paper.read("tested") and "--nodes=1" in paper.read("tested")
    assert " : " in paper.read("sbatch")


def test_components_of_one_partition_need_its_nodes_together(paper, submit):
    said = submit(HET=1, LAST_NODE=1)
    assert "grading need 3 nodes with 0 GPUs, and partition 'the default' has 2" in said


def test_a_drained_node_is_waited_for(paper, submit):
    drained = {"LAST_NODE": 1, "DRAINED": 1, "REFUSE": "--nodes=3"}
    said = submit(**drained, WHY="Requested node configuration is not available")
    assert paper.code == 0 and "down or drained" in said and "never start" not in said, said
    assert paper.read("sbatch")


def test_options_of_sbatch_reach_it_and_other_words_are_refused(paper, submit):
    submit("--exclude=n7", SUBMIT_OPTIONS="--qos=long")
    assert "--exclude=n7" in paper.read("sbatch") and "--qos=long" in paper.read("sbatch")
    assert "'ppo.beta=0' is no option of sbatch" in submit("ppo.beta=0") and paper.code == 2
    assert "--time=9: these scripts set it themselves" in submit("--time=9") and paper.code == 2
    assert "--bogus" in submit("--bogus", REFUSE="--bogus", WHY="unrecognized option '--bogus'")
    assert "options of sbatch come before it" in submit("--exclude=n7", SLURM_JOB_ID="7")
    assert len(paper.read("sbatch").splitlines()) == 1


@pytest.mark.slow
def test_a_site_chooses_how_gpus_are_asked_for(paper, submit):
    gpus = {"GPUS_PER_NODE": 8, "MORE_SETS": "parallel.processes_per_node=1"}
    submit(**gpus)
    submit(**gpus, GPU_REQUEST="--gres=gpu:h100:%n")
    submit(**gpus, GPU_REQUEST="")
    first, second, third = paper.read("sbatch").splitlines()
    assert "--gpus-per-node=8" in first and "--gres=gpu:h100:8" in second
    assert "gpus" not in third and "gres" not in third


def test_jobs_of_one_node_have_cores_memory_and_the_sites_settings(paper):
    settings = {"PARTITION": "main", "ACCOUNT": "us", "SUBMIT_OPTIONS": "--qos=long"}
    for script in ("eval.sh", "export_hf.sh", "bench.sh"):
        text = (ROOT / "slurm" / script).read_text()
        assert "#SBATCH --mem" in text
        assert "#SBATCH --cpus-per-task" in text or "#SBATCH --exclusive" in text
        paper.run("bash", ROOT / "slurm" / script, "a", "b", **settings)
        asked = paper.read("sbatch").splitlines()[-1].split()
        assert {"--partition=main", "--account=us", "--qos=long", "--export=ALL"} <= set(asked)
        assert asked[-3:] == [str(ROOT / "slurm" / script), "a", "b"]


def test_a_requeue_that_ends_scontrol_is_not_called_refused(paper):
    """Slurm kills the job's processes, scontrol among them."""
    requeue = f"sed -n '/^requeue()/,/^}}/p' {ROOT}/slurm/lib/run.sh"
    script = (
        f'. {ROOT}/slurm/lib/steps.sh; STOPPED=3; sleep() {{ :; }}; eval "$({requeue})"; requeue x'
    )
    for code, expected in ((0, 3), (143, 3), (1, 2)):
        said = paper.run("bash", "-c", script, REQUEUE_CODE=code, SLURM_JOB_ID=7)
        assert paper.code == expected and ("refused" in said) == (expected == 2), said


@pytest.mark.parametrize(
    ("code", "attempts", "message"),
    [
        (4, 1, "the run is refused (above); it would fail again"),
        (2, 2, "2 attempts have failed at step 0. Fix the cause"),
    ],
)
def test_a_configuration_error_is_never_tried_again(paper, submit, code, attempts, message):
    """Neither one that the checks of a run find, nor one that its ranks find."""
    inside = {"SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "n[0-1]", "RESTART_WAIT_S": 0}
    settings = {"SANDBOX_NODES": 0, "MAX_FAILURES": 2, "MASTER_ADDR": "fd00::7"}
    said = submit(CHECK_CODE=code, RUN_DIR=paper.folder / "run", **inside | settings)
    assert paper.code == 2 and message in said, said
    assert paper.read("srun").count("cluster.slurm check") == attempts
    assert "MASTER_ADDR=fd00::7" in paper.read("srun.env")
    assert "rank 0 is reached at fd00::7" in said
    ended = (
        ". $ROOT/slurm/lib/steps.sh; . $ROOT/slurm/lib/attempt.sh; RUN=$PAPER LOGS=$PAPER"
        " HANG_S=9 START_S=9; echo ConfigError >.failed; false & PIDS[train]=$!; supervise"
    )
    paper.run("bash", "-c", ended)
    assert paper.code == 4


@pytest.mark.parametrize("packages", ["numpy,sympy", ""])
def test_grading_servers_run_as_the_recipe_asks(paper, packages):
    services = '. "$ROOT/slurm/lib/attempt.sh"; start_services; wait'
    recipe = {"ENGINE": "local", "ISOLATION": "minimal", "PACKAGES": packages, "SANDBOX_PORT": 80}
    inside = {"SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "n[0-1]"}
    paper.run("bash", "-uc", STEP.replace("(step train train 8 rank)", services), **recipe | inside)
    words = (
        f"-m rlef_sandbox --isolation minimal --packages {packages} serve --host ADDRESS --port 80"
    )
    assert words in paper.read("srun")


def test_rank_0_is_reached_at_the_address_that_the_check_of_its_node_found(paper, submit):
    inside = {"SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "n[0-1]", "SANDBOX_NODES": 0}
    said = submit(CHECK_CODE=4, RUN_DIR=paper.folder / "run", **inside, INTERFACE="ib0")
    assert "rank 0 is reached at 10.0.0.0" in said and "--interface ib0" in paper.read("srun")
    script = (
        ". $ROOT/slurm/lib/steps.sh; NODES=([a]='n0 n1') ADDRESS=([n0]=fd00::1 [n1]=n1);"
        " url_list a 80 1"
    )
    assert paper.run("bash", "-c", script) == '["http://[fd00::1]:80","http://n1:80"]\n'


def test_a_run_needs_no_room_for_what_it_has_written(paper, submit):
    inside = {"SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "n[0-1]", "SANDBOX_NODES": 0}
    for name, size in (("step_000001", 3 * 2**20), ("step_000002.refused", 2**20)):
        checkpoint = paper.folder / "run/checkpoints" / name
        checkpoint.mkdir(parents=True)
        (checkpoint / "rank_0").write_bytes(bytes(size))
    submit(CHECK_CODE=4, RUN_DIR=paper.folder / "run", DISK_GIB=1, **inside)
    _, *checks = paper.read("srun").split("--disk-gib ")
    asked = max(float(words.split()[0]) for words in checks)  # of the training nodes
    assert 1 - 5 / 1024 < asked < 1 - 2 / 1024


def test_an_environment_is_unpacked_on_a_nodes_own_disk(paper):
    """Two roles of a node unpack it at the same time; what is there already stays."""
    stage, folder = ROOT / "slurm/lib/stage.sh", paper.folder
    paper.run(sys.executable, "-m", "venv", "--without-pip", "env")
    (*_, packages) = (folder / "env/lib").glob("python*/site-packages")
    (packages / "found_here.py").write_text("import sys\nprint(sys.prefix)\n")
    assert paper.run("bash", stage, "pack", "env", "env.tar") == "" and paper.code == 0
    shutil.rmtree(folder / "env")
    there = folder / "disk/venv"
    both = f"for n in 1 2; do bash {stage} unpack env.tar {there} & done; wait -n && wait -n"
    assert paper.run("bash", "-c", both) == "" and paper.code == 0
    python = there / "bin/python"
    assert paper.run(python, "-m", "found_here") == f"{there}\n"
    (folder / "env.tar").unlink()
    assert paper.run("bash", stage, "unpack", "env.tar", there) == "" and paper.code == 0
    assert [path.name for path in there.parent.iterdir()] == ["venv"]
    assert "there is no nothing/bin/python" in paper.run("bash", stage, "pack", "nothing", "a.tar")


def test_the_recorded_environment_holds_no_secret(paper):
    secrets = {
        "SLURM_JWT": "s3cret",
        "PGPASSWD": "s3cret",
        "https_proxy": "http://me:s3cret@proxy",
        "WANDB_API_KEY": "s3cret",
        "RLEF_SANDBOX_TOKEN": "s3cret",
    }
    script = (
        ". $ROOT/slurm/lib/steps.sh; . $ROOT/slurm/lib/attempt.sh; STATE=$PAPER RUN=/r SETS=(a=1)"
        " RECIPE=demo; NODES=([train]=n0 [sandbox]=n0); open_logs"
    )
    paper.run("bash", "-c", script, SLURM_JOB_ID=7, NCCL_DEBUG="INFO", **secrets)
    kept = paper.read("attempt_001/environment.txt")
    assert "NCCL_DEBUG=INFO" in kept and "RECIPE=demo" in kept and "SETS a=1" in kept
    assert "s3cret" not in kept


def test_a_site_may_use_variables_that_are_not_set(paper, submit):
    copy = paper.folder / "checkout"
    copy.mkdir()
    for name in ("rlef_mega", "kernels", "sandbox"):
        (copy / name).symlink_to(ROOT / name)
    paper.run("cp", "-r", ROOT / "slurm", copy)
    with (copy / "slurm/site.sh").open("a") as site:
        site.write('\nexport LD_LIBRARY_PATH="/opt/cuda:$LD_LIBRARY_PATH"\n')
    del paper.environment["RLEF_ROOT"]
    environment = {"RLEF_ROOT": copy, "DRY_RUN": 1}
    paper.environment.pop("LD_LIBRARY_PATH", None)
    said = submit(**environment)
    assert paper.code == 0, said
