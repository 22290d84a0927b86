# shellcheck shell=bash
# One attempt at a run: check nodes and network, start services and ranks, supervise them.
# Exit codes are the ranks': 0 finished, 2 failed, 3 stopped on request and saved. 4: the run's settings or inputs are
# wrong, so another attempt would fail too.

declare -A PIDS=() # process ids of this attempt's srun commands, by component
STOPPED=3 REFUSED=4
# variables that environment.txt keeps: none of them holds a password or a token
RECORDED='^(SLURM_(JOB|HET|NNODES|NTASKS|NODELIST|CPUS|GPUS|CLUSTER|SUBMIT)|SLURMD_NODENAME=|NCCL_|GLOO_|CUDA_|TORCH|PYTORCH_|TRITON_|OMP_|UCX_|PYTHON|LD_LIBRARY_PATH=|PATH=|HOME=|USER=|HOSTNAME=|LANG=|LC_|HF_HUB_OFFLINE=|HF_HOME=|MASTER_)'

open_logs() { # make this attempt's folder, link `latest` to it, and record what is run
    local n=1 name
    while ! mkdir "$STATE/attempt_$(printf %03d $n)" 2>/dev/null; do n=$((n + 1)); done
    LOGS=$STATE/attempt_$(printf %03d $n)
    ln -sfn "${LOGS##*/}" "$STATE/latest"
    {
        env | grep -E "$RECORDED" | sort
        for name in RECIPE RUN STEPS VENV CONTAINER PARTITION GPU_REQUEST INTERFACE LOCAL_DIR PORT TIME GRACE_S; do
            echo "$name=${!name:-}"
        done
        printf 'SETS %q\n' "${SETS[@]}"
        echo
        scontrol show job "$SLURM_JOB_ID"
        git -C "$ROOT" log -1 --format='commit %H' 2>/dev/null && git -C "$ROOT" status --short
    } >"$LOGS/environment.txt" 2>&1 || true
    say "attempt $n of job $SLURM_JOB_ID on ${NODES[train]} | ${NODES[rollout]:-} | ${NODES[sandbox]}; logs in $LOGS"
}

