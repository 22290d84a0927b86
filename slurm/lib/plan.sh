# shellcheck shell=bash disable=SC2034
# Before a job: read what the run needs, check that the cluster has it, and call sbatch.

read_layout() { # set RANKS, RANKS_PER_NODE, RUN, STEPS, ... from the recipe
    local found
    found=$(in_software "$PYTHON" -m rlef_mega.cluster.slurm layout "$RECIPE" "${SETS[@]}" 2>&1) || die "the recipe: $found"
    eval "$found"
    TRAIN_NODES=$((RANKS / RANKS_PER_NODE))
    [ "$ROLLOUT_NODES" = 0 ] || [ "$ENGINE" = sglang ] || die "rollout.engine is $ENGINE; ROLLOUT_NODES must be 0"
    # without nodes of their own, servers run on the training nodes
    [ "$ROLLOUT_NODES" != 0 ] || [ "$ENGINE" = local ] || [ -z "$PLACEMENT" ] || die "$PLACEMENT; or set ROLLOUT_NODES"
    TRAIN_GPUS=$((GPUS_PER_NODE ? RANKS_PER_NODE : 0))
    # PORT: torch.distributed; +1: network check; +2: grading; from +10: SGLang
    PORT=${PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 1000 * 10))}
    SANDBOX_PORT=$((PORT + 2)) SERVER_PORT=$((PORT + 10))
}

print_plan() {
    cat <<END
run        $RECIPE, $STEPS steps, in $RUN
train      $TRAIN_NODES nodes x $RANKS_PER_NODE ranks = $RANKS ranks (srun), port $PORT of the first node
rollout    $ROLLOUT_NODES nodes x ${SERVERS_PER_NODE} SGLang servers x ${GPUS_PER_SERVER} GPUs, ports from $SERVER_PORT (engine: $ENGINE)$([ "$ROLLOUT_NODES$ENGINE" != 0sglang ] || echo ", on the training nodes")
sandbox    $SANDBOX_NODES nodes of their own, port $SANDBOX_PORT
allocation $(if [ "$HET" = 1 ]; then echo "a het job, one component per role"; else echo "one, of $((TRAIN_NODES + ROLLOUT_NODES + SANDBOX_NODES)) equal nodes"; fi)
software   ${CONTAINER:-$VENV}${CONTAINER:+ ($CONTAINER_RUNTIME)}
END
    local words=() setting
    for setting in "${SETS[@]}"; do words+=(--set "$setting"); done
    [ -z "$GPU_MODEL" ] || words+=(--gpu "$GPU_MODEL")
    local sampling=$((ROLLOUT_NODES * SERVERS_PER_NODE * GPUS_PER_SERVER))
    [ "$sampling" = 0 ] || words+=(--sampling-gpus "$sampling")
    in_software "$PYTHON" -m rlef_mega.cli plan "$RECIPE" "${words[@]}" || die "rlef plan refuses the recipe"
}

require_nodes() { # require_nodes PARTITION COUNT GPUS WHAT: stop if the cluster has fewer, counting busy ones
    local where=() have
    [ -z "$1" ] || where=(--partition="$1")
    have=$(sinfo --noheader --Node --format='%N %G %t' "${where[@]}" |
        awk -v gpus="$3" '$3 !~ /^(down|drain|drng|fail|maint)/ {
            found = 0
            if (match($2, /gpu:([^:,(]*:)?[0-9]+/)) { n = split(substr($2, RSTART, RLENGTH), part, ":"); found = part[n] }
            if (found >= gpus && !seen[$1]++) count++ } END { print count + 0 }')
    [ "$have" -ge "$2" ] ||
        die "$4 need $2 nodes with $3 GPUs, and partition '${1:-the default}' has $have that work; the job would never start." \
            "Change the layout, the nodes, or PARTITION"
}

submit() { # check the run and submit CHAIN jobs (`bash slurm/train_8b.sh`)
    local parts=() refusal n extra=()
    [ -z "$ACCOUNT" ] || extra+=(--account="$ACCOUNT")
    local gpu=("${extra[@]}") cpu=("${extra[@]}")
    [ -z "$PARTITION" ] || gpu+=(--partition="$PARTITION")
    [ -z "$CPU_PARTITION" ] || cpu+=(--partition="$CPU_PARTITION")
    [ "$GPUS_PER_NODE" = 0 ] || gpu+=(--gpus-per-node="$GPUS_PER_NODE")
    [ "$RANKS_PER_NODE" -le "$GPUS_PER_NODE" ] || [ "$GPUS_PER_NODE" = 0 ] ||
        die "$RANKS_PER_NODE ranks per node, but GPUS_PER_NODE=$GPUS_PER_NODE; lower parallel.processes_per_node"
    [ $((SERVERS_PER_NODE * GPUS_PER_SERVER)) -le "$GPUS_PER_NODE" ] || [ "$ENGINE" = local ] ||
        die "$SERVERS_PER_NODE servers x $GPUS_PER_SERVER GPUs per node, but GPUS_PER_NODE=$GPUS_PER_NODE; lower" \
            "rollout.servers.count or rollout.servers.tensor_parallel_size"
    local all=(--exclusive --mem=0 "--job-name=$JOB_NAME" "--time=$TIME" "--signal=B:USR1@$GRACE_S" --requeue
        --open-mode=append "--output=${JOB_LOG:-$JOB_NAME-%j.log}" --dependency=singleton)
    if [ "$HET" = 1 ]; then # components need different names, or `singleton` makes them wait for each other
        require_nodes "$PARTITION" $((TRAIN_NODES + ROLLOUT_NODES)) "$GPUS_PER_NODE" "training and rollouts"
        parts=("${all[@]}" "${gpu[@]}" --nodes="$TRAIN_NODES")
        [ "$ROLLOUT_NODES" = 0 ] || parts+=(: "--job-name=$JOB_NAME-rollout" --exclusive --mem=0 "${gpu[@]}" --nodes="$ROLLOUT_NODES")
        if [ "$SANDBOX_NODES" != 0 ]; then
            require_nodes "$CPU_PARTITION" "$SANDBOX_NODES" 0 "grading"
            parts+=(: "--job-name=$JOB_NAME-sandbox" --exclusive --mem=0 "${cpu[@]}" --nodes="$SANDBOX_NODES")
        fi
    else
        n=$((TRAIN_NODES + ROLLOUT_NODES + SANDBOX_NODES))
        require_nodes "$PARTITION" "$n" "$GPUS_PER_NODE" "training, rollouts and grading"
        parts=("${all[@]}" "${gpu[@]}" --nodes="$n")
        refusal=$(sbatch --test-only "${parts[@]}" "$0" 2>&1) || die "Slurm would not start it: $refusal"
    fi
    for ((n = 0; n < CHAIN; n++)); do
        sbatch "${parts[@]}" "$0" || die "sbatch refused the job"
    done
}
