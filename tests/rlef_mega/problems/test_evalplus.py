"""HumanEval+ and MBPP+: expected outputs from canonical solutions, compared as evalplus does."""

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlef_mega.dialogues import judge
from rlef_mega.problems import evalplus, load_problems, read_data_set
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import Sandbox, Status

# Published tasks, for checks on machines that have them; nothing else needs them.
PUBLISHED = Path(__file__).parents[4] / "shared/data/HumanEvalPlus-Mini.jsonl.gz"

HALVES = {
    "task_id": "HumanEval/900",
    "prompt": 'def halves(xs):\n    """Half of each."""\n',
    "entry_point": "halves",
    "canonical_solution": "    return [x / 2 for x in xs]\n",
    "base_input": [[[1, 2]], [[]]],
    "plus_input": [[[n]] for n in range(150)],
    "atol": 0,
}
PAIRS = {  # a published number, whose arguments are tuples
    "task_id": "Mbpp/2",
    "prompt": '"""\nFind the shared elements.\nassert similar_elements((1,), (1,)) == (1,)\n"""\n',
    "entry_point": "similar_elements",
    "canonical_solution": "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
    "base_input": [[[1, 2, 3], [3, 2]]],
    "plus_input": [[[1], [2]]],
    "atol": 0,
}
LARGE = {
    **HALVES,
    "task_id": "HumanEval/901",
    "entry_point": "power",
    "prompt": "def power(n):\n",
    "canonical_solution": "    return 10**n\n",
    "base_input": [[3], [60000]],
    "plus_input": [],
}


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> list[Problem]:
    folder = tmp_path_factory.mktemp("evalplus")
    file = folder / "tasks.jsonl.gz"
    rows = (HALVES, PAIRS, LARGE)
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    store = load_problems(f"evalplus:{file}", folder / "cache")
    assert [drop.detail for drop in store.drops] == ["1 of 2 tests"]
    return list(store)


def test_plus_tests_are_never_shown(tmp_path):
    """The first base output is too large to store: only the second base test is shown, and no plus
    test replaces the first."""
    row = {**LARGE, "base_input": [[60000], [3]], "plus_input": [[7]]}
    file = tmp_path / "large.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (problem,) = load_problems(f"evalplus:{file}", tmp_path / "cache")
    assert [test.statement for test in problem.public_tests] == ["assert power(3) == 1000"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"atol": "x"}, "atol: 'x' is not a number"),
        ({"base_input": [1, 2]}, "base_input.*1 is not a list"),
    ],
)
def test_a_malformed_task_is_named(tmp_path, change, message):
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps({**HALVES, **change}) + "\n")
    with pytest.raises(ValueError, match=message):
        load_problems(f"evalplus:{file}", tmp_path / "cache")


def statuses(problem: Problem, program: str) -> list[Status]:
    with Sandbox(workers=1) as sandbox:
        results = sandbox.grade(
            program, judge.tests_of(problem), limits=problem.limits, stop_at_first_failure=False
        )
    return [result.status for result in results]


def test_base_tests_are_shown_with_expected_outputs_and_all_decide(problems):
    halves, pairs, large = problems
    assert [t.statement for t in halves.public_tests] == [
        "assert halves([1, 2]) == [0.5, 1.0]",
        "assert halves([]) == []",
    ]
    assert len(halves.private_tests.tests) == 7  # 152 inputs, 25 per check
    (shown,) = pairs.public_tests
    assert shown.statement.startswith("assert set(similar_elements((1, 2, 3), (3, 2))) == set((")
    assert pairs.statement == "Find the shared elements."
    assert [t.statement for t in large.public_tests] == ["assert power(3) == 1000"]


@pytest.mark.parametrize(
    "body, public, private",
    [
        ("[x / 2 for x in xs]", "..", "......."),
        ("[x / 2 + 1e-8 for x in xs]", "..", "......."),  # floats within 1e-6
        ("[x / 2 + 1e-5 for x in xs]", "F.", "FFFFFFF"),
        ("[x / 2 if x < 120 else 0.0 for x in xs]", "..", "....FFF"),
        ("tuple(x / 2 for x in xs)", "FF", "FFFFFFF"),  # evalplus distinguishes tuples from lists
        ("None", "FF", "FFFFFFF"),
    ],
)
def test_outputs_are_compared_as_evalplus_does(problems, body, public, private):
    found = statuses(problems[0], f"def halves(xs):\n    return {body}\n")
    assert "".join("." if s is Status.OK else "F" for s in found) == public + private


TEXT = {
    **HALVES,
    "task_id": "HumanEval/902",
    "prompt": "def same(x):\n",
    "entry_point": "same",
    "canonical_solution": "    print('a line of its own')\n    return x\n",
    "base_input": [],
}
UNUSUAL = {
    "outside the basic plane": "a \U0001f600 b",
    "half a surrogate pair": "\ud83d",
    "separators of lines": "\u2028\x85\x0b\r\n\\N{BULLET}",
    "quotes and a null": '\'"""\x00{}',
    "an integer of 5,001 digits": 10**5000,
    "a long integer within": [{"k": -(10**5000)}, float("inf")],
}


@pytest.mark.parametrize("value", UNUSUAL.values(), ids=UNUSUAL)
def test_values_reach_programs_unchanged(tmp_path, value):
    file = tmp_path / "text.jsonl"
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    file.write_text(json.dumps({**TEXT, "base_input": [[value]], "plus_input": [[value]]}) + "\n")
    sys.set_int_max_str_digits(limit)
    (problem,) = load_problems(f"evalplus:{file}", tmp_path / "cache")
    assert set(statuses(problem, "def same(x): return x")) == {Status.OK}
    wrong = "def same(x): return [x] if isinstance(x, list) else x + x"
    assert set(statuses(problem, wrong)) == {Status.WRONG_ANSWER}


