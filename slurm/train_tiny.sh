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
# slurm/lib/settings.sh says how to start it and explains the settings.

# shellcheck disable=SC2034
RECIPE=${RECIPE:-demo}
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
)
ROLLOUT_NODES=${ROLLOUT_NODES:-0}
if [ "$ROLLOUT_NODES" != 0 ]; then       # SGLang without a GPU: `make setup-sglang`
    SETS+=(rollout.engine=sglang rollout.servers.device=cpu rollout.servers.memory_fraction=0.05
        'rollout.servers.arguments=["--max-total-tokens", "20000"]')
fi
SANDBOX_NODES=${SANDBOX_NODES:-1} GPUS_PER_NODE=${GPUS_PER_NODE:-0}
JOB_NAME=${JOB_NAME:-rlef-tiny} TIME=${TIME:-10:00} GRACE_S=${GRACE_S:-120}
HANG_S=${HANG_S:-120} START_S=${START_S:-600} ALLREDUCE_GBPS=${ALLREDUCE_GBPS:-0.01}
DISK_GIB=${DISK_GIB:-1} TMP_GIB=${TMP_GIB:-0.5} SHM_GIB=${SHM_GIB:-0.1}

ROOT=${RLEF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$ROOT/slurm/lib/run.sh" ] || { echo "submit from the repository's root, or set RLEF_ROOT"; exit 2; }
# shellcheck source=slurm/lib/run.sh
. "$ROOT/slurm/lib/run.sh"
