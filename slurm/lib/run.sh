# shellcheck shell=bash
# Submit a run, or, inside a job, execute it. Sourced at the end of slurm/train_*.sh, whose settings it uses.
#
# In a job, this script runs on the first node and starts services and ranks as steps. A component that ends,
# fails or hangs ends the attempt. The run is restarted
#   by this script, on the same nodes    after a component ended or hung
#   by Slurm (--requeue)                 after preemption or a dead node
#   by the next job of the chain         after the time limit (--dependency=singleton)
# always from the newest good checkpoint. MAX_FAILURES attempts from the same checkpoint end the run.
set -uo pipefail

# shellcheck source=slurm/lib/settings.sh
. "$ROOT/slurm/lib/settings.sh"
set +u # a site's own lines may use variables that are not set
# shellcheck source=slurm/site.sh
. "$ROOT/slurm/site.sh"
set -u
# shellcheck source=slurm/lib/steps.sh
. "$ROOT/slurm/lib/steps.sh"
# shellcheck source=slurm/lib/plan.sh
. "$ROOT/slurm/lib/plan.sh"
# shellcheck source=slurm/lib/attempt.sh
. "$ROOT/slurm/lib/attempt.sh"

# shellcheck disable=SC2206 # words
SETS+=(${MORE_SETS:-}) # more settings from the environment, separated by spaces
cd "$ROOT" || die "no folder $ROOT"
set_software

if [ -z "${SLURM_JOB_ID:-}" ] || [ "${DRY_RUN:-0}" = 1 ]; then
    read_options "$@"
    read_layout
    print_plan
    [ "${DRY_RUN:-0}" = 1 ] || submit
    exit
fi
[ $# = 0 ] || die "'$*' follows the script's name in a job; options of sbatch come before it, settings of the recipe in MORE_SETS"
[ "${0##*/}" = slurm_script ] || say "inside job $SLURM_JOB_ID: the run starts here, in this allocation; nothing is submitted"

ASKED_TO_STOP=""
ask_to_stop() { # Slurm signals before a time limit or a preemption; the ranks see the file after their step
    ASKED_TO_STOP=1
    say "asked to stop by SIG$1; the current step is finished and saved"
    [ -z "${RUN:-}" ] || touch "$RUN/stop"
}
is_preempted() { # in a preemption Slurm sends SIGTERM to the steps only, and kills the job after the grace time
    scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'
}

requeue() { # Slurm regards a job that ends within the grace time as finished, whatever its exit code
    local code=0
    say "$1; requesting a requeue from Slurm"
    scontrol requeue "$SLURM_JOB_ID" || code=$?
    # after a requeue Slurm kills the job's processes; scontrol may be killed (code above 128) before it can answer
    [ $code = 0 ] || [ $code -gt 128 ] || die "Slurm refused the requeue; submit the job again"
    sleep 300
    exit "$STOPPED"
}
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM

set_binding
read_layout
mkdir -p "$RUN/slurm" || die "cannot write $RUN"
STATE=$RUN/slurm
export RLEF_CACHE=${RLEF_CACHE:-$RUN/cache}
if [ -f "$STATE/done" ] && [ "$(<"$STATE/done")" -ge "$STEPS" ]; then
    say "all $STEPS steps are finished already"
    exit 0
fi
assign_nodes

RLEF_SANDBOX_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n') # of this job only, stored in no file
export RLEF_SANDBOX_TOKEN
trap clean_nodes EXIT
say "the run's checkpoints and weights need up to $DISK_GIB GiB in $RUN"

ready=(true) # on each node once: import the image, or unpack the environment
if [ -z "$CONTAINER" ] && [ -n "$VENV_ARCHIVE" ]; then
    ready=(bash "$ROOT/slurm/lib/stage.sh" unpack "$VENV_ARCHIVE" "$CACHES/venv")
    PYTHON=$CACHES/venv/bin/python
fi
if [ -n "$CONTAINER$VENV_ARCHIVE" ]; then
    for role in "${!NODES[@]}"; do # one after another: roles may share nodes
        (LOGS=$STATE step "stage_$role" "$role" 1 "${ready[@]}") &
        await $! || die "the software is not on the nodes; see $STATE/stage_$role.log"
    done
fi
while :; do
    count_attempt
    open_logs
    export RLEF_STACKS=$LOGS/stacks
    attempt
    code=$?
    stop_all
    case $code in
        0)
            echo "$STEPS" >"$STATE/done"
            say "done: $STEPS steps are finished, in $RUN"
            exit 0
            ;;
        "$STOPPED")
            echo "stopped 0" >"$STATE/tries"
            say "stopped and saved; the next job resumes from step $(newest_checkpoint)"
            ! is_preempted || requeue "the job was preempted"
            exit $STOPPED
            ;;
        "$REFUSED")
            echo "refused 0" >"$STATE/tries"
            die "the run is refused (above); it would fail again. Fix the cause and submit again"
            ;;
    esac
    [ -z "$ASKED_TO_STOP" ] || exit "$code"
    for role in "${!NODES[@]}"; do
        (step alive "$role" 1 timeout 30 true) &
        if ! await $!; then
            requeue "nodes of $role do not answer"
        fi
    done
    say "next attempt in $RESTART_WAIT_S s"
    sleep "$RESTART_WAIT_S"
done
