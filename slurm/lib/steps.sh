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
declare -A ADDRESS=()        # by node

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

step() { # step NAME ROLE TASKS_PER_NODE COMMAND...: become srun, with output in LOGS/NAME.log, labelled by task
    local name=$1 role=$2 per_node=$3 nodes=${NODES[$2]}
    local options=(--job-name="$name" --nodelist="${nodes// /,}" --wait="${STEP_WAIT_S:-20}" --label --open-mode=append
        --output="$LOGS/$name.log" --error="$LOGS/$name.log")
    shift 3
    [ -z "${SLURM_HET_SIZE:-}" ] || options+=(--het-group="${GROUP[$role]}")
    become_srun "$(wc -w <<<"$nodes")" "$per_node" "$@"
}

become_srun() { # become_srun NODES TASKS_PER_NODE COMMAND...: exec srun with the caller's `options`, and none from variables
    local number=$1 per_node=$2 name carried
    shift 2
    # Otherwise srun would take options from variables of the job, the user or the site, such as one GPU for each task, a
    # cyclic distribution of tasks, or no exported variables. Variables that identify the job stay.
    for name in $(compgen -e); do
        case $name in
            SLURM_JOB* | SLURM_HET_* | SLURM_CONF | SLURM_CLUSTER* | SLURM_SUBMIT* | SLURM_JWT | SLURM_NETWORK) ;;
            SLURM_* | SRUN_*) unset "$name" ;;
        esac
    done
    if [ -n "$CONTAINER" ]; then # these keep our values; for all others the image's own take precedence
        carried=$(compgen -e | grep -E '^(PYTHON|RLEF_|MASTER_|NCCL_|GLOO_|HF_|TOKENIZERS_|OMP_|TORCH|PYTORCH_|CUDA_DEVICE_|WANDB_)|_CACHE_(DIR|PATH)$')
        case $CONTAINER_RUNTIME in
            pyxis) options+=(--container-env="${carried//$'\n'/,}") ;;
            apptainer) for name in $carried; do export "APPTAINERENV_$name=${!name}"; done ;;
        esac
    fi
    # no --kill-on-bad-exit: every rank that stops on request must return its own exit code
    # no --gpu-bind: with `none` srun sets no CUDA_VISIBLE_DEVICES
    exec srun --quiet --export=ALL --nodes="$number" --ntasks=$((number * per_node)) --ntasks-per-node="$per_node" \
        --distribution=block --overlap --mem=0 --mpi=none --kill-on-bad-exit=0 --unbuffered --propagate=NOFILE,CORE \
        "${STEP_FLAGS[@]}" "${options[@]}" "${RUNNER[@]}" "$@" </dev/null
}

set_binding() { # let tasks use all cores of the job; a cluster without task binding refuses the option
    ! scontrol show config | grep -q '^TaskPlugin .*task/[ac]' || STEP_FLAGS+=(--cpu-bind=none)
}

set_software() { # set PYTHON, RUNNER (a prefix of commands), STEP_FLAGS (options of srun), variables and limits
    PYTHON=$VENV/bin/python RUNNER=() STEP_FLAGS=()
    if [ -n "$CONTAINER" ]; then
        PYTHON=python
        case $CONTAINER_RUNTIME in
            pyxis) # with a name, each node imports the image once per job
                STEP_FLAGS=(--container-image="$CONTAINER" --container-name="rlef-${SLURM_JOB_ID:-0}"
                    --container-mounts="$MOUNTS" --container-workdir="$ROOT")
                ;;
            apptainer) RUNNER=(apptainer exec --bind "$MOUNTS" --pwd "$ROOT" "$CONTAINER") ;;
            *) die "CONTAINER_RUNTIME=$CONTAINER_RUNTIME; set it to pyxis or apptainer" ;;
        esac
        [ "$GPUS_PER_NODE" = 0 ] || [ "$CONTAINER_RUNTIME" = pyxis ] || RUNNER=("${RUNNER[@]:0:2}" --nv "${RUNNER[@]:2}")
    elif [ ! -x "$PYTHON" ]; then
        die "no $PYTHON; set VENV or CONTAINER in slurm/site.sh"
    fi
    export PYTHONPATH="$ROOT:$ROOT/kernels:$ROOT/sandbox${PYTHONPATH:+:$PYTHONPATH}" # run the code of this checkout
    export PYTHONUTF8=1 # file names and texts, whatever the locale
    export PYTHONSAFEPATH=1 PYTHONNOUSERSITE=1 # import no module from the working directory or ~/.local
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
    ulimit -Sn "$(ulimit -Hn)" # rank 0 has a connection from every rank
    ulimit -c 0                # no core files of many GB in a shared folder
    [ -n "${SLURM_JOB_ID:-}" ] || return 0
    # compiled kernels go to a folder of this job on each node: a shared home is slow, and all ranks would write to it
    CACHES=$LOCAL_DIR/rlef-$UID-$SLURM_JOB_ID
    local name
    for name in TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR CUDA_CACHE_PATH FLASHINFER_WORKSPACE_BASE TORCH_EXTENSIONS_DIR \
        SGLANG_DG_CACHE_DIR DG_JIT_CACHE_DIR TVM_FFI_CACHE_DIR CUTE_DSL_CACHE_DIR; do
        export "$name=${!name:-$CACHES/$name}"
    done
}

clean_nodes() { # remove this job's caches from its nodes and, where pyxis keeps containers after a job, its container
    local role pids=() RUNNER=() STEP_FLAGS=() CONTAINER=""
    for role in "${!NODES[@]}"; do
        # shellcheck disable=SC2016 # expanded on the node
        (LOGS=$STATE step clean "$role" 1 bash -c 'rm -rf "$0"; ! command -v enroot || enroot remove -f "pyxis_rlef-$SLURM_JOB_ID"' "$CACHES") &
        pids+=($!)
    done
    (sleep 60 && kill "${pids[@]}") & # a dead node never answers
    wait "${pids[@]}"
    kill $!
} >/dev/null 2>&1

in_software() { # run a command; with CONTAINER, run it in the container or, before a job, with the login node's Python
    if [ -n "$CONTAINER" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        (options=() && become_srun 1 1 "$@")
    elif [ -n "$CONTAINER" ]; then
        shift
        "$LOGIN_PYTHON" "$@"
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

read_addresses() { # set ADDRESS of each node: where other nodes reach it, as the node checks found
    local node
    for node in $(printf "%s " "${NODES[@]}"); do
        read -r _ "ADDRESS[$node]" <"$LOGS/shared/$node" || die "no address of $node in $LOGS/shared"
    done
}

url_list() { # url_list ROLE PORT COUNT: print the TOML list of the role's servers, http://ADDRESS:PORT
    local node host urls=() n
    for node in ${NODES[$1]}; do
        host=${ADDRESS[$node]}
        [[ $host != *:* ]] || host="[$host]" # IPv6
        for ((n = 0; n < $3; n++)); do urls+=("\"http://$host:$(($2 + n))\""); done
    done
    local IFS=,
    echo "[${urls[*]}]"
}
