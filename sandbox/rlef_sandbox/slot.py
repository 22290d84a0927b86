"""The controller's handle on one zygote: starts it, asks it, and starts it anew when it is lost.

Descriptors are memory files: the source and the input are written before the request, the
outputs are read after the answer, so that nothing streams and a program cannot block on us.
"""

from __future__ import annotations

import array
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from .protocol import MAX_MESSAGE_BYTES, Outcome, Request

START_TIMEOUT_S = 60.0
ANSWER_GRACE_S = 20.0  # past the wall clock limit, before a silent zygote is given up
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
}
PACKAGE_DIRECTORY = os.path.dirname(os.path.abspath(__file__))
# A bare package, so that the zygote does not load the controller's half.
BOOTSTRAP = f"""\
import sys, types
package = types.ModuleType("rlef_sandbox")
package.__path__ = [{PACKAGE_DIRECTORY!r}]
sys.modules["rlef_sandbox"] = package
from rlef_sandbox.zygote import main
main()
"""
COMMAND = [sys.executable, "-s", "-S", "-P", "-B", "-c", BOOTSTRAP]


class ZygoteLostError(Exception):
    """The zygote died or fell silent: the sandbox's fault, never the program's."""


class Slot:
    """One zygote and the way to it. Used by one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._channel: socket.socket | None = None
        self._errors = -1

    def start(self) -> None:
        """Start a zygote, without waiting for it."""
        self.stop()
        self._channel, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        controller = os.pidfd_open(os.getpid())
        streams = [memory_file(name) for name in ("stdin", "stdout", "stderr")]
        self._errors = streams[2]
        try:
            self._process = subprocess.Popen(
                [*COMMAND, str(remote.fileno()), str(controller)],
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                pass_fds=(remote.fileno(), controller),
                env=ENVIRONMENT,
                cwd="/",
            )
        finally:
            remote.close()
            for descriptor in (controller, *streams[:2]):
                os.close(descriptor)

    def greet(self) -> dict[str, object]:
        """The layers of the zygote just started. ZygoteLostError, with its words, if it failed."""
        try:
            return json.loads(self._receive(time.monotonic() + START_TIMEOUT_S))
        except ZygoteLostError:
            words = os.pread(self._errors, MAX_MESSAGE_BYTES, 0).decode(errors="replace")
            raise ZygoteLostError(f"the zygote did not start: {words.strip()}") from None

    def ask(self, request: Request, descriptors: Sequence[int]) -> Outcome:
        """Send a request and wait for its outcome. ZygoteLostError if there is none in time."""
        self.tell(request, descriptors)
        deadline = time.monotonic() + request.wall_s + ANSWER_GRACE_S
        return Outcome.unpack(self._receive(deadline))

    def tell(self, request: Request, descriptors: Sequence[int] = ()) -> None:
        """Send a request that has no answer."""
        channel = self._open_channel()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            channel.sendmsg([request.pack()], rights if descriptors else [])
        except OSError as error:
            raise ZygoteLostError(f"the zygote is gone: {error}") from None

    def _open_channel(self) -> socket.socket:
        if self._channel is None:
            raise ZygoteLostError("there is no zygote")
        return self._channel

    def _receive(self, deadline: float) -> bytes:
        channel = self._open_channel()
        try:
            channel.settimeout(max(0.001, deadline - time.monotonic()))
            message = channel.recv(MAX_MESSAGE_BYTES)
        except OSError as error:
            raise ZygoteLostError(f"the zygote does not answer: {error}") from None
        if not message:
            raise ZygoteLostError("the zygote died")
        return message

    def stop(self) -> None:
        """Kill the zygote and all it forked."""
        if self._process is None or self._channel is None:
            return
        self.interrupt()
        self._process.wait()
        self._channel.close()
        os.close(self._errors)
        self._process = self._channel = None

    def interrupt(self) -> None:
        """Kill the zygote under a thread that may be waiting for it."""
        if self._process is not None:
            self._process.kill()  # the reaper, whose death takes the rest along


def memory_file(name: str, content: bytes = b"") -> int:
    """A descriptor of a new file in memory that holds `content`, at offset 0."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    if content:
        written = os.pwrite(descriptor, content, 0)
        while written < len(content):
            written += os.pwrite(descriptor, content[written:], written)
    return descriptor
