"""Solutions known to be right pass: neither the sandbox nor its comparisons fail them.

The tests run a part of the inputs, or with RLEF_ALL_REFERENCES=1 all of them, which takes minutes.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rlef_sandbox import CHECKERS, CallTest, CheckTest, Limits, Sandbox, Status, Test, values
from tests.sandbox import reference_answers

DATA = Path(__file__).parents[3] / "shared" / "data"
EVERYTHING = os.environ.get("RLEF_ALL_REFERENCES") == "1"
PLUS_INPUTS = 10**6 if EVERYTHING else 4  # of a problem, besides its few base inputs
OTHER_TESTS = 10**6 if EVERYTHING else 2  # of a CodeContests problem, besides the public ones
AT_ONCE = 8 if EVERYTHING else 64  # problems whose answers are in memory at a time
LIMITS = Limits(cpu_s=20.0)

# Checks that call functions of the program's own file, which the checking side does not have: they
# are given the canonical solution, as the data set's own way of joining the two would.
CHECKS_THAT_NEED_THE_PROMPT = {
    "HumanEval/32": "poly, which the prompt defines",
    "HumanEval/33": "sort_third, compared with itself",
    "HumanEval/38": "encode_cyclic, which the prompt defines",
    "HumanEval/50": "encode_shift, which the prompt defines",
}
# Right by the published rule and wrong by the stricter default, each with what differs.
REFUSED_BY_TOKENS = {
    "791_B. Bear and Friendship Condition": "NO for No",
    "262_D. Maxim and Restaurant": "20.0 for 20",
    "1516_B. AGAGA XOOORRR": "Yes for YES",
}


class Problem(NamedTuple):
    name: str
    source: str
    entry_point: str
    inputs: list[list[Any]]
    check: str


def needs(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"../shared/data/{name} is not here")
    return path


def function_problems(name: str) -> Iterator[Problem]:
    with gzip.open(needs(name), "rt") as lines:
        for row in map(json.loads, lines):
            is_prefix = "def " in row["prompt"]  # HumanEval's solutions go on after the prompt
            source = row["prompt"] * is_prefix + row["canonical_solution"]
            inputs = row["base_input"] + (row["plus_input"] or [])[:PLUS_INPUTS]
            check = row.get("test", "")
            yield Problem(row["task_id"], source, row["entry_point"], inputs, check)


def answered(problems: list[Problem]) -> Iterator[tuple[Problem, list[CallTest]]]:
    """Yield each problem with tests of the inputs for which its solution has an answer."""
    asked = "".join(
        json.dumps({"source": p.source, "entry_point": p.entry_point, "inputs": p.inputs}) + "\n"
        for p in problems
    )
    sandbox_path = str(Path(values.__file__).parents[1])
    told = subprocess.run(
        [sys.executable, reference_answers.__file__],
        input=asked,
        env={**os.environ, "PYTHONPATH": sandbox_path, "PYTHONHASHSEED": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for problem, line in zip(problems, told.stdout.splitlines(), strict=True):
        yield (
            problem,
            [
                CallTest(problem.entry_point, tuple(arguments), values.decode(wire.encode()))
                for arguments, wire in zip(problem.inputs, json.loads(line), strict=True)
                if wire is not None
            ],
        )


def shown(value: object) -> str:
    """Return the wire form, since `repr` refuses the longest integers."""
    return values.encode(value)[:200].decode()


@pytest.fixture(scope="module")
def wide_sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=2) as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    ("name", "least_tests"),
    [
        ("HumanEvalPlus.jsonl.gz", 2000),
        pytest.param("MbppPlus.jsonl.gz", 2000, marks=pytest.mark.slow),
    ],
)
def test_canonical_solutions_pass_their_tests(
    wide_sandbox: Sandbox, name: str, least_tests: int
) -> None:
    problems = list(function_problems(name))
    count = 0

    def grade(problem: Problem, tests: list[CallTest]) -> list[str]:
        results = wide_sandbox.grade(problem.source, tests, LIMITS, stop_at_first_failure=False)
        return [
            f"{problem.name}{shown(test.args)} -> {result.status} {result.returned!r:.200}, "
            f"not {shown(test.expected)}; {result.stderr[-300:].decode()}"
            for test, result in zip(tests, results, strict=True)
            if result.status is not Status.OK
        ]

    failures: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(problems), AT_ONCE):
            tried = list(answered(problems[start : start + AT_ONCE]))
            count += sum(len(tests) for _, tests in tried)
            failures += [f for found in pool.map(lambda one: grade(*one), tried) for f in found]
    assert count > least_tests
    assert not failures, f"{len(failures)} failed:\n" + "\n".join(failures[:20])


def test_canonical_solutions_pass_their_checks(wide_sandbox: Sandbox) -> None:
    failures = []
    for problem in function_problems("HumanEvalPlus.jsonl.gz"):
        needs_prompt = problem.name in CHECKS_THAT_NEED_THE_PROMPT
        code = problem.source * needs_prompt + problem.check
        (result,) = wide_sandbox.grade(
            problem.source, [CheckTest(problem.entry_point, code)], LIMITS
        )
        if result.status is not Status.OK:
            failures.append(f"{problem.name}: {result.status} {result.stderr[-300:].decode()}")
    assert not failures, "\n".join(failures)


def test_right_solutions_pass_their_tests(wide_sandbox: Sandbox) -> None:
    lines = needs("codecontests_train_200.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["solution_passes_all_tests"]]

    def grade(row: dict[str, Any]) -> tuple[list[str], bool]:
        """Return what fails by the published rule, and whether the default rule accepts all."""
        public, other = row["public_tests"], row["other_tests"]
        pairs = [
            *zip(public["input"], public["output"], strict=True),
            *[*zip(other["input"], other["output"], strict=True)][:OTHER_TESTS],
        ]
        source = row["solutions"]["solution"][0]
        tests = [Test(*pair) for pair in pairs]
        results = wide_sandbox.grade(
            source, tests, LIMITS, checker="codecontests", stop_at_first_failure=False
        )
        failures = [
            f"{row['name']}: {r.status} {r.stdout[:60]!r}, not {t.expected[:60]!r} {r.stderr!r:.99}"
            for t, r in zip(tests, results, strict=True)
            if r.status is not Status.OK
        ]
        accepted = (
            CHECKERS["tokens"](t.expected, r.stdout) for t, r in zip(tests, results, strict=True)
        )
        return failures, all(accepted)

    with ThreadPoolExecutor(2) as pool:
        graded = dict(zip([row["name"] for row in rows], pool.map(grade, rows), strict=True))
    failures = [failure for found, _ in graded.values() for failure in found]
    assert not failures, f"{len(failures)} failed:\n" + "\n".join(failures[:40])
    refused = {name for name, (_, accepted) in graded.items() if not accepted}
    assert refused == set(REFUSED_BY_TOKENS)
