"""The bundled curriculum: its splits are disjoint, its public tests reveal the variant, and
hard-coding fails.
"""

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest

from rlef_mega.dialogues.programs import extract_program
from rlef_mega.problems import curriculum
from rlef_mega.problems.curriculum import FAMILIES, Exercise, exercises, problems
from rlef_mega.problems.splits import SPLITS, Split
from rlef_sandbox import Limits, Sandbox, Status, Test

EVERY = {split: exercises(split) for split in SPLITS}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=1) as opened:
        yield opened


def passes(sandbox: Sandbox, program: str, tests: tuple[Test, ...]) -> bool:
    results = sandbox.grade(program, tests, limits=Limits(cpu_s=5))
    assert all(result.status is not Status.SANDBOX_ERROR for result in results)
    return all(result.status is Status.OK for result in results)


def one_of_each_variant(split: Split) -> list[Exercise]:
    return list({(e.family.name, e.variant): e for e in EVERY[split]}.values())


def test_splits_share_no_public_test_whatever_the_wording():
    shown = {
        split: {(e.family.name, e.variant, e.public_input) for e in EVERY[split]}
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not shown[one] & shown[other]
    assert sum(map(len, shown.values())) == sum(
        len(f.variants) * len(f.public_inputs) for f in FAMILIES
    )


def test_ids_are_unique_over_all_splits():
    ids = [e.id for split in SPLITS for e in EVERY[split]]
    assert len(set(ids)) == len(ids)


def test_held_out_families_have_equally_many_problems_and_each_public_test_comes_once():
    for split, count in (("test", 50), ("valid", 30)):
        assert set(Counter(e.family.name for e in EVERY[split]).values()) == {count}
        public = {(e.family.name, e.variant, e.public_input) for e in EVERY[split]}
        assert len(public) == len(EVERY[split])


@pytest.mark.parametrize("split", SPLITS)
def test_four_fifths_of_the_statements_are_vague(split):
    counts = Counter(e.wording for e in EVERY[split])
    shares = {wording: count / len(EVERY[split]) for wording, count in counts.items()}
    assert shares == pytest.approx({"vague": 0.8, "word": 0.1, "example": 0.1}, abs=0.01)


@pytest.mark.parametrize("split", SPLITS)
def test_any_prefix_of_a_split_has_all_families(split):
    counts = Counter(e.family.name for e in EVERY[split][:100])
    assert len(counts) == len(FAMILIES) >= 6 and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_public_test_reveals_the_variant(family):
    """Feedback must carry what the statement withholds: all variants print differently on a public
    input.
    """
    for text in family.public_inputs:
        outputs = [family.output(text, variant) for variant in family.variants]
        assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_vague_statements_do_not_depend_on_the_variant_and_named_ones_do(family):
    vague = {e.statement for e in EVERY["train"] if e.family is family and e.wording == "vague"}
    assert vague == set(family.vague)
    named = [family.word.format(*variant) for variant in family.variants]
    assert len(set(named)) == len(family.variants) >= 9


def test_an_example_quotes_its_own_public_test_and_no_private_one():
    for e in EVERY["test"]:
        if e.wording == "example":
            expected = e.output(e.public_input)
            quote = f"Example: input '{e.public_input}' Expected output '{expected}'."
            assert e.statement.endswith(quote)


def test_private_inputs_are_other_inputs():
    for problem in problems("test") + problems("train"):
        public, *_ = problem.public_tests
        private = problem.private_tests.tests
        assert len({test.stdin for test in private}) == curriculum.PRIVATE_TESTS
        assert public.stdin not in {test.stdin for test in private}


@pytest.mark.parametrize("split", SPLITS)
def test_printing_the_public_output_fails_a_private_test_of_every_problem(split):
    for problem in problems(split):
        public, *_ = problem.public_tests
        assert any(test.expected != public.expected for test in problem.private_tests.tests)


def test_reference_programs_print_what_their_families_say(sandbox):
    """The expected outputs come from Python callables; here every variant's program is run."""
    for exercise in one_of_each_variant("train"):
        problem = curriculum.to_problem(exercise)
        tests = problem.public_tests + problem.private_tests.tests
        assert passes(sandbox, exercise.source, tests), exercise.id


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_hard_coding_the_public_output_fails_in_the_sandbox(sandbox, family):
    exercise = next(e for e in EVERY["test"] if e.family is family)
    problem = curriculum.to_problem(exercise)
    cheat = f"print({exercise.output(exercise.public_input)!r})"
    assert passes(sandbox, cheat, problem.public_tests)
    assert not passes(sandbox, cheat, problem.private_tests.tests)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_wrong_variant_fails_the_public_test_in_the_sandbox(sandbox, family):
    exercise = next(e for e in EVERY["test"] if e.family is family)
    other = family.variants[(exercise.variant + 1) % len(family.variants)]
    assert not passes(sandbox, family.source(other), curriculum.to_problem(exercise).public_tests)


def test_a_reference_program_in_a_fence_is_valid_code():
    for exercise in one_of_each_variant("train"):
        response = f"```python\n{exercise.source}\n```"
        assert extract_program(response).program == exercise.source
