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
# The paper's 8B run on nodes of 8 GPUs: 16 train, 20 sample and grade on their CPU cores; one allocation.
# Checked and planned, but never run on GPUs.
#
#   bash slurm/train_8b.sh             check that it can run, and submit it; CHAIN=5 submits five jobs
#   DRY_RUN=1 bash slurm/train_8b.sh   print the plan, submit nothing
#   sbatch slurm/train_8b.sh           submit it without the checks

# shellcheck disable=SC2034 # settings; slurm/lib/settings.sh explains them and has all others
RECIPE=${RECIPE:-llama31_8b}
SETS=(rollout.servers.count=8)
ROLLOUT_NODES=${ROLLOUT_NODES:-20}
JOB_NAME=${JOB_NAME:-rlef-8b}

ROOT=${RLEF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$ROOT/slurm/lib/run.sh" ] || { echo "submit from the repository's root, or set RLEF_ROOT"; exit 2; }
# shellcheck source=slurm/lib/run.sh
. "$ROOT/slurm/lib/run.sh"
