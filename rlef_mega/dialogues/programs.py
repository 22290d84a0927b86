"""The program in a response: the fenced code blocks of its Markdown, and which of them counts. Pure
functions.

RLEF asks for code in triple backticks (C.1) and does not say what else is valid. Blocks are those
of CommonMark 0.31, section 4.5, and more: a fence may also be indented deeper, as in lists, follow
text if it names a language, and be closed at the end of a line of code.
"""

import ast
import re
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rlef_sandbox.cpp import STANDARDS

FILE_NAME = "solution.py"  # as in the tracebacks of the sandbox
Which = Literal["first", "last", "only"]
INFO_STRINGS = {"python": ("", "python", "python3", "py")} | dict.fromkeys(
    STANDARDS, ("", "cpp", "c++")
)
OPENING = re.compile(
    r"^(?:(?P<indent>[ \t]*)|[^`\n]*\S[ \t]*(?=`{3,}[\w+]+[ \t\r]*$))"
    r"(?P<fence>`{3,}(?=[^`\n]*$)|~{3,})(?P<info>.*)$",
    re.MULTILINE,
)
LANGUAGE = re.compile(r"(?!\w+=)[\w+]*")  # of an info string, which may have attributes: title="x"
# a chat template may have opened the first thought, and the last one may have no end
THOUGHTS = re.compile(r"\A(?:(?!<think>).)*</think>|<think>.*?(?:</think>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Extracted:
    """The program of a response; or None, and in `invalid` the reason that the model is told."""

    program: str | None
    invalid: str = ""


@dataclass(frozen=True)
class Block:
    language: str  # in lower case, as its fence names it
    content: str
    closed: bool


def extract_program(
    text: str, language: str = "python", begun: str = "", which: Which = "first"
) -> Extracted:
    """Find the program in a response: the `first` or the `last` complete block whose fence names
    the language or none, or the `only` block. For Python it must parse and not be empty.

    Blocks within <think> and </think> do not count, unless the response was `begun` for the model.
    Then that text opened the first block, whose end may be missing.
    """
    named = INFO_STRINGS[language]  # first: an unknown language is a KeyError, no verdict
    blocks = list(fenced_blocks(text if begun else THOUGHTS.sub("", text), begun))
    if which == "only" and len(blocks) > 1:
        return Extracted(None, "More than one code block found.")
    fitting = [block for block in blocks if block.language in named]
    complete = [block for block in fitting if block.closed or (begun and block is blocks[0])]
    if not complete:
        invalid = "The code block has no end." if fitting else "No code block found."
        return Extracted(None, invalid)
    program = complete[-1 if which == "last" else 0].content
    invalid = python_error(program) if language == "python" else ""
    return Extracted(None, invalid) if invalid else Extracted(program)


def fenced_blocks(text: str, begun: str = "") -> Iterator[Block]:
    """Yield the fenced code blocks of a text. If `begun` is given, it precedes the text, and its
    first line opens the first block."""
    opening, content, position = OPENING.match(begun), begun.partition("\n")[2], 0
    while opening or (opening := OPENING.search(text, position)):
        if opening.string is text:
            content, position = "", opening.end()
        fence, indent = opening["fence"], len(opening["indent"] or "")
        end = rf"{fence[0]}{{{len(fence)},}}[ \t\r]*$"
        on_a_line_of_its_own = re.compile(rf"^[ \t]{{0,{indent + 3}}}{end}", re.MULTILINE)
        after_code = re.compile(end, re.MULTILINE)
        closing = on_a_line_of_its_own.search(text, position) or after_code.search(text, position)
        content += text[position : closing.start() if closing else len(text)]
        content = re.sub(rf"^[ \t]{{0,{indent}}}", "", content, flags=re.MULTILINE).strip("\r\n")
        language = LANGUAGE.match(opening["info"].strip().lower())
        yield Block(language[0] if language else "", content, closed=closing is not None)
        if closing is None:
            return
        opening, position = None, closing.end()


def python_error(program: str) -> str:
    """Return why a program is not valid Python, in the interpreter's words; empty if it is valid.
    The program is parsed, not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes, `is` with a literal ...
            return "" if ast.parse(program, FILE_NAME).body else "The code block has no code."
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        # the last two are how the parser refuses deep nesting
        return "".join(traceback.format_exception_only(error)).strip()
