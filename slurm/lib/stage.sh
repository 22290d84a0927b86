#!/bin/bash
# Copy an environment to each node's own disk. 1,024 ranks that import it from a shared file system look up tens of
# millions of names there at each start; an archive is read once per node.
#
#   bash slurm/lib/stage.sh pack .venv venv.tar    on the login node, again after each change; then set VENV_ARCHIVE=venv.tar
#   bash slurm/lib/stage.sh unpack venv.tar DIR    on each node: jobs do this themselves
#
# The Python that the environment was made from stays where it is.
set -euo pipefail
[ $# = 3 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
case $1 in
    pack)
        [ -x "$2/bin/python" ] || { echo "there is no $2/bin/python; name a virtual environment"; exit 2; }
        tar -cf "$3.partial" -C "$2" .
        mv "$3.partial" "$3"
        ;;
    unpack)
        [ ! -x "$3/bin/python" ] || exit 0
        umask 077
        mkdir -p "$3"
        [ -O "$3" ] || { echo "$3 belongs to another user; set LOCAL_DIR to another folder"; exit 2; }
        part=$(mktemp -d "$3.XXXXXX")
        tar -xf "$2" -C "$part"
        # a step of another role on this node may have been faster
        mv -T "$part" "$3" 2>/dev/null || rm -rf "$part"
        [ -x "$3/bin/python" ] || { echo "cannot move the environment to $3; remove what is there"; exit 2; }
        ;;
    *) exit 2 ;;
esac
