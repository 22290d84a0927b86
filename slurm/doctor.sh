#!/bin/bash
# Say what this cluster has, which settings slurm/site.sh lacks, and which command to run first. Changes nothing.
#
#   bash slurm/doctor.sh      on a login node, from the repository's root

ROOT=${RLEF_ROOT:-$PWD}
[ -f "$ROOT/slurm/site.sh" ] || { echo "start it from the repository's root, or set RLEF_ROOT"; exit 2; }
# shellcheck source=slurm/site.sh
. "$ROOT/slurm/site.sh"
MISSING=()
shopt -s extglob
has() { command -v "$1" >/dev/null; }
line() { printf '%-12s %s\n' "$@"; }

if ! has sinfo; then
    echo "no sinfo: this is no login node of a Slurm cluster, or its commands are not in PATH (module load slurm)"
    exit 2
fi
config=$(scontrol show config) || exit 2 # Slurm has said why
setting() { sed -n "s/^$1 *= *//p" <<<"$config"; }
line slurm "$(sinfo --version), cluster $(setting ClusterName)"
line limits "EnforcePartLimits=$(setting EnforcePartLimits), MaxArraySize=$(setting MaxArraySize), JobRequeue=$(setting JobRequeue)"
line tasks "$(setting TaskPlugin); $(setting ProctrackType); PropagateResourceLimits=$(setting PropagateResourceLimits)"
line GRES "$(setting GresTypes)"

echo
printf '%-18s %-8s %-12s %6s %6s  %s\n' partition state time nodes cores GRES
sinfo --noheader --format='%P %a %l %D %c %G' | while read -r name state limit nodes cores gres; do
    printf '%-18s %-8s %-12s %6s %6s  %s\n' "$name" "$state" "$limit" "$nodes" "$cores" "$gres"
done
with_gpus=$(sinfo --noheader --format='%R %G' | awk '/gpu/ { print $1 }' | sort -u | paste -sd' ')
default=$(sinfo --noheader --format=%P | sed -n 's/\*$//p')
echo
line "with GPUs" "${with_gpus:-no partition lists GPUs in its GRES}"
if [ -z "$PARTITION" ] && [[ " $with_gpus " != *" $default "* ]]; then
    MISSING+=("PARTITION: the default, '${default:-none}', has no GPUs; choose one of: ${with_gpus:-the list above}")
fi
if [ -z "$with_gpus" ] && [ -n "$GPU_REQUEST" ]; then
    MISSING+=("GPU_REQUEST: no partition offers GPUs as GRES; set it empty (GPU_REQUEST=) if whole nodes have them anyway")
fi
accounts=$(sacctmgr --noheader --parsable2 show associations user="$USER" format=account 2>/dev/null | sort -u | paste -sd' ')
line accounts "${accounts:-not known (no sacctmgr)}"
[ -n "$ACCOUNT" ] || [ "$(wc -w <<<"$accounts")" -lt 2 ] || MISSING+=("ACCOUNT: you have several; choose one of: $accounts")
reachable=$(srun --help 2>/dev/null | grep -q -- --container-image && echo pyxis; has apptainer && echo apptainer; has enroot && echo enroot)
line containers "${reachable//$'\n'/, }"
[ -z "$CONTAINER" ] || [[ "$reachable" = *$CONTAINER_RUNTIME* ]] || MISSING+=("CONTAINER_RUNTIME=$CONTAINER_RUNTIME is not installed here")
[ -z "$CONTAINER" ] || "$LOGIN_PYTHON" -c 'import pydantic, transformers' 2>/dev/null ||
    MISSING+=("LOGIN_PYTHON=$LOGIN_PYTHON cannot plan: it has no pydantic or transformers")
[ -n "$CONTAINER" ] || [ -x "$VENV/bin/python" ] || MISSING+=("VENV: there is no $VENV/bin/python; make setup, or set CONTAINER")

for folder in "$ROOT" "$HOME" "$LOCAL_DIR" "${SCRATCH:-}" "${WORK:-}"; do
    [ -d "$folder" ] || continue
    read -r kind size free < <(df --output=fstype,size,avail -BG "$folder" | tail -n 1) || continue
    line "$folder" "$kind, $free of $size free"
    [ "$folder" != "$ROOT" ] || [[ $kind = *(nfs*|lustre|gpfs|beegfs|weka*|ceph|fuse*|panfs|wekafs|daos) ]] ||
        MISSING+=("the repository is on $kind: move it to a file system that all nodes share, unless this one is")
done
line "open files" "soft $(ulimit -Sn), hard $(ulimit -Hn)"
set_by_hand=$(compgen -e | grep -E '^S(BATCH|LURM|RUN)_' | paste -sd' ')
[ -z "$set_by_hand" ] || line "exported" "$set_by_hand (ignored, except account, partition, QOS, reservation, constraint, clusters and wckey)"

echo
for line in "${MISSING[@]}"; do echo "slurm/site.sh  $line"; done
if [ ${#MISSING[@]} = 0 ]; then
    echo "Nothing is missing. First: rlef sft demo_base --set dir=runs/tiny-base --set steps=1, then bash slurm/train_tiny.sh"
else
    echo "Then: bash slurm/doctor.sh again"
fi
