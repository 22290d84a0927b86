"""A real Slurm of several nodes on this host: munged, slurmctld and a slurmd per node, each in a
UTS namespace of its own, so that `hostname` in a job is the node's name.

Theory of operation: everything lives in one folder, on ports of its own, so a Slurm that the host
has is not disturbed. `Cluster` starts the daemons, in the foreground, and ends exactly those; if it
is killed, the kernel kills them (PR_SET_PDEATHSIG). A node is killed as a machine is: its slurmd
and all that it has started get SIGKILL at once. Needs root, for the namespaces and /etc/hosts, and
Debian's slurm-wlm (22.05) or a newer one.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from rlef_mega.run.launch import die_with_parent

NODES = [f"rlef-n{number}" for number in range(5)]
CONTROLLER_PORT, FIRST_NODE_PORT = 16717, 16720
DAEMONS = ("munged", "slurmctld", "slurmd")
HOSTS = Path("/etc/hosts")


def why_not() -> str | None:
    """Return what this host lacks; None if a cluster can be started."""
    missing = [name for name in DAEMONS if not shutil.which(name, path="/usr/sbin:/usr/bin")]
    if missing:
        return f"no {', '.join(missing)}; `make test-slurm` installs them on Debian as root"
    return None if os.geteuid() == 0 else "several slurmd on one host need root"


def configuration(folder: Path) -> str:
    """Return slurm.conf. Without cred_expire a requeued job would wait for two minutes. Preemption
    requeues a job after a grace time."""
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={FIRST_NODE_PORT + number} "
        "CPUs=4 RealMemory=4096 State=UNKNOWN"
        for number, node in enumerate(NODES)
    )
    return f"""
ClusterName=rlef
SlurmctldHost={socket.gethostname().partition(".")[0]}(127.0.0.1)
SlurmctldPort={CONTROLLER_PORT}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
KillWait=5
CompleteWait=0
JobRequeue=1
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


def stepds_above(process: psutil.Process) -> list[psutil.Process]:
    return [parent for parent in process.parents() if parent.name() == "slurmstepd"]


class Cluster:
    """A Slurm cluster on this host, in a folder of its own; a context manager."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rlef-slurm-"))
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        lines = HOSTS.read_text().splitlines(keepends=True)
        self.hosts = "".join(line for line in lines if line.split()[1:] not in [[n] for n in NODES])
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        for name in ("state", "run", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(configuration(self.folder))
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        HOSTS.write_text(self.hosts + "".join(f"127.0.0.1 {node}\n" for node in NODES))
        self.folder.chmod(0o755)  # as munged wants it
        munged = {"key-file": "munge.key", "socket": "munge.socket", "seed-file": "munge.seed"}
        munged |= {"pid-file": "run/munged.pid"}
        options = [f"--{name}={self.folder / file}" for name, file in munged.items()]
        try:
            self.start("munged", "/usr/sbin/munged", "--foreground", "--force", *options)
            self.wait_for(lambda: (self.folder / "munge.socket").exists(), 30)
            self.start("slurmctld", "/usr/sbin/slurmctld", "-c", "-D")
            for node in NODES:
                self.start_node(node)
            self.wait_for(lambda: self.idle_nodes() == len(NODES), 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=root")
        for node in NODES:
            self.kill_node(node)
        for name in ("slurmctld", "munged"):
            if name in self.daemons:
                self.daemons[name].terminate()
                self.daemons[name].wait(20)
        HOSTS.write_text(self.hosts)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *words: str, **settings: str) -> str:
        """Run a command of Slurm's. Returns its output. Raises CalledProcessError if it fails."""
        done = subprocess.run(
            words,
            env={**self.environment, **settings},
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            error = subprocess.CalledProcessError(
                done.returncode, list(words), done.stdout, done.stderr
            )
            error.add_note(done.stderr)
            raise error
        return done.stdout

    def start(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                words,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent,
            )

    def start_node(self, node: str) -> None:
        daemon = f"hostname {node}; exec /usr/sbin/slurmd -D -N {node}"
        self.start(node, "unshare", "--uts", "bash", "-c", daemon)

    def kill_node(self, node: str) -> None:
        """Kill a node as a power failure would: the processes with its name in their environment,
        the slurmstepd processes above them, and its daemon."""
        if node not in self.daemons:
            return
        daemon = self.daemons.pop(node)
        ours = self.environment["SLURM_CONF"]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                its = process.environ()
                if its.get("SLURMD_NODENAME") == node and its.get("SLURM_CONF") == ours:
                    for one in (process, *stepds_above(process)):
                        one.kill()
        daemon.kill()
        daemon.wait()

    def idle_nodes(self) -> int:
        listing = self.run("sinfo", "-h", "-N", "-t", "idle", "-p", "low", "-o", "%N")
        return len(set(listing.split()))

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """Return a field of a job; of a het job, that of its first component."""
        shown = self.run("scontrol", "show", "job", job)
        found = [word.partition("=")[2] for word in shown.split() if word.startswith(name + "=")]
        return found[0]

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the condition never held"
            time.sleep(0.2)
