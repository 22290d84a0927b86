#!/bin/bash
#SBATCH --job-name=rlef-8b
#SBATCH --nodes=36
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --gpus-per-node=8
#SBATCH --time=2-00:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --dependency=singleton
#SBATCH --signal=B:USR1@900
#
# The paper's 8B run on GPU nodes of 8: 16 train, 20 generate, and their CPU cores grade; one allocation.
# Loaded and planned; never run by us on GPUs.
#
#   bash slurm/train_8b.sh             checks that it can run, and submits it; CHAIN=5 submits five, one after another
#   DRY_RUN=1 bash slurm/train_8b.sh   prints the plan and submits nothing
#   sbatch slurm/train_8b.sh           submits it as it is

# shellcheck disable=SC2034 # settings, for slurm/lib
RECIPE=${RECIPE:-llama31_8b}          # a TOML file, or a recipe's name; its layout says how many nodes train
SETS=(rollout.servers.count=8)                                       # section.key=value, over the recipe
ROLLOUT_NODES=${ROLLOUT_NODES:-20}      # that generate with SGLang; 0: each training rank does, in its own process
SANDBOX_NODES=${SANDBOX_NODES:-0}       # that only grade; 0: those that generate do it beside, or those that train
GPUS_PER_NODE=${GPUS_PER_NODE:-8}       # 0: none
HET=${HET:-0}                           # 1: a het job, with a component a role; 0: one allocation

JOB_NAME=${JOB_NAME:-rlef-8b}       # one job of a name runs at a time: the others go on with its run
TIME=${TIME:-2-00:00:00}            # limit of a job
GRACE_S=${GRACE_S:-900}                 # before it, the step is finished and saved: longer than both take
CHAIN=${CHAIN:-1}                       # jobs that `bash` submits, one after another; what is done already ends at once

MAX_FAILURES=${MAX_FAILURES:-3}         # attempts that begin at the same checkpoint
RESTART_WAIT_S=${RESTART_WAIT_S:-10}    # between attempts of a job
HANG_S=${HANG_S:-3600}                  # without a phase that begins or ends (rollout, update, a protocol of an evaluation): they hang
START_S=${START_S:-3600}               # for the ranks to load the model or a checkpoint, and to begin the first phase
SANDBOX_READY_S=${SANDBOX_READY_S:-120} # for the grading servers to start
SERVERS_READY_S=${SERVERS_READY_S:-1800} # for the SGLang servers to load the model
ALLREDUCE_GBPS=${ALLREDUCE_GBPS:-10}   # least bus bandwidth over all training ranks; 0: not measured
NETWORK_S=${NETWORK_S:-300}             # for that measurement

ROOT=${RLEF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$ROOT/slurm/lib/run.sh" ] || { echo "submit from the repository's root, or set RLEF_ROOT"; exit 2; }
# shellcheck source=slurm/lib/run.sh
. "$ROOT/slurm/lib/run.sh"
