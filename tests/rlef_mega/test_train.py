"""The whole loop through the command a user gives, on a model that trains in seconds.

Each run below starts its own ranks, engine and sandbox; so these tests also cover killed runs,
layouts and bad input. The command is a process of its own where a test is about that: in the run
that is stopped, killed and resumed. The others call its function, with ranks forked from a process
that has imported torch and Megatron (`train`). Not tested: faults that show only on GPUs or at
scale.
"""

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from rlef_mega import cli
from rlef_mega.config import GuardConfig, SFTConfig, TrainConfig, find_recipe, load_config
from rlef_mega.demo.base_model import make_initial_model
from rlef_mega.dialogues.rollout import Rollout
from rlef_mega.engines import EngineLostError
from rlef_mega.megatron.checkpoints.files import fault_in, networks_in, steps_in
from rlef_mega.preflight import check_train, claim_run_directory
from rlef_mega.problems import load_problems
from rlef_mega.problems.jsonl import to_row
from rlef_mega.run.directory import RunDirectory
from rlef_mega.run.guards import GuardError, Guards
from rlef_mega.train import all_steps, save
from tests.rlef_mega.distributed import Ranks, run_command
from tests.rlef_mega.megatron.small_disk import small_disk
from tests.sandbox.service_process import TOKEN, ServerProcess

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
GAPS = ("logprob_gap_max", "logprob_gap_mean")  # rounding itself
RLEF = [sys.executable, "-m", "rlef_mega.cli"]
TINY_RUN = [
    "run.steps=4",
    "run.checkpoint_every=2",
    "rollout.episodes_per_batch=8",
    "rollout.max_new_tokens=16",
    "ppo.updates_per_batch=2",
    "eval.every=2",
    "eval.problems=4",
    "guard.max_invalid_fraction=1.0",  # an untrained model writes no code at all
    "learner.policy.lr=1e-3",
]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Write the tokenizer and random weights with which the demo's supervised stage starts."""
    folder = tmp_path_factory.mktemp("with a space") / "base"
    overrides = [f"dir={json.dumps(str(folder))}", "hidden_size=32", "num_layers=2"]
    make_initial_model(
        load_config(find_recipe("demo_base"), [*overrides, "ffn_hidden_size=64"], SFTConfig)
    )
    return folder / "init"


def settings(run: Path, model: Path, *overrides: str) -> list[str]:
    return [
        f"run.dir={json.dumps(str(run))}",
        f"model.path={json.dumps(str(model))}",
        "data.test=''",
        *TINY_RUN,
        *overrides,
    ]


def command(run: Path, model: Path, *overrides: str) -> list[str]:
    sets = [part for each in settings(run, model, *overrides) for part in ("--set", each)]
    return [*RLEF, "train", "demo", *sets]


def ended_ranks(
    run: Path, model: Path, *overrides: str, meanwhile: Callable[[Ranks], object] = lambda _: None
) -> tuple[list[int | None], list[str]]:
    return run_command(lambda: cli.train("demo", settings(run, model, *overrides)), meanwhile)


def train(run: Path, model: Path, *overrides: str) -> list[dict]:
    """Run or resume to the end. Returns the metrics without times."""
    codes, outputs = ended_ranks(run, model, *overrides)
    assert not any(codes), "\n".join([f"exit codes {codes}", *outputs])
    return metrics(run)


def metrics(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "time" not in k} for line in lines]


def assert_close(one: list[dict], other: list[dict], tolerance: float) -> None:
    assert [line.keys() for line in one] == [line.keys() for line in other]
    for a, b in zip(one, other, strict=True):
        for name, value in a.items():
            if isinstance(value, float):
                assert value == pytest.approx(b[name], rel=tolerance, abs=tolerance), (
                    a["step"],
                    name,
                )
            else:
                assert value == b[name], (a["step"], name)


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory, model) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run, model)
    return run


@pytest.fixture(scope="session")
def undisturbed(undisturbed_run) -> list[dict]:
    return metrics(undisturbed_run)


def test_the_same_seed_gives_the_same_metrics_profiled_or_not(undisturbed, model, tmp_path):
    assert len(undisturbed) == 4
    traced = ("profile.steps=[2]", "profile.ranks=[1]", "profile.memory=true")
    assert train(tmp_path / "again", model, *traced) == undisturbed
    (trace,) = (tmp_path / "again/profile").iterdir()
    assert trace.name == "step_000002_rank_1.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert "aten::mm" in names and "[memory]" in names


