"""Wording of prompts and feedback (RLEF C.1, C.4, C.5), and its bounds."""

import pytest

from rlef_mega.dialogues import judge, templates
from rlef_mega.dialogues.programs import INFO_STRINGS, extract_program
from rlef_mega.problems.asserts import assert_test
from rlef_mega.types import LANGUAGES, TEMPLATE_NAMES, PrivateTests, Problem, TestOutcome
from rlef_sandbox import CallTest, Result, Sandbox, Status, Test

DOUBLE = Test("3\n", "6\n")
TRACE = b'Traceback (most recent call last):\n  File "solution.py", line 1\nValueError: no\n'


def outcome(status: Status, test=DOUBLE, **fields) -> TestOutcome:
    return TestOutcome(test, Result(status, **fields))


def test_codecontests_prompt_is_the_papers():
    assert templates.first_prompt("Print 2n", "codecontests") == (
        "Provide a Python solution for the following competitive programming question: Print 2n. "
        "Your code should be enclosed in triple backticks like so: ```python YOUR CODE HERE ```. "
        "Use the backticks for your code only."
    )


def test_codecontests_feedback_is_the_papers():
    outcomes = [
        outcome(Status.WRONG_ANSWER, stdout=b"9\n"),
        outcome(Status.OK, stdout=b"6\n"),
        outcome(Status.RUNTIME_ERROR, stderr=TRACE),
        outcome(Status.TIME_LIMIT),
        outcome(Status.MEMORY_LIMIT),
    ]
    assert templates.feedback(outcomes, "codecontests") == (
        "Your code failed the following tests:\n"
        "- input '3' failed: Expected output '6' but got '9'\n"
        "- input '3' failed: Traceback (most recent call last):\n"
        '  File "solution.py", line 1\n'
        "ValueError: no\n"
        "- input '3' failed: Execution took too long.\n"
        "- input '3' failed: Out of memory.\n"
        "Give it another try. "
        "Your code should be enclosed in triple backticks like so: ```python YOUR CODE HERE ```. "
        "Use the backticks for your code only."
    )


def test_mbpp_shows_tests_successes_and_run_time_values():
    test = CallTest("double", (3,), 6)
    prompt = templates.first_prompt("Write double.", "mbpp", [test])
    assert (
        "problem: Write double.\nYour code should pass these tests:\nassert double(3) == 6\n"
        in prompt
    )
    told = templates.feedback(
        [outcome(Status.OK, test), outcome(Status.WRONG_ANSWER, test, returned="9")], "mbpp"
    )
    assert told.splitlines()[:4] == [
        "Your code failed some test cases:",
        "- Failure: 'assert double(3) == 6': 'AssertionError: 9 != 6'",
        "- Success: 'assert double(3) == 6'",
        "Give it another try.",
    ]


@pytest.mark.parametrize("template", ["codecontests", "humaneval", "curriculum"])
def test_only_mbpp_quotes_public_tests_in_its_prompt(template):
    tests = [Test("secret input", "secret output")]
    assert templates.first_prompt("Do it.", template, tests) == templates.first_prompt(
        "Do it.", template
    )


@pytest.mark.parametrize("template", templates.TEMPLATES)
def test_feedback_on_a_response_without_code_says_so_in_the_same_frame(template):
    told = templates.feedback((), template).splitlines()
    wording = templates.TEMPLATES[template]
    assert told[:2] == [wording.failed, "- No code block found."]
    assert told[2].startswith("Give it another try.")


def test_a_program_that_does_not_parse_is_told_its_syntax_error():
    invalid = extract_program("```python\nx = 1\nprint((x)\n```").invalid
    assert templates.feedback((), "codecontests", invalid=invalid).splitlines()[1:5] == [
        '- File "solution.py", line 2',
        "    print((x)",
        "         ^",
        "SyntaxError: '(' was never closed",
    ]
    told = templates.feedback((), "curriculum", invalid=invalid).splitlines()
    assert told[1] == "- SyntaxError: '(' was never closed"


@pytest.mark.parametrize("template", templates.TEMPLATES)
def test_braces_in_a_statement_stay_what_they_are(template):
    assert "a {problem} {tests} {0} {{x}}" in templates.first_prompt(
        "a {problem} {tests} {0} {{x}}", template
    )


@pytest.mark.parametrize("template", templates.TEMPLATES)
def test_feedback_is_bounded_and_keeps_head_and_tail(template):
    megabyte = b"<head>" + b"x" * (1 << 20) + b"<tail>"
    flood = [
        outcome(Status.WRONG_ANSWER, Test(megabyte, megabyte), stdout=megabyte),
        outcome(Status.RUNTIME_ERROR, stderr=megabyte),
    ] * 50
    told = templates.feedback(flood, template)
    wording = templates.TEMPLATES[template]
    assert len(told) < wording.max_tests * (3 * wording.field_chars + wording.trace_chars + 200)
    assert "<head>" in told and "<tail>" in told


@pytest.mark.parametrize("length", range(0, 40))
def test_clip_never_exceeds_its_limit(length):
    text = "0123456789" * 4
    assert len(templates.clip(text[:length], 20)) <= 20
    assert length > 20 or templates.clip(text[:length], 20) == text[:length]


def test_curriculum_feedback_has_only_the_last_line_of_a_trace():
    told = templates.feedback([outcome(Status.RUNTIME_ERROR, stderr=TRACE)], "curriculum")
    assert told.splitlines()[1] == "- input '3' failed: ValueError: no"


