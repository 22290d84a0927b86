"""Check that a node can take part in a run: `python -m rlef_mega.cluster.node_check` on each node,
before anything is started there. Prints one line per fault, with its remedy; exit code 2 if there
is any.

Theory of operation: srun starts one process on each node of the run. Each writes its own time into
a file of a shared folder and waits for the files of all others, which shows whether the folder is
shared and whose clock is wrong. All other checks concern the node alone. It imports only the
standard library, so that it starts at once, even where nothing else is installed.
"""

import argparse
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

GIB = 2**30
POLL_S = 0.1


def check_shared_folder(
    folder: Path, node: str, expected: list[str], *, began_s: float, skew_s: float, wait_s: float
) -> Iterator[str]:
    """Wait for the files of all nodes. `began_s` is the first node's clock when it started them."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{node}.{os.getpid()}.partial"  # a node may have two roles
    partial.write_text(repr(time.time()))
    partial.rename(folder / node)
    deadline = time.monotonic() + wait_s
    seen: dict[str, float] = {}
    while True:
        for other in expected:
            if other not in seen and (folder / other).exists():
                seen[other] = float((folder / other).read_text())
                ahead = seen[other] - time.time()
                if ahead > skew_s:
                    yield f"the clock of {other} is {ahead:.1f} s ahead of this one; start chrony"
        if len(seen) == len(expected) or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    behind = began_s - seen.get(node, began_s)
    if behind > skew_s:
        yield f"the clock is {behind:.1f} s behind that of the first node; start chrony"
    if missing := sorted(set(expected) - seen.keys()):
        yield (
            f"after {wait_s:.0f} s {folder} shows nothing from {', '.join(missing)}: either the "
            "nodes do not share this file system (set run.dir to a folder that they do), or those "
            "nodes did not start"
        )


def check_gpus(wanted: int) -> Iterator[str]:
    """Compare the GPUs that the driver shows to this step with the number that the run needs."""
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


def check_isolation(level: str) -> Iterator[str]:
    """Check the isolation layers that the sandbox requires."""
    if not level:
        return
    command = [sys.executable, "-P", "-m", "rlef_sandbox", "--isolation", level, "doctor"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if found.returncode:
        yield f"programs cannot be confined here: {found.stderr.strip()}"


def faults(asked: argparse.Namespace, node: str) -> Iterator[str]:
    yield from check_room(asked.folder, asked.disk_gib)
    yield from check_room(Path("/tmp"), asked.tmp_gib)
    yield from check_room(Path("/dev/shm"), asked.shm_gib)
    yield from check_gpus(asked.gpus)
    yield from check_ports(*asked.ports)
    yield from check_isolation(asked.isolation)
    yield from check_shared_folder(
        asked.folder,
        node,
        asked.nodes.split(","),
        began_s=asked.began,
        skew_s=asked.skew_s,
        wait_s=asked.wait_s,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rlef_mega.cluster.node_check", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="on the shared file system, new for each try")
    parser.add_argument("--nodes", required=True, help="all nodes of the run, comma-separated")
    parser.add_argument("--began", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--skew-s", type=float, default=5.0, help="largest difference of clocks")
    parser.add_argument("--wait-s", type=float, default=60.0, help="wait for the others")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--ports", type=int, nargs=2, default=(0, 0), metavar=("FIRST", "COUNT"))
    parser.add_argument("--disk-gib", type=float, default=0.0)
    parser.add_argument("--tmp-gib", type=float, default=0.0)
    parser.add_argument("--shm-gib", type=float, default=0.0)
    parser.add_argument("--isolation", default="", help="the sandbox's level; empty: none")
    asked = parser.parse_args()
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    found = list(faults(asked, node))
    for fault in found:
        print(f"{node}: {fault}", flush=True)
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
