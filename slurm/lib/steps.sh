# shellcheck shell=bash
# Steps: commands on the nodes of a role, in the container or the virtual environment.
# The roles are train, rollout and sandbox. One allocation is divided in this order; in a het job each role is a
# component, in this order too. A role without nodes uses those of another.

say() { printf '%(%F %T)T %s\n' -1 "$*"; }
die() {
    say "FAILED: $*"
    exit 2
}

declare -A NODES=() GROUP=() # by role: its nodes, separated by spaces; its component of a het job

assign_nodes() { # set NODES and GROUP from Slurm's variables, or stop
    local role list all wanted group=0
    declare -A count=([train]=$TRAIN_NODES [rollout]=$ROLLOUT_NODES [sandbox]=$SANDBOX_NODES)
    mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    wanted=$((TRAIN_NODES + ROLLOUT_NODES + SANDBOX_NODES))
    if [ -z "${SLURM_HET_SIZE:-}" ] && [ ${#all[@]} != $wanted ]; then
        die "the job has ${#all[@]} nodes, the run needs $wanted: $TRAIN_NODES to train, $ROLLOUT_NODES to sample," \
            "$SANDBOX_NODES to grade. Submit it with --nodes=$wanted, or change the settings"
    fi
    for role in train rollout sandbox; do
        [ "${count[$role]}" -gt 0 ] || continue
        if [ -n "${SLURM_HET_SIZE:-}" ]; then
            list=SLURM_JOB_NODELIST_HET_GROUP_$group
            [ -n "${!list:-}" ] || die "the het job has no component $group for the role $role; add one to the #SBATCH lines"
            mapfile -t all < <(scontrol show hostnames "${!list}")
            [ ${#all[@]} = "${count[$role]}" ] ||
                die "component $group has ${#all[@]} nodes, $role needs ${count[$role]}; change #SBATCH --nodes"
            GROUP[$role]=$((group++))
        fi
        NODES[$role]="${all[*]:0:${count[$role]}}"
        all=("${all[@]:${count[$role]}}")
    done
    if [ "$ENGINE" = sglang ]; then # servers without nodes of their own run on the training nodes
        NODES[rollout]=${NODES[rollout]:-${NODES[train]}}
        GROUP[rollout]=${GROUP[rollout]:-0}
    fi
    # without nodes of their own, graders use the idle cores of the sampling nodes, or the training nodes
    NODES[sandbox]=${NODES[sandbox]:-${NODES[rollout]:-${NODES[train]}}}
    GROUP[sandbox]=${GROUP[sandbox]:-${GROUP[rollout]:-0}}
}

step() { # step NAME ROLE TASKS_PER_NODE COMMAND...: exec srun, with output in LOGS/NAME.log, labelled by task
    local name=$1 role=$2 per_node=$3
    shift 3
    local nodes=${NODES[$role]} flags=("${STEP_FLAGS[@]}") count
    count=$(wc -w <<<"$nodes")
    [ -z "${SLURM_HET_SIZE:-}" ] || flags+=(--het-group="${GROUP[$role]}")
    # srun would read these options of the job from the environment
    unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_MEM_PER_NODE SLURM_NTASKS_PER_NODE SLURM_NTASKS SLURM_NPROCS
    # no --kill-on-bad-exit: every rank that stops on request must return its own exit code
    exec srun --quiet --job-name="$name" --nodes="$count" --ntasks=$((count * per_node)) --ntasks-per-node="$per_node" \
        --nodelist="${nodes// /,}" --overlap --mem=0 --kill-on-bad-exit=0 --wait="${STEP_WAIT_S:-20}" --unbuffered --label \
        --open-mode=append --output="$LOGS/$name.log" --error="$LOGS/$name.log" "${flags[@]}" "${RUNNER[@]}" "$@"
}

set_binding() { # let tasks use all cores of the job; a cluster without task binding refuses the option
    ! scontrol show config | grep -q '^TaskPlugin .*task/[ac]' || STEP_FLAGS+=(--cpu-bind=none)
}

set_software() { # set PYTHON, RUNNER (a prefix of commands) and STEP_FLAGS (options of srun)
    PYTHON=$VENV/bin/python RUNNER=() STEP_FLAGS=()
    if [ -n "$CONTAINER" ]; then
        PYTHON=python
        case $CONTAINER_RUNTIME in
            pyxis) STEP_FLAGS=(--container-image="$CONTAINER" --container-mounts="$MOUNTS" --container-workdir="$ROOT") ;;
            apptainer) RUNNER=(apptainer exec --bind "$MOUNTS" --pwd "$ROOT" "$CONTAINER") ;;
            *) die "CONTAINER_RUNTIME=$CONTAINER_RUNTIME; set it to pyxis or apptainer" ;;
        esac
        [ "$GPUS_PER_NODE" = 0 ] || [ "$CONTAINER_RUNTIME" = pyxis ] || RUNNER=("${RUNNER[@]:0:2}" --nv "${RUNNER[@]:2}")
    elif [ ! -x "$PYTHON" ]; then
        die "no $PYTHON; set VENV or CONTAINER in slurm/site.sh"
    fi
}

in_software() { # run a command; with CONTAINER, run it in the container or, before a job, with the login node's Python
    if [ -n "$CONTAINER" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        srun --nodes=1 --ntasks=1 --overlap --mem=0 --quiet "${STEP_FLAGS[@]}" "${RUNNER[@]}" "$@"
    elif [ -n "$CONTAINER" ]; then
        shift
        "${LOGIN_PYTHON:-python3}" "$@"
    else
        "$@"
    fi
}

await() { # return a child's exit code; signals to this script do not end the wait
    local code
    while :; do
        wait "$1"
        code=$?
        kill -0 "$1" 2>/dev/null || return $code
    done
}

url_list() { # url_list ROLE PORT COUNT: print the TOML list of http://NODE:PORT for the role's servers
    local node urls=() n
    for node in ${NODES[$1]}; do
        for ((n = 0; n < $3; n++)); do urls+=("\"http://$node:$(($2 + n))\""); done
    done
    local IFS=,
    echo "[${urls[*]}]"
}
