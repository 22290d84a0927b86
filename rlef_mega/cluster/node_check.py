"""Check that a node can take part in a run: `python -m rlef_mega.cluster.node_check` on each node,
before anything is started there. Prints one line per fault, with its remedy; exit code 2 if there
is any.

Theory of operation: srun starts one process on each node of the run. Each writes its own time, and
the address that others reach it at, into a file of a shared folder, and waits until the files of
all others are there. Each lists the folder only once a second, because hundreds of nodes do so. The
first node reads the files, to see whose clock is ahead; a node whose own clock is behind sees it by
`--began`. The launcher reads the addresses. All other checks concern the node alone. This module
needs only the standard library, so that it starts at once, even where nothing else is installed.
"""

import argparse
import ctypes
import errno
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rlef_mega.run.addresses import reached_at

GIB = 2**30
POLL_S = 1.0
FALLOC_FL_KEEP_SIZE = 1


def check_shared_folder(
    folder: Path,
    node: str,
    expected: list[str],
    *,
    began_s: float,
    skew_s: float,
    wait_s: float,
    address: str = "",
) -> Iterator[str]:
    """Write this node's file and wait `wait_s` for those of the `expected` nodes; yield a fault for
    nodes that are missing, and for clocks that differ by more than `skew_s`. `began_s` is the first
    node's clock when it started the checks."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{node}.{os.getpid()}.partial"  # a node may have two roles
    mine_s = time.time()
    partial.write_text(f"{mine_s!r} {address or node}\n")
    partial.rename(folder / node)
    deadline = time.monotonic() + wait_s
    missing, read = set(expected), set[str]()
    while True:
        missing -= {entry.name for entry in os.scandir(folder)}
        for other in set(expected) - missing - read if node == expected[0] else ():
            read.add(other)
            ahead = float((folder / other).read_text().split()[0]) - time.time()
            if ahead > skew_s:
                yield f"the clock of {other} is {ahead:.1f} s ahead of this one; start chrony"
        left_s = deadline - time.monotonic()
        if not missing or left_s <= 0:
            break
        time.sleep(min(POLL_S, left_s))
    behind = began_s - mine_s
    if behind > skew_s:
        yield f"the clock is {behind:.1f} s behind that of the first node; start chrony"
    if missing:
        yield (
            f"after {wait_s:.0f} s {folder} shows nothing from {', '.join(sorted(missing))}: "
            "either the nodes do not share this file system (set run.dir to a folder that all of "
            "them share), or those nodes did not start"
        )


def check_gpus(wanted: int) -> Iterator[str]:
    """Yield a fault if the driver shows this Slurm step fewer GPUs than the run needs."""
    if not wanted:
        return
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        yield f"{wanted} GPUs are needed, but nvidia-smi -L fails ({error}); drain this node"
        return
    found = sum(line.startswith("GPU ") for line in listing.splitlines())
    given = os.environ.get("SLURM_GPUS_ON_NODE", "no count")
    if found < wanted:
        yield (
            f"{wanted} GPUs are needed, the driver shows {found} and Slurm gave {given}; ask for "
            "more with --gpus-per-node, or drain this node if it has lost some"
        )


def check_ports(first: int, count: int) -> Iterator[str]:
    """Yield a fault for each of these ports on which something listens."""
    for port in range(first, first + count):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                yield (
                    f"port {port} is taken ({error.strerror}); end what listens there (ss -ltnp), "
                    "or set PORT to another one"
                )


def check_room(folder: Path, wanted_gib: float) -> Iterator[str]:
    """Yield a fault if the folder's file system has less than `wanted_gib` free."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_gib = shutil.disk_usage(existing).free / GIB
    if free_gib < wanted_gib:
        listed = ""
        if str(folder) == "/dev/shm":
            mine = [path.name for path in folder.iterdir() if path.stat().st_uid == os.getuid()]
            listed = f"; your files there: {', '.join(sorted(mine)[:5]) or 'none'}"
        yield (
            f"{folder} has {free_gib:.1f} GiB free, {wanted_gib:g} are needed; "
            f"remove what earlier runs left there{listed}"
        )


