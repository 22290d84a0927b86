"""Rows that come with a solution: when a source is first read, each solution is run in the sandbox
on the tests and limits made from its own row. A task whose solution fails cannot be solved by
anyone, so it is left out and named.

This takes minutes. Finished rows are kept in a journal beside the store, one per line, until the
store is complete: a reader that was killed resumes from it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlef_mega.problems.jsonl import parse_problem, to_row
from rlef_mega.problems.literals import to_literal
from rlef_mega.problems.rows import Parsed, Read, Row, read_each, read_rows
from rlef_mega.run.progress import StepProgress
from rlef_mega.types import Problem, tests_of
from rlef_sandbox import Result, Sandbox, Status

SOLUTION_FAILS = "its own solution fails"


def read_graded(
    files: Sequence[Path], id_key: str, journal: Path, parse: Callable[[Row, Sandbox], Parsed]
) -> Iterator[Read]:
    """Yield the outcome of each row, as `parse` makes it with a sandbox, with a progress bar."""
    finished = read_journal(journal)
    total = sum(1 for path in files for _ in read_rows(path))
    with (
        Sandbox(workers=1) as sandbox,
        journal.open("a", encoding="utf-8") as file,
        StepProgress("grading solutions", done=len(finished), total=total, shown=True) as progress,
    ):
        file.write("\n")  # the last line may have been cut off

        def parse_once(row: Row, _: Path) -> Parsed:
            key = hashlib.blake2b(to_literal(row).encode(), digest_size=16).hexdigest()
            if entry := finished.get(key):
                graded = entry["problem"] and parse_problem(entry["problem"], compiled=False)
                return graded, [tuple(lost) for lost in entry["lost"]]
            problem, lost = parse(row, sandbox)
            line = {"key": key, "problem": problem and to_row(problem), "lost": lost}
            file.write(json.dumps(line) + "\n")
            file.flush()
            progress.step(str(row.get(id_key, "")))
            return problem, lost

        yield from read_each(files, id_key, parse_once)


def read_journal(journal: Path) -> dict[str, Any]:
    """Return the lines of a journal by the keys of their rows, without a line that was cut off."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    if not journal.is_file():
        return {}
    finished = {}
    for line in journal.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            finished[entry["key"]] = entry
    return finished


def grade_solution(problem: Problem, solution: str, sandbox: Sandbox) -> tuple[list[Result], str]:
    """Grade a solution. Returns its results and how it fails, empty if it passes.

    Raises RuntimeError if the sandbox did not run it.
    """
    tests = tests_of(problem)
    results = sandbox.grade(
        problem.prelude + solution, tests, limits=problem.limits, checker=problem.checker
    )
    last = results[-1]
    if last.status is Status.OK:
        return results, ""
    message = last.stderr.decode(errors="replace").strip().rpartition("\n")[2][:200]
    if last.status is Status.SANDBOX_ERROR and "CheckTest" not in message:
        raise RuntimeError(f"the sandbox failed on a solution of {problem.id}: {message}")
    return results, f"test {len(results)} of {len(tests)}: {last.status} {message}"