def test_the_test_problems_are_evaluated_once_before_and_once_after(model, tmp_path):
    """With all protocols; a command that finds both evaluations does not repeat them."""
    problems = list(load_problems("curriculum:test"))[:3]
    rows = (json.dumps(to_row(problem)) + "\n" for problem in problems)
    (tmp_path / "three.jsonl").write_text("".join(rows))
    run = tmp_path / "run"
    overrides = ("run.steps=1", f"data.test={json.dumps(str(tmp_path / 'three.jsonl'))}")
    train(run, model, *overrides)
    written = {name: (run / f"eval/{name}.json").read_text() for name in ("before", "after")}
    for version, name in enumerate(written):
        about = json.loads(written[name])
        assert about["problems"] == 3 and about["model"].endswith(f"version {version}")
        assert set(about["protocols"]) == {"multi_turn", "independent", "random_feedback"}
        for protocol in about["protocols"].values():
            assert len(protocol["outcomes"]) == 3 and protocol["solve_rate"]["value"] == 0
        with zstandard.open(run / f"eval/{name}_episodes.jsonl.zst", "rt") as lines:
            assert [json.loads(line)["problem_id"] for line in lines] == [p.id for p in problems]
    train(run, model, *overrides)  # all of it is done
    assert written == {name: (run / f"eval/{name}.json").read_text() for name in written}


def test_a_run_that_is_stopped_and_killed_resumes_with_the_same_numbers(
    undisturbed, model, tmp_path, capsys
):
    """The same command three times. Ctrl-C to the first: it says how to resume, and its checkpoint
    is complete when it ends. SIGKILL to the second while it trains: its last checkpoint is that of
    the second step, the file of metrics may hold three. (run/test_launch.py has SIGUSR1.)"""
    run = tmp_path / "a run"
    first = start(run, model, stdout=subprocess.PIPE)
    wait_for(lambda: steps_done(run) >= 1, first)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 3, output
    assert "the same command resumes it" in output
    newest = steps_in(run / "checkpoints")[-1]
    assert fault_in(newest) is None and newest.name == f"step_{steps_done(run):06d}"

    second = start(run, model, stdout=subprocess.DEVNULL)
    wait_for(lambda: steps_done(run) >= 3, second)
    second.kill()
    second.wait()
    wait_for(lambda: not processes_of(run))  # the ranks die with it, or they would go on writing

    assert train(run, model) == undisturbed
    assert f"done; `rlef view {run}` plots it" in capsys.readouterr().out


def test_a_full_disk_does_not_stop_training(undisturbed, model, tmp_path):
    """The disk has space for metrics, not for a checkpoint; with more, the same command resumes."""
    with small_disk(tmp_path / "disk", "1M") as disk:
        if disk is None:
            pytest.skip("mounting a small tmpfs needs root; test_checkpoint.py has a stand-in")
        run = disk / "run"
        codes, outputs = ended_ranks(run, model, "run.checkpoint_async=false")
        said = "\n".join(outputs)
        assert 2 in codes
        assert "step_000002 was NOT saved: [Errno 28] No space left on device" in said
        assert "the last step could not be saved" in said
        assert [line["checkpoint_failures"] for line in metrics(run)] == [0, 0, 1, 1]
        assert list((run / "checkpoints").iterdir()) == []
        subprocess.run(["mount", "-o", "remount,size=64M", str(disk)], check=True)
        assert train(run, model) == undisturbed


@pytest.mark.slow
def test_grading_on_servers_changes_no_number(undisturbed, model, tmp_path, monkeypatch):
    """Both ranks reach both servers with the token of the environment, which no file of the run
    holds. This model writes no code yet, so nothing is graded: test_judge.py tests the verdicts."""
    with ServerProcess(token=TOKEN) as one, ServerProcess(token=TOKEN) as two:
        monkeypatch.setenv("RLEF_SANDBOX_TOKEN", TOKEN)
        run = tmp_path / "served"
        assert train(run, model, f"judge.servers=['{one.url}', '{two.url}']") == undisturbed
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["isolation"]["servers"].keys() == {one.url, two.url}
    assert not any(TOKEN.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file())


ALONE = "parallel.tensor_model_parallel_size=1"


