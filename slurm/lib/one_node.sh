# shellcheck shell=bash disable=SC2034
# shellcheck disable=SC2119
# Run one command on one node, in the container or the virtual environment: for eval.sh, export_hf.sh, bench.sh.
set -o pipefail
# shellcheck source=slurm/site.sh
. "$ROOT/slurm/site.sh"
set -u
# shellcheck source=slurm/lib/steps.sh
. "$ROOT/slurm/lib/steps.sh"
# shellcheck source=slurm/lib/plan.sh
. "$ROOT/slurm/lib/plan.sh"
cd "$ROOT" || exit 2
set_software

on_node() { # on_node ARGUMENTS...: run Python with these arguments; outside a job, submit the script with ARGS
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        read_options # of sbatch, from slurm/site.sh alone: the script's arguments are the command's
        site_options "$PARTITION" "$GPUS_PER_NODE"
        exec sbatch "${FROM_SITE[@]}" "${ASKED[@]}" "$0" "${ARGS[@]}"
    fi
    set_binding
    say "on $(hostname): $*"
    mkdir -m 700 "$CACHES" || [ -O "$CACHES" ] || die "$CACHES is not ours; set LOCAL_DIR in slurm/site.sh"
    trap 'rm -rf "$CACHES"' EXIT
    in_software "$PYTHON" "$@" || die "the command ended with code $?"
    say "finished"
}
