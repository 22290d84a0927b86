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
# A run of seconds on nodes without GPUs, with all the parts of a large one: 2 nodes train, 1 grades, and with
# ROLLOUT_NODES=1 one generates. Its model, made by: rlef sft demo_base --set dir=runs/tiny-base --set steps=1
#
#   bash slurm/train_tiny.sh             checks that it can run, and submits it; CHAIN=5 submits five, one after another
#   DRY_RUN=1 bash slurm/train_tiny.sh   prints the plan and submits nothing
#   sbatch slurm/train_tiny.sh           submits it as it is

# shellcheck disable=SC2034 # settings, for slurm/lib
RECIPE=${RECIPE:-demo}          # a TOML file, or a recipe's name; its layout says how many nodes train
SETS=(
    "run.dir=${RUN_DIR:-runs/tiny}"
    "model.path=${MODEL:-runs/tiny-base/init}"
    "run.steps=${STEPS:-6}"
    run.checkpoint_every=2
    parallel.processes_per_node=1        # so that its two ranks are on two nodes
    rollout.episodes_per_batch=8
    ppo.updates_per_batch=2
    eval.every=2
    eval.problems=4
    "data.test=''"
    guard.max_invalid_fraction=1.0       # an untrained model writes no code at all
    learner.policy.lr=1e-3
)                                       # section.key=value, over the recipe
ROLLOUT_NODES=${ROLLOUT_NODES:-0}      # that generate with SGLang; 0: each training rank does, in its own process
SANDBOX_NODES=${SANDBOX_NODES:-1}       # that only grade; 0: those that generate do it beside, or those that train
GPUS_PER_NODE=${GPUS_PER_NODE:-0}       # 0: none
HET=${HET:-0}                           # 1: a het job, with a component a role; 0: one allocation

JOB_NAME=${JOB_NAME:-rlef-tiny}       # one job of a name runs at a time: the others go on with its run
TIME=${TIME:-10:00}            # limit of a job
GRACE_S=${GRACE_S:-120}                 # before it, the step is finished and saved: longer than both take
CHAIN=${CHAIN:-1}                       # jobs that `bash` submits, one after another; what is done already ends at once

MAX_FAILURES=${MAX_FAILURES:-3}         # attempts that begin at the same checkpoint
RESTART_WAIT_S=${RESTART_WAIT_S:-10}    # between attempts of a job
HANG_S=${HANG_S:-120}                  # without a phase that begins or ends (rollout, update, a protocol of an evaluation): they hang
START_S=${START_S:-600}               # for the ranks to load the model or a checkpoint, and to begin the first phase
SANDBOX_READY_S=${SANDBOX_READY_S:-120} # for the grading servers to start
SERVERS_READY_S=${SERVERS_READY_S:-1800} # for the SGLang servers to load the model
ALLREDUCE_GBPS=${ALLREDUCE_GBPS:-0.01}   # least bus bandwidth over all training ranks; 0: not measured
NETWORK_S=${NETWORK_S:-300}             # for that measurement

if [ "$ROLLOUT_NODES" != 0 ]; then       # SGLang without a GPU: `make setup-sglang`
    SETS+=(rollout.engine=sglang rollout.servers.device=cpu rollout.servers.memory_fraction=0.05
        'rollout.servers.arguments=["--max-total-tokens", "20000"]')
fi
DISK_GIB=${DISK_GIB:-1} TMP_GIB=${TMP_GIB:-0.5} SHM_GIB=${SHM_GIB:-0.1}

ROOT=${RLEF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$ROOT/slurm/lib/run.sh" ] || { echo "submit from the repository's root, or set RLEF_ROOT"; exit 2; }
# shellcheck source=slurm/lib/run.sh
. "$ROOT/slurm/lib/run.sh"
