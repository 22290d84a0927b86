# shellcheck shell=bash disable=SC2034
# Settings of this cluster, for all jobs. Edit them once; the environment overrides them. `bash slurm/doctor.sh` says what
# this cluster has.

PARTITION=${PARTITION:-${SBATCH_PARTITION:-}} # partition of training and sampling nodes; empty: Slurm's default
CPU_PARTITION=${CPU_PARTITION:-}              # partition of grading nodes, in a het job; empty: Slurm's default
ACCOUNT=${ACCOUNT:-${SBATCH_ACCOUNT:-}}       # account to charge; empty: Slurm's default
SUBMIT_OPTIONS=${SUBMIT_OPTIONS:-}            # more options of sbatch, like --qos=long --constraint=h100

GPU_REQUEST=${GPU_REQUEST---gpus-per-node=%n} # option of sbatch that requests %n GPUs per node, like --gres=gpu:h100:%n;
                                              # empty: no request, for whole nodes whose GPUs are not GRES
GPU_MODEL=${GPU_MODEL:-}          # GPU whose memory `rlef plan` checks: h100-80gb, h200, b200, a100-80gb; empty: h100-80gb

VENV=${VENV:-$ROOT/.venv}         # environment with rlef-mega, on a file system that all nodes share
VENV_ARCHIVE=${VENV_ARCHIVE:-}    # archive of VENV (slurm/lib/stage.sh), unpacked on each node's disk at the start of a job; empty: none
CONTAINER=${CONTAINER:-}          # image with rlef-mega, instead of VENV: a file (.sqsh, .sif) on a shared file system; empty: none
CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-pyxis} # runtime of the image: pyxis (srun's plugin) or apptainer
MOUNTS=${MOUNTS:-$ROOT:$ROOT}     # mounts of the container, in the runtime's syntax; include data and models
LOGIN_PYTHON=${LOGIN_PYTHON:-python3} # with CONTAINER: Python with rlef-mega's base requirements that plans on the login node

LOCAL_DIR=${LOCAL_DIR:-/tmp}      # folder on each node's own disk, for compiled kernels; removed after the job
INTERFACE=${INTERFACE:-}          # network interface of all nodes, like ib0; empty: the one on the route between them
MASTER_ADDR=${MASTER_ADDR:-}      # address of the first training node; empty: found by the node checks
PORT=${PORT:-}                    # first of 10 ports on each node, followed by SGLang's; empty: derived from the job's number

DISK_GIB=${DISK_GIB:-}            # space that a run needs in its folder, including what it already uses; empty: from the recipe's checkpoints
TMP_GIB=${TMP_GIB:-5}             # free space that each node needs in /tmp
SHM_GIB=${SHM_GIB:-8}             # free space that each node needs in /dev/shm
CLOCK_SKEW_S=${CLOCK_SKEW_S:-5}   # largest difference of the nodes' clocks
SHARED_WAIT_S=${SHARED_WAIT_S:-150} # time within which all nodes must see a file that one wrote; NFS hides new files up to 60 s

# Other network settings. NCCL finds most of them; these are usually set by hand.
# export NCCL_IB_HCA=mlx5

export RLEF_CACHE=${RLEF_CACHE:-} # folder for prepared data sets, shared by runs; empty: in each run's folder
[ -z "$INTERFACE" ] || export NCCL_SOCKET_IFNAME="$INTERFACE" GLOO_SOCKET_IFNAME="$INTERFACE"
