"""The whole loop, with a tensor-parallel trainer and rollouts on real servers."""

import json
import os
import socket
import subprocess
import sys
import urllib.request

import pytest

from tests.sglang.conftest import PYTHON, free_ports, save_tiny_model

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize(
    ("way", "mode"),
    [
        ("distributed", "async"),
        pytest.param("distributed", "sync", marks=pytest.mark.slow),
        pytest.param("disk", "async", marks=pytest.mark.slow),
        pytest.param("disk", "sync", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_on_what_two_servers_sampled(serving, tmp_path, way, mode):
    """The gap between the servers' log-probs and the trainer's proves that ids, weights and
    temperature agree; in async mode, for tokens sampled with the trainer's weights."""
    run = tmp_path / "run"
    settings = {
        "run.dir": run,
        "run.steps": 4,
        "run.checkpoint_every": 1,
        "model.path": serving.model,
        "model.dtype": "float32",
        "data.test": "",
        "parallel.tensor_model_parallel_size": 2,
        "rollout.engine": "sglang",
        "rollout.servers.urls": json.dumps(serving.urls),
        "rollout.servers.publish": way,
        "rollout.mode": mode,
        "rollout.max_staleness": 1,
        "rollout.servers.publish_s": 60,
        "rollout.episodes_per_batch": 8,
        "rollout.max_context": 1500,
        "rollout.max_new_tokens": 40,
        "rollout.temperature": 0.9,
        "learner.microbatch_tokens": 3000,
        # a version's log-probs differ from the last one's by far more than the gap that is allowed
        # below, and by less than the guard allows to what is trained on one version late
        "learner.policy.lr": 3e-3,
        "ppo.updates_per_batch": 2,
        "eval.every": 2,
        "eval.problems": 4,
        "guard.max_invalid_fraction": 1.0,
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    result = subprocess.run(
        [sys.executable, "-m", "rlef_mega.cli", "train", "demo", *sets],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 4
    assert steps[0]["logprob_gap_max"] is not None  # the first batch has the trainer's weights
    for step in steps:
        assert step["dropped"] == {} and (step["logprob_gap_max"] or 0) < 1e-3, step
        assert step["staleness_max"] <= (mode == "async"), step
        counts = step["servers"]  # of both ranks
        assert counts["requests"] > 0 and "failures" not in counts, counts
        assert 0 < counts["cached_tokens"] < counts["context_tokens"], counts
        assert 0 < counts["follow_up_cached_share"] < 1, counts
    assert sum(step["servers"]["requests"] for step in steps) >= 4 * 8
    assert [step["valid_step"] for step in steps if "valid_step" in step] == [2, 4]


def test_one_command_trains_a_model_of_the_hub_with_a_server_on_the_same_cores(tmp_path):
    """One rank and one server, as on one GPU: `--serve` starts the server and ends it. The model is
    a name, found in the hub's cache by the rank and by the server."""
    if not PYTHON.exists():
        pytest.skip("no .venv-sglang; `make test-sglang` makes it")
    cached = tmp_path / "hub/models--someone--tiny"
    save_tiny_model(cached / "snapshots/abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    run, port = tmp_path / "run", free_ports(1)
    settings = {
        "run.dir": run,
        "run.steps": 2,
        "model.path": "someone/tiny",
        "model.dtype": "float32",
        "data.test": "",
        "parallel.tensor_model_parallel_size": 1,
        "rollout.engine": "sglang",
        "rollout.servers.device": "cpu",
        "rollout.servers.python": PYTHON,
        "rollout.servers.port": port,
        "rollout.servers.memory_fraction": 0.05,
        "rollout.servers.arguments": '["--max-total-tokens", "20000"]',
        "rollout.servers.publish": "tensor",
        "rollout.episodes_per_batch": 8,
        "rollout.max_context": 1500,
        "learner.microbatch_tokens": 3000,
        "learner.policy.lr": 3e-3,
        "ppo.updates_per_batch": 2,
        "guard.max_invalid_fraction": 1.0,
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    result = subprocess.run(
        [sys.executable, "-m", "rlef_mega.cli", "train", "demo", "--serve", *sets],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_CACHE": str(tmp_path / "hub")},
        timeout=500,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'path = "someone/tiny"' in (run / "config.toml").read_text()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    for step in steps:
        assert step["dropped"] == {} and step["logprob_gap_max"] < 1e-3, step
        assert step["staleness_max"] == 0 and step["servers"]["requests"] >= 8
    with pytest.raises(ConnectionRefusedError):  # the server ended with the run
        socket.create_connection(("127.0.0.1", port))


def test_a_folder_is_evaluated_on_free_servers(serving, tmp_path):
    words = [sys.executable, "-m", "rlef_mega.cli", "eval", str(serving.model)]
    words += ["--data", "curriculum:test", "--problems", "4", "--turns", "2"]
    words += ["--max-new-tokens", "20", "--max-context", "1500", "--out", str(tmp_path)]
    words += [word for url in serving.urls for word in ("--sglang", url)]
    result = subprocess.run(words, timeout=300, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "eval/model.json").exists()
    for url in serving.urls:
        with urllib.request.urlopen(f"{url}/model_info", timeout=20) as said:
            assert json.load(said)["weight_version"] == "default"
