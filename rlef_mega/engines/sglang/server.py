"""SGLang servers of one node: started, waited for, started again, ended.

Theory of operation. Each server is a process of the server's own Python, with a log file, in a
session of its own; it starts processes of its own (scheduler, detokenizer), which it ends. Whoever
starts servers owns them: if that process dies, even by SIGKILL, the kernel kills the server
(PR_SET_PDEATHSIG, bound to the thread that started it: start servers from the main thread), and the
server's own processes end because SGLang binds them to it in the same way. `supervise` watches the
servers and starts again what has ended or hangs. It does not bring weights: a server that starts
has those of its model folder, and who publishes weights must see to the rest
(rlef_mega/engines/sglang/engine.py).
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlef_mega.engines import EngineError

CPU_LAUNCHER = Path(__file__).with_name("cpu.py")
CPU_ARGUMENTS = (
    *("--attention-backend", "torch_native"),
    "--disable-overlap-schedule",
    "--disable-cuda-graph",
    "--skip-server-warmup",
    "--sleep-on-idle",
)
SPARE_TOKENS = 2  # of its context length that SGLang 0.5.23 keeps for itself
PR_SET_PDEATHSIG = 1
POLL_S = 0.2
ASK_EVERY_S = 10.0
HEALTH_S = 5.0  # for an answer
# Without a sign of health, before a server is ended. Longer than weights take: while they are
# received, and while servers are paused, none answers.
HANG_S = 600.0
MARK = "RLEF_SERVER"  # in the environment of a server and of what it starts
STOP_S = 15.0  # that a server has to end by itself
MOST_FAILED_STARTS = 3  # in a row
TAIL_LINES = 15


@dataclass(frozen=True)
class ServerSettings:
    """What all servers of a node have in common. `context_length` is of a request with its answer;
    `arguments` are SGLang's own, and come last."""

    model: Path
    python: str
    device: str  # cpu, cuda
    dtype: str
    context_length: int
    tensor_parallel_size: int = 1
    memory_fraction: float = 0.8
    host: str = "127.0.0.1"
    arguments: tuple[str, ...] = ()

    def command(self, port: int, first_gpu: int = 0) -> list[str]:
        """How to start the server of this port, on `tensor_parallel_size` GPUs from this one on."""
        if self.device == "cpu":
            start = [self.python, "-P", str(CPU_LAUNCHER), *CPU_ARGUMENTS]
        else:
            start = [self.python, "-m", "sglang.launch_server"]
        options = {
            "model-path": self.model,
            "host": self.host,
            "port": port,
            "device": self.device,
            "dtype": self.dtype,
            "tp-size": self.tensor_parallel_size,
            "mem-fraction-static": self.memory_fraction,
            "context-length": self.context_length + SPARE_TOKENS,
        }
        if self.device == "cuda":
            options["base-gpu-id"] = first_gpu
        given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [*start, *given, *self.arguments]


class Server:
    """One server of this node, which may be started more than once."""

    def __init__(self, settings: ServerSettings, port: int, logs: Path, first_gpu: int = 0) -> None:
        self.settings, self.port, self.first_gpu = settings, port, first_gpu
        self.url = f"http://{settings.host}:{port}"
        self.log = log_file(logs, self.url)
        self.process: subprocess.Popen[bytes] | None = None
        self.mark = ""
        self.starting = False  # again; not healthy yet
        self.failed_starts = 0
        self.started_at_s = self.heard_at_s = 0.0

    def start(self) -> None:
        """From the main thread. EngineError if there is no such Python."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
        environment.pop("PYTHONPATH", None)  # our packages are not the server's
        environment[MARK] = self.mark = uuid.uuid4().hex  # of all that it will start
        with self.log.open("ab") as log:
            try:
                self.process = subprocess.Popen(
                    self.settings.command(self.port, self.first_gpu),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            except OSError as error:
                raise EngineError(
                    f"cannot start {self.settings.python}: {error.strerror}; `make setup-sglang` "
                    "makes the CPU server's environment, rollout.servers.python names another"
                ) from None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def answers(self, path: str = "/health") -> bool:
        """Whether it says that it is healthy: it has loaded its model and generates."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=HEALTH_S) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def stop(self, patience_s: float = STOP_S) -> None:
        """It and what it started; returns when they are gone."""
        if self.process is None:
            return
        if self.running and patience_s:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # a session of its own
        self.process.wait()
        # who has left that session, and was just starting as its parent died
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    process.kill()
        self.process = None


