#!/bin/bash
#SBATCH --job-name=rlef-export
#SBATCH --nodes=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#
# Run `rlef export-hf` on a run's newest checkpoint on one node, without a GPU; a killed export resumes.
#
#   bash slurm/export_hf.sh RUN OUT [options of rlef export-hf]
#
# `bash` submits it with the settings of slurm/site.sh, `sbatch` with the lines above.

ROOT=${RLEF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
GPUS_PER_NODE=0 ARGS=("$@")
# shellcheck source=slurm/lib/one_node.sh
. "$ROOT/slurm/lib/one_node.sh"
[ $# -gt 1 ] || die "name a run and a folder to write: sbatch slurm/export_hf.sh RUN OUT"
on_node -m rlef_mega.cli export-hf "$@"
