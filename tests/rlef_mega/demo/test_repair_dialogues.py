"""The supervised dialogues of functions: what they teach, in the format that rollouts use."""

from collections import Counter

from rlef_mega.demo.repair_dialogues import (
    REPAIRED,
    RIGHT_AT_ONCE,
    graded_programs,
    repair_dialogue,
)
from rlef_mega.dialogues import templates
from rlef_mega.dialogues.programs import extract_program
from rlef_mega.problems import load_problems
from rlef_mega.problems.functions import solved
from rlef_mega.types import Problem


def first_prompt(problem: Problem) -> str:
    return templates.first_prompt(problem.statement, problem.template)


DIALOGUES = [repair_dialogue(number) for number in range(2000)]
SOLUTIONS = {first_prompt(problem): set() for problem, _, _ in solved("train")}
for problem, solution, _ in solved("train"):
    SOLUTIONS[first_prompt(problem)].add(solution.strip())


def program_of(begun: str, response: str) -> str:
    program = extract_program(response, "python", begun).program
    assert program is not None
    return program


def test_a_dialogue_depends_on_its_number_and_the_seed_alone():
    ones = [repair_dialogue(number, seed=1) for number in range(8)]
    assert [repair_dialogue(number, seed=1) for number in reversed(range(8))] == ones[::-1]
    assert [repair_dialogue(number, seed=2) for number in range(8)] != ones


def test_only_training_problems_are_taught():
    held_out = {
        first_prompt(p) for split in ("valid", "test") for p in load_problems(f"functions:{split}")
    }
    taught = {messages[0] for _, messages in DIALOGUES}
    assert taught <= {first_prompt(p) for p, _ in graded_programs()} and not taught & held_out


def test_every_response_is_a_valid_program_and_feedback_shows_what_it_did():
    for begun, messages in DIALOGUES[:300]:
        programs = [program_of(begun, response) for response in messages[1::2]]
        for told in messages[2::2]:
            assert told.startswith("Your code failed some test cases:\n- Failure: 'assert ")
        assert 1 <= len(programs) <= 3


def test_feedback_is_used_no_better_than_stated():
    """Nor worse: the share of right programs at each turn, by whether the statement tells all."""
    shares = Counter()
    for begun, messages in DIALOGUES:
        last = len(messages) // 2
        for turn in range(1, last + 1):
            shares[turn, "made"] += 1
        program = program_of(begun, messages[-1])
        shares[last, "right"] += program in SOLUTIONS[messages[0]]
    assert abs(shares[2, "right"] / shares[2, "made"] - REPAIRED) < 0.05
    assert 0.2 < shares[1, "right"] / shares[1, "made"] < RIGHT_AT_ONCE
