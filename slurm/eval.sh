#!/bin/bash
#SBATCH --job-name=rlef-eval
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#
# Run `rlef eval` on one node, with the sandbox on the same node.
#
#   bash slurm/eval.sh MODEL [options of rlef eval]
#
# `bash` submits it with the settings of slurm/site.sh, `sbatch` with the lines above.

ROOT=${RLEF_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
DATA=${DATA:-humaneval:test}   # the problems
OUT=${OUT:-runs/eval}          # folder for the results
DTYPE=${DTYPE:-bfloat16}       # data type of the weights
GPUS_PER_NODE=${GPUS_PER_NODE:-1} ARGS=("$@")
# shellcheck source=slurm/lib/one_node.sh
. "$ROOT/slurm/lib/one_node.sh"
[ $# -gt 0 ] || die "name a model: sbatch slurm/eval.sh MODEL"
on_node -m rlef_mega.cli eval --data "$DATA" --out "$OUT" --dtype "$DTYPE" "$@"
