"""The numbers of an evaluation by hand, and chrF as sacrebleu defines it."""

from collections import Counter

import pytest

from rlef_mega.evaluation.behaviour import (
    NO_VALID_CODE,
    PRIVATE_TEST,
    SOLVED,
    DialogueOutcomes,
    chrf_of_next,
)
from rlef_mega.evaluation.numbers import FinishedDialogues, summarize
from rlef_mega.types import PrivateTests, Problem
from rlef_sandbox import Test

WRONG, SLOW = "WRONG_ANSWER", "TIME_LIMIT"
TESTS = PrivateTests((Test("", ""),))
PROBLEMS = [
    Problem("a", "", (), TESTS, family="greet", difficulty="easy", tags=("vague",)),
    Problem("b", "", (), TESTS, family="greet", difficulty="hard"),
    Problem("c", "", (), TESTS, family="sum", difficulty="hard"),
    Problem("lost", "", (), TESTS, family="sum"),
]


def dialogue(problem: str, *outcomes: str) -> DialogueOutcomes:
    programs = tuple(None if o == NO_VALID_CODE else f"print({i})" for i, o in enumerate(outcomes))
    return DialogueOutcomes(problem, outcomes, programs)


HELD = FinishedDialogues(
    turns=3,
    dialogues=[
        dialogue("a", SOLVED),
        dialogue("a", WRONG, SOLVED),
        dialogue("b", WRONG, WRONG, SOLVED),
        dialogue("b", SLOW, PRIVATE_TEST),
        dialogue("c", NO_VALID_CODE, WRONG, WRONG),
        dialogue("c", WRONG, WRONG),  # its context was full
    ],
    drops=Counter({"EngineError: lost": 2}),
)
SINGLE = FinishedDialogues(
    1, [dialogue(p, o) for p in "abc" for o in (SOLVED, WRONG, PRIVATE_TEST, WRONG)]
)


@pytest.fixture(scope="module")
def numbers():
    return summarize(PROBLEMS, HELD, samples=3, n_at_k=[(1, 6), (2, 6)], single=SINGLE)


def test_rates_by_hand(numbers):
    assert numbers["outcomes"] == [1, 0.5, 0, None]  # one dialogue of two
    assert numbers["solve_rate"]["value"] == pytest.approx(0.5)
    assert numbers["turn1"]["value"] == pytest.approx((0.5 + 0 + 0) / 3)
    # 6 samples are both dialogues; both of b's pass the public tests, so one of them, selected at
    # random, is right half of the time
    assert numbers["n_at_k"]["1@6"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert numbers["n_at_k"]["2@6"]["value"] == pytest.approx((1 + 1 + 0) / 3)
    assert numbers["pass_at_k"]["6"]["value"] == pytest.approx(2 / 3)
    assert numbers["n_at_k"]["2@6"]["draws"] == 2 and not numbers["n_at_k"]["2@6"]["bootstrapped"]


def test_breakdowns_by_hand(numbers):
    shares = {
        name: {member: (found["value"], found["problems"]) for member, found in group.items()}
        for name, group in numbers.items()
        if name.startswith("by_")
    }
    assert shares == {
        "by_family": {"greet": (0.75, 2), "sum": (0.0, 1)},
        "by_difficulty": {"easy": (1.0, 1), "hard": (0.25, 2)},
        "by_kind": {"vague": (1.0, 1)},
    }


def test_what_was_dropped_is_counted_and_named(numbers):
    assert numbers["dialogues"] == 6 and numbers["dropped"] == {"EngineError": 2}
    assert numbers["problems_left_out"] == ["lost"]
    with pytest.raises(RuntimeError, match="dropped: 3 x EngineError: lost"):
        summarize(PROBLEMS, FinishedDialogues(3, [], Counter({"EngineError: lost": 3})), samples=3)


def test_failures_and_their_repair_by_hand(numbers):
    assert numbers["error_kinds"] == {
        "turn1": {NO_VALID_CODE: 1, SLOW: 1, WRONG: 3},
        "turn2": {PRIVATE_TEST: 1, WRONG: 3},
        "turn3": {WRONG: 1},
    }
    assert numbers["became"]["turn1"] == {
        NO_VALID_CODE: {WRONG: 1},
        SLOW: {PRIVATE_TEST: 1},
        WRONG: {SOLVED: 1, WRONG: 2},
    }
    assert numbers["became"]["turn2"] == {WRONG: {SOLVED: 1, WRONG: 1}}
    assert numbers["repaired_turn2"] == pytest.approx(1 / 5)
    assert numbers["repaired_turn3"] == pytest.approx(1 / 2)
    assert numbers["invalid_fraction"] == pytest.approx(1 / 13)


def test_the_turn_budget_cuts_dialogues_and_keeps_the_samples(numbers):
    """3 samples pay for one dialogue of 3 turns, or one of 2, or 3 single turns."""
    budget = numbers["turn_budget"]["1@3"]
    assert [budget[t]["draws"] for t in "123"] == [3, 1, 1]
    assert budget["3"]["value"] == pytest.approx(0.5)
    assert budget["2"]["value"] == pytest.approx((1 + 0 + 0) / 3)
    # of the 4 ways to draw 3 of 4 single turns, one has SOLVED without PRIVATE_TEST, and two have
    # both, of which one is selected at random
    assert budget["1"]["value"] == pytest.approx(0.25 * 1 + 0.5 * 0.5)


def test_chrf_is_of_each_program_and_the_one_before():
    def of(*programs: str | None) -> DialogueOutcomes:
        return DialogueOutcomes("a", (WRONG,) * len(programs), programs)

    same, other = "print(input())", "xyz"
    found = chrf_of_next([of(same, same), of(same, other), of(None, same), of(same)], 0)
    assert found["pairs"] == found["scored"] == 2 and found["unchanged"] == 0.5
    assert found["mean"] == pytest.approx(50, abs=1) and found["by_ten"][9] == 1
    # abcde against abcdx: for n = 1 to 6, precision and recall are 4/5, 3/4, 2/3, 1/2, 0 and none
    found = chrf_of_next([of("abcdx", "abcde")], 0)
    assert found["mean"] == pytest.approx(100 * (4 / 5 + 3 / 4 + 2 / 3 + 1 / 2 + 0) / 5)
    assert chrf_of_next([of(None, same), of(same)], 0) is None
