# shellcheck shell=bash disable=SC2034
# What is the same for all jobs of this cluster. Edit it once; the environment overrides it.

PARTITION=${PARTITION:-}          # of the nodes that train and generate; empty: Slurm's default
CPU_PARTITION=${CPU_PARTITION:-}  # of the nodes that grade, in a het job; empty: Slurm's default
ACCOUNT=${ACCOUNT:-}              # whom the hours are counted for; empty: Slurm's default

GPU_MODEL=${GPU_MODEL:-}          # whose memory the plan counts with: h100-80gb, h200, b200, a100-80gb; empty: h100-80gb

VENV=${VENV:-$ROOT/.venv}         # where rlef-mega is installed, on a file system that all nodes share
CONTAINER=${CONTAINER:-}          # an image that has it, instead of VENV; empty: no container
CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-pyxis} # what runs the image: pyxis (srun's plugin) or apptainer
MOUNTS=${MOUNTS:-$ROOT:$ROOT}     # what the container sees, as pyxis and apptainer write it; with data and models

PORT=${PORT:-}                    # first of 10 ports of each node, then those of SGLang; empty: from the job's number
DISK_GIB=${DISK_GIB:-200}         # free space that a run wants in its folder,
TMP_GIB=${TMP_GIB:-5}             # in /tmp,
SHM_GIB=${SHM_GIB:-8}             # and in /dev/shm, on each node
CLOCK_SKEW_S=${CLOCK_SKEW_S:-5}   # by how much the nodes' clocks may differ
SHARED_WAIT_S=${SHARED_WAIT_S:-60} # until a file of one node is seen by all others

# What the network wants. NCCL finds most of it; these are the usual ones to set.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