@pytest.mark.parametrize(
    ("overrides", "resumed"),
    [
        ([ALONE, "learner.offload=idle"], False),
        ([ALONE, "critic_parallel.tensor_model_parallel_size=1"], True),
    ],
    ids=["one process, idle state on the host", "resumed with the critic on its own rank"],
)
def test_other_layouts_give_the_numbers_of_tensor_parallel_2(
    undisturbed, undisturbed_run, model, tmp_path, overrides, resumed
):
    """The whole loop in fp32: sums in another order differ by rounding, which a few updates enlarge
    a little. megatron/test_layouts.py has the learner in all layouts."""
    run = tmp_path / "layout"
    if resumed:
        shutil.copytree(undisturbed_run, run)
        for checkpoint in ("step_000003", "step_000004"):
            shutil.rmtree(run / "checkpoints" / checkpoint, ignore_errors=True)
    other = train(run, model, *overrides)
    if resumed:
        changes = json.loads((run / "changes.jsonl").read_text())["changes"]
        assert changes["parallel.tensor_model_parallel_size"] == [2, 1]
    assert_close(without(other, GAPS), without(undisturbed, GAPS), tolerance=2e-4)
    assert all(line["logprob_gap_max"] < 1e-4 for line in other + undisturbed)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["ppo.token_level_value=true", "rollout.feedback=private", "ppo.beta=0.0"], {"kl": None}),
        pytest.param(["rollout.turns=1"], {"turns_mean": 1.0}, marks=pytest.mark.slow),
        pytest.param(
            ["rollout.feedback=none", "ppo.critic_warmup_steps=1"], {}, marks=pytest.mark.slow
        ),
    ],
    ids=[
        "token-level value, private feedback, no KL",
        "single-turn",
        "no feedback, critic warm-up",
    ],
)
def test_each_ablation_is_a_switch_of_the_whole_loop(model, tmp_path, overrides, expected):
    lines = train(tmp_path / "ablation", model, ALONE, "run.steps=2", *overrides)
    assert len(lines) == 2
    for line in lines:
        assert line | expected == line
        assert line["value_loss"] > 0 and line["logprob_gap_max"] < 1e-4


@pytest.mark.slow
def test_the_exact_kl_of_a_run_has_less_spread_than_the_sampled_one(model, tmp_path):
    first, second = train(tmp_path / "exact", model, ALONE, "run.steps=2", "ppo.kl=exact")
    assert abs(first["kl_exact"]) < 1e-6  # before any update, policy and reference are equal
    assert second["kl_exact"] > 1e-6 and second["kl_exact_std"] < second["kl_std"]


@pytest.mark.parametrize("estimator", ["rloo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_without_a_critic_no_part_of_a_run_has_one(model, tmp_path, monkeypatch, capsys, estimator):
    """The groups are the same on two data-parallel ranks, each of which samples half of each."""
    overrides = [f"ppo.advantage={estimator}", "rollout.samples_per_problem=4", "run.steps=2"]
    run, alone = tmp_path / "two ranks", tmp_path / "one rank"
    two = ["parallel.tensor_model_parallel_size=1", "parallel.data_parallel_size=2"]
    lines = train(run, model, *two, *overrides)
    assert_close(without(train(alone, model, ALONE, *overrides), GAPS), without(lines, GAPS), 2e-4)
    for line in lines:
        assert not [name for name in line if "value" in name or "critic" in name]
        assert 0 <= line["turns_alone"] < 1
    assert networks_in(steps_in(run / "checkpoints")[-1]) == {"policy"}
    words = command(run, model, *two, *overrides, "ppo.advantage=critic")
    said = refusal(words, monkeypatch, capsys)
    assert f"ppo.advantage = '{estimator}' there, 'critic' here" in said
    words = [*RLEF, "export-hf", str(run), str(tmp_path / "hf"), "--role", "critic"]
    assert "holds no weights under 'critic.'" in refusal(words, monkeypatch, capsys)


def without(lines: list[dict], names: tuple[str, ...]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in names} for line in lines]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.betta=1", "unknown key 'ppo.betta'; known there: beta"),
        ("parallel.tensor_model_parallel_size=3", "are not divisible by"),
        ("parallel.pipeline_model_parallel_size=5", "cannot be split into 5 stages"),
        (
            "critic_parallel.tensor_model_parallel_size=3",
            "critic_parallel: 4 attention heads are not divisible by",
        ),
        ("parallel.data_parallel_size=3", "cannot be divided evenly by"),
        ("ppo.updates_per_batch=3", "cannot be divided into"),
        ("data.train=nowhere.jsonl", "nowhere.jsonl"),
        ("model.path=nowhere", "nowhere/config.json"),
        ("judge.servers=['http://127.0.0.1:9']", "judge.servers: grading servers are not ready"),
    ],
)
def test_bad_input_is_one_message_before_anything_starts(
    model, tmp_path, monkeypatch, capsys, override, message
):
    said = refusal(command(tmp_path / "bad", model, override), monkeypatch, capsys)
    assert said.startswith("error: ") and message in said
    assert not (tmp_path / "bad").exists()


