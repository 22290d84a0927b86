"""Which code block of a response is its program, and what the model is told where there is none."""

import pytest

from rlef_mega.dialogues import templates
from rlef_mega.dialogues.programs import extract_program

FENCE = "```"
ONE, TWO = f"{FENCE}python\nprint(1)\n{FENCE}", f"{FENCE}\nprint(2)\n{FENCE}"


def program(text: str, *arguments: str, **options: str) -> str | None:
    return extract_program(text, *arguments, **options).program


@pytest.mark.parametrize("which", ["first", "last", "only"])
@pytest.mark.parametrize(
    "text",
    [
        ONE,
        f"Here it is:\n{ONE}\nIt prints 1.",
        f"Here it is: {ONE}",
        f"{FENCE}\nprint(1)\n{FENCE}",
        f"{FENCE}Python3 \r\nprint(1)\r\n{FENCE}\r\n",
        f"{FENCE}py\n\nprint(1){FENCE}",
        f'{FENCE}Python title="x`y.py" hl=1\nprint(1)\n{FENCE}'.replace("`y", "y"),
        f"{FENCE} title=main.py\nprint(1)\n{FENCE}",
        "~~~python `x`\nprint(1)\n~~~~",
        f"{FENCE}{FENCE}py\nprint(1)\n{FENCE}{FENCE}`  ",
        f"1. So:\n\n   {FENCE}python\n   print(1)\n   {FENCE}",
        f"- a\n  - b\n\n      {FENCE}python\n      print(1)\n      {FENCE}",
        f"<think>{TWO}</think>\n{ONE}",
        f"{TWO}\nno, wait\n</think>{ONE}",  # the chat template has opened the thought
        f"{ONE}\n<think>Is it?\n{TWO}",
        f"<think>a</think>b<think>{TWO}</think>{ONE}<think></think>",
    ],
)
def test_the_one_fenced_block_outside_thoughts_is_the_program(text, which):
    assert program(text, which=which) == "print(1)"


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        (f"{ONE}\nor\n{TWO}", "print(1)", "print(2)"),
        (f"{FENCE}text\n1\n{FENCE}\n{ONE}\n{FENCE}java\nx\n{FENCE}", "print(1)", "print(1)"),
        (f"{ONE}\n{FENCE}python\nprint(2)", "print(1)", "print(1)"),  # left open
        # nested: a longer fence, other characters, a fence with more text, a deeper indentation
        (f"{FENCE}`python\n1\n{FENCE}\n2\n{FENCE}`\n{TWO}", None, "print(2)"),
        (f"~~~\ns = '''\n{FENCE}\n'''\n~~~", f"s = '''\n{FENCE}\n'''", None),
        (f"{FENCE}\ns = '{FENCE}'\n    {FENCE}\n{FENCE}", None, None),
    ],
)
def test_of_several_blocks_the_first_or_the_last_complete_one_counts(text, first, last):
    assert program(text) == first
    assert program(text, which="last") == (last or first)
    if last:
        assert extract_program(text, which="only").invalid == "More than one code block found."


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "No code block found."),
        ("print(1)", "No code block found."),
        (f"<think>{ONE}</think>It prints 1.", "No code block found."),
        (f"{FENCE}python print(1) {FENCE}", "No code block found."),  # a code span
        (f"{FENCE}java\nprint(1)\n{FENCE}", "No code block found."),
        (f"{FENCE}python\nprint(1)", "The code block has no end."),
        (f"{FENCE}python\n\n{FENCE}", "The code block has no code."),
        (f"{FENCE}python\n# to do\n{FENCE}", "The code block has no code."),
        (f"{FENCE}python\nx = '\0'\n{FENCE}", "null bytes"),
        (
            f"{FENCE}python\nx = 1\nprint((x)\n{FENCE}",
            'File "solution.py", line 2\n    print((x)\n         ^\n'
            "SyntaxError: '(' was never closed",
        ),
        (f"{FENCE}py\nif x:\ny\n{FENCE}", "IndentationError: expected an indented block after"),
    ],
)
def test_without_valid_code_the_model_is_told_why(text, why):
    found = extract_program(text)
    assert found.program is None and why in found.invalid


@pytest.mark.parametrize(
    "source", ["(" * 50_000, "-" * 50_000 + "1", "x" + ".a" * 50_000, "1" + "**1" * 50_000]
)
def test_a_program_that_overwhelms_the_parser_is_not_valid_code(source):
    found = extract_program(f"{FENCE}python\n{source}\n{FENCE}")
    assert found.program is None and "Error" in found.invalid


@pytest.mark.parametrize("info", ["cpp", "C++", "", 'cpp title="a.cpp"'])
def test_other_languages_are_fenced_but_not_parsed(info):
    assert program(f"{ONE}\n{FENCE}{info}\nint main() {{}}\n{FENCE}", "cpp") == "int main() {}"


def test_an_unknown_language_is_an_error_even_without_a_block():
    with pytest.raises(KeyError, match="'perl'"):
        extract_program("", "perl")


STUB = 'def add(a, b):\n    """Add."""'


def test_humaneval_responses_are_begun_with_the_problem():
    begun = templates.response_start(STUB, "humaneval")
    assert begun == f"```python\n{STUB}\n"
    assert templates.first_prompt(STUB, "humaneval").endswith(f"passes the tests: {STUB}")
    whole = f"{STUB}\n    return a + b"
    for response in (
        f"    return a + b\n{FENCE}",
        f"    return a + b\n{FENCE}\nDone.",
        f"    return a + b{FENCE}",
        "    return a + b",
    ):
        for which in ("first", "last", "only"):
            assert program(response, begun=begun, which=which) == whole
    assert program(f"{FENCE}\nor\n{FENCE}python\npass\n{FENCE}", begun=begun, which="only") is None
    for response in ("return a +", "  x = 1\n y"):
        assert program(response, begun=begun) is None
    assert templates.response_start(STUB, "functions") == "```python\ndef add(a, b):\n"
    assert not templates.response_start(STUB, "mbpp")
