#!/bin/bash
#SBATCH --job-name=rlef-bench
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --gpus-per-node=1
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.log
#
# Run `rlef bench` on one node and write its figures as JSON.
#
#   bash slurm/bench.sh kernels [RECIPE] [options of rlef bench]
#
# `bash` submits it with the settings of slurm/site.sh, `sbatch` with the lines above.

ROOT=${RLEF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
OUT=${OUT:-runs/bench/${1:-none}-${SLURM_JOB_ID:-0}.json}   # the figures
GPUS_PER_NODE=${GPUS_PER_NODE:-1} ARGS=("$@")
# shellcheck source=slurm/lib/one_node.sh
. "$ROOT/slurm/lib/one_node.sh"
[ $# -gt 0 ] || die "name a benchmark: sbatch slurm/bench.sh kernels"
mkdir -p "$(dirname "$OUT")"
on_node -m rlef_mega.cli bench "$@" --json "$OUT"