newest_checkpoint() { # print the step of the newest checkpoint, or 0
    local found
    found=$(find "$RUN/checkpoints" -maxdepth 1 -regex '.*/step_[0-9]+' 2>/dev/null | sort | tail -n 1)
    found=${found##*step_}
    echo $((10#${found:-0}))
}

count_attempt() { # stop the run when MAX_FAILURES attempts began at the same checkpoint
    local at last=none tries=0
    at=$(newest_checkpoint)
    [ ! -f "$STATE/tries" ] || read -r last tries <"$STATE/tries"
    [ "$last" = "$at" ] || tries=0
    [ "$tries" -lt "$MAX_FAILURES" ] ||
        die "$tries attempts have failed at step $at. Fix the cause, remove $STATE/tries, and submit again"
    echo "$at $((tries + 1))" >"$STATE/tries"
}

check_nodes() {
    local role pid pids=() faulty=0 names room
    # what the run has written itself is no longer needed as free space
    room=$(du -scBM --exclude='*.refused*' "$RUN/checkpoints" "$RUN/weights" 2>/dev/null |
        awk -v all="$DISK_GIB" 'END { left = all - $1 / 1024; print (left > 0 ? left : 0) }')
    declare -A gpus=([train]=$TRAIN_GPUS [rollout]=$((SERVERS_PER_NODE * GPUS_PER_SERVER)) [sandbox]=0)
    declare -A ports=([train]="$PORT 2" [rollout]="$SERVER_PORT $SERVERS_PER_NODE" [sandbox]="$SANDBOX_PORT 1")
    declare -A level=([train]="" [rollout]="" [sandbox]=$ISOLATION) disk=([train]=$room [rollout]=0 [sandbox]=0)
    names=$(echo "${NODES[@]}" | tr ' ' '\n' | sort -u | paste -sd,)
    for role in "${!NODES[@]}"; do
        # shellcheck disable=SC2086 # two words
        (step "check_$role" "$role" 1 "$PYTHON" -m rlef_mega.cluster.node_check "$LOGS/shared" --nodes "$names" \
            --began "$(date +%s.%N)" --skew-s "$CLOCK_SKEW_S" --wait-s "$SHARED_WAIT_S" --gpus "${gpus[$role]}" \
            --ports ${ports[$role]} --disk-gib "${disk[$role]}" --tmp-gib "$TMP_GIB" --shm-gib "$SHM_GIB" \
            --isolation "${level[$role]}" --interface "$INTERFACE" --caches "$CACHES" --connections $((RANKS + 100))) &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do await "$pid" || faulty=1; done
    if [ $faulty = 1 ]; then
        sed 's/^/  /' "$LOGS"/check_*.log
        say "FAILED: node checks failed (above)"
        return 2
    fi
    read_addresses
    export MASTER_ADDR=${MASTER_ADDR:-${ADDRESS[${NODES[train]%% *}]}} MASTER_PORT=$PORT
    say "node checks passed; rank 0 is reached at $MASTER_ADDR, port $PORT"
}

check_network() { # one process per rank, as in training
    [ "$ALLREDUCE_GBPS" != 0 ] && [ "$RANKS" -gt 1 ] || return 0
    (MASTER_PORT=$((PORT + 1)) step check_network train "$RANKS_PER_NODE" \
        timeout "$NETWORK_S" "$PYTHON" -m rlef_mega.cluster.allreduce_check "$ALLREDUCE_GBPS") &
    await $! || {
        sed 's/^/  /' "$LOGS/check_network.log"
        say "FAILED: the network check of the training nodes"
        return 2
    }
    say "$(sed 's/^[0-9]*: //' "$LOGS/check_network.log" | grep all-reduce)"
}

start_services() {
    local unsignalled=(env --block-signal=TERM --block-signal=USR1) # Slurm sends these to all steps while ranks still need the services
    # shellcheck disable=SC2016 # expanded on the node: a service listens on the address that other nodes use
    local at_address=(bash -c 'read -r _ address <"$0/$SLURMD_NODENAME" && exec "${@/%ADDRESS/$address}"' "$LOGS/shared")
    (CUDA_VISIBLE_DEVICES='' step sandbox sandbox 1 "${unsignalled[@]}" "${at_address[@]}" "$PYTHON" -m rlef_sandbox \
        --isolation "$ISOLATION" --packages "$PACKAGES" serve --host ADDRESS --port "$SANDBOX_PORT") &
    PIDS[sandbox]=$!
    [ "$ENGINE" = sglang ] || return 0
    (step rollout rollout 1 "${unsignalled[@]}" "${at_address[@]}" "$PYTHON" -m rlef_mega.cli serve "$RECIPE" \
        "${SET_WORDS[@]}" --set rollout.servers.host=ADDRESS) &
    PIDS[rollout]=$!
}

all_running() { # all_running [BUT]: check that all components except BUT run; report one that has ended, and its exit code
    local name code
    for name in "${!PIDS[@]}"; do
        if [ "$name" != "${1:-}" ] && ! kill -0 "${PIDS[$name]}" 2>/dev/null; then
            code=0
            wait "${PIDS[$name]}" || code=$?
            say "FAILED: $name ended with code $code; the end of $LOGS/$name.log:"
            tail -n 15 "$LOGS/$name.log" 2>/dev/null | sed 's/^/  /'
            unset "PIDS[$name]"
            return 2
        fi
    done
}

wait_ready() { # wait_ready NAME ROLE PORT COUNT DEADLINE_S: wait until each server answers /health with 200
    local url began=$SECONDS urls
    urls=$(url_list "$2" "$3" "$4" | sed 's/^\[//; s/\]$//' | tr -d '"' | tr ',' ' ')
    for url in $urls; do
        until curl -gfsS -m 5 --noproxy '*' -H @- -o /dev/null "$url/health" 2>/dev/null \
            <<<"Authorization: Bearer $RLEF_SANDBOX_TOKEN"; do # through a pipe: all users can see command lines
            all_running || return 2
            if [ -n "$ASKED_TO_STOP" ]; then return "$STOPPED"; fi
            if [ $((SECONDS - began)) -gt "$5" ]; then
                say "FAILED: $1 at $url is not ready after $5 s; the end of $LOGS/$1.log:"
                tail -n 15 "$LOGS/$1.log" | sed 's/^/  /'
                return 2
            fi
            sleep 0.5
        done
    done
    say "$1 ready after $((SECONDS - began)) s: $urls"
}

prepare() { # prepare WHAT SETTINGS...: "check" checks the inputs; "prepare" also the servers, and writes the run directory
    local what=$1 code
    shift
    # only task 0 does the work; the others exit at once
    # shellcheck disable=SC2016 # expanded in the task
    (STEP_WAIT_S=0 step "$what" train 1 bash -c '[ "$SLURM_PROCID" != 0 ] || exec "$@"' - \
        "$PYTHON" -m rlef_mega.cluster.slurm "$what" "$RECIPE" "$@") &
    await $! || {
        code=$?
        sed 's/^/  /' "$LOGS/$what.log"
        say "FAILED: the checks of the run failed"
        return $code
    }
}

start_ranks() {
    rm -f "$RUN/stop" "$RUN/.failed"
    echo starting >"$RUN/progress"
    # CUDA and PyTorch read these, as in rlef_mega/run/launch.py (gpu_settings)
    (export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
        [ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ] || [ "$USES_IPC" = 1 ] || export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
        step train train "$RANKS_PER_NODE" "$PYTHON" -m rlef_mega.train "$RUN") &
    PIDS[train]=$!
    say "training: $RANKS ranks resume from step $(newest_checkpoint) of $STEPS"
}

supervise() { # wait for the ranks; return their code, or 2 when a service ends or the ranks hang
    local code silent_s limit_s doing
    while all_running train; do
        if ! kill -0 "${PIDS[train]}" 2>/dev/null; then
            code=0
            wait "${PIDS[train]}" || code=$?
            unset 'PIDS[train]'
            [ $code = 0 ] || [ $code = $STOPPED ] || tail -n 15 "$LOGS/train.log" | sed 's/^/  /'
            ! grep -qs ConfigError "$RUN/.failed" || code=$REFUSED
            say "training ended with code $code at step $(newest_checkpoint)"
            return $code
        fi
        silent_s=$(($(date +%s) - $(stat -c %Y "$RUN/progress" 2>/dev/null || date +%s)))
        doing=$(cat "$RUN/progress" 2>/dev/null)
        limit_s=$HANG_S
        [ "$doing" != starting ] || limit_s=$START_S
        if [ "$silent_s" -gt "$limit_s" ]; then
            say "FAILED: no progress for $silent_s s, since '$doing'; stacks of all ranks in $LOGS/stacks"
            kill -USR2 "${PIDS[train]}"
            sleep 3
            return 2
        fi
        sleep 1
    done
    return 2
}

stop_all() { # kill what still runs: services, which have no state to save, and ranks that hang or lost a service
    local name
    for name in "${!PIDS[@]}"; do kill "${PIDS[$name]}" 2>/dev/null; done
    sleep 0.2
    for name in "${!PIDS[@]}"; do kill "${PIDS[$name]}" 2>/dev/null; done # the second signal makes srun exit at once
    for name in "${!PIDS[@]}"; do wait "${PIDS[$name]}" 2>/dev/null; done
    PIDS=()
}

attempt() {
    local settings=("${SETS[@]}") SET_WORDS=() setting
    check_nodes || return 2
    prepare check "${SETS[@]}" || return
    check_network || return 2
    settings+=("judge.servers=$(url_list sandbox "$SANDBOX_PORT" 1)")
    if [ "$ENGINE" = sglang ]; then
        settings+=("rollout.servers.port=$SERVER_PORT" "rollout.servers.urls=$(url_list rollout "$SERVER_PORT" "$SERVERS_PER_NODE")")
    fi
    for setting in "${settings[@]}"; do SET_WORDS+=(--set "$setting"); done
    start_services
    wait_ready sandbox sandbox "$SANDBOX_PORT" 1 "$SANDBOX_READY_S" || return
    if [ "$ENGINE" = sglang ]; then
        wait_ready rollout rollout "$SERVER_PORT" "$SERVERS_PER_NODE" "$SERVERS_READY_S" || return
    fi
    prepare prepare "${settings[@]}" || return
    [ -z "$ASKED_TO_STOP" ] || return $STOPPED
    start_ranks
    supervise
}
