"""A confined C++ compiler: one compilation at a time, with the toolchain and a scratch directory.

Theory of operation. It is started like a zygote (`worker.py`), with a reaper, namespaces, a private
root and Landlock. But it sees the toolchain, may write to one scratch directory in memory, and its
filter (`Profile.COMPILER`) allows processes and files. No untrusted code runs here, yet untrusted
text steers large programs. Each request brings one source, and a session for the answer: an
Outcome, with the descriptor of the executable if there is one. Between two compilations every
process but this one is killed, and the scratch is emptied.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time

from . import callers_state, landlock
from .confinement import VisibleFiles, confine_zygote
from .probes import holds_in_a_child, refused
from .protocol import Ending, Outcome, Phase, Task, ZygoteRequest, failed_to_start, receive
from .reaper import leave_reaper_behind
from .seccomp import Filter, filter_for_this_machine
from .syscalls import Profile

TOOLCHAIN = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives")
OPEN_FILES = 256


class ConfinedCompiler:
    """g++ with its flags, and the directory that it may write to."""

    def __init__(self, flags: list[str], scratch: str) -> None:
        self.program = shutil.which("g++") or "g++"
        self.flags, self.scratch = flags, scratch
        self.filter = filter_for_this_machine(Profile.COMPILER)

    def files(self) -> VisibleFiles:
        """Return the toolchain, wherever it is, and the precompiled headers."""
        home = os.path.dirname(os.path.dirname(os.path.realpath(self.program)))
        headers = [flag[2:] for flag in self.flags if flag.startswith("-I")]
        found = list(filter(os.path.isdir, dict.fromkeys([*TOOLCHAIN, *headers, home])))
        directories = [p for p in found if not any(p.startswith(f"{other}/") for other in found)]
        return VisibleFiles(
            directories,
            # the unprivileged user cannot reach, for example, a cache of headers in root's home
            lambda: landlock.restrict_to(
                [], [], filter(os.path.isdir, directories), [self.scratch]
            ),
            scratch=self.scratch,
        )

    def compile(self, request: ZygoteRequest, streams: list[int]) -> tuple[Outcome, int | None]:
        """Compile. Returns the outcome, and the executable if there is one."""
        output = os.path.join(self.scratch, "program")
        command = [self.program, *self.flags, "-static", "-pipe", "-x", "c++", "-", "-o", output]
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=streams[0],
            stdout=streams[1],
            stderr=streams[2],
            cwd=self.scratch,
            env={"PATH": os.environ["PATH"], "TMPDIR": self.scratch, "LANG": "C.UTF-8"},
            process_group=0,
            preexec_fn=lambda: hold_to(request, self.filter),
        )
        pidfd = os.pidfd_open(process.pid)
        ended = bool(select.select([pidfd], [], [], request.wall_s)[0])
        os.close(pidfd)
        os.killpg(process.pid, signal.SIGKILL)
        _, wait_status, usage = os.wait4(process.pid, 0)
        process.returncode = 0  # so that Popen does not wait for it again
        outcome = Outcome(
            Phase.COMPILING,
            Ending.ITSELF if ended else Ending.WALL_LIMIT,
            wait_status,
            usage.ru_utime + usage.ru_stime,
            time.monotonic() - started,
            usage.ru_maxrss * 1024,
        )
        return outcome, _regular_file(output) if ended and wait_status == 0 else None

    def clean(self) -> None:
        """Wait for the killed processes to end, and empty the scratch folder."""
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        for entry in os.scandir(self.scratch):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


def hold_to(request: ZygoteRequest, call_filter: Filter | None) -> None:
    """Set the limits and install the filter of this process, which will become the compiler."""
    cpu_s = int(request.cpu_s)
    # the soft limit sends SIGXCPU; a SIGKILL would count as a fault of the machine
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))
    for kind, bound in (
        (resource.RLIMIT_AS, request.memory_bytes),
        (resource.RLIMIT_FSIZE, request.output_bytes),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
    ):
        resource.setrlimit(kind, (bound, bound))
    if call_filter is not None:
        call_filter.install(os.getpid())


def probe_layers(call_filter: Filter | None) -> dict[str, bool]:
    """Return which layers have an effect, of those that only the compiler's process applies."""
    small = ZygoteRequest(Task.COMPILE, 1.0, 1.0, memory_bytes=256 << 20, output_bytes=1 << 10)

    def limits_hold() -> bool:
        hold_to(small, None)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails instead
        output = os.memfd_create("probe")
        return refused(errno.EFBIG, os.pwrite, output, b"x", small.output_bytes) and refused(
            errno.ENOMEM, mmap.mmap, -1, small.memory_bytes
        )

    def filter_holds() -> bool:
        hold_to(small, call_filter)
        return refused(errno.EPERM, socket.socket) and refused(errno.EPERM, os.kill, 1, 0)

    return {
        "rlimits": holds_in_a_child(limits_hold),
        "seccomp": call_filter is not None and holds_in_a_child(filter_holds),
    }


def is_readable(flag: str) -> bool:
    """Return False for an -I of a folder that the confined compiler cannot read: g++ would fail."""
    return not flag.startswith("-I") or os.access(flag[2:], os.R_OK | os.X_OK)


def _regular_file(path: str) -> int | None:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    return None


def serve(control: socket.socket, compiler: ConfinedCompiler) -> None:
    """Compile one source after another, until the controller is gone."""
    while True:
        message, descriptors = receive(control)
        if not message:
            os._exit(0)
        session_descriptor, *streams = descriptors
        with socket.socket(fileno=session_descriptor) as session:
            try:
                outcome, made = compiler.compile(ZygoteRequest.unpack(message), streams)
            except (OSError, subprocess.SubprocessError) as error:
                outcome, made = failed_to_start(f"the compiler does not start: {error}"), None
            with contextlib.suppress(OSError):  # the controller closed the session
                if made is None:
                    session.send(outcome.pack())
                else:
                    socket.send_fds(session, [outcome.pack()], [made])
            for descriptor in [*streams, *([made] if made is not None else [])]:
                os.close(descriptor)
        compiler.clean()


def main() -> None:
    """Become a compiler. The arguments are the descriptors of the control channel and the
    controller, g++'s flags, the scratch directory, and the cgroup, which may be empty.
    """
    callers_state.reset()
    channel, controller, *flags, scratch, cgroup = sys.argv[1:]
    namespaces = leave_reaper_behind(int(channel), int(controller), cgroup, scratch)
    control = socket.socket(fileno=int(channel))
    compiler = ConfinedCompiler(flags, scratch)
    layers = confine_zygote(namespaces, compiler.files())
    compiler.flags = [flag for flag in flags if is_readable(flag)]
    control.send(json.dumps({**layers, **probe_layers(compiler.filter)}).encode())
    serve(control, compiler)
