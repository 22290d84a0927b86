# shellcheck shell=bash disable=SC2034
# Before a job: read what the run needs, check that the cluster has it, and call sbatch.

read_layout() { # set RANKS, RANKS_PER_NODE, RUN, STEPS, ... from the recipe
    local found name value
    found=$(in_software "$PYTHON" -m rlef_mega.cluster.slurm layout "$RECIPE" "${SETS[@]}") || die "the recipe is refused (above)"
    while IFS="=" read -r name value; do # other lines are not ours: a container may print a greeting
        case $name in
            RUN | ENGINE | PLACEMENT | ISOLATION | PACKAGES) printf -v "$name" %s "$value" ;;
            RANKS | RANKS_PER_NODE | STEPS | SERVERS_PER_NODE | GPUS_PER_SERVER | USES_IPC | CHECKPOINTS_GIB)
                [[ $value =~ ^[0-9]+$ ]] || die "$name=$value from the recipe's layout is not a number"
                printf -v "$name" %s "$value"
                ;;
        esac
    done <<<"$found"
    DISK_GIB=${DISK_GIB:-$CHECKPOINTS_GIB}
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
disk       $DISK_GIB GiB in $RUN, for checkpoints and published weights
variables  all of this shell travel to the job and its steps (--export=ALL)
END
    local words=() setting
    for setting in "${SETS[@]}"; do words+=(--set "$setting"); done
    [ -z "$GPU_MODEL" ] || words+=(--gpu "$GPU_MODEL")
    local sampling=$((ROLLOUT_NODES * SERVERS_PER_NODE * GPUS_PER_SERVER))
    [ "$sampling" = 0 ] || words+=(--sampling-gpus "$sampling")
    in_software "$PYTHON" -m rlef_mega.cli plan "$RECIPE" "${words[@]}" || die "rlef plan refuses the recipe"
}

read_options() { # set ASKED, the user's own options of sbatch: `bash slurm/train_8b.sh --exclude=node7`
    local word
    ASKED=()
    for word in $SUBMIT_OPTIONS "$@"; do
        case $word in
            --nodes* | -N* | --ntasks* | -n* | --time=* | -t* | --partition* | -p* | --account* | -A* | --job-name* | -J* | --output* | -o* | \
                --dependency* | -d* | --signal* | --export* | --gpus* | -G* | --gres=* | --array* | -a* | --wrap* | --test-only | --help | -h)
                die "$word: these scripts set it themselves, from the settings at the top of the script and in slurm/site.sh"
                ;;
            -?*) ASKED+=("$word") ;;
            *) die "'$word' is no option of sbatch; write options as --name=value, and settings of the recipe in MORE_SETS" ;;
        esac
    done
    # sbatch would take options from these too
    for word in $(compgen -e | grep '^SBATCH_'); do
        case $word in SBATCH_QOS | SBATCH_RESERVATION | SBATCH_CONSTRAINT | SBATCH_CLUSTERS | SBATCH_WCKEY) ;; *) unset "$word" ;; esac
    done
}

site_options() { # site_options PARTITION GPUS: set FROM_SITE, the options of sbatch that follow from slurm/site.sh
    FROM_SITE=(--export=ALL --propagate=NONE) # pass on the checked settings; keep each node's own limits
    [ -z "$ACCOUNT" ] || FROM_SITE+=(--account="$ACCOUNT")
    [ -z "$1" ] || FROM_SITE+=(--partition="$1")
    [ "$2" = 0 ] || [ -z "$GPU_REQUEST" ] || FROM_SITE+=("${GPU_REQUEST//%n/$2}")
    [[ "${FROM_SITE[*]}" = *--gpus-per-node=* ]] || ! grep -q '^#SBATCH --gpus-per-node' "$0" || FROM_SITE+=(--gpus-per-node=0)
}

exceeds() { # exceeds A B: whether time A is longer than time B, both in Slurm's formats
    awk -v a="$1" -v b="$2" 'function minutes(t, part, n) {
            n = split(t, part, /[-:]/)
            if (t ~ /-/) return part[1] * 1440 + part[2] * 60 + part[3] + part[4] / 60
            return n == 3 ? part[1] * 60 + part[2] + part[3] / 60 : part[1] + part[2] / 60
        }
        BEGIN { exit !(b ~ /^[0-9]/ && (a !~ /^[0-9]/ || minutes(a) > minutes(b))) }'
}

