# shellcheck shell=bash disable=SC2034
# Settings of a run that neither its script nor the environment has set. slurm/site.sh has those of the cluster.
#
#   bash slurm/train_8b.sh             check that it can run, and submit it; CHAIN=5 submits five jobs
#   DRY_RUN=1 bash slurm/train_8b.sh   print the plan, submit nothing
#   sbatch slurm/train_8b.sh           submit it without the checks
#
# Each script sets RECIPE, a TOML file or a recipe's name, whose layout gives the number of training nodes; SETS, words
# section.key=value that are added to it; and JOB_NAME: jobs of one name run one after another, each resuming the run.

ROLLOUT_NODES=${ROLLOUT_NODES:-0}        # nodes that sample with SGLang; 0: the training nodes sample, with the recipe's engine
SANDBOX_NODES=${SANDBOX_NODES:-0}        # nodes that only grade; 0: the sampling nodes grade too, or the training nodes
GPUS_PER_NODE=${GPUS_PER_NODE:-8}        # 0: no GPUs
HET=${HET:-0}                            # 1: a het job, one component per role; 0: one allocation

TIME=${TIME:-2-00:00:00}                 # time limit of a job
GRACE_S=${GRACE_S:-900}                  # seconds before the limit to finish the step and save; must suffice for both
CHAIN=${CHAIN:-1}                        # jobs that `bash` submits, to run one after another; they end at once when the run is finished

MAX_FAILURES=${MAX_FAILURES:-3}          # attempts from the same checkpoint before the run is given up
RESTART_WAIT_S=${RESTART_WAIT_S:-10}     # wait between attempts of a job
HANG_S=${HANG_S:-3600}                   # the ranks count as hung if no phase (rollout, update, evaluation) begins or ends for this long
START_S=${START_S:-3600}                 # deadline for the ranks to load the model or a checkpoint
SANDBOX_READY_S=${SANDBOX_READY_S:-120}  # deadline for the grading servers to start
SERVERS_READY_S=${SERVERS_READY_S:-1800} # deadline for the SGLang servers to load the model
ALLREDUCE_GBPS=${ALLREDUCE_GBPS:-10}     # smallest bus bandwidth over all training ranks; 0: do not measure
NETWORK_S=${NETWORK_S:-300}              # deadline for that measurement
