# shellcheck shell=bash
# Steps: commands on the nodes of a role, in the container or the virtual environment.
# Roles are train, rollout and sandbox. In one allocation the nodes are dealt in this order; in a het job
# each role has a component of its own, in this order too. Roles without nodes of their own use others'.

say() { printf '%(%F %T)T %s\n' -1 "$*"; }
die() {
    say "FAILED: $*"
    exit 2
}

declare -A NODES=() GROUP=() # of a role: its nodes with spaces, its component of a het job

deal_nodes() { # fills NODES and GROUP from Slurm's variables, or stops
    local role list all wanted group=0
    declare -A count=([train]=$TRAIN_NODES [rollout]=$ROLLOUT_NODES [sandbox]=$SANDBOX_NODES)
    mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    wanted=$((TRAIN_NODES + ROLLOUT_NODES + SANDBOX_NODES))
    if [ -z "${SLURM_HET_SIZE:-}" ] && [ ${#all[@]} != $wanted ]; then
        die "the job has ${#all[@]} nodes, the run needs $wanted: $TRAIN_NODES to train, $ROLLOUT_NODES to generate," \
            "$SANDBOX_NODES to grade. Submit it with --nodes=$wanted, or change the settings"
    fi
    for role in train rollout sandbox; do
        [ "${count[$role]}" -gt 0 ] || continue
        if [ -n "${SLURM_HET_SIZE:-}" ]; then
            list=SLURM_JOB_NODELIST_HET_GROUP_$group
            [ -n "${!list:-}" ] || die "the het job has no component $group for the nodes that $role"
            mapfile -t all < <(scontrol show hostnames "${!list}")
            [ ${#all[@]} = "${count[$role]}" ] ||
                die "component $group has ${#all[@]} nodes, $role needs ${count[$role]}; change #SBATCH --nodes"
            GROUP[$role]=$((group++))
        fi
        NODES[$role]="${all[*]:0:${count[$role]}}"
        all=("${all[@]:${count[$role]}}")
    done
    # graders on the nodes that generate, whose cores are idle; a tiny run has neither
    NODES[sandbox]=${NODES[sandbox]:-${NODES[rollout]:-${NODES[train]}}}
    GROUP[sandbox]=${GROUP[sandbox]:-${GROUP[rollout]:-0}}
}

step() { # step NAME ROLE TASKS_PER_NODE COMMAND...: becomes srun; output to LOGS/NAME.log, a line's task before it
    local name=$1 role=$2 per_node=$3
    shift 3
    local nodes=${NODES[$role]} flags=("${STEP_FLAGS[@]}") count
    count=$(wc -w <<<"$nodes")
    [ -z "${SLURM_HET_SIZE:-}" ] || flags+=(--het-group="${GROUP[$role]}")
    # what a job's own options leave behind would be added to ours
    unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_MEM_PER_NODE SLURM_NTASKS_PER_NODE SLURM_NTASKS SLURM_NPROCS
    # no --kill-on-bad-exit: ranks that stop on request must all say so
    exec srun --quiet --job-name="$name" --nodes="$count" --ntasks=$((count * per_node)) --ntasks-per-node="$per_node" \
        --nodelist="${nodes// /,}" --overlap --mem=0 --kill-on-bad-exit=0 --wait="${STEP_WAIT_S:-20}" --unbuffered --label \
        --open-mode=append --output="$LOGS/$name.log" --error="$LOGS/$name.log" "${flags[@]}" "${RUNNER[@]}" "$@"
}

set_binding() { # tasks use all cores of their job on a node; a cluster without bindings refuses to hear of them
    ! scontrol show config | grep -q '^TaskPlugin .*task/[ac]' || STEP_FLAGS+=(--cpu-bind=none)
}

set_software() { # PYTHON, and what runs it: RUNNER before a command, STEP_FLAGS for srun
    PYTHON=$VENV/bin/python RUNNER=() STEP_FLAGS=()
    if [ -n "$CONTAINER" ]; then
        PYTHON=python
        case $CONTAINER_RUNTIME in
            pyxis) STEP_FLAGS=(--container-image="$CONTAINER" --container-mounts="$MOUNTS" --container-workdir="$ROOT") ;;
            apptainer) RUNNER=(apptainer exec --bind "$MOUNTS" --pwd "$ROOT" "$CONTAINER") ;;
            *) die "CONTAINER_RUNTIME=$CONTAINER_RUNTIME; it may be pyxis or apptainer" ;;
        esac
        [ "$GPUS_PER_NODE" = 0 ] || [ "$CONTAINER_RUNTIME" = pyxis ] || RUNNER=("${RUNNER[@]:0:2}" --nv "${RUNNER[@]:2}")
    elif [ ! -x "$PYTHON" ]; then
        die "no $PYTHON; set VENV or CONTAINER in slurm/site.sh"
    fi
}

in_software() { # here, or in a job's container as a step; before a job, by the login node's own Python
    if [ -n "$CONTAINER" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        srun --nodes=1 --ntasks=1 --overlap --mem=0 --quiet "${STEP_FLAGS[@]}" "${RUNNER[@]}" "$@"
    elif [ -n "$CONTAINER" ]; then
        shift
        "${LOGIN_PYTHON:-python3}" "$@"
    else
        "$@"
    fi
}

await() { # the exit code of a child; a signal to this script does not end the wait
    local code
    while :; do
        wait "$1"
        code=$?
        kill -0 "$1" 2>/dev/null || return $code
    done
}

url_list() { # url_list ROLE PORT COUNT: the TOML list of http://NODE:PORT and the ports that follow
    local node urls=() n
    for node in ${NODES[$1]}; do
        for ((n = 0; n < $3; n++)); do urls+=("\"http://$node:$(($2 + n))\""); done
    done
    local IFS=,
    echo "[${urls[*]}]"
}
