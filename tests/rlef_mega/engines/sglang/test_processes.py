"""Starting servers, with a stand-in for the server's Python that ends, sleeps or serves on command.

Real servers: tests/sglang."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from rlef_mega.config import ConfigError, ServersConfig, TrainConfig, dump_toml
from rlef_mega.engines import EngineError
from rlef_mega.engines.sglang import processes
from rlef_mega.engines.sglang.processes import CPU_LAUNCHER, ServerProcesses
from rlef_mega.engines.sglang.serve import servers_for, serving

HEALTHY = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *words): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
print("serving", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def stand_in(folder: Path, program: str) -> str:
    """Write this program in place of the server's Python; returns its path."""
    python, script = folder / "python", folder / "program.py"
    script.write_text(program)
    # a shebang line could not hold a path with a space
    python.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n'
    )
    python.chmod(0o755)
    return str(python)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def servers(folder: Path, program: str, **asked) -> ServerProcesses:
    python = stand_in(folder, program)
    config = ServersConfig(**{"python": python, "port": free_port(), "ready_s": 20.0, **asked})
    return ServerProcesses(config, folder, dtype="bfloat16", context_length=9, logs=folder / "logs")


def test_a_server_that_ends_as_it_starts_is_an_error_with_the_end_of_its_log(tmp_path):
    program = "import sys; print('CUDA out of memory'); sys.exit(1)"
    with pytest.raises(EngineError, match=r"(?s)has ended\..*CUDA out of memory"):
        servers(tmp_path, program).__enter__()


def test_a_server_that_is_not_ready_in_time_is_an_error_and_ends(tmp_path):
    program = "import os, time; print('loading', os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(EngineError, match=r"(?s)did not answer for 1 s.*loading"):
        servers(tmp_path, program, ready_s=1.0).__enter__()
    (log,) = (tmp_path / "logs").iterdir()
    assert not psutil.pid_exists(int(log.read_text().split()[-1]))


def test_a_port_that_is_taken_is_not_mistaken_for_the_server(tmp_path):
    port = free_port()
    with (
        servers(tmp_path, HEALTHY, port=port),
        pytest.raises(EngineError, match=r"answers at http://127.0.0.1:.* already"),
    ):
        servers(tmp_path, HEALTHY, port=port).__enter__()


def test_a_port_on_which_something_other_than_http_answers_is_taken(tmp_path):
    def answer() -> None:
        connection, _ = other.accept()
        with connection:
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            connection.recv(1 << 16)

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(EngineError, match=rf"answers at http://127.0.0.1:{port} already"):
            servers(tmp_path, HEALTHY, port=port).__enter__()


def test_servers_are_reached_although_a_proxy_is_configured(tmp_path, monkeypatch):
    """By us and by themselves: a server sends itself requests when it starts."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "example.org")
    asks_itself = """
import threading, time, urllib.request
def ask():
    time.sleep(0.3)
    print("asked", urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status, flush=True)
