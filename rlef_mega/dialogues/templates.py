"""Prompts and feedback. Pure functions.

They take a statement and the outcomes of *public* tests, never a `Problem` or its `PrivateTests`,
so nothing of the private tests can enter a dialogue. The wording is that of RLEF C.1, C.4 and C.5;
deviations are named at their lines.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlef_mega.problems.literals import to_literal
from rlef_mega.types import AssertTest, PublicTest, TestOutcome
from rlef_sandbox import CallTest, Result, Status, Test

BACKTICKS = (
    "Your code should be enclosed in triple backticks like so: ```python YOUR CODE HERE ```. "
    "Use the backticks for your code only."
)
RETRY = "Give it another try."
LEAST_CHARACTERS = 80  # of the part about the tests, however short the feedback must be
Cut = Literal["middle", "right"]
WITHHELD = "Your code failed some of the tests."  # the ablation without execution feedback


@dataclass(frozen=True)
class Template:
    """The wording of a benchmark's dialogues, and limits on the text that programs add to it."""

    prompt: str  # with {problem} and {tests}
    failed: str  # the first line of feedback
    reminder: str  # the last sentence of prompt and feedback
    style: Literal["input_output", "assertions"]
    remind_again: bool = True  # the reminder ends every feedback too
    begun: Literal["", "code", "signature"] = ""  # what of the problem's text begins every response
    field_chars: int = 1000  # of one input, output or value
    trace_chars: int = 2000
    whole_trace: bool = True  # else its last line only
    max_tests: int = 8  # tests shown, failed ones first; RLEF B.3 shows at most 8


HUMANEVAL = Template(  # RLEF C.4
    prompt=(
        "Write a solution to the following problem and make sure that it passes the tests: "
        "{problem}"
    ),
    failed="Your code failed some test cases:",
    reminder="",
    style="assertions",
    remind_again=False,
    begun="code",
)
TEMPLATES = {
    "codecontests": Template(  # RLEF C.1
        prompt=(
            "Provide a Python solution for the following competitive programming question: "
            "{problem}"
        ),
        failed="Your code failed the following tests:",
        reminder=BACKTICKS,
        style="input_output",
    ),
    "humaneval": HUMANEVAL,
    "mbpp": Template(  # RLEF C.5
        prompt="Provide a Python solution for the following problem: {problem}{tests}",
        failed="Your code failed some test cases:",
        reminder=BACKTICKS,
        style="assertions",
        remind_again=False,
    ),
    # Ours: humaneval's in fewer tokens, because CPUs must train on all of them.
    "functions": replace(HUMANEVAL, prompt="Write this function: {problem}", begun="signature"),
    # Ours: codecontests', cut to what a model of a few 100,000 parameters learns in minutes.
    "curriculum": Template(
        prompt="Provide a Python solution for the following question: {problem}",
        failed="Your code failed the following tests:",
        reminder="Enclose your code in triple backticks.",
        style="input_output",
        remind_again=False,
        field_chars=60,
        trace_chars=80,
        whole_trace=False,
    ),
}


def first_prompt(statement: str, template: str, public_tests: Sequence[PublicTest] = ()) -> str:
    """Return the first user message. Only the mbpp template quotes public tests."""
    wording = TEMPLATES[template]
    tests = ""
    if public_tests and "{tests}" in wording.prompt:
        quoted = [clip(assertion(test), wording.field_chars) for test in public_tests]
        tests = "\n".join(["\nYour code should pass these tests:", *quoted])
    asked = wording.prompt.format(problem=statement.strip(), tests=tests)
    if not wording.reminder:
        return asked
    # C.1 puts a full stop after the problem, whatever it ends with; we leave it out where it would
    # be a second one, and end a problem of several lines with a line break instead.
    separator = "\n" if "\n" in asked else " " if asked.endswith((".", "?", "!")) else ". "
    return f"{asked}{separator}{wording.reminder}"


def response_start(statement: str, template: str) -> str:
    """Return the text that begins every response and that the model continues (RLEF C.4): the
    problem's code, or its first line, in an open block; empty for most templates. The paper does
    not say whether later responses begin with it; here they do, so that all are parsed alike."""
    code, begun = statement.strip(), TEMPLATES[template].begun
    code = code.partition("\n")[0] if begun == "signature" else code
    return f"```python\n{code}\n" if begun else ""


def feedback(
    outcomes: Sequence[TestOutcome],
    template: str,
    max_characters: int | None = None,
    *,
    invalid: str = "",
    cut: Cut = "middle",
) -> str:
    """Return the feedback on a program's public tests or, for a response without valid code, which
    has no outcomes, why it is `invalid` (the paper is silent).

    The part about the tests is shortened to fit `max_characters`, in its middle or on the right;
    the sentences around it always stay.
    """
    wording = TEMPLATES[template]
    describe = input_output_line if wording.style == "input_output" else assertion_line
    if outcomes:
        shown = [o for o in outcomes if o.result.status is not Status.OK]
        if wording.style == "assertions":  # C.4 and C.5 list successes too
            shown = sorted(outcomes, key=lambda o: o.result.status is Status.OK)
        lines = [describe(o, wording) for o in shown[: wording.max_tests]]
    else:
        lines = ["- " + traced(invalid or "No code block found.", wording)]
    results = "\n".join(lines)
    if max_characters is not None:
        frame = len(wording.failed) + len(closing(wording)) + 2
        results = clip(results, max(LEAST_CHARACTERS, max_characters - frame), cut)
    return "\n".join([wording.failed, results, closing(wording)])