never_starts() { # never_starts PARTITION COUNT GPUS: set FAULT to why a job could never start there; set DOWN to 1 if too few nodes work now
    local name=$1 where=() have working about
    FAULT="" DOWN=""
    sinfo --noheader --format=%P >/dev/null || die "Slurm does not answer (above); try again later"
    [ -n "$name" ] || name=$(sinfo --noheader --format=%P | sed -n 's/\*$//p')
    [ -z "$name" ] || where=(--partition="$name")
    # inval: Slurm refuses the node until its configuration is right; futr: it does not exist. Others come back.
    read -r have working < <(sinfo --noheader --Node --format='%N %G %t' "${where[@]}" | awk -v gpus="$3" '$3 !~ /^(inval|futr)/ {
            found = 0
            if (match($2, /gpu:([^:,(]*:)?[0-9]+/)) { n = split(substr($2, RSTART, RLENGTH), part, ":"); found = part[n] }
            if (found >= gpus && !seen[$1]++) { have++; if ($3 !~ /^(down|drain|drng|fail|maint|unk)/) working++ }
        } END { print have + 0, working + 0 }')
    [ "$working" -ge "$2" ] || DOWN=1
    [ -z "$name" ] || about=$(scontrol show partition "$name" 2>/dev/null)
    about=" ${about:-} "
    limit() { sed -n "s/.* $1=\([^ ]*\) .*/\1/p" <<<"${about//$'\n'/ }"; }
    if [ "$have" -lt "$2" ]; then
        FAULT="$2 nodes with $3 GPUs, and partition '${1:-the default}' has $have"
    elif exceeds "$TIME" "$(limit MaxTime)"; then
        FAULT="TIME=$TIME, and partition '$name' allows $(limit MaxTime)"
    elif [[ $(limit MaxNodes) =~ ^[0-9]+$ ]] && [ "$2" -gt "$(limit MaxNodes)" ]; then
        FAULT="$2 nodes, and a job in partition '$name' may have $(limit MaxNodes)"
    elif [[ $(limit State) =~ ^(DOWN|INACTIVE|DRAIN)$ ]]; then
        FAULT="partition '$name', whose state is $(limit State)"
    fi
}

add_component() { # add_component ROLES NAME COUNT PARTITION GPUS: check a component of the job and append its options to JOB
    local partition partitions options refusal gpus=$5
    [ "$3" != 0 ] || return 0
    [ -n "$GPU_REQUEST" ] || gpus=0 # Slurm does not count them
    NODES_OF[_$4]=$((${NODES_OF[_$4]:-0} + $3)) # of all components so far
    IFS=, read -r -a partitions <<<"${4:-,}"
    for partition in "${partitions[@]}"; do # the job starts in one of them
        never_starts "$partition" "${NODES_OF[_$4]}" "$gpus"
        [ -n "$FAULT" ] || break
    done
    [ -z "$FAULT" ] || die "$1 need $FAULT; the job would never start. Change the layout, TIME, or PARTITION"
    site_options "$4" "$5"
    options=(--nodes="$3" --exclusive --mem=0 "${FROM_SITE[@]}" "${ASKED[@]}")
    if ! refusal=$(sbatch --test-only --time="$TIME" "${options[@]}" --wrap=true 2>&1); then
        [[ -n $DOWN && $refusal =~ not\ available|busy ]] || die "Slurm would not start it: $refusal"
        say "WARNING: $1 need $3 nodes, and too many of the partition are down or drained; the job waits for them"
    fi
    [ ${#JOB[@]} = 0 ] || JOB+=(:)
    # components need different names, or `singleton` makes them wait for each other
    JOB+=("--job-name=$2" "${options[@]}")
}

submit() { # check the run and submit CHAIN jobs (`bash slurm/train_8b.sh`)
    local n JOB=()
    declare -A NODES_OF=()
    [ "$RANKS_PER_NODE" -le "$GPUS_PER_NODE" ] || [ "$GPUS_PER_NODE" = 0 ] ||
        die "$RANKS_PER_NODE ranks per node, but GPUS_PER_NODE=$GPUS_PER_NODE; lower parallel.processes_per_node"
    [ $((SERVERS_PER_NODE * GPUS_PER_SERVER)) -le "$GPUS_PER_NODE" ] || [ "$ENGINE" = local ] ||
        die "$SERVERS_PER_NODE servers x $GPUS_PER_SERVER GPUs per node, but GPUS_PER_NODE=$GPUS_PER_NODE; lower" \
            "rollout.servers.count or rollout.servers.tensor_parallel_size"
    exceeds "$TIME" "0:$GRACE_S" || die "TIME=$TIME leaves nothing before GRACE_S=$GRACE_S s; raise TIME"
    if [ "$HET" = 1 ]; then
        # shellcheck disable=SC2153 # of slurm/site.sh
        add_component training "$JOB_NAME" "$TRAIN_NODES" "$PARTITION" "$GPUS_PER_NODE"
        add_component rollouts "$JOB_NAME-rollout" "$ROLLOUT_NODES" "$PARTITION" "$GPUS_PER_NODE"
        add_component grading "$JOB_NAME-sandbox" "$SANDBOX_NODES" "$CPU_PARTITION" 0
    else
        add_component "training, rollouts and grading" "$JOB_NAME" $((TRAIN_NODES + ROLLOUT_NODES + SANDBOX_NODES)) \
            "$PARTITION" "$GPUS_PER_NODE"
    fi
    if ! in_software "$PYTHON" -m rlef_mega.cluster.slurm find "$RECIPE" "${SETS[@]}"; then
        [ -n "$CONTAINER" ] || die "the run would fail (above)"
        say "WARNING: this node lacks what is named above; MOUNTS must put it into the container"
    fi
    for ((n = 0; n < CHAIN; n++)); do
        sbatch "--time=$TIME" "--signal=B:USR1@$GRACE_S" --requeue --open-mode=append \
            "--output=${JOB_LOG:-$JOB_NAME-%j.log}" --dependency=singleton "${JOB[@]}" "$0" || die "sbatch refused the job"
    done
}