def test_feedback_on_real_runs_names_what_happened():
    test = Test("3\n", "6\n")
    with Sandbox(workers=1) as sandbox:
        for program, expected in (
            ("print(int(input()) * 3)", "Expected output '6' but got '9'"),
            ("print(1 // 0)", "ZeroDivisionError: integer division or modulo by zero"),
            ("import sys; sys.exit(7)", "exit code 7"),
        ):
            (result,) = sandbox.grade(program, [test])
            told = templates.feedback([TestOutcome(test, result)], "curriculum")
            assert told.splitlines()[1] == f"- input '3' failed: {expected}"


def test_every_way_to_fail_has_words_in_every_template():
    for template in templates.TEMPLATES:
        for status in set(Status) - {Status.OK, Status.SANDBOX_ERROR}:
            # `repr` refuses the last one's integers
            for test in (DOUBLE, CallTest("f", (1,), 2), CallTest("f", (10**5000,), [10**5000])):
                assert templates.first_prompt("x", template, [test])
                died = outcome(status, test, returned="3", signal=11)
                told = templates.feedback([died], template)
                assert "None" not in told and len(told.splitlines()[1]) > 20


def test_a_fault_of_the_sandbox_is_not_feedback():
    with pytest.raises(AssertionError, match="SANDBOX_ERROR is not"):
        templates.feedback([outcome(Status.SANDBOX_ERROR)], "codecontests")


def test_withheld_feedback_is_the_same_for_all_outcomes_and_shows_none():
    told = templates.feedback_withheld("codecontests")
    assert "'3'" not in told and told.endswith(templates.BACKTICKS)


def test_a_failed_assert_shows_what_was_compared_at_run_time():
    tests = [
        assert_test("assert f(2) == [4]", "f"),
        assert_test("assert set(f(3)) == {6}, 'why'", "f"),
        assert_test("assert not f(0)", "f"),
        assert_test("assert f(K) > [9]", "f", setup="K = 5"),
        assert_test("assert 7 in f(1)", "f"),
        assert_test("assert f('a') == 1", "f"),
        assert_test("assert len(f(2)) == len(None)", "f"),
    ]
    problem = Problem("p", "x", tuple(tests), PrivateTests(()))
    with Sandbox(workers=1) as sandbox:
        program = "def f(n):\n    return [int(n) * 2]"
        results = sandbox.grade(program, judge.tests_of(problem), stop_at_first_failure=False)
    told = templates.feedback(list(map(TestOutcome, tests, results)), "mbpp").splitlines()
    assert told[1:8] == [
        "- Failure: 'assert not f(0)': 'AssertionError: [0] is not false'",
        "- Failure: 'assert 7 in f(1)': 'AssertionError: 7 not found in [2]'",
        "- Failure: 'assert f('a') == 1': ValueError: invalid literal for int() with base 10: 'a'",
        "- Failure: 'assert len(f(2)) == len(None)': "
        "'TypeError: object of type 'NoneType' has no len()'",
        "- Success: 'assert f(2) == [4]'",
        "- Success: 'assert set(f(3)) == {6}, 'why''",
        "- Success: 'assert f(K) > [9]'",
    ]


@pytest.mark.parametrize("text", ["f(1) == 2", "assert 1; assert 2", "assert (", "x = 1"])
def test_anything_but_one_assert_is_refused(text):
    with pytest.raises(ValueError, match="is n"):
        assert_test(text, "f")


def test_a_trace_shows_only_the_programs_own_frames():
    program = "import json\n\ndef read(text):\n    return json.loads(text)\n\nread(input())"
    with Sandbox(workers=1) as sandbox:
        (result,) = sandbox.grade(program, [Test("x", "")])
    assert b"json/" in result.stderr.replace(b"\\", b"/")  # else there is nothing to leave out
    told = templates.feedback([TestOutcome(Test("x", ""), result)], "codecontests")
    assert told.count('File "') == told.count('File "solution.py"') == 2
    assert "return json.loads(text)" in told and "JSONDecodeError: Expecting value" in told
    assert "rlef_sandbox" not in told and "decoder" not in told.replace("json.decoder.", "")


@pytest.mark.parametrize("limit", [0, 300, 1000])
def test_feedback_within_a_bound_keeps_its_frame_and_both_ends(limit):
    outcomes = [outcome(Status.WRONG_ANSWER, stdout=b"9" * 900)] * 3
    told = templates.feedback(outcomes, "codecontests", limit)
    assert told.startswith("Your code failed the following tests:\n- input '3'")
    assert told.endswith(f"9'\nGive it another try. {templates.BACKTICKS}")
    assert len(told) <= max(limit, 80 + 300)


def test_feedback_cut_on_the_right_ends_with_the_mark_and_the_request():
    outcomes = [outcome(Status.WRONG_ANSWER, stdout=b"9" * 900)] * 3
    told = templates.feedback(outcomes, "mbpp", 1000, cut="right")
    assert len(told) == 1000
    assert told.endswith("9 ... [1949 characters left out] ... \nGive it another try.")


def test_every_name_that_a_problem_may_give_has_a_template_and_a_fence():
    assert tuple(templates.TEMPLATES) == TEMPLATE_NAMES
    assert tuple(INFO_STRINGS) == LANGUAGES
