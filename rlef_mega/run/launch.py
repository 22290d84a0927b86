"""Launching ranks on one node, and what every worker process does around its work.

Theory of operation: `rlef` validates everything it can, writes the run directory, and starts one
process group for the ranks through torchrun's own agent, in a session of its own. A Ctrl-C,
SIGTERM or SIGUSR1 (which Slurm sends before a time limit) leaves a file `stop`, which the ranks see
at the end of their step; a second Ctrl-C does not wait. The agent ignores these signals, because
Slurm sends them to every process of a step, and ranks that get them do as the file asks. If `rlef`
dies, even by SIGKILL, the kernel kills the agent, and with it the ranks
(PR_SET_PDEATHSIG), so that no orphan goes on writing. Under Slurm, srun starts the worker modules
directly and none of this file but `worker_main` and `StopRequest` is used. SIGUSR2 makes a rank
write the stacks of all its threads, also where it waits in a collective for ever.
"""

import ctypes
import faulthandler
import gc
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOPPED = 3  # exit code of a run that was asked to stop; the same command goes on with it
FAILED = 2  # exit code of a run that ended with a message
STEPS_A_COLLECTION = 50
PR_SET_PDEATHSIG = 1


def sandbox_token() -> str | None:
    """What grading servers are shown; out of the environment, so that no run directory holds it."""
    return os.environ.get("RLEF_SANDBOX_TOKEN") or None


class StopRequest:
    """SIGINT, SIGTERM, SIGUSR1 or the file `stop`: finish the step, save, end."""

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
        """The exit code; the file is removed, or it would stop the run that goes on."""
        if writer:
            self.file.unlink(missing_ok=True)
        return STOPPED


def die_with_parent() -> None:
    """Linux only; elsewhere an orphan must be ended by hand."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def launch(module: str, run_dir: Path, processes: int) -> int:
    """Run `python -m module run_dir` on this many ranks of this machine; returns the first failing
    exit code or 0."""
    stop_file = run_dir / "stop"
    stop_file.unlink(missing_ok=True)
    cores = len(os.sched_getaffinity(0))
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // processes)),  # more threads than cores cost time
        **os.environ,
        "PYTHONUNBUFFERED": "1",
    }
    print(f"starting {processes} ranks of {module} in {run_dir}", flush=True)
    command = [sys.executable, "-m", "rlef_mega.run.launch", str(processes), module, str(run_dir)]
    child = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=die_with_parent
    )

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if stop_file.exists():
            if number == signal.SIGINT:  # asked twice: do not wait for the step
                child.kill()
        else:
            print("\nstopping: the current step is finished and saved first", flush=True)
            stop_file.touch()

    for number in STOP_SIGNALS:
        signal.signal(number, ask_to_stop)
    code = child.wait()
    stop_file.unlink(missing_ok=True)
    return code


def launch_again(processes: int, module: str, arguments: list[str]) -> int:
    """Run `python -m module arguments` on this many ranks of this machine, each with one thread;
    returns the first failing exit code or 0. A Ctrl-C ends them all."""
    command = [sys.executable, "-m", "rlef_mega.run.launch", str(processes), module, *arguments]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run(
        command, env=environment, preexec_fn=die_with_parent, check=False
    ).returncode


def run_agent(processes: int, module: str, *arguments: str) -> int:
    """torchrun's agent, without its report on exit codes that are ours."""
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
        rdzv_endpoint="localhost:0",
        run_id=f"rlef-{os.getpid()}",
        max_restarts=0,
        monitor_interval=0.2,
        **known_options(LaunchConfig, signals_to_handle="SIGHUP,SIGQUIT", shutdown_timeout=2),
    )
    try:
        elastic_launch(settings, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    finally:
        os.environ["TORCHELASTIC_RUN_ID"] = settings.run_id  # as the ranks have it
        failure_mark().unlink(missing_ok=True)
    return 0


def known_options(config: Any, **options: object) -> dict[str, Any]:
    """Those that this version of torch has: which signals end all ranks (ours do not), and how long
    ranks are waited for when one has failed (they cannot go on without it)."""
    return {name: value for name, value in options.items() if name in config.__dataclass_fields__}


def worker_main(work: Callable[[Path], int]) -> None:
    """The main of a rank: user errors become one message, that of the rank which failed first, and
    the exit code says how it ended."""
    die_with_parent()
    take_place_in_step()
    dump_stacks_when_asked()
    launched = psutil.Process(os.getppid()).create_time()  # torchrun's agent, or srun's
    # Megatron's overlapped exchanges want kernels to start in the order in which they are launched;
    # read when CUDA starts, and of no effect without it
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    collect_garbage_by_hand()
    try:
        code = work(Path(sys.argv[1]))
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        if os.environ.get("RLEF_TRACEBACK"):
            raise
        if fails_first(failure_mark(), since=launched):
            rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
            where = "" if rank == "0" else f" on rank {rank}"
            hint = "(RLEF_TRACEBACK=1 shows where)"
            print(f"error{where}: {error}\n{hint}", file=sys.stderr, flush=True)
        code = FAILED
    sys.stdout.flush()
    os._exit(code)  # not through destructors of process groups whose peers may be gone


def collect_garbage_by_hand() -> None:
    """A collection stops every thread, so also the rollouts: the youngest objects alone, with their
    tens of thousands of log-probs, take it a tenth of a second. Hardly anything of ours is in a
    circle, so none comes by itself; `collect_garbage` has its place at the end of a step."""
    gc.collect()
    gc.freeze()  # what imports made is left out of those to come
    gc.disable()


def collect_garbage(step: int) -> None:
    """Every so many steps."""
    if step % STEPS_A_COLLECTION == 0:
        gc.collect()


def take_place_in_step() -> None:
    """torch.distributed's variables from Slurm's, for a rank that srun started; MASTER_ADDR and
    MASTER_PORT come from whoever called srun. torchrun's own are left alone, and so is a process
    of the batch script, which is not of a step."""
    names = {
        "RANK": "SLURM_PROCID",
        "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
        "LOCAL_RANK": "SLURM_LOCALID",
    }
    if "RANK" not in os.environ and "MASTER_ADDR" in os.environ:
        os.environ |= {ours: os.environ[its] for ours, its in names.items() if its in os.environ}


def dump_stacks_when_asked() -> None:
    """On SIGUSR2, from C, so that it works while Python waits for a library; into a file a rank of
    the folder RLEF_STACKS, else to stderr."""
    folder = os.environ.get("RLEF_STACKS")
    if folder is None:
        faulthandler.register(signal.SIGUSR2, all_threads=True)
        return
    rank = os.environ.get("RANK", "0")
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = Path(folder, f"rank_{rank}.txt").open("a")  # noqa: SIM115 - until the process ends
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)