def read(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_data_set(f"evalplus:{file}", tmp_path / "cache")


def test_limits_follow_from_the_solutions_time(tmp_path, monkeypatch):
    """Every input has four times the solution's time. A check holds one input, or several of
    2 s and 1 MiB together: here the solution takes 0.6 s of CPU for one input and 0.22 s each for
    two others, and three have half a megabyte each."""
    monkeypatch.setattr(evalplus, "LIMITS", replace(evalplus.LIMITS, cpu_s=2.0))
    slow = {
        **HALVES,
        "prompt": "import time\ndef wait(s, text):\n",
        "entry_point": "wait",
        "canonical_solution": "    end = time.process_time() + s\n"
        "    while time.process_time() < end: pass\n    return len(text)\n",
        "base_input": [[0, ""]],
        "plus_input": [[0.6, ""], [0.22, ""], [0.22, ""], *[[0, "x" * 450_000]] * 3],
    }
    (problem,) = read(tmp_path, slow)
    assert 2.4 <= problem.limits.cpu_s < 3.2
    assert len(problem.private_tests.tests) == 4  # 0 s | 0.6 s | 0.44 s, two texts | a text


def test_memory_follows_from_the_solutions_memory(tmp_path):
    row = {**HALVES, "base_input": [[[1]]], "plus_input": []}
    row["canonical_solution"] = "    return [x / 2 for x in xs][: len('x' * 7 * 10**8)]\n"
    (problem,) = read(tmp_path, row)
    assert 1 << 30 < problem.limits.memory_bytes <= 8 << 30


def test_a_match_is_an_answer_and_complex_numbers_are_left_out_by_name(tmp_path, caplog):
    search = {
        **PAIRS,
        "task_id": "Mbpp/787",
        "entry_point": "text_match_three",
        "canonical_solution": "import re\ndef text_match_three(t):\n    return re.search('a', t)\n",
        "base_input": [["ba"], ["b"]],
        "plus_input": [],
    }
    root = {**search, "task_id": "Mbpp/590", "entry_point": "f", "base_input": [[1]]}
    root["canonical_solution"] = "f = complex\n"
    fails = {**root, "task_id": "Mbpp/591", "base_input": [[[]]]}
    store = read(tmp_path, search, root, fails)
    assert [(drop.id, drop.reason) for drop in store.drops] == [
        ("Mbpp/590", "its own solution fails"),
        ("Mbpp/591", "its own solution fails"),
    ]
    for body, found in {
        "re.search('a', t)": "...",
        "'a' in t": "...",
        "[] if 'a' in t else None": "...",
        "re.search('b', t)": ".FF",
        "re.search('a', t).start()": ".FF",
    }.items():
        program = f"import re\ndef text_match_three(t):\n    return {body}\n"
        results = statuses(store[0], program)
        assert "".join("." if s is Status.OK else "F" for s in results) == found, body
    load_problems(f"evalplus:{tmp_path}/rows.jsonl", tmp_path / "cache")
    assert "left out Mbpp/590: its own solution fails: does not return plain data" in caplog.text


def test_a_reader_that_was_killed_continues(tmp_path, capsys):
    """The second start finds the first row in the journal, after which a line was cut off."""
    slow = {**HALVES, "task_id": "HumanEval/903", "plus_input": []}
    slow["canonical_solution"] = f"    sum(range(3 * 10**7))\n{HALVES['canonical_solution']}"
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(HALVES) + "\n" + json.dumps(slow) + "\n")
    call = f"read_data_set({f'evalplus:{file}'!r}, Path({str(tmp_path / 'cache')!r}))"
    code = f"from pathlib import Path; from rlef_mega.problems import read_data_set; {call}"
    reader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert b"1/2  HumanEval/900" in reader.stdout.readline()
    reader.kill()
    reader.communicate()
    (journal,) = (tmp_path / "cache").glob("*.journal")
    journal.write_text(journal.read_text() + '{"key": "cut o')
    store = read(tmp_path, HALVES, slow)
    assert [problem.id for problem in store] == ["HumanEval/900+", "HumanEval/903+"]
    printed = capsys.readouterr().out
    assert "2/2  HumanEval/903" in printed and "HumanEval/900" not in printed
    assert not list((tmp_path / "cache").glob("*.journal"))


def test_special_oracles_hold(problems):
    program = "def similar_elements(a, b):\n    return [x for x in b if x in a] * 2\n"
    assert set(statuses(problems[1], program)) == {Status.OK}  # as sets
    assert statuses(problems[1], "def similar_elements(a, b):\n    return (1,)\n")[0] is (
        Status.WRONG_ANSWER
    )


def test_the_published_solutions_pass_and_defective_ones_do_not(tmp_path):
    if not PUBLISHED.is_file():
        pytest.skip("../shared/data/HumanEvalPlus-Mini.jsonl.gz is not here")
    lines = gzip.decompress(PUBLISHED.read_bytes()).splitlines()
    chosen = [json.loads(lines[number]) for number in (0, 2, 32, 38, 50)]
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    for row, problem in zip(chosen, load_problems(f"evalplus:{file}", tmp_path), strict=True):
        assert isinstance(problem.private_tests, PrivateTests)
        found = statuses(problem, row["prompt"] + row["canonical_solution"])
        assert set(found) == {Status.OK}, problem.id
        found = statuses(problem, f"def {row['entry_point']}(*given):\n    return 'no'\n")
        assert Status.OK not in found, problem.id