class Servers:
    """Servers on neighbouring ports of this node; a context manager that ends them.

    Entering starts them all and waits until all are ready: EngineError with the log's tail where
    one ends before, or is not ready after `ready_s`. With `may_rest` they may stand still, without
    memory, for as long as whoever trains likes.
    """

    def __init__(
        self,
        settings: ServerSettings,
        *,
        count: int,
        port: int,
        logs: Path,
        ready_s: float,
        hang_s: float = HANG_S,
        may_rest: bool = False,
    ) -> None:
        width = settings.tensor_parallel_size
        self.servers = [Server(settings, port + n, logs, n * width) for n in range(count)]
        self.ready_s, self.hang_s = ready_s, hang_s
        # /health has an idle server generate; its scheduler answers this one though it is paused
        self.sign_of_life = "/server_info" if may_rest else "/health"
        self.restarts = 0

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    def __enter__(self) -> "Servers":
        try:
            for server in self.servers:
                if server.answers():
                    raise EngineError(
                        f"something answers at {server.url} already; end it, or choose another "
                        "rollout.servers.port"
                    )
                server.start()
            self.wait_until_ready(self.servers)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for server in self.servers:  # all at once, for each takes seconds
            if server.process is not None and server.running:
                server.process.terminate()
        for server in self.servers:
            server.stop()

    def wait_until_ready(self, servers: list[Server]) -> None:
        deadline = time.monotonic() + self.ready_s
        waiting = list(servers)
        while waiting:
            for server in waiting:
                if not server.running:
                    raise EngineError(f"{server.url} ended as it started.{log_tail(server.log)}")
            waiting = [server for server in waiting if not server.answers()]
            if waiting and time.monotonic() > deadline:
                first = waiting[0]
                raise EngineError(
                    f"{first.url} was not ready after {self.ready_s:g} s.{log_tail(first.log)}"
                )
            time.sleep(POLL_S)

    def restart(self, server: Server) -> None:
        """Start it again, without waiting until it is ready."""
        server.stop(patience_s=0)
        server.start()
        server.starting = True
        server.started_at_s = server.heard_at_s = time.monotonic()
        self.restarts += 1

    def supervise(self, say: Callable[[str], None]) -> None:
        """Start again what has ended or hangs, until an exception. EngineError with the log's tail
        for a server that ends again and again before it is ready."""
        for server in self.servers:
            server.heard_at_s = time.monotonic()
        while True:
            for server in self.servers:
                if reason := self.reason_to_restart(server):
                    server.failed_starts += server.starting
                    if server.failed_starts == MOST_FAILED_STARTS:
                        raise EngineError(
                            f"{server.url} ended {MOST_FAILED_STARTS} times before it was ready."
                            f"{log_tail(server.log)}"
                        )
                    say(f"{server.url} {reason}; it is started again (log: {server.log})")
                    self.restart(server)
                elif server.starting and server.heard_at_s > server.started_at_s:
                    server.starting, server.failed_starts = False, 0
                    say(f"{server.url} is ready again")
            time.sleep(POLL_S)

    def reason_to_restart(self, server: Server) -> str | None:
        """Asks a server that was silent for a while for a sign of life."""
        if not server.running:
            return "has ended"
        silent_s = time.monotonic() - server.heard_at_s
        if silent_s > ASK_EVERY_S or server.starting:
            if server.answers("/health" if server.starting else self.sign_of_life):
                server.heard_at_s = time.monotonic()
            elif silent_s > (self.ready_s if server.starting else self.hang_s):
                return f"did not answer for {silent_s:.0f} s"
        return None


def die_with_parent() -> None:
    """Linux only; elsewhere an orphan must be ended by hand."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def log_file(logs: Path, url: str) -> Path:
    """Where the server of this address writes, for whoever shares the file system."""
    return logs / f"{url.partition('://')[2].replace(':', '-')}.log"


def log_tail(log: Path | None) -> str:
    """The end of a server's log as a paragraph of an error message; empty where there is none."""
    if log is None or not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        lines = file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    return "".join(["\n", f"The end of {log}:\n", *(f"  | {line[:300]}\n" for line in lines)])
