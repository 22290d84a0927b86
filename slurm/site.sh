# shellcheck shell=bash disable=SC2034
# Settings of this cluster, for all jobs. Edit them once; the environment overrides them.

PARTITION=${PARTITION:-}          # partition of training and sampling nodes; empty: Slurm's default
CPU_PARTITION=${CPU_PARTITION:-}  # partition of grading nodes, in a het job; empty: Slurm's default
ACCOUNT=${ACCOUNT:-}              # account to charge; empty: Slurm's default

GPU_MODEL=${GPU_MODEL:-}          # GPU whose memory `rlef plan` checks: h100-80gb, h200, b200, a100-80gb; empty: h100-80gb

VENV=${VENV:-$ROOT/.venv}         # environment with rlef-mega, on a file system that all nodes share
CONTAINER=${CONTAINER:-}          # image with rlef-mega, instead of VENV; empty: no container
CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-pyxis} # runtime of the image: pyxis (srun's plugin) or apptainer
MOUNTS=${MOUNTS:-$ROOT:$ROOT}     # mounts of the container, in the runtime's syntax; include data and models

PORT=${PORT:-}                    # first of 10 ports on each node, followed by SGLang's; empty: derived from the job's number
DISK_GIB=${DISK_GIB:-200}         # free space that a run needs in its folder,
TMP_GIB=${TMP_GIB:-5}             # in /tmp,
SHM_GIB=${SHM_GIB:-8}             # and in /dev/shm, on each node
CLOCK_SKEW_S=${CLOCK_SKEW_S:-5}   # largest difference of the nodes' clocks
SHARED_WAIT_S=${SHARED_WAIT_S:-60} # time within which all nodes must see a file that one wrote

# Network settings. NCCL finds most of them; these are usually set by hand.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
