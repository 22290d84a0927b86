"""Launch ranks on one node, run our own commands, and wrap the main function of every rank.

Theory of operation: `rlef` validates the recipe, writes the run directory, and starts all ranks
through torchrun's agent, which runs in a session of its own. SIGINT, SIGTERM and SIGUSR1 (Slurm
sends it before a time limit) make `rlef` create the file `stop`; the ranks see it at the end of
their step, save, and exit. A second Ctrl-C kills them at once. The agent ignores these signals,
because Slurm sends them to every process of a job step; ranks treat them like the file. If `rlef`
dies, even by SIGKILL, the kernel kills the agent and with it the ranks (PR_SET_PDEATHSIG), so no
orphan keeps writing. Under Slurm, srun starts the worker modules directly, without `launch`.
SIGUSR2 makes a rank write the stacks of all its threads, even while it waits in a collective.
"""

import contextlib
import ctypes
import errno
import faulthandler
import gc
import io
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any

from rlef_mega.config import ConfigError, ParallelConfig
from rlef_mega.run.addresses import address_towards, addresses_of, interface_with
from rlef_mega.run.directory import DISK_IS_FULL, PHASE, explain_error

# Python that imports nothing from the working directory: a file there may be named like a module.
PYTHON = (sys.executable, "-P")
RLEF = (*PYTHON, "-m", "rlef_mega.cli")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOPPED = 3  # exit code of a run that was asked to stop; the same command resumes it
FAILED = 2  # exit code of a run that ended with an error message
FAILURE_MARK = ".failed"  # in the run directory
STEPS_PER_COLLECTION = 50
PR_SET_PDEATHSIG = 1
SHARD = (
    "Set learner.offload = 'idle', or split the networks over more ranks "
    "(parallel.tensor_model_parallel_size, pipeline_model_parallel_size, data_parallel_size)"
)
ACTIVATIONS = f"Lower learner.microbatch_tokens, or set model.recompute = 'full'. {SHARD}"
SAMPLING = f"Lower rollout.max_context, or sample from servers (rollout.engine = 'sglang'). {SHARD}"
# what to change, by phase of a step; the run then resumes from its newest checkpoint
MEMORY_REMEDIES = {
    "rollout": SAMPLING,
    "score": ACTIVATIONS,
    "update": ACTIVATIONS,
    "evaluate": SAMPLING,
}
OUTPUT_IS_GONE = (errno.EPIPE, errno.EIO, *DISK_IS_FULL)  # no reader, no terminal, no space


def sandbox_token() -> str | None:
    """Return the token for grading servers, from the environment so that no file stores it."""
    return os.environ.get("RLEF_SANDBOX_TOKEN") or None


