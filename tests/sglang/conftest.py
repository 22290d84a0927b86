"""Two real SGLang servers on this machine, started as a user starts them, for all tests here."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlef_mega.dialogues.chat import CONTROLS
from rlef_mega.megatron.convert.from_hf import import_folder
from rlef_mega.megatron.convert.to_hf import export_checkpoint
from tests.rlef_mega.dialogues.test_chat import byte_tokenizer
from tests.rlef_mega.tiny_llama import tiny_llama

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sglang/bin/python"
VOCABULARY = 262  # not a multiple of 64: a server pads it
END_OF_TEXT = 5  # of the model's config; in no chat format
CONTEXT = 2048


class Serving:
    """`rlef serve` and what it has started."""

    def __init__(self, model: Path, run: Path, process: subprocess.Popen, urls: list[str]) -> None:
        self.model, self.run, self.process, self.urls = model, run, process, urls

    def server_process(self, url: str) -> psutil.Process:
        port = url.rpartition(":")[2]
        (found,) = [p for p in psutil.Process(self.process.pid).children() if port in p.cmdline()]
        return found

    def scheduler_process(self, url: str) -> psutil.Process:
        """Return the process that samples (not the HTTP process)."""
        started = self.server_process(url).children()
        (found,) = [p for p in started if p.name().startswith("sglang::schedul")]
        return found


def save_tiny_model(folder: Path) -> Path:
    """Save a model of two layers, and a tokenizer with the control tokens of both chat formats."""
    model = tiny_llama(
        VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        max_position_embeddings=CONTEXT + 2,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT,
    )
    model.save_pretrained(folder)
    byte_tokenizer(CONTROLS["llama3"] + CONTROLS["chatml"]).save_pretrained(folder)
    return folder


def free_ports(count: int) -> int:
    """Return the first of `count` consecutive free ports. The search begins at a port that depends
    on the process, because other test processes search at the same time."""
    first = 20000 + os.getpid() % 1000 * 10
    while not all(map(is_free, range(first, first + count))):
        first += count
    return first


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@pytest.fixture(scope="session")
def serving(tmp_path_factory) -> Iterator[Serving]:
    if not PYTHON.exists():
        pytest.skip("no .venv-sglang; `make test-sglang` makes it")
    folder = tmp_path_factory.mktemp("serving")
    # the served model is exported from one of our checkpoints, so these tests check the export
    import_folder(save_tiny_model(folder / "made"), folder / "checkpoint")
    model = folder / "model"
    export_checkpoint(folder / "checkpoint", model)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f"""
        run = {{dir = "{folder / "run"}", steps = 1}}
        model = {{path = "{model}", dtype = "float32"}}
        data = {{train = "curriculum:train"}}
        [rollout]
        engine = "sglang"
        max_context = {CONTEXT}
        [rollout.servers]
        count = 2
        port = {free_ports(2)}
        device = "cpu"
        python = "{PYTHON}"
        memory_fraction = 0.05
        arguments = ["--max-total-tokens", "20000"]
        ready_s = 400
        """
    )
    command = [sys.executable, "-m", "rlef_mega.cli", "serve", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("ready: "):
                break
        else:
            pytest.fail(f"rlef serve ended: {''.join(said)}")
        yield Serving(model, folder / "run", process, said[-1].split()[1:])
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 4  # two servers, each with processes of its own
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        _, left = psutil.wait_procs(started, timeout=10)
        assert not left, "rlef serve left processes behind"
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)  # the kernel ends the rest