def fails_first(mark: Path, *, since: float) -> bool:
    """Whether no rank of this launch on this machine has failed before: the others fail because of
    it, or as it did, and have nothing to add. A mark that is older than this launch
    is another one's of the same name."""
    try:
        if mark.stat().st_mtime < since:
            mark.unlink()
    except FileNotFoundError:
        pass
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def failure_mark() -> Path:
    """One a launch: torchrun's agent names it, or Slurm's job, step and attempt do."""
    names = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    launched = [os.environ[name] for name in names if name in os.environ] or [str(os.getpid())]
    return Path(tempfile.gettempdir(), "-".join(["rlef-failed", *launched]))


if __name__ == "__main__":
    sys.exit(run_agent(int(sys.argv[1]), *sys.argv[2:]))


def say(message: str) -> None:
    print(f"\n== {message}", flush=True)


def stage(title: str, *command: str) -> None:
    """A command of ours, as a user would give it; its failure ends the demo with its exit code."""
    say(f"{title}:  rlef {' '.join(command)}")
    words = [sys.executable, "-m", "rlef_mega.cli", *command]
    child = subprocess.Popen(words, preexec_fn=die_with_parent)
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:
            continue  # it has got the Ctrl-C as well, and ends by itself
    if code:
        if code == STOPPED:
            print("run the demo again to go on", flush=True)
        sys.exit(code)


def rlef(*words: str) -> None:
    """RuntimeError with the end of what it printed where it fails."""
    command = [sys.executable, "-m", "rlef_mega.cli", *words]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        printed = "\n".join((ended.stdout + ended.stderr).splitlines()[-20:])
        raise RuntimeError(f"rlef {' '.join(words)} ended with {ended.returncode}:\n{printed}")