class StopRequest:
    """A request to finish the step, save and exit: SIGINT, SIGTERM, SIGUSR1 or the file `stop`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.signalled = False
        for number in STOP_SIGNALS:
            signal.signal(number, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True

    def requested(self) -> bool:
        return self.signalled or self.file.exists()

    def obeyed(self, *, writer: bool) -> int:
        """Remove the file, which would also stop the resumed run. Returns the exit code."""
        if writer:
            self.file.unlink(missing_ok=True)
        return STOPPED


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Output(io.FileIO):
    """An output file that discards what cannot be written, instead of raising an error."""

    def write(self, text: Any) -> int:
        try:
            return super().write(text) or 0
        except OSError as error:
            if error.errno not in OUTPUT_IS_GONE:
                raise
            return len(text)


def outlive_output() -> None:
    """Ignore errors of printing: a run continues when `tee` ends or the disk of its log is full."""
    for name, stream in (("stdout", sys.__stdout__), ("stderr", sys.__stderr__)):
        if stream is not None and getattr(sys, name) is stream:
            output: Any = Output(stream.fileno(), "w", closefd=False)
            text = io.TextIOWrapper(output, stream.encoding, stream.errors, write_through=True)
            setattr(sys, name, text)


def launch(module: str, run_dir: Path, *layouts: ParallelConfig, uses_ipc: bool = False) -> int:
    """Run `python -m module run_dir` as the ranks of these layouts, on this machine. `uses_ipc`:
    other processes will map the ranks' GPU memory.

    Returns the exit code of the first rank that failed, else 0. Raises ConfigError if there are
    GPUs but fewer than ranks.
    """
    processes = sum(layout.world_size for layout in layouts)
    check_gpu_count(processes, layouts[0])
    outlive_output()
    stop_file = run_dir / "stop"
    for left_behind in (stop_file, run_dir / FAILURE_MARK):
        left_behind.unlink(missing_ok=True)
    environment = {**gpu_settings(uses_ipc), **os.environ, "PYTHONUNBUFFERED": "1"}
    if os.environ.get("OMP_NUM_THREADS", "0").strip() in ("", "0"):
        # more threads than cores cost time
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
    print(f"starting {processes} ranks of {module} in {run_dir}", flush=True)
    # an agent (`run_agent`) starts the ranks
    command = [*PYTHON, "-m", "rlef_mega.run.launch", str(processes), module, str(run_dir)]
    child = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=die_with_parent
    )

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if stop_file.exists():
            if number == signal.SIGINT:  # the second one: do not wait for the step
                child.kill()
        else:
            print("\nstopping: the current step is finished and saved first", flush=True)
            stop_file.touch()

    before = {number: signal.signal(number, ask_to_stop) for number in STOP_SIGNALS}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop_file.unlink(missing_ok=True)


def check_gpu_count(processes: int, layout: ParallelConfig) -> None:
    """Raise ConfigError if this machine has GPUs, but not one for each rank. `layout` is the
    policy's, for the remedy."""
    import torch  # here, because commands that start no ranks do without it

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else processes
    if processes <= gpus:
        return
    sets, left = [], gpus
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size"):
        size = getattr(layout, key)
        most = max(n for n in range(1, size + 1) if size % n == 0 and n <= left)
        left //= most
        if most != size:
            sets.append(f"--set parallel.{key}={most}")
    remedies = [f"add {' '.join(sets)}"] if sets else []
    if layout.world_size != processes:
        remedies.append("remove [critic_parallel]")
    raise ConfigError(
        f"the layout has {processes} ranks, which need a GPU each, and PyTorch finds {gpus} here: "
        f"{' and '.join(remedies)}, or set CUDA_VISIBLE_DEVICES= to compute on the CPU"
    )


def gpu_settings(uses_ipc: bool) -> dict[str, str]:
    """Return environment variables that CUDA and PyTorch read when a rank starts to use a GPU.

    Megatron's overlapped communication needs kernels to start in launch order. Expandable segments
    fragment memory less, but on some systems other processes cannot map them.
    """
    settings = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if not uses_ipc and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        settings["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return settings


def run_agent(processes: int, module: str, *arguments: str) -> int:
    """Run torchrun's agent, without its report on exit codes that we define."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    die_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",  # not this machine's name, which may resolve to another machine
        run_id=f"rlef-{os.getpid()}",
        max_restarts=0,
        monitor_interval=0.2,
        # signals that end all ranks; how long to wait for the other ranks after one has failed
        **known_options(LaunchConfig, signals_to_handle="SIGHUP,SIGQUIT", shutdown_timeout=2),
    )
    try:
        elastic_launch(settings, sys.executable)(*PYTHON[1:], "-m", module, *arguments)
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0


def known_options(config: Any, **options: object) -> dict[str, Any]:
    """Return those of the options that this version of torch's `config` has."""
    return {name: value for name, value in options.items() if name in config.__dataclass_fields__}


def worker_main(work: Callable[[Path], int]) -> None:
    """Run the main function of a rank. A user error is printed as one message, by the rank that
    failed first; the exit code is the work's, or FAILED."""
    die_with_parent()
    outlive_output()
    take_rank_from_slurm()
    dump_stacks_when_asked()
    collect_garbage_by_hand()
    run_dir = Path(sys.argv[1])
    try:
        code = work(run_dir)
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        if os.environ.get("RLEF_TRACEBACK"):
            raise
        if fails_first(run_dir / FAILURE_MARK, error):
            rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
            where = "" if rank == "0" else f" on rank {rank}"
            hint = "(RLEF_TRACEBACK=1 shows where)"
            message = explain_memory(error, rank) or explain_error(error)
            print(f"error{where}: {message}\n{hint}", file=sys.stderr, flush=True)
        code = FAILED
    sys.stdout.flush()
    os._exit(code)  # not through destructors of process groups whose peers may be gone


def explain_memory(error: Exception, rank: str) -> str | None:
    """Return the phase and rank in which a GPU's memory was full, and what to change; None for
    another error."""
    import torch

    if not isinstance(error, torch.OutOfMemoryError):
        return None
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(PHASE)]
    phase = notes[-1].removeprefix(PHASE) if notes else "start"  # the outermost
    message = str(error).partition(" If reserved but")[0]
    return f"rank {rank}, phase {phase}: {message} {MEMORY_REMEDIES.get(phase, SHARD)}"


