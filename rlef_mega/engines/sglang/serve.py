"""`rlef serve`: the SGLang servers of one node, for a training run on this node or others.

Theory of operation: this process owns the servers. It starts them, prints their addresses when all
are ready, and starts again what ends; SIGINT or SIGTERM ends them, and so does its own death. It
knows nothing of weights: training brings them, also to a server that was started again.

`rlef train --serve` starts this process beside its ranks (`serving`), and ends it after them. If it
dies before, even by SIGKILL, the kernel ends this process, and with it the servers.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import FrameType

from rlef_mega.config import ConfigError, TrainConfig
from rlef_mega.engines import EngineError
from rlef_mega.engines.sglang.server import SPARE_TOKENS, Servers, ServerSettings
from rlef_mega.run.launch import die_with_parent

READY = "ready: "  # begins the line that says that all servers are


def server_logs(config: TrainConfig) -> Path:
    """In the run's folder, where training finds them when a server fails."""
    return Path(config.run.dir) / "servers"


def max_context(config: TrainConfig) -> int:
    """As asked. ConfigError where the model has not as many positions, with those that SGLang keeps
    for itself."""
    read = json.loads((Path(config.model.path) / "config.json").read_text())
    positions = int(read["max_position_embeddings"])
    asked = config.rollout.max_context
    if asked + SPARE_TOKENS > positions:
        raise ConfigError(
            f"rollout.max_context = {asked} exceeds what SGLang can serve of a model with "
            f"{positions} positions; set it to at most {positions - SPARE_TOKENS}"
        )
    return asked


def servers_for(config: TrainConfig) -> Servers:
    """Those that the recipe asks for on this node, not started yet."""
    asked, model = config.rollout.servers, Path(config.model.path)
    if not (model / "config.json").is_file():
        raise ConfigError(f"model.path = {model} has no config.json; servers need the model here")
    settings = ServerSettings(
        model=model.absolute(),
        python=asked.python,
        device=asked.device,
        dtype=config.model.dtype,
        context_length=max_context(config),
        tensor_parallel_size=asked.tensor_parallel_size,
        memory_fraction=asked.memory_fraction,
        host=asked.host,
        arguments=(*asked.arguments, *(("--enable-memory-saver",) * asked.release_memory)),
    )
    return Servers(
        settings,
        count=asked.count,
        port=asked.port,
        logs=server_logs(config),
        ready_s=asked.ready_s,
        may_rest=asked.release_memory,
    )


def serve(config: TrainConfig) -> None:
    """Until told to stop. EngineError with the end of its log for a server that does not start."""
    servers = servers_for(config)
    told = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if not told:
            told = True
            raise KeyboardInterrupt  # also while servers load, which takes minutes

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    print(f"starting {len(servers.urls)} servers; logs in {server_logs(config)}", flush=True)
    try:
        with servers:
            print(READY + " ".join(servers.urls), flush=True)
            servers.supervise(say=lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print("stopped", flush=True)


@contextmanager
def serving(config: TrainConfig, arguments: Sequence[str]) -> Iterator[None]:
    """The recipe's servers for as long as this lasts, by `rlef serve` with these arguments, in a
    process of its own; to be entered from the main thread. What it says is said here. EngineError
    if they do not start."""
    asked = config.rollout
    if asked.engine != "sglang" or asked.servers.urls:
        found = asked.servers.urls or f"rollout.engine = {asked.engine!r}"
        raise ConfigError(
            f"--serve starts this node's SGLang servers, but the recipe has {found}; leave it out, "
            'or set rollout.engine = "sglang" without rollout.servers.urls'
        )
    child = subprocess.Popen(
        [sys.executable, "-m", "rlef_mega.cli", "serve", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C is for the ranks, which still need the servers
        preexec_fn=die_with_parent,
    )
    assert child.stdout is not None
    try:
        for line in child.stdout:
            print(line, end="", flush=True)
            if line.startswith(READY):
                break
        else:
            raise EngineError("the servers did not start; what is wrong is said above")
        Thread(target=echo, args=(child.stdout,), daemon=True).start()
        yield
    finally:
        child.terminate()
        child.wait()


def echo(lines: Iterator[str]) -> None:
    for line in lines:
        print(line, end="", flush=True)
