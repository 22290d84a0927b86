"""Run the SGLang servers of one node as processes: start, watch, restart and end them.

Theory of operation. Each server is a process of the server's own Python, with a log file, in a
session of its own; it starts processes of its own (scheduler, detokenizer) and ends them. If the
process that started a server dies, even by SIGKILL, the kernel kills the server (PR_SET_PDEATHSIG,
which is bound to the thread that started it: start servers from the main thread), and SGLang binds
the server's processes to the server in the same way. `supervise` restarts servers that have ended
or hang. It does not load weights: a server starts with those of its model folder, and the engine of
the process that publishes updates it (fleet.py).
"""

import contextlib
import os
import signal
import subprocess
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

import psutil

from rlef_mega.config import ServersConfig
from rlef_mega.engines import EngineError
from rlef_mega.run.launch import die_with_parent

CPU_LAUNCHER = Path(__file__).with_name("cpu_launcher.py")
CPU_ARGUMENTS = (
    *("--attention-backend", "torch_native"),
    "--disable-overlap-schedule",
    "--disable-cuda-graph",
    "--skip-server-warmup",
    "--sleep-on-idle",
)
SPARE_TOKENS = 2  # of its context length that SGLang 0.5.23 keeps for itself
POLL_S = 0.2
ASK_EVERY_S = 10.0  # how often a server that is ready is asked for a sign of life
HEALTH_S = 5.0  # timeout of its answer
# How long a server may stay unhealthy before it is restarted. Longer than a publication takes:
# a server that is paused or receives weights does not answer.
SERVER_HANG_S = 600.0
MARK = "RLEF_SERVER"  # an environment variable of a server and all its processes
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # without http_proxy
STOP_S = 15.0  # for a server to end by itself
MOST_FAILED_STARTS = 3  # in a row
TAIL_LINES = 15


def server_command(
    asked: ServersConfig, model: Path, *, dtype: str, context_length: int, index: int = 0
) -> list[str]:
    """Return the command of a node's `index`-th server, which has a port and GPUs of its own.

    `context_length` is that of a prompt with its response. The user's own arguments come last.
    """
    if asked.device == "cpu":
        start = [asked.python, "-P", str(CPU_LAUNCHER), *CPU_ARGUMENTS]
    else:
        start = [asked.python, "-P", "-m", "sglang.launch_server"]
    options = {
        "model-path": model,
        "host": asked.host,
        "port": asked.port + index,
        "device": asked.device,
        "dtype": dtype,
        "tp-size": asked.tensor_parallel_size,
        "mem-fraction-static": asked.memory_fraction,
        "context-length": context_length + SPARE_TOKENS,
    }
    if asked.device == "cuda":
        options["base-gpu-id"] = asked.first_gpu + index * asked.tensor_parallel_size
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    saver = ["--enable-memory-saver"] * asked.release_memory
    return [*start, *words, *asked.arguments, *saver]