threading.Thread(target=ask).start()
"""
    program = HEALTHY.replace('print("serving"', asks_itself + 'print("serving"')
    with servers(tmp_path, program):
        (log,) = (tmp_path / "logs").iterdir()
        deadline = time.monotonic() + 10
        while "asked" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "asked 200" in log.read_text()


def test_a_missing_python_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(EngineError, match="make setup-sglang"):
        servers(tmp_path, "", python=str(tmp_path / "absent")).__enter__()


class EnoughError(Exception):
    pass


def test_a_server_that_ends_is_restarted(tmp_path):
    said = []

    def say(text: str) -> None:
        said.append(text)
        if "ready again" in text:
            raise EnoughError

    with servers(tmp_path, HEALTHY) as running:
        first = running.servers[0].process.pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(EnoughError):
            running.supervise(say)
        assert running.servers[0].process.pid != first
        assert urllib.request.urlopen(running.urls[0], timeout=5).status == 200
    assert "has ended" in said[0]


def test_a_server_that_hangs_is_restarted(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "ASK_EVERY_S", 0.1)
    monkeypatch.setattr(processes, "HEALTH_S", 0.3)
    monkeypatch.setattr(processes, "SERVER_HANG_S", 1.0)
    said = []

    def say(text: str) -> None:
        said.append(text)
        if "ready again" in text:
            raise EnoughError

    with servers(tmp_path, HEALTHY) as running:
        first = running.servers[0].process.pid
        os.kill(first, signal.SIGSTOP)
        with pytest.raises(EnoughError):
            running.supervise(say)
    assert "did not answer" in said[0] and not psutil.pid_exists(first)


RESTING = HEALTHY.replace(
    "self.send_response(200)",
    "self.send_response(503 if self.path == '/health' and os.path.exists(RESTS) else 200)",
)


@pytest.mark.parametrize("may_rest", [True, False])
def test_servers_that_released_their_memory_are_not_restarted(tmp_path, monkeypatch, may_rest):
    """Such a server is unhealthy for longer than SERVER_HANG_S."""
    monkeypatch.setattr(processes, "ASK_EVERY_S", 0.1)
    monkeypatch.setattr(processes, "SERVER_HANG_S", 0.5)
    rests = tmp_path / "rests"
    program = f"RESTS = {str(rests)!r}\n{RESTING}"
    with servers(tmp_path, program, release_memory=may_rest) as running:
        (server,) = running.servers
        server.heard_at_s = time.monotonic()
        rests.touch()
        until, reason = time.monotonic() + 1.5, None
        while not reason and time.monotonic() < until:
            reason = running.reason_to_restart(server)
            time.sleep(0.02)
    assert reason is None if may_rest else "did not answer" in reason


def test_a_server_that_never_comes_back_is_an_error_in_the_end(tmp_path):
    program = f"import os\nif os.path.exists({str(tmp_path / 'broken')!r}): os._exit(1)\n{HEALTHY}"
    with servers(tmp_path, program) as running:
        (tmp_path / "broken").touch()
        os.kill(running.servers[0].process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"ended 3 times before it was ready"):
            running.supervise(lambda text: None)


def expect_end_of(process: int) -> None:
    until = time.monotonic() + 5
    while psutil.pid_exists(process) and psutil.Process(process).status() != "zombie":
        assert time.monotonic() < until, f"process {process} outlived its parent"
        time.sleep(0.02)


SERVING = """
import sys, time
from pathlib import Path
import psutil
from rlef_mega.config import TrainConfig, load_config
from rlef_mega.engines.sglang.serve import serving
with serving(load_config(Path(sys.argv[1]), [], TrainConfig), [sys.argv[1]]):
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    time.sleep(60)
"""


def saved_recipe(folder: Path, program: str) -> tuple[TrainConfig, str]:
    """Write a recipe whose servers run this program."""
    config = recipe(folder, python=stand_in(folder, program), port=free_port())
    path = folder / "recipe.toml"
    path.write_text(dump_toml(config))
    return config, str(path)


def test_servers_end_with_the_training_that_they_were_started_for(tmp_path, capfd):
    config, path = saved_recipe(tmp_path, HEALTHY)
    with serving(config, [path]):
        assert f"ready: {config.rollout.servers.addresses[0]}\n" in capfd.readouterr().out
        processes = psutil.Process().children(recursive=True)
        (server,) = (p for p in processes if str(tmp_path / "program.py") in p.cmdline())
    expect_end_of(server.pid)


def test_servers_die_with_a_killed_training(tmp_path):
    _, path = saved_recipe(tmp_path, HEALTHY)
    command = [sys.executable, "-c", SERVING, path]
    training = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    *_, pids = (training.stdout.readline() for _ in range(3))
    serve, server = map(int, pids.split())
    training.kill()
    assert training.wait(10) == -signal.SIGKILL
    expect_end_of(serve)
    expect_end_of(server)


def test_training_does_not_begin_without_its_servers(tmp_path, capfd):
    config, path = saved_recipe(tmp_path, "print('CUDA out of memory')")
    with pytest.raises(EngineError, match="did not start"), serving(config, [path]):
        pytest.fail("they have ended")
    assert "CUDA out of memory" in capfd.readouterr().err
    elsewhere = recipe(tmp_path, urls=["http://node7:30000"])
    for wrong in (elsewhere, recipe(tmp_path, engine="local")):
        with pytest.raises(ConfigError, match="--serve starts this node's"), serving(wrong, []):
            pytest.fail("they are not of this node, or none are asked for")


def recipe(folder: Path, engine: str = "sglang", **servers) -> TrainConfig:
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 1002}))
    save_file({"model.norm.weight": torch.ones(2)}, folder / "model.safetensors")
    return TrainConfig.model_validate(
        {
            "run": {"dir": str(folder / "run"), "steps": 1},
            "model": {"path": str(folder)},
            "data": {"train": "curriculum:train"},
            "rollout": {
                "engine": engine,
                "max_context": 1000,
                "max_new_tokens": 100,
                "servers": servers,
            },
        }
    )


def test_the_command_of_each_server_follows_from_the_recipe(tmp_path):
    config = recipe(tmp_path, count=2, port=4000, tensor_parallel_size=4, arguments=["--x", "y"])
    command = servers_for(config).servers[1].command
    assert command[1:4] == ["-P", "-m", "sglang.launch_server"] and command[-2:] == ["--x", "y"]
    options = dict(zip(command[4:-2:2], command[5:-2:2], strict=True))
    assert options["--tp-size"] == "4" and options["--port"] == "4001"
    assert options["--dtype"] == "bfloat16" and options["--model-path"] == str(tmp_path)
    assert options["--context-length"] == "1002"
    assert config.rollout.servers.addresses == ("http://127.0.0.1:4000", "http://127.0.0.1:4001")
    resting = servers_for(recipe(tmp_path, release_memory=True))
    assert "--enable-memory-saver" in resting.servers[0].command
    assert resting.sign_of_life != "/health"
    for count, width, gpus in ((8, 1, list(range(8))), (2, 4, [0, 4])):  # no two on one GPU
        several = servers_for(recipe(tmp_path, count=count, tensor_parallel_size=width))
        first = [server.command for server in several.servers]
        assert [int(c[c.index("--base-gpu-id") + 1]) for c in first] == gpus
    after_six = servers_for(recipe(tmp_path, count=2, first_gpu=6)).servers[1].command
    assert after_six[after_six.index("--base-gpu-id") + 1] == "7"
    on_cpu = servers_for(recipe(tmp_path, device="cpu")).servers[0].command
    assert on_cpu[1:3] == ["-P", str(CPU_LAUNCHER)] and "--base-gpu-id" not in on_cpu


def test_a_context_that_the_model_cannot_hold_is_refused(tmp_path):
    config = recipe(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 1000}))
    with pytest.raises(ConfigError, match="at most 998"):
        servers_for(config)
