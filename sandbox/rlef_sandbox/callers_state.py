"""Resets the process state that a zygote or a compiler inherits from its caller.

A verdict must not depend on who started the sandbox, so each of these is set explicitly: umask,
signals, schedule, processors and limits here; environment, working directory and descriptors by
`worker.py`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal

from .confinement import succeeds

STACK_BYTES = 256 << 20  # of the main thread, for deep recursion; fixed when a process is exec'd
# Each limit that a run sets (launch_plan.py, compiler.py) or that would stop it, and the least that
# default limits and a compilation need.
NEEDED = {
    "STACK": STACK_BYTES,
    "AS": 2 << 30,
    "DATA": 2 << 30,
    "FSIZE": 128 << 20,
    "CPU": 15,
    "NOFILE": 256,
    "NPROC": 64,
}
# No run needs these resources. A core_pattern that is a pipe ignores a limit of 0, but not one of
# 1 (core(5)).
FIXED = {"CORE": 1, "MEMLOCK": 0, "MSGQUEUE": 0, "NICE": 0, "RTPRIO": 0}
MOST_PROCESSORS = 4096


def reset() -> None:
    """Set the state of this process. Raises SystemExit if the caller's hard limits, which only root
    can raise, are too low.
    """
    os.umask(0o022)
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # Python ignores these
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    succeeds(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(0))
    succeeds(os.setpriority, os.PRIO_PROCESS, 0, 0)  # only root can lower it
    # all that the cgroup allows: OpenMP pins a trainer's main thread to one processor
    succeeds(os.sched_setaffinity, 0, range(MOST_PROCESSORS))
    succeeds(_allow_oom_kill)
    for name, bound in FIXED.items():
        with contextlib.suppress(ValueError):  # a hard limit of core dumps that is 0 stays
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (bound, bound))
    low = [line for name, least in NEEDED.items() if (line := _raise_limit(name, least))]
    if low:
        raise SystemExit(
            f"hard limits of the calling process are too low: {', '.join(low)}. Raise them where "
            "it starts: limits.conf, systemd, or Slurm's PropagateResourceLimits"
        )


def core_dumps_stopped_by(reaper: int) -> list[str]:
    """Return what keeps a crash from being dumped, or given to this machine's handler of dumps."""
    bound = resource.prlimit(reaper, resource.RLIMIT_CORE)[1]  # its zygote's too
    with open("/proc/sys/kernel/core_pattern") as file:
        pattern = file.read()
    with open("/proc/sys/fs/suid_dumpable") as file:
        undumpable = int(file.read()) == 0  # also for executables that nobody may read
    # a pipe obeys only a limit of 1, and a socket no limit (core(5))
    heeded = bound == 1 if pattern.startswith("|") else bound < 2 and not pattern.startswith("@")
    return ["limit"] * heeded + ["undumpable"] * undumpable


def _raise_limit(name: str, least: int) -> str:
    """Raise a limit as far as allowed. Returns the fault if it is then below `least`."""
    kind = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY and name != "NOFILE":  # cannot be unlimited
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            hard = resource.RLIM_INFINITY
    if name != "STACK":  # `zygote.py` sets this one
        resource.setrlimit(kind, (hard, hard))
    unlimited = hard == resource.RLIM_INFINITY
    return "" if unlimited or hard >= least else f"RLIMIT_{name} is {hard} and must be {least}"


def _allow_oom_kill() -> None:
    """Give up a protection from the OOM killer that this process inherited."""
    with open("/proc/self/oom_score_adj", "r+") as score:
        if int(score.read()) < 0:
            score.write("0")
