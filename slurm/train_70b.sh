#!/bin/bash
#SBATCH --job-name=rlef-70b
#SBATCH --nodes=128
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --gpus-per-node=8
#SBATCH --time=2-00:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --dependency=singleton
#SBATCH --signal=B:USR1@1800
#SBATCH hetjob
#SBATCH --job-name=rlef-70b-rollout
#SBATCH --nodes=160
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --gpus-per-node=8
#SBATCH hetjob
#SBATCH --job-name=rlef-70b-sandbox
#SBATCH --nodes=16
#SBATCH --exclusive
#SBATCH --mem=0
#
# The paper's 70B run, a het job: 128 nodes of 8 GPUs train, 160 sample, 16 without GPUs grade.
# Checked and planned, but never run on GPUs.
# slurm/lib/settings.sh says how to start it and explains the settings.

# shellcheck disable=SC2034
RECIPE=${RECIPE:-llama31_70b}
SETS=(rollout.servers.count=1)
ROLLOUT_NODES=${ROLLOUT_NODES:-160}
SANDBOX_NODES=${SANDBOX_NODES:-16}
HET=${HET:-1}
JOB_NAME=${JOB_NAME:-rlef-70b}
GRACE_S=${GRACE_S:-1800}
HANG_S=${HANG_S:-5400}

ROOT=${RLEF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$ROOT/slurm/lib/run.sh" ] || { echo "submit from the repository's root, or set RLEF_ROOT"; exit 2; }
# shellcheck source=slurm/lib/run.sh
. "$ROOT/slurm/lib/run.sh"
