#!/bin/bash
#SBATCH --job-name=rlef-tiny
#SBATCH --nodes=3
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=10:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --dependency=singleton
#SBATCH --signal=B:USR1@120
#
# A run of a few seconds without GPUs, with all components of a large one: 2 nodes train, 1 grades and, with
# ROLLOUT_NODES=1, one samples. Make its model first: rlef sft demo_base --set dir=runs/tiny-base --set steps=1
#
#   bash slurm/train_tiny.sh             check that it can run, and submit it; CHAIN=5 submits five jobs
#   DRY_RUN=1 bash slurm/train_tiny.sh   print the plan, submit nothing
#   sbatch slurm/train_tiny.sh           submit it without the checks

# shellcheck disable=SC2034 # settings, for slurm/lib
RECIPE=${RECIPE:-demo}          # a TOML file or a recipe's name; its layout gives the number of training nodes
SETS=(
    "run.dir=${RUN_DIR:-runs/tiny}"
    "model.path=${MODEL:-runs/tiny-base/init}"
    "run.steps=${STEPS:-6}"
    run.checkpoint_every=2
    parallel.processes_per_node=1        # one of the two ranks on each node
    rollout.episodes_per_batch=8
    ppo.updates_per_batch=2
    eval.every=2
    eval.problems=4
    "data.test=''"
    guard.max_invalid_fraction=1.0       # an untrained model writes no valid code
    learner.policy.lr=1e-3
)                                       # section.key=value, added to the recipe
ROLLOUT_NODES=${ROLLOUT_NODES:-0}      # nodes that sample with SGLang; 0: each training rank samples in its own process
SANDBOX_NODES=${SANDBOX_NODES:-1}       # nodes that only grade; 0: the sampling nodes grade too, or the training nodes
GPUS_PER_NODE=${GPUS_PER_NODE:-0}       # 0: no GPUs
HET=${HET:-0}                           # 1: a het job, one component per role; 0: one allocation

JOB_NAME=${JOB_NAME:-rlef-tiny}       # jobs of the same name run one after another, each resuming the run
TIME=${TIME:-10:00}            # time limit of a job
GRACE_S=${GRACE_S:-120}                 # seconds before the limit to finish the step and save; must suffice for both
CHAIN=${CHAIN:-1}                       # jobs that `bash` submits, to run one after another; they end at once when the run is finished

MAX_FAILURES=${MAX_FAILURES:-3}         # attempts from the same checkpoint before the run is given up
RESTART_WAIT_S=${RESTART_WAIT_S:-10}    # wait between attempts of a job
HANG_S=${HANG_S:-120}                  # the ranks count as hung if no phase (rollout, update, evaluation) begins or ends for this long
START_S=${START_S:-600}               # deadline for the ranks to load the model or a checkpoint
SANDBOX_READY_S=${SANDBOX_READY_S:-120} # deadline for the grading servers to start
SERVERS_READY_S=${SERVERS_READY_S:-1800} # deadline for the SGLang servers to load the model
ALLREDUCE_GBPS=${ALLREDUCE_GBPS:-0.01}   # smallest bus bandwidth over all training ranks; 0: do not measure
NETWORK_S=${NETWORK_S:-300}             # deadline for that measurement

if [ "$ROLLOUT_NODES" != 0 ]; then       # SGLang without a GPU: `make setup-sglang`
    SETS+=(rollout.engine=sglang rollout.servers.device=cpu rollout.servers.memory_fraction=0.05
        'rollout.servers.arguments=["--max-total-tokens", "20000"]')
fi
DISK_GIB=${DISK_GIB:-1} TMP_GIB=${TMP_GIB:-0.5} SHM_GIB=${SHM_GIB:-0.1}

ROOT=${RLEF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$ROOT/slurm/lib/run.sh" ] || { echo "submit from the repository's root, or set RLEF_ROOT"; exit 2; }
# shellcheck source=slurm/lib/run.sh
. "$ROOT/slurm/lib/run.sh"