def check_quota(folder: Path, wanted_gib: float) -> Iterator[str]:
    """Yield a fault if a quota refuses to reserve `wanted_gib`, even where the disk has room. A
    file system that cannot reserve space passes."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with tempfile.TemporaryFile(dir=existing) as file:
        size = ctypes.c_long(int(wanted_gib * GIB))
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.fallocate(file.fileno(), FALLOC_FL_KEEP_SIZE, ctypes.c_long(0), size)
        if failed and ctypes.get_errno() == errno.EDQUOT:
            yield (
                f"{folder}: your quota leaves less than {wanted_gib:g} GiB; remove files, have it "
                "raised, or lower run.keep_checkpoints"
            )


def check_limits(connections: int) -> Iterator[str]:
    """Yield a fault if processes that srun starts here may open too few files (rank 0 has a
    connection from each rank), or would write core files."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < connections:
        yield (
            f"processes may open {files} files, {connections} are needed; raise LimitNOFILE of "
            "slurmd, or `nofile` in /etc/security/limits.conf"
        )
    if resource.getrlimit(resource.RLIMIT_CORE)[0]:
        yield "a crash would write core files (ulimit -c); allow srun's --propagate=CORE"


def check_caches(folder: str) -> Iterator[str]:
    """Make the job's folder for compiled kernels; yield a fault if others can write to it."""
    if not folder:
        return
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        found = os.stat(folder)
    except OSError as error:
        yield f"{folder} cannot be made ({error.strerror}); set LOCAL_DIR to a folder of this node"
        return
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        yield f"{folder} is writable to others; remove it, or set LOCAL_DIR to another folder"


def check_isolation(level: str) -> Iterator[str]:
    """Yield a fault if this node lacks an isolation layer that the sandbox requires at `level`."""
    if not level:
        return
    command = [sys.executable, "-P", "-m", "rlef_sandbox", "--isolation", level, "doctor"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if found.returncode:
        yield f"programs cannot be confined here: {found.stderr.strip()}"


def faults(asked: argparse.Namespace, node: str) -> Iterator[str]:
    """Yield all faults of this node; the check that waits for other nodes comes last."""
    if os.environ.get("SLURM_PROCID", "0") == "0":  # the nodes share it
        yield from check_room(asked.folder, asked.disk_gib)
        yield from check_quota(asked.folder, asked.disk_gib)
    yield from check_room(Path("/tmp"), asked.tmp_gib)
    yield from check_room(Path("/dev/shm"), asked.shm_gib)
    yield from check_gpus(asked.gpus)
    yield from check_ports(*asked.ports)
    yield from check_limits(asked.connections)
    yield from check_caches(asked.caches)
    yield from check_isolation(asked.isolation)
    nodes, address = asked.nodes.split(","), node
    try:
        address = reached_at(node, nodes, asked.interface)
    except OSError as error:
        yield f"no address: {error}; set INTERFACE to one that all nodes have (ip -brief address)"
    yield from check_shared_folder(
        asked.folder,
        node,
        nodes,
        began_s=asked.began,
        skew_s=asked.skew_s,
        wait_s=asked.wait_s,
        address=address,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rlef_mega.cluster.node_check", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="on the shared file system, new for each try")
    parser.add_argument("--nodes", required=True, help="all nodes of the run, comma-separated")
    parser.add_argument("--began", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--skew-s", type=float, default=5.0, help="largest difference of clocks")
    parser.add_argument("--wait-s", type=float, default=150.0, help="wait for the others")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--ports", type=int, nargs=2, default=(0, 0), metavar=("FIRST", "COUNT"))
    parser.add_argument("--disk-gib", type=float, default=0.0)
    parser.add_argument("--tmp-gib", type=float, default=0.0)
    parser.add_argument("--shm-gib", type=float, default=0.0)
    parser.add_argument("--isolation", default="", help="the sandbox's level; empty: none")
    parser.add_argument("--interface", default="", help="network interface; empty: by the route")
    parser.add_argument("--caches", default="", help="folder for compiled kernels, made here")
    parser.add_argument("--connections", type=int, default=0, help="that a process must accept")
    asked = parser.parse_args()
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    found = list(faults(asked, node))
    for fault in found:
        print(f"{node}: {fault}", flush=True)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
