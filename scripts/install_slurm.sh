#!/bin/sh
# Install Slurm for tests/slurm, if this is Debian and we are root. Without Slurm, these tests skip and say why.
set -eu
if command -v slurmctld >/dev/null && command -v munged >/dev/null; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "no Slurm, and not root on Debian: install slurm-wlm and munge for these tests"
    exit 0
fi
# their daemons are not started: the tests start their own
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge shellcheck >/dev/null ||
    echo "Slurm could not be installed: the tests skip"