def collect_garbage_by_hand() -> None:
    """Switch automatic garbage collection off; `collect_garbage` runs at the end of a step instead.

    A collection of even the youngest objects, among them tens of thousands of log-probs, stops
    every thread for about 0.1 s, rollouts included. Almost none of our objects form cycles.
    """
    gc.collect()
    gc.freeze()  # later collections skip what imports have created
    gc.disable()


def collect_garbage(step: int) -> None:
    """Collect garbage every STEPS_PER_COLLECTION steps."""
    if step % STEPS_PER_COLLECTION == 0:
        gc.collect()


def return_freed_memory() -> None:
    """Return freed host memory to the system; otherwise glibc may keep gigabytes after a step."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def take_rank_from_slurm() -> None:
    """Set torch.distributed's variables from Slurm's in a rank that srun started.

    The caller of srun sets MASTER_ADDR and MASTER_PORT. Under torchrun, and in a process that the
    batch script starts without srun, nothing changes.
    """
    names = {
        "RANK": "SLURM_PROCID",
        "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
        "LOCAL_RANK": "SLURM_LOCALID",
    }
    if "RANK" not in os.environ and "MASTER_ADDR" in os.environ:
        os.environ |= {ours: os.environ[its] for ours, its in names.items() if its in os.environ}
        choose_interface(os.environ["MASTER_ADDR"])


def choose_interface(master: str) -> None:
    """Make gloo use the interface on the route to rank 0 if this node's name resolves to a loopback
    address (Debian's 127.0.1.1), on which gloo would listen otherwise."""
    if "GLOO_SOCKET_IFNAME" in os.environ or not any(
        ip_address(found).is_loopback for found in addresses_of(socket.gethostname())
    ):
        return
    with contextlib.suppress(OSError):
        address = address_towards(master)
        if not ip_address(address).is_loopback and (name := interface_with(address)):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def dump_stacks_when_asked() -> None:
    """Make SIGUSR2 write the stacks of all threads to RLEF_STACKS/rank_N.txt, or to stderr without
    that variable. faulthandler does it in C, so it works while Python waits in a library."""
    file = sys.stderr
    if folder := os.environ.get("RLEF_STACKS"):
        path = Path(folder, f"rank_{os.environ.get('RANK', '0')}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")  # until the process ends
    faulthandler.register(signal.SIGUSR2, file)


def fails_first(mark: Path, error: Exception) -> bool:
    """Return whether this rank is the first of its launch to fail: the first creates the file
    `mark`, with the error's type. Other ranks fail for the same reason or because of it, and print
    nothing. The launcher removes the mark before it starts ranks."""
    try:
        with mark.open("x", encoding="utf-8") as file:
            file.write(type(error).__name__)
    except OSError as fault:  # of a full disk, for example: better each rank's message than none
        return not isinstance(fault, FileExistsError)
    return True


def say(message: str) -> None:
    print(f"\n== {message}", flush=True)


def stage(title: str, *command: str) -> None:
    """Run an `rlef` command in a process of its own, with its output shown.

    Raises SystemExit with its exit code if it fails.
    """
    say(f"{title}:  rlef {' '.join(command)}")
    child = subprocess.Popen([*RLEF, *command], preexec_fn=die_with_parent)
    code = None
    while code is None:
        with contextlib.suppress(KeyboardInterrupt):  # the command got it too, and exits by itself
            code = child.wait()
    if code == STOPPED:
        print("run the same command again to resume", flush=True)
    if code:
        sys.exit(code)


def rlef(*words: str) -> None:
    """Run an `rlef` command in a process of its own, silently.

    Raises RuntimeError with the end of its output if it fails.
    """
    ended = subprocess.run([*RLEF, *words], capture_output=True, text=True)
    if ended.returncode:
        printed = "\n".join((ended.stdout + ended.stderr).splitlines()[-20:])
        raise RuntimeError(f"rlef {' '.join(words)} ended with {ended.returncode}:\n{printed}")


if __name__ == "__main__":
    sys.exit(run_agent(int(sys.argv[1]), *sys.argv[2:]))
