"""Solutions known to be right pass: the sandbox's world fails nobody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlef_sandbox import Sandbox, Status, Test

DATA = Path(__file__).parents[3] / "shared" / "data" / "codecontests_train_200.jsonl"
EVERY = 8  # of the problems whose solution passes; all of them take minutes


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data/codecontests_train_200.jsonl missing")
def test_right_solutions_pass_their_public_tests() -> None:
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    rows = [row for row in rows if row["solution_passes_all_tests"]][::EVERY]
    with Sandbox(workers=1) as sandbox:
        for row in rows:
            public = row["public_tests"]
            tests = [Test(*pair) for pair in zip(public["input"], public["output"], strict=True)]
            (source,) = row["solutions"]["solution"][:1]
            results = sandbox.grade(source, tests, checker="codecontests")
            assert all(result.status is Status.OK for result in results), row["name"]
