"""The process that owns the sandbox, and how the server asks it.

Theory of operation. Parsing a large body or comparing large outputs may be a single C call that
takes seconds and holds the GIL, so that no other thread of its process runs. So the server's
process only speaks HTTP. A child of it, forked before there are threads, parses and grades. Each
thread of the server's pool has a connection to a thread of the child, and sends one request at a
time. The child leaves signals to the server. It ends with the server, and the server ends if the
child does.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle

from .. import Sandbox
from ..kernel import die_with_parent
from . import wire
from .grading_queue import GradingAnswer

PING = ""  # in place of a path: asks whether the child still runs
SMALL_BODY_BYTES = 16 << 10  # larger bodies are parsed one at a time
CLOSE_TIMEOUT_S = 10.0
_parsing = threading.Lock()


class GradingProcess(contextlib.AbstractContextManager):
    """The server's handle on its child, in which `open_sandbox` is called."""

    def __init__(self, open_sandbox: Callable[[], Sandbox]) -> None:
        """Start the child. Raises what `open_sandbox` raises."""
        self._of_thread = threading.local()
        self._control, theirs = Pipe()
        server = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            self._control.close()
            try:
                serve_connections(theirs, open_sandbox, server)
            finally:
                os._exit(1)
        theirs.close()
        self.ended = os.pidfd_open(self._pid)  # can be read once the child has ended
        try:
            about = self._control.recv()
            if isinstance(about, Exception):
                raise about
        except BaseException:
            self.__exit__()
            raise
        self.isolation, self.languages, self.zygotes_started = about

    def __exit__(self, *_: object) -> None:
        self._control.close()
        select.select([self.ended], [], [], CLOSE_TIMEOUT_S)
        self.kill()
        os.waitpid(self._pid, 0)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def answer(self, path: str, body: bytearray) -> GradingAnswer:
        """Return the answer to a request. Raises ValueError if it is malformed, and one of
        SANDBOX_FAULTS if the sandbox or the child fails.
        """
        try:
            connection = getattr(self._of_thread, "connection", None) or self._connect()
            connection.send_bytes(path.encode())
            connection.send_bytes(body)
            answer, self.zygotes_started = connection.recv()
        except (EOFError, OSError):
            self._of_thread.connection = None
            raise OSError("the grading process ended") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _connect(self) -> Connection:
        """Connect this thread of the server with one of the child."""
        connection, theirs = Pipe()
        send_handle(self._control, theirs.fileno(), self._pid)
        theirs.close()
        self._of_thread.connection = connection
        return connection


def serve_connections(
    control: Connection, open_sandbox: Callable[[], Sandbox], server: int
) -> None:
    """Run the child: open the sandbox, and answer each connection that comes on `control` in a
    thread of its own.
    """
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if os.getppid() != server:
        return
    try:
        sandbox = open_sandbox()
    except Exception as error:
        control.send(error)
        return
    with sandbox, contextlib.suppress(EOFError):
        control.send((sandbox.isolation, sandbox.languages, sandbox.zygotes_started))
        while True:
            connection = Connection(recv_handle(control))
            threading.Thread(target=answer_each, args=(connection, sandbox), daemon=True).start()


def answer_each(connection: Connection, sandbox: Sandbox) -> None:
    """Answer the requests of one thread of the server."""
    with contextlib.suppress(EOFError, OSError):  # the server has ended
        while True:
            path, body = connection.recv_bytes().decode(), connection.recv_bytes()
            try:
                answer: GradingAnswer | Exception = answer_to(sandbox, path, body)
            except Exception as error:  # the server raises it
                error.add_note(traceback.format_exc())
                answer = error
            connection.send((answer, sandbox.zygotes_started))


def answer_to(sandbox: Sandbox, path: str, body: bytes) -> GradingAnswer:
    if path == PING:
        return GradingAnswer(b"", ())
    with contextlib.nullcontext() if len(body) <= SMALL_BODY_BYTES else _parsing:
        asked = wire.decode_request(path, body)
    if isinstance(asked, wire.RunRequest):
        results = [sandbox.run(**vars(asked))]
    else:
        results = sandbox.grade(**vars(asked))
    return GradingAnswer(wire.encode_results(results), tuple(result.status for result in results))