def feedback_withheld(template: str) -> str:
    """Return the feedback of the ablation without execution feedback: it only asks for another
    try."""
    return f"{WITHHELD}\n{closing(TEMPLATES[template])}"


def closing(wording: Template) -> str:
    return f"{RETRY} {wording.reminder}" if wording.remind_again else RETRY


def input_output_line(outcome: TestOutcome, wording: Template) -> str:
    test, result = outcome.test, outcome.result
    if not isinstance(test, Test):
        return assertion_line(outcome, wording)
    lead = f"- input '{readable(test.stdin, wording)}' failed:"
    if result.status is Status.WRONG_ANSWER:
        expected, got = readable(test.expected, wording), readable(result.stdout, wording)
        return f"{lead} Expected output '{expected}' but got '{got}'"
    return f"{lead} {failure(result, wording)}"


def assertion_line(outcome: TestOutcome, wording: Template) -> str:
    """Return the line of an assert (C.5), with run-time values as unittest's assertEqual shows
    them."""
    test, result = outcome.test, outcome.result
    quoted = clip(assertion(test), wording.field_chars)
    if result.status is Status.OK:
        return f"- Success: '{quoted}'"
    if result.status is not Status.WRONG_ANSWER:
        return f"- Failure: '{quoted}': {failure(result, wording)}"
    if isinstance(test, AssertTest):  # its code has compared, and printed the values
        return f"- Failure: '{quoted}': '{clip(error_of(result.stderr), wording.field_chars)}'"
    if isinstance(test, CallTest):
        got, expected = result.returned or "None", to_literal(test.expected)
    else:
        got, expected = repr(text_of(result.stdout)), repr(text_of(test.expected))
    got, expected = clip(got, wording.field_chars), clip(expected, wording.field_chars)
    return f"- Failure: '{quoted}': 'AssertionError: {got} != {expected}'"


def error_of(stderr: bytes) -> str:
    """Return the error that ended an assert's code, without the traceback."""
    said = text_of(stderr)
    start = said.rfind("\nAssertionError")
    return (said[start + 1 :] if start >= 0 else last_line(said)) or "AssertionError"


def failure(result: Result, wording: Template) -> str:
    """Return why there is no output to compare. The paper has the first three cases."""
    match result.status:
        case Status.RUNTIME_ERROR | Status.COMPILE_ERROR:
            end = (
                f"exit code {result.exit_code}"
                if result.signal is None
                else f"killed by signal {result.signal}"
            )
            return traced(own_frames(text_of(result.stderr)) or end, wording)
        case Status.TIME_LIMIT | Status.IDLE_LIMIT:
            return "Execution took too long."
        case Status.MEMORY_LIMIT:
            return "Out of memory."
        case Status.OUTPUT_LIMIT:
            return "Too much output."
        case Status.SECURITY_VIOLATION:
            return "Operation not permitted."
    raise AssertionError(f"{result.status} is not a verdict with a reason")


def traced(trace: str, wording: Template) -> str:
    return clip(trace if wording.whole_trace else last_line(trace), wording.trace_chars)


FRAME = re.compile(r'  File "(?P<file>[^"]*)", line \d+')


def own_frames(trace: str) -> str:
    """Remove the frames of other files from a traceback: libraries, the interpreter, the test
    runner. Other lines stay."""
    kept: list[str] = []
    foreign = False
    for line in trace.splitlines():
        frame = FRAME.match(line)
        if frame:
            foreign = frame["file"].startswith(("/", "<frozen"))
        elif not line.startswith("    "):  # what belongs to a frame is indented deeper
            foreign = False
        if not foreign:
            kept.append(line)
    return "\n".join(kept)


def assertion(test: PublicTest) -> str:
    """Return a test as one line of Python."""
    if isinstance(test, AssertTest):
        return test.statement
    if isinstance(test, Test):
        return f"assert run({text_of(test.stdin)!r}) == {text_of(test.expected)!r}"
    arguments = ", ".join(map(to_literal, test.args))
    return f"assert {test.entry_point}({arguments}) == {to_literal(test.expected)}"


def readable(raw: bytes, wording: Template) -> str:
    return clip(text_of(raw), wording.field_chars)


def text_of(raw: bytes) -> str:
    return raw.decode("utf-8", "replace").strip()


def last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


def clip(text: str, limit: int, cut: Cut = "middle") -> str:
    """Shorten a text to `limit` characters: keep its head and, if cut in the middle, its tail."""
    if len(text) <= limit:
        return text
    mark = f" ... [{len(text) - limit} characters left out] ... "
    if limit <= 2 * len(mark):  # no room for the long mark
        mark = "..."
    kept = limit - len(mark)
    tail = kept // 2 if cut == "middle" else 0
    return text[: kept - tail] + mark + text[len(text) - tail :]
