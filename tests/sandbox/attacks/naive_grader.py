"""A grader of the common, wrong kind: it runs the program and judges it in one process.

`python naive_grader.py program|function < source` prints PASS or FAIL. It is here to show that the
attacks on verdicts are real: `test_attacks.py` starts it in a throw-away process.
"""

from __future__ import annotations

import contextlib
import io
import sys

QUESTION, EXPECTED = "question", "7351980246"


def grade_program(source: str, expected: str) -> bool:
    stdout, stdin = io.StringIO(), io.StringIO(QUESTION)
    before, sys.stdin = sys.stdin, stdin
    try:
        with contextlib.redirect_stdout(stdout), contextlib.suppress(SystemExit):
            exec(source, {"__name__": "__main__"})
            stdout = sys.stdout  # whatever the program made of it
    finally:
        sys.stdin = before
    return stdout.getvalue().strip() == expected


def grade_function(source: str, expected: int) -> bool:
    namespace: dict[str, object] = {}
    exec(source, namespace)
    solve = namespace["solve"]
    assert callable(solve)
    return solve([3, 1, 2]) == expected


def main() -> None:
    source = sys.stdin.read()
    if sys.argv[1] == "program":
        passed = grade_program(source, EXPECTED)
    else:
        passed = grade_function(source, int(EXPECTED))
    print("PASS" if passed else "FAIL")


if __name__ == "__main__":
    main()
