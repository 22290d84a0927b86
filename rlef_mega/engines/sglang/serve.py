"""`rlef serve`: the SGLang servers of one node, for training on this node or others.

Theory of operation. This process owns the servers: it starts them, prints their addresses when all
are ready, and restarts those that end. SIGINT or SIGTERM ends them, and so does its own death.
Training publishes the weights, also to a restarted server.

`rlef train --serve` starts this process in addition to its ranks (`serving`), and ends it last. If
`rlef train` dies, even by SIGKILL, the kernel ends this process, and with it the servers.
"""

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import FrameType

from rlef_mega.config import ConfigError, TrainConfig, read_json
from rlef_mega.engines import EngineError
from rlef_mega.engines.sglang.processes import SPARE_TOKENS, ServerProcesses
from rlef_mega.run.hub import find_model
from rlef_mega.run.launch import RLEF, die_with_parent
from rlef_mega.run.model_folder import SafetensorsFolder

READY = "ready: "  # begins the line that names the servers once all are ready


def server_logs(config: TrainConfig) -> Path:
    """Return the folder of the servers' logs, in the run directory, where training finds them."""
    return Path(config.run.dir) / "servers"


def servers_for(config: TrainConfig) -> ServerProcesses:
    """Return the servers of this node that the recipe asks for, not started yet.

    Raises ConfigError if there is no model, or it lacks the positions for `rollout.max_context`.
    """
    model, context = find_model(config.model.path), config.rollout.max_context
    if not (model / "config.json").is_file():
        raise ConfigError(f"model.path = {model} has no config.json; servers need the model here")
    hf_config = read_json(model / "config.json")
    SafetensorsFolder(model)  # refuses a folder whose weights cannot be read
    most = int(hf_config["max_position_embeddings"]) - SPARE_TOKENS
    if context > most:
        raise ConfigError(
            f"rollout.max_context = {context} exceeds what SGLang can serve of this model; "
            f"set it to at most {most}"
        )
    return ServerProcesses(
        config.rollout.servers,
        model.absolute(),
        dtype=config.model.dtype,
        context_length=context,
        logs=server_logs(config),
    )


def serve(config: TrainConfig) -> None:
    """Run the servers until SIGINT or SIGTERM. Raises EngineError if one does not start."""
    servers = servers_for(config)
    signalled = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal signalled
        if not signalled:
            signalled = True
            raise KeyboardInterrupt  # also while servers load, which takes minutes

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    print(f"starting {len(servers.urls)} servers; logs in {server_logs(config)}", flush=True)
    try:
        with servers:
            print(READY + " ".join(servers.urls), flush=True)
            servers.supervise(report=lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print("stopped", flush=True)


@contextmanager
def serving(config: TrainConfig, arguments: Sequence[str]) -> Iterator[None]:
    """Run the recipe's servers during the block, by `rlef serve ARGUMENTS` as a child process.

    Enter it from the main thread. The child's output is printed. Raises EngineError if the servers
    do not start.
    """
    asked = config.rollout
    if asked.engine != "sglang" or asked.servers.urls:
        found = asked.servers.urls or f"rollout.engine = {asked.engine!r}"
        raise ConfigError(
            f"--serve starts this node's SGLang servers, but the recipe has {found}; leave out "
            '--serve, or set rollout.engine = "sglang" without rollout.servers.urls'
        )
    child = subprocess.Popen(
        [*RLEF, "serve", *arguments],
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
            raise EngineError("the servers did not start; the reason is printed above")
        Thread(target=echo, args=(child.stdout,), daemon=True).start()
        yield
    finally:
        child.terminate()
        child.wait()


def echo(lines: Iterator[str]) -> None:
    for line in lines:
        print(line, end="", flush=True)
