"""`rlef eval` end to end: resumed after a kill, regraded, refused. Responses come from a server
that selects one of five by the request's seed; grading is real."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlef_mega.cli import app
from rlef_mega.config import ConfigError
from rlef_mega.dialogues.chat import CONTROLS, ChatFormat
from rlef_mega.evaluation.command import EvalRequest, Source, run_evaluation, with_lengths
from rlef_mega.evaluation.dialogue_file import DialogueFile, Key, key_of, read_dialogues
from rlef_mega.evaluation.numbers import numbers_of
from rlef_mega.evaluation.protocols import SINGLE, PlannedDialogues
from rlef_mega.megatron.convert.from_hf import import_folder
from rlef_mega.problems import load_problems
from rlef_mega.problems.jsonl import to_row
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import Test
from tests.rlef_mega.dialogues.test_chat import byte_tokenizer
from tests.rlef_mega.engines.sglang.server_double import ServerDouble
from tests.rlef_mega.tiny_llama import tiny_llama

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
NAMES = ("Bob", "Kim", "Ida", "Max", "Zoe")
RIGHT = "```python\nprint('Hello',input())\n```"
WRONG = "```python\nprint('Ciao',input())\n```"
ONLY_PUBLIC = "```python\nname=input()\nprint('Hello' if len(name)==3 else 'Bye',name)\n```"
NO_CODE = "I do not know."
RESPONSES = [RIGHT, WRONG, ONLY_PUBLIC, NO_CODE, WRONG]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a tiny model and its tokenizer. Returns their folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(262).save_pretrained(folder)
    byte_tokenizer(CONTROLS["llama3"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "greet.jsonl"
    problems = [
        Problem(
            id=f"greet-{name}",
            statement="Greet the person whose name is given.",
            public_tests=(Test(f"{name}\n", f"Hello {name}\n"),),
            private_tests=PrivateTests((Test("Julia\n", "Hello Julia\n"),)),
            template="curriculum",
            family="greet",
            difficulty="easy" if name < "K" else "hard",
        )
        for name in NAMES
    ]
    path.write_text("".join(json.dumps(to_row(problem)) + "\n" for problem in problems))
    return path


class SpeakingServer(ServerDouble):
    def __init__(self, folder: Path) -> None:
        super().__init__(1, str(folder), "default")
        self.chat = ChatFormat.from_folder(folder)
        self.loaded_from: list[Path] = []

    async def update_weights_from_disk(self, body):
        self.loaded_from.append(Path(body["model_path"]).parent)
        return await super().update_weights_from_disk(body)

    async def server_info(self, body):
        return {**await super().server_info(body), "max_req_input_len": 2000}

    async def generate(self, body):
        self.prompts.append(body["input_ids"])
        await asyncio.sleep(self.delay_s)
        asked = body["sampling_params"]
        whole = self.chat.respond(RESPONSES[asked["sampling_seed"] % len(RESPONSES)])
        ids = whole[: asked["max_new_tokens"]]
        version = {"version": self.weight_version, "start": 0, "end": len(ids)}
        return {
            "output_ids": ids,
            "meta_info": {
                "finish_reason": {"type": "stop" if ids == whole else "length"},
                "output_token_logprobs": [[-0.25, id, None] for id in ids],
                "weight_versions": [version],
                "cached_tokens": 0,
            },
        }


@pytest.fixture(scope="module")
def server(folder):
    with SpeakingServer(folder) as server:
        yield server


def request_of(folder: Path, data: Path, out: Path, server: ServerDouble | None) -> EvalRequest:
    return EvalRequest(
        model=folder,
        data=str(data),
        out=out,
        name=None,
        step=None,
        problems=0,
        n_at_k="1@3,2@6",
        rollouts=3,
        turns=3,
        feedback=("true", "random", "private"),
        single_turn=True,
        temperature=1.0,
        top_p=1.0,
        max_new_tokens=120,
        max_context=2000,
        dtype="float32",
        seed=0,
        at_once=4,
        sglang=(server.url,) if server else (),
    )


def words(request: EvalRequest) -> list[str]:
    """Return the command line."""
    return [
        *(sys.executable, "-m", "rlef_mega.cli", "eval", str(request.model)),
        *("--data", request.data, "--out", str(request.out), "--n-at-k", str(request.n_at_k)),
        *("--rollouts", "3", "--feedback", "true,random,private", "--temperature", "1"),
        *("--top-p", "1", "--max-new-tokens", "120", "--max-context", "2000", "--at-once", "4"),
        *("--sglang", request.sglang[0]),
    ]


def result(out: Path, name: str = "tiny") -> dict:
    return json.loads((out / f"eval/{name}.json").read_text())


def dialogues(out: Path, name: str = "tiny") -> dict:
    """Return the dialogue records by key."""
    records = read_dialogues(out / f"eval/{name}.dialogues.jsonl")
    return {key_of(record): record for record in records}


@pytest.fixture(scope="module")
def undisturbed(folder, data, server, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    server.prompts.clear()
    run_evaluation(request_of(folder, data, out, server))
    return out


def test_every_dialogue_is_held_once_and_all_numbers_are_there(undisturbed, server):
    held = dialogues(undisturbed)
    assert len(held) == sum(1 for _ in read_dialogues(undisturbed / "eval/tiny.dialogues.jsonl"))
    assert Counter(key.protocol for key in held) == {
        "independent": 45,
        "multi_turn": 15,
        "random_feedback": 15,
        "private_feedback": 15,
    }
    assert sum(len(record["turns"]) for record in held.values()) == len(server.prompts)
    found = result(undisturbed)
    for protocol, numbers in found["protocols"].items():
        assert numbers["asked"] == numbers["dialogues"] and not numbers["dropped"]
        assert set(numbers["n_at_k"]) == {"1@3", "2@6"} and numbers["by_difficulty"].keys() == {
            "easy",
            "hard",
        }
        assert ("turn_budget" in numbers) == (protocol != "independent")
    outcomes = {t["outcome"] for record in held.values() for t in record["turns"]}
    assert outcomes == {"OK", "WRONG_ANSWER", "PRIVATE_TEST", "NO_VALID_CODE"}
    assert found["sessions"][0]["engine"]["weights"] == "verified"
    assert (undisturbed / "eval/tiny.png").stat().st_size > 10_000


def test_feedback_is_what_was_asked_for(undisturbed):
    told = {"multi_turn": [], "random_feedback": [], "private_feedback": []}
    for key, record in dialogues(undisturbed).items():
        if key.protocol in told:
            own = key.problem_id.removeprefix("greet-")
            told[key.protocol] += [(own, turn["observation"]) for turn in record["turns"][1:]]
    assert all(told.values())
    assert all(own in text or "No code" in text for own, text in told["multi_turn"])
    assert not any("Julia" in text for _, text in told["multi_turn"])
    assert not any(own in text for own, text in told["random_feedback"])
    assert any("Expected" in text for _, text in told["random_feedback"])
    assert any("Julia" in text for _, text in told["private_feedback"])


def test_a_killed_evaluation_resumes_with_the_same_results(
    undisturbed, folder, data, server, tmp_path
):
    """SIGKILL while dialogues are sampled, and a last line that was cut."""
    request = request_of(folder, data, tmp_path, server)
    path = tmp_path / "eval/tiny.dialogues.jsonl"
    server.delay_s = 0.05
    child = subprocess.Popen(words(request), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 400
        while not path.exists() or path.read_text().count('"multi_turn"') < 3:
            assert child.poll() is None and time.monotonic() < until
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    server.delay_s = 0.0
    whole = sum(1 for _ in read_dialogues(path))
    assert 45 < whole < 90
    with path.open("a") as file:
        file.write('{"protocol": "multi_turn", "problem')
    run_evaluation(request)
    assert dialogues(tmp_path) == dialogues(undisturbed)
    assert sum(1 for _ in read_dialogues(path)) == 90, "a dialogue was written twice"
    again, before = result(tmp_path), result(undisturbed)
    assert again["protocols"] == before["protocols"] and len(again["sessions"]) == 2
    asked = len(server.prompts)
    run_evaluation(request)  # there is nothing left to do
    assert len(server.prompts) == asked and result(tmp_path)["protocols"] == before["protocols"]


def test_a_later_request_may_add_dialogues_but_not_change_settings(
    undisturbed, folder, data, server, tmp_path
):
    small = replace(
        request_of(folder, data, tmp_path, server),
        feedback=("true",),
        single_turn=False,
        rollouts=1,
    )
    run_evaluation(small)
    assert Counter(key.protocol for key in dialogues(tmp_path)) == {"multi_turn": 5}
    run_evaluation(replace(small, rollouts=3, single_turn=True, n_at_k="3@9"))
    later, whole = dialogues(tmp_path), dialogues(undisturbed)
    assert later == {key: whole[key] for key in later} and len(later) == 60
    assert result(tmp_path)["protocols"]["multi_turn"]["n_at_k"].keys() == {"1@3", "3@9"}
    for change in ({"temperature": 0.5}, {"turns": 2}, {"seed": 1}, {"problems": 3}):
        with pytest.raises(ConfigError, match=r"another evaluation .* here.*--name"):
            run_evaluation(replace(small, **change))


def test_dialogues_dropped_by_a_fault_are_sampled_again(folder, data, server, tmp_path):
    request = replace(request_of(folder, data, tmp_path, server), feedback=("true",))
    run_evaluation(request)
    path = tmp_path / "eval/tiny.dialogues.jsonl"
    before, keys = result(tmp_path), list(dialogues(tmp_path))
    faulty = [{**keys[0]._asdict(), "dropped": "EngineError"}]
    faulty.append({**keys[1]._asdict(), "dropped": "prompt too long"})
    lines = path.read_text().splitlines()
    kept = [line for line in lines if "protocol" not in json.loads(line)]
    kept += [line for line in lines if "protocol" in json.loads(line)][2:]
    path.write_text("\n".join(kept + [json.dumps(record) for record in faulty]) + "\n")
    run_evaluation(request)
    numbers = result(tmp_path)["protocols"][keys[0].protocol]
    assert numbers["dropped"] == {} and numbers["dialogues"] == numbers["asked"] == 45
    assert numbers["error_kinds"]["turn1"]["PROMPT_TOO_LONG"] == 1  # the model's fault, if any
    assert dialogues(tmp_path)[keys[0]]["solved"] in (True, False)
    same = (found["protocols"]["multi_turn"]["n_at_k"] for found in (before, result(tmp_path)))
    assert next(same) == next(same)


def small(folder, data, out, server) -> EvalRequest:
    """Return the request for one dialogue of each problem."""
    request = request_of(folder, data, out, server)
    return replace(request, feedback=("true",), single_turn=False, rollouts=1)


def test_an_evaluation_takes_back_only_servers_that_a_kill_kept_it_from_releasing(
    folder, data, server, tmp_path
):
    """Servers that it had released, and that another process uses now, are refused."""
    request = small(folder, data, tmp_path, server)
    run_evaluation(request)
    server.weight_version = "7"
    try:
        with pytest.raises(ConfigError, match="has weights of version 7"):
            run_evaluation(replace(request, rollouts=2))
    finally:
        server.weight_version = "default"


def test_only_the_last_session_claims_its_servers_until_it_releases_them(tmp_path):
    one, other = {"servers": ["http://a"]}, {"servers": ["http://b"]}
    with DialogueFile.locked(tmp_path / "file", {}) as file:
        assert not file.claims(one)
        for record, claimed in (
            ({"session": {"engine": one}}, (True, False)),
            ({"released": one}, (False, False)),
            ({"session": {"engine": one}}, (True, False)),
            ({"session": {"engine": other}}, (False, True)),
        ):
            file.append(record)
            assert (file.claims(one), file.claims(other)) == claimed


def test_evaluations_of_two_names_send_their_weights_through_folders_of_their_own(
    folder, data, server, tmp_path
):
    server.loaded_from.clear()
    for name in ("one", "two"):
        run_evaluation(replace(small(folder, data, tmp_path, server), name=name))
    assert len(set(server.loaded_from)) == 2


def test_servers_without_room_for_the_context_are_refused_and_left_alone(
    folder, data, server, tmp_path
):
    server.loaded_from.clear()
    request = replace(small(folder, data, tmp_path, server), max_context=2010)
    with pytest.raises(ConfigError, match=r"--max-context 2010, but .* room for 2004 tokens"):
        run_evaluation(request)
    assert not server.loaded_from and server.weight_version == "default"


def test_an_evaluation_stops_when_another_process_publishes_to_its_servers(folder, data, tmp_path):
    """The file holds no dialogue with tokens of the other weights."""

    class TakenServer(SpeakingServer):
        async def generate(self, body):
            if len(self.prompts) == 2:
                self.weight_version = "1"
            return await super().generate(body)

    with TakenServer(folder) as taken:
        request = replace(small(folder, data, tmp_path, taken), turns=1, n_at_k=None, at_once=1)
        with pytest.raises(RuntimeError, match="another process publishes weights"):
            run_evaluation(request)
    assert len(dialogues(tmp_path)) == 2


def test_two_processes_cannot_write_one_evaluation(undisturbed):
    path = undisturbed / "eval/tiny.dialogues.jsonl"
    asked = json.loads(path.open().readline())["asked"]
    with (
        DialogueFile.locked(path, asked),
        pytest.raises(ConfigError, match="another process"),
        DialogueFile.locked(path, asked),
    ):
        pass


@pytest.mark.parametrize("left", ["", '{"rlef_eval": 1, "ask'])
def test_a_file_of_a_process_that_was_killed_before_its_header_is_started_over(tmp_path, left):
    (tmp_path / "one.jsonl").write_text(left)
    with DialogueFile.locked(tmp_path / "one.jsonl", {"seed": 1}) as file:
        file.append({"session": 1})
    with DialogueFile.locked(tmp_path / "one.jsonl", {"seed": 1}):
        pass
    assert len((tmp_path / "one.jsonl").read_text().splitlines()) == 2


def test_a_protocol_whose_dialogues_all_failed_does_not_hide_others(undisturbed, data, tmp_path):
    lines = (undisturbed / "eval/tiny.dialogues.jsonl").read_text().splitlines()
    path = tmp_path / "one.dialogues.jsonl"
    with path.open("w") as file:
        for line in lines:
            record = json.loads(line)
            if record.get("protocol") == "random_feedback":
                record = {key: record[key] for key in ("protocol", "problem_id", "number")}
                record["dropped"] = "JudgeError"
            file.write(json.dumps(record) + "\n")
    before = result(undisturbed)["protocols"]
    keys: dict[str, list[Key]] = {}
    for key in map(key_of, read_dialogues(path)):
        keys.setdefault(key.protocol, []).append(key)
    parts = [
        PlannedDialogues(name, 1 if name == SINGLE else 3, tuple(dict.fromkeys(mine)))
        for name, mine in keys.items()
    ]
    problems = load_problems(str(data))
    found = numbers_of(path, problems, parts, turns=3, n_at_k=[(1, 3)])
    count = len(keys["random_feedback"])
    assert found["all_dropped"] == {"random_feedback": {"JudgeError": count}}
    assert set(found["protocols"]) == set(before) - {"random_feedback"}
    assert found["protocols"]["multi_turn"]["outcomes"] == before["multi_turn"]["outcomes"]
    with pytest.raises(RuntimeError, match="every dialogue"):
        numbers_of(
            path,
            problems,
            [p for p in parts if p.protocol == "random_feedback"],
            turns=3,
            n_at_k=[],
        )


# -------------------------------------------------------------------------------- graded again


def test_recorded_responses_give_the_same_numbers(undisturbed, folder, data, tmp_path):
    file = undisturbed / "eval/tiny.dialogues.jsonl"
    run_evaluation(request_of(file, data, tmp_path, None))
    again, before = result(tmp_path, "tiny-regraded"), result(undisturbed)
    for protocol, numbers in before["protocols"].items():
        found = again["protocols"][protocol]
        assert {k: found[k] for k in numbers if k != "response_tokens"} == {
            k: v for k, v in numbers.items() if k != "response_tokens"
        }
    with pytest.raises(ConfigError, match="at most 3 turns"):
        run_evaluation(replace(request_of(file, data, tmp_path, None), turns=4, n_at_k=None))


def test_foreign_responses_are_graded_until_their_dialogue_would_have_ended(data, tmp_path):
    file = tmp_path / "said.jsonl"
    rows = [
        {"problem_id": "greet-Bob", "responses": [WRONG, RIGHT, WRONG]},
        {"problem_id": "greet-Kim", "responses": [WRONG, NO_CODE]},
        {"task_id": "greet-Bob", "response": ONLY_PUBLIC},
        {"task_id": "greet-Bob", "response": RIGHT},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_evaluation(replace(request_of(file, data, tmp_path, None), n_at_k="1@3"))
    held = dialogues(tmp_path, "said-regraded")
    kinds = [[turn["outcome"] for turn in record["turns"]] for record in held.values()]
    assert sorted(kinds) == [
        ["OK"],
        ["PRIVATE_TEST"],
        ["WRONG_ANSWER", "NO_VALID_CODE"],
        ["WRONG_ANSWER", "OK"],
    ]
    found = result(tmp_path, "said-regraded")["protocols"]
    assert found["multi_turn"]["solve_rate"]["value"] == 0.5
    assert found["multi_turn"]["problems_left_out"] == ["greet-Ida", "greet-Max", "greet-Zoe"]
    assert found["independent"]["n_at_k"]["1@3"]["bootstrapped"] == 1
    for row, message in (
        ({"problem_id": "greet-Ann", "response": RIGHT}, "greet-Ann"),
        ({"problem_id": "greet-Bob", "responses": []}, "give each line problem_id"),
        ({"problem_id": "greet-Bob", "responses": [3]}, r"line 1: .*responses \(a list of texts"),
        (
            {"protocol": "greedy", "problem_id": "a", "number": 0},
            "unknown protocol 'greedy'; known",
        ),
        ({"protocol": "multi_turn", "problem_id": "a", "number": 0}, "not a dialogue"),
        ({"protocol": "multi_turn", "problem_id": "a", "number": 0, "turns": []}, "not a dialogue"),
        ({"protocol": "multi_turn", "turns": []}, "not a dialogue"),
        ({"rlef_eval": 1}, "not a dialogue"),
    ):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(ConfigError, match=message):
            run_evaluation(request_of(file, data, tmp_path, None))


def test_programs_import_the_packages_and_are_isolated_as_the_command_says(data, tmp_path):
    file = tmp_path / "said.jsonl"
    response = RIGHT.replace("print", "import numpy\nprint")
    file.write_text(json.dumps({"problem_id": "greet-Bob", "response": response}))
    words = ["eval", str(file), "--data", str(data), "--out", str(tmp_path), "--turns", "1"]
    wide = CliRunner().invoke(app, [*words, "--package", "numpy", "--isolation", "minimal"])
    assert wide.exit_code == 0, wide.output
    (record,) = dialogues(tmp_path, "said-regraded").values()
    (session,) = result(tmp_path, "said-regraded")["sessions"]
    assert record["solved"] and session["isolation"]["level"] == "minimal"
    narrow = CliRunner().invoke(app, words)
    assert "another evaluation (packages = ['numpy'] there" in str(narrow.exception)


# ------------------------------------------------------------------------------------- a model


def test_a_checkpoint_is_exported_once_and_sampled_by_the_embedded_engine(folder, data, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    import_folder(folder, checkpoint)
    request = replace(
        request_of(checkpoint, data, tmp_path, None),
        feedback=("true",),
        n_at_k=None,
        rollouts=1,
        turns=2,
        max_new_tokens=4,
    )
    run_evaluation(request)
    (model,) = (tmp_path / "models").iterdir()
    assert model.name.startswith("checkpoint-") and (model / "config.json").is_file()
    found = result(tmp_path, "checkpoint")
    assert found["protocols"]["multi_turn"]["error_kinds"]["turn1"] == {"NO_VALID_CODE": 5}
    assert found["protocols"]["multi_turn"]["response_tokens"] == 5 * 2 * 4
    assert found["sessions"][0]["engine"] == {"kind": "local", "dtype": "float32"}
    # another checkpoint of that name is another model
    os.rename(checkpoint, tmp_path / "moved")
    tiny_llama(262, seed=1).save_pretrained(tmp_path / "other")
    byte_tokenizer(CONTROLS["llama3"]).save_pretrained(tmp_path / "other")
    import_folder(tmp_path / "other", checkpoint)
    run_evaluation(replace(request, name="other"))
    identities = {result(tmp_path, name)["weights"] for name in ("checkpoint", "other")}
    assert len(identities) == 2
    os.rename(checkpoint, tmp_path / "moved too")
    with pytest.raises(ConfigError, match="no such folder"):
        run_evaluation(request)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_at_k": "1@2"}, "counts as 3 samples"),
        ({"n_at_k": "3"}, "is not n@k"),
        ({"feedback": ("maybe",)}, "use one or more of true, none, random, private"),
        ({"feedback": ("random",), "single_turn": False}, "leave --single-turn on"),
        ({"feedback": (), "single_turn": False}, "nothing to evaluate"),
        ({"max_context": 10**6}, "config.json has max_position_embeddings = "),
        ({"max_context": 100, "max_new_tokens": 100}, "leaves no room for a prompt"),
    ],
)
def test_requests_that_make_no_sense_are_refused_before_work(
    folder, data, tmp_path, change, message
):
    with pytest.raises(ValueError, match=message):
        run_evaluation(replace(request_of(folder, data, tmp_path, None), **change))
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize(
    ("positions", "asked", "lengths"),
    [
        (8192, {}, (2048, 512)),
        (512, {}, (512, 256)),
        (512, {"max_new_tokens": 100}, (512, 100)),
        (8192, {"max_context": 4096}, (4096, 512)),
    ],
)
def test_default_lengths_fit_the_model(folder, data, tmp_path, positions, asked, lengths):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = positions
    (model / "config.json").write_text(json.dumps(config))
    request = request_of(model, data, tmp_path, None)
    request = replace(request, **{"max_context": None, "max_new_tokens": None} | asked)
    fitted = with_lengths(request, Source("model", "", folder=model))
    assert (fitted.max_context, fitted.max_new_tokens) == lengths
