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
# slurm/lib/settings.sh says how to start it and explains the settings.

# shellcheck disable=SC2034
RECIPE=${RECIPE:-llama31_8b}
SETS=(rollout.servers.count=8)
ROLLOUT_NODES=${ROLLOUT_NODES:-20}
JOB_NAME=${JOB_NAME:-rlef-8b}

ROOT=${RLEF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$ROOT/slurm/lib/run.sh" ] || { echo "submit from the repository's root, or set RLEF_ROOT"; exit 2; }
# shellcheck source=slurm/lib/run.sh
. "$ROOT/slurm/lib/run.sh"
