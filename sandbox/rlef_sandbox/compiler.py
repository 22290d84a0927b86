"""A confined C++ compiler: one compilation at a time, in a world of the toolchain and a scratch.

Theory of operation. Started like a zygote (`worker.py`), with a reaper, namespaces, a private root
and Landlock; but what it shows is the toolchain, what it may write is one scratch directory in
memory, and its filter (`Profile.COMPILER`) allows processes and files. No untrusted code runs
here, yet untrusted text steers large programs. Each request brings one source and a session for its
answer: an Outcome, with the executable's descriptor if there is one. Between two compilations
every process but this one is killed and the scratch is emptied.
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

from . import landlock
from .confinement import Files, confine_zygote
from .probes import holds_in_a_child, refused
from .protocol import (
    Ending,
    Outcome,
    Phase,
    Request,
    Task,
    failed_to_start,
)
from .reaper import leave_reaper_behind
from .seccomp import Filter, filter_for_this_machine
from .supervise import receive
from .syscalls import Profile

TOOLCHAIN = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/alternatives")
OPEN_FILES = 256


class Compiler:
    """g++ with its flags, and the directory that it may write to."""

    def __init__(self, flags: list[str], scratch: str) -> None:
        self.program = shutil.which("g++") or "g++"
        self.flags, self.scratch = flags, scratch
        self.filter = filter_for_this_machine(Profile.COMPILER)

    def files(self) -> Files:
        """The toolchain and the precompiled headers, and where the toolchain is if elsewhere."""
        home = os.path.dirname(os.path.dirname(os.path.realpath(self.program)))
        headers = [flag[2:] for flag in self.flags if flag.startswith("-I")]
        wanted = dict.fromkeys([*TOOLCHAIN, *headers, home])
        found = [path for path in wanted if os.path.isdir(path)]
        directories = [
            path for path in found if not any(path.startswith(f"{other}/") for other in found)
        ] + [path for path in found if path == "/etc/alternatives"]
        directories = list(dict.fromkeys(directories))
        return Files(
            directories,
            # what the unprivileged user can reach: not a cache of headers in root's home
            lambda: landlock.restrict_to(
                [], [], filter(os.path.isdir, directories), [self.scratch]
            ),
            scratch=self.scratch,
        )

    def compile(self, request: Request, streams: list[int]) -> tuple[Outcome, int | None]:
        """What became of a compilation, and the executable."""
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
        process.returncode = 0  # waited for, just now
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
        """Wait for what the kill left, and empty the scratch."""
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        for entry in os.scandir(self.scratch):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


def hold_to(request: Request, call_filter: Filter | None) -> None:
    """In a child that will become the compiler."""
    cpu_s = int(request.cpu_s)
    # passing the soft limit ends it with a signal of its own, and not with the machine's
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))
    for kind, bound in (
        (resource.RLIMIT_AS, request.memory_bytes),
        (resource.RLIMIT_FSIZE, request.output_bytes),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (bound, bound))
    if call_filter is not None:
        call_filter.install(os.getpid())


def probe_layers(call_filter: Filter | None) -> dict[str, bool]:
    """Proof by effect of the layers that only the compiler itself puts on."""
    small = Request(Task.COMPILE, 1.0, 1.0, memory_bytes=256 << 20, output_bytes=1 << 10)

    def limits_hold() -> bool:
        hold_to(small, None)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # answer with an error instead
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
    """False for an -I of a folder that the confined compiler cannot read: it would give up."""
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


def serve(control: socket.socket, compiler: Compiler) -> None:
    """One compilation after another, until the controller is gone."""
    while True:
        message, descriptors = receive(control)
        if not message:
            os._exit(0)
        session_descriptor, *streams = descriptors
        with socket.socket(fileno=session_descriptor) as session:
            try:
                outcome, made = compiler.compile(Request.unpack(message), streams)
            except (OSError, subprocess.SubprocessError) as error:
                outcome, made = failed_to_start(f"the compiler does not start: {error}"), None
            with contextlib.suppress(OSError):  # a controller that gave up
                if made is None:
                    session.send(outcome.pack())
                else:
                    socket.send_fds(session, [outcome.pack()], [made])
            for descriptor in [*streams, *([made] if made is not None else [])]:
                os.close(descriptor)
        compiler.clean()


def main() -> None:
    """Become a compiler; the arguments are the descriptors of the control channel and the
    controller, g++'s flags, the scratch directory and the cgroup, which may be empty.
    """
    channel, controller, *flags, scratch, cgroup = sys.argv[1:]
    namespaces = leave_reaper_behind(int(channel), int(controller), cgroup, scratch)
    control = socket.socket(fileno=int(channel))
    compiler = Compiler(flags, scratch)
    layers = confine_zygote(namespaces, compiler.files())
    compiler.flags = [flag for flag in flags if is_readable(flag)]
    control.send(json.dumps({**layers, **probe_layers(compiler.filter)}).encode())
    serve(control, compiler)