def refusal(words: list[str], monkeypatch, capsys) -> str:
    """Run `rlef` in this process. Returns the message with which it ends."""
    monkeypatch.setattr(sys, "argv", words[len(RLEF) - 1 :])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_run_directory_with_other_settings_is_refused(model, tmp_path, monkeypatch, capsys):
    run = tmp_path / "claimed"
    words = [f"run.dir={json.dumps(str(run))}", f"model.path={json.dumps(str(model))}"]
    claim = load_config(find_recipe("demo"), words, TrainConfig)
    claim_run_directory(claim, run, check_train(claim))
    before = (run / "config.toml").read_text()
    said = refusal(command(run, model), monkeypatch, capsys)
    assert "rollout.episodes_per_batch = 256 there, 8 here" in said
    assert (run / "config.toml").read_text() == before


def test_a_second_start_of_a_run_changes_nothing_in_its_folder(
    model, tmp_path, monkeypatch, capsys
):
    config = load_config(find_recipe("demo"), settings(tmp_path / "run", model), TrainConfig)
    run = RunDirectory(tmp_path / "run")
    claim_run_directory(config, run.path, check_train(config))
    run.lock()
    run.stop_request.touch()
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    said = refusal(command(run.path, model, "run.steps=9"), monkeypatch, capsys)
    assert f"{run.path} is in use by process {os.getpid()}" in said
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


class LoopDouble:
    """Parts and rollouts of a run whose servers share its devices. `told` has what the loop asked
    of them, in order; a publication finds no server."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, outcome: Rollout | EngineLostError | None = None
    ) -> None:
        sets = ["rollout.engine=sglang", "rollout.servers.release_memory=true"]
        self.config = load_config(find_recipe("demo"), sets, TrainConfig)
        self.learner = self.engine = self.checkpoints = self.progress = self
        self.guards = Guards(GuardConfig(), max_drop_fraction=0.5, max_staleness=1)
        self.outcome, self.taken, self.saved_last = outcome, 4, 1
        self.told: list[object] = []
        monkeypatch.setattr("rlef_mega.parts.any_rank", lambda flag: self.told.append("all ranks"))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: self.told.append(name)

    def note_phase(self, text: str) -> None:
        pass

    def state(self) -> dict[str, int]:
        return {"taken": self.taken}

    def batch(self, step: int) -> Rollout:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        self.taken += 2
        return self.outcome

    def save(self, step: int, state: dict[str, int], score: float | None = None) -> None:
        self.told.append((step, state))

    def policy_weights(self) -> Iterator[tuple[str, object]]:
        return iter(())

    def update_weights(self, weights: object, version: int) -> None:
        raise EngineLostError("no server")


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(
    "outcome", [EngineLostError("no server"), Rollout(("EngineError: it is broken", "late"))]
)
def test_a_step_without_its_dialogues_ends_the_run_after_a_checkpoint_of_the_step_before(
    monkeypatch, outcome, saved
):
    """Servers make room for it first. The dialogues that were dropped are run again later."""
    run = LoopDouble(monkeypatch, outcome)
    run.saved_last = 2 if saved else 1
    with pytest.raises((EngineLostError, GuardError)):
        all_steps(run, run, [3])
    saving = [] if saved else ["rest", "all ranks", (2, {"taken": 4})]
    assert run.told == ["say", "finish", *saving, "require_saved"]  # the reason comes first


def test_a_publication_that_fails_after_a_checkpoint_ends_the_run_once_that_is_complete(
    monkeypatch,
):
    run = LoopDouble(monkeypatch)
    with pytest.raises(EngineLostError):
        save(run, {"step": 3}, run.state(), ending=False)
    begun = ["poll", "rest", "all ranks", (3, {"taken": 4})]
    assert run.told == [*begun, "make_room", "end_update", "require_saved"]


def start(run: Path, model: Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(command(run, model), env=ENVIRONMENT, text=True, **options)


def steps_done(run: Path) -> int:
    return len(metrics(run)) if (run / "metrics.jsonl").exists() else 0


def wait_for(condition, running: Any = None, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert running is None or running.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.05)


def processes_of(run: Path) -> list[int]:
    """Find those with this directory in their command lines: the command, the agent, the ranks."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(run).encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
    return found
