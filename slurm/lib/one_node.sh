# shellcheck shell=bash disable=SC2034
# Run one command on one node, in the container or the virtual environment: for eval.sh, export_hf.sh, bench.sh.
set -uo pipefail
TRAIN_NODES=1 ROLLOUT_NODES=0 SANDBOX_NODES=0
# shellcheck source=slurm/site.sh
. "$ROOT/slurm/site.sh"
# shellcheck source=slurm/lib/steps.sh
. "$ROOT/slurm/lib/steps.sh"
cd "$ROOT" || exit 2
export PYTHONPATH="$ROOT:$ROOT/kernels:$ROOT/sandbox${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUTF8=1 # file names and texts, whatever the locale
export PYTHONSAFEPATH=1 # import no module from the working directory
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
set_software

on_node() { # on_node ARGUMENTS...: run Python with these arguments
    [ -n "${SLURM_JOB_ID:-}" ] || die "submit this script with sbatch"
    say "on $(hostname): $*"
    in_software "$PYTHON" "$@" || die "the command ended with code $?"
    say "finished"
}
