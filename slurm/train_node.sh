#!/bin/bash
#SBATCH --job-name=rlef-node
#SBATCH --nodes=1
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
# A run on one node of 8 GPUs, which trains, samples and grades. Checked and planned, but never run on GPUs.
# slurm/lib/settings.sh says how to start it and explains the settings.

# shellcheck disable=SC2034
RECIPE=${RECIPE:-llama31_8b_node}
SETS=()
JOB_NAME=${JOB_NAME:-rlef-node}
ALLREDUCE_GBPS=${ALLREDUCE_GBPS:-100} # by NVLink

ROOT=${RLEF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$ROOT/slurm/lib/run.sh" ] || { echo "submit from the repository's root, or set RLEF_ROOT"; exit 2; }
# shellcheck source=slurm/lib/run.sh
. "$ROOT/slurm/lib/run.sh"