class ServerProcess:
    """One server, which may be started more than once."""

    def __init__(self, command: list[str], url: str, log: Path) -> None:
        self.command, self.url, self.log = command, url, log
        self.process: subprocess.Popen[bytes] | None = None
        self.mark = ""
        self.starting = False  # not healthy yet
        self.failed_starts = 0
        self.heard_at_s = 0.0

    def start(self) -> None:
        """Start the server, from the main thread. Raises EngineError if there is no such Python."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
        environment.pop("PYTHONPATH", None)  # our packages are not the server's
        environment[MARK] = self.mark = uuid.uuid4().hex
        host = urllib.parse.urlsplit(self.url).hostname
        for name in ("NO_PROXY", "no_proxy"):  # at its start a server calls itself, by `requests`
            environment[name] = f"localhost,127.0.0.1,{host},{os.environ.get(name, '')}"
        self.starting, self.heard_at_s = True, time.monotonic()
        with self.log.open("ab") as log:
            try:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            except OSError as error:
                raise EngineError(
                    f"cannot start {self.command[0]}: {error.strerror}; `make setup-sglang-gpu` "
                    "(on a CPU `make setup-sglang`) makes it; or set rollout.servers.python"
                ) from None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def answers(self, path: str = "/health") -> bool:
        """Return whether the server answers; on /health, whether it generates."""
        try:
            with DIRECT.open(self.url + path, timeout=HEALTH_S) as answer:
                return bool(answer.status == 200)
        except HTTPException:  # something answers, but not in HTTP
            return path == "/health" and self.process is None
        except OSError:  # URLError, too
            return False

    def stop(self, patience_s: float = STOP_S) -> None:
        """End the server and all its processes; returns when they are gone."""
        if self.process is None:
            return
        if self.running and patience_s:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # a session of its own
        self.process.wait()
        # some have left the session; PR_SET_PDEATHSIG misses those that start as their parent dies
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    process.kill()
        self.process = None


class ServerProcesses:
    """The recipe's servers on this node; a context manager that ends them.

    Entering starts all of them and waits until all are ready. Raises EngineError with the end of
    the log if a server ends before it is ready, or is not ready after `asked.ready_s`.
    """

    def __init__(
        self,
        asked: ServersConfig,
        model: Path,
        *,
        dtype: str,
        context_length: int,
        logs: Path,
    ) -> None:
        self.urls = list(asked.own_addresses)
        self.servers = [
            ServerProcess(
                server_command(asked, model, dtype=dtype, context_length=context_length, index=n),
                url,
                log_file(logs, url),
            )
            for n, url in enumerate(self.urls)
        ]
        self.ready_s = asked.ready_s
        # /health makes an idle server generate. A server that has released its memory cannot, but
        # its scheduler still answers /server_info
        self.sign_of_life = "/server_info" if asked.release_memory else "/health"

    def __enter__(self) -> "ServerProcesses":
        try:
            for server in self.servers:
                if server.answers():
                    raise EngineError(
                        f"something answers at {server.url} already; end it, or choose another "
                        "rollout.servers.port"
                    )
                server.start()
            while any(server.starting for server in self.servers):
                for server in self.servers:
                    if reason := self.reason_to_restart(server):
                        raise EngineError(f"{server.url} {reason}.{log_tail(server.log)}")
                time.sleep(POLL_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for server in self.servers:  # all at once, because each takes seconds
            if server.process is not None and server.running:
                server.process.terminate()
        for server in self.servers:
            server.stop()

    def supervise(self, report: Callable[[str], None]) -> None:
        """Restart servers that have ended or hang, until an exception; `report` gets each event.

        Raises EngineError with the end of the log if a server keeps ending before it is ready.
        """
        while True:
            for server in self.servers:
                starting = server.starting
                if reason := self.reason_to_restart(server):
                    server.failed_starts += starting
                    if server.failed_starts == MOST_FAILED_STARTS:
                        raise EngineError(
                            f"{server.url} ended {MOST_FAILED_STARTS} times before it was ready."
                            f"{log_tail(server.log)}"
                        )
                    report(f"{server.url} {reason}; restarting it (log: {server.log})")
                    server.stop(patience_s=0)
                    server.start()
                elif starting and not server.starting:
                    server.failed_starts = 0
                    report(f"{server.url} is ready again")
            time.sleep(POLL_S)

    def reason_to_restart(self, server: ServerProcess) -> str | None:
        """Return why the server must be restarted, if it must. A server that starts or was silent
        for a while is asked for a sign of life."""
        if not server.running:
            return "has ended"
        silent_s = time.monotonic() - server.heard_at_s
        if silent_s > ASK_EVERY_S or server.starting:
            if server.answers("/health" if server.starting else self.sign_of_life):
                server.starting, server.heard_at_s = False, time.monotonic()
            elif silent_s > (self.ready_s if server.starting else SERVER_HANG_S):
                return f"did not answer for {silent_s:.0f} s"
        return None


def log_file(logs: Path, url: str) -> Path:
    """Return the log file of the server at this address."""
    return logs / f"{url.partition('://')[2].replace(':', '-')}.log"


def log_tail(log: Path | None) -> str:
    """Return the end of a server's log as a paragraph of an error message; empty without a log."""
    if log is None or not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        lines = file.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    return "".join(["\n", f"The end of {log}:\n", *(f"  | {line[:300]}\n" for line in lines)])
