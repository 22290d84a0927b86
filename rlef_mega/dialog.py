"""What is said to the model, and how it becomes token ids: prompts, feedback, code extraction, chat
formats.

Everything here is pure. Functions take a statement and the outcomes of *public* tests, never a
`Problem` or its `PrivateTests`, so nothing of the private tests can enter a dialogue. Wording is
that of RLEF C.1, C.4 and C.5; deviations are named at their lines.
"""

import ast
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from rlef_mega.types import AnyTest, TestOutcome
from rlef_sandbox import CallTest, Result, Status, Test

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# --- templates

BACKTICKS = (
    "Your code should be enclosed in triple backticks like so: ```python YOUR CODE HERE ```. "
    "Use the backticks for your code only."
)
RETRY = "Give it another try."
WITHHELD = "Your code failed some of the tests."  # the ablation without execution feedback


@dataclass(frozen=True)
class Template:
    """The wording of one benchmark's dialogues, and bounds on what a program may put into them."""

    prompt: str  # with {problem} and {tests}
    failed: str  # the first line of feedback
    reminder: str  # the last sentence of prompt and feedback
    style: Literal["input_output", "assertions"]
    remind_again: bool = True  # the reminder ends every feedback too
    field_chars: int = 1000  # of one input, output or value
    trace_chars: int = 2000
    whole_trace: bool = True  # else its last line only
    max_tests: int = 8  # failed tests shown; RLEF B.3 shows at most 8


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
    # RLEF C.4 begins the response with the problem's prompt; ours is sampled whole, like all
    # others, and so is told about the backticks.
    "humaneval": Template(
        prompt=(
            "Write a solution to the following problem and make sure that it passes the tests: "
            "{problem}"
        ),
        failed="Your code failed some test cases:",
        reminder=BACKTICKS,
        style="assertions",
    ),
    "mbpp": Template(  # RLEF C.5
        prompt="Provide a Python solution for the following problem: {problem}{tests}",
        failed="Your code failed some test cases:",
        reminder=BACKTICKS,
        style="assertions",
    ),
    # Ours: codecontests', cut to what a model of a few 100,000 parameters reads in minutes.
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


def template_named(name: str) -> Template:
    """ValueError, naming the known ones, if there is none."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def first_prompt(statement: str, template: str, public_tests: Sequence[AnyTest] = ()) -> str:
    """The first user message. Only the mbpp template quotes public tests."""
    wording = template_named(template)
    tests = ""
    if public_tests and "{tests}" in wording.prompt:
        quoted = [clip(assertion(test), wording.field_chars) for test in public_tests]
        tests = "\n".join(["\nYour code should pass these tests:", *quoted])
    asked = wording.prompt.format(problem=statement.strip(), tests=tests)
    # C.1 puts a full stop after the problem, whatever it ends with; we leave it out where it would
    # be a second one, and give a problem of many lines a line of its own end.
    separator = "\n" if "\n" in asked else " " if asked.endswith((".", "?", "!")) else ". "
    return f"{asked}{separator}{wording.reminder}"


def feedback(outcomes: Sequence[TestOutcome], template: str) -> str:
    """What the program did on the public tests. No outcomes: the response held no valid code."""
    wording = template_named(template)
    describe = input_output_line if wording.style == "input_output" else assertion_line
    if outcomes:
        shown = [o for o in outcomes if not passed(o.result)]
        if wording.style == "assertions":  # C.4 and C.5 list successes too
            shown = sorted(outcomes, key=lambda o: passed(o.result))
        lines = [describe(o, wording) for o in shown[: wording.max_tests]]
    else:
        lines = ["- No valid code."]  # the paper is silent
    return "\n".join([wording.failed, *lines, closing(wording)])


def feedback_withheld(template: str) -> str:
    """The ablation without execution feedback: another try is asked for, and why is not said."""
    return f"{WITHHELD}\n{closing(template_named(template))}"


def closing(wording: Template) -> str:
    return f"{RETRY} {wording.reminder}" if wording.remind_again else RETRY


def passed(result: Result) -> bool:
    assert result.status is not Status.SANDBOX_ERROR, "a fault of the sandbox is not a verdict"
    return result.status is Status.OK


def input_output_line(outcome: TestOutcome, wording: Template) -> str:
    test, result = outcome.test, outcome.result
    if isinstance(test, CallTest):
        return assertion_line(outcome, wording)
    lead = f"- input '{readable(test.stdin, wording)}' failed:"
    if result.status is Status.WRONG_ANSWER:
        expected, got = readable(test.expected, wording), readable(result.stdout, wording)
        return f"{lead} Expected output '{expected}' but got '{got}'"
    return f"{lead} {failure(result, wording)}"


def assertion_line(outcome: TestOutcome, wording: Template) -> str:
    """C.5. The message shows run-time values, as unittest's assertEqual does."""
    result = outcome.result
    quoted = clip(assertion(outcome.test), wording.field_chars)
    if passed(result):
        return f"- Success: '{quoted}'"
    if result.status is not Status.WRONG_ANSWER:
        return f"- Failure: '{quoted}': {failure(result, wording)}"
    if isinstance(outcome.test, CallTest):
        got, expected = result.returned or "None", repr(outcome.test.expected)
    else:
        got, expected = repr(text_of(result.stdout)), repr(text_of(outcome.test.expected))
    got, expected = clip(got, wording.field_chars), clip(expected, wording.field_chars)
    return f"- Failure: '{quoted}': 'AssertionError: {got} != {expected}'"


def failure(result: Result, wording: Template) -> str:
    """Why there is no output to compare. The paper names the first three."""
    match result.status:
        case Status.RUNTIME_ERROR | Status.COMPILE_ERROR:
            end = (
                f"exit code {result.exit_code}"
                if result.signal is None
                else f"killed by signal {result.signal}"
            )
            trace = text_of(result.stderr) or end
            return clip(trace if wording.whole_trace else last_line(trace), wording.trace_chars)
        case Status.TIME_LIMIT | Status.IDLE_LIMIT:
            return "Execution took too long."
        case Status.MEMORY_LIMIT:
            return "Out of memory."
        case Status.OUTPUT_LIMIT:
            return "Too much output."
        case Status.SECURITY_VIOLATION:
            return "Operation not permitted."
    raise AssertionError(f"{result.status} is not a failure to run")


def assertion(test: AnyTest) -> str:
    """A test as one line of Python."""
    if isinstance(test, Test):
        return f"assert run({text_of(test.stdin)!r}) == {text_of(test.expected)!r}"
    return f"assert {test.entry_point}({', '.join(map(repr, test.args))}) == {test.expected!r}"


def readable(raw: bytes, wording: Template) -> str:
    return clip(text_of(raw), wording.field_chars)


def text_of(raw: bytes) -> str:
    return raw.decode("utf-8", "replace").strip()


def last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


def clip(text: str, limit: int) -> str:
    """At most `limit` characters: head and tail, where what matters usually stands."""
    if len(text) <= limit:
        return text
    mark = f" ... [{len(text) - limit} characters left out] ... "
    if limit <= 2 * len(mark):  # no room for the long mark
        mark = "..."
    kept = limit - len(mark)
    return text[: kept - kept // 2] + mark + text[len(text) - kept // 2 :]


# --- code extraction

INFO_STRINGS = {"python": ("", "python", "python3", "py"), "cpp": ("", "cpp", "c++")}
FENCED = re.compile(r"[ \t]*([\w+]*)[ \t]*\r?\n(.*)", re.DOTALL)


def extract_program(text: str, language: str = "python") -> str | None:
    """The program in a response: exactly one fenced block, which for Python parses and is not
    empty.

    RLEF leaves open what valid code is; this is our reading. The parse is `ast.parse`, in this
    process: it runs nothing.
    """
    if language not in INFO_STRINGS:
        raise ValueError(f"unknown language {language!r}; known: {', '.join(INFO_STRINGS)}")
    parts = text.split("```")
    if len(parts) != 3:
        return None
    block = FENCED.fullmatch(parts[1])
    if block is None or block[1].lower() not in INFO_STRINGS[language]:
        return None
    program = block[2].strip("\r\n")
    return program if language != "python" or is_python(program) else None


def is_python(program: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # doubtful escapes and comparisons are the program's affair
            return bool(ast.parse(program).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False  # the last two are how the parser refuses deep nesting


# --- chat format


@dataclass(frozen=True)
class ChatFormat:
    """How a dialogue becomes token ids, token-in token-out.

    Messages are encoded one by one and appended; what the engine sampled is never encoded again.
    Message text is always plain text: a control token spelled out in it comes out as ordinary
    characters' ids.

    `llama3` is Llama 3.1's format without its system message (which holds the date of the day);
    `chatml` is without a default system message too.
    """

    tokenizer: "PreTrainedTokenizerBase"
    begin: tuple[int, ...]  # before the first message
    user_header: tuple[int, ...]  # control tokens that open a user message
    user_lead: str  # plain text after them, encoded together with the message
    assistant_header: tuple[int, ...]  # closes the user message and opens the assistant's
    end_of_turn: int
    between: tuple[int, ...]  # after the end of a response, before the next header
    stop_token_ids: tuple[int, ...]

    @classmethod
    def for_tokenizer(cls, tokenizer: "PreTrainedTokenizerBase", name: str = "auto") -> Self:
        """`name` is llama3, chatml or auto (by the control tokens that the tokenizer has)."""
        known = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
        if name == "auto":
            fits = [f for f, controls in CONTROLS.items() if known.issuperset(controls)]
            if not fits:
                raise ValueError(
                    f"the tokenizer {tokenizer.name_or_path!r} has the control tokens of no chat "
                    f"format ({', '.join(CONTROLS)}); take an instruction-tuned model"
                )
            name = fits[0]
        if name not in CONTROLS:
            raise ValueError(f"unknown chat format {name!r}; known: auto, {', '.join(CONTROLS)}")
        missing = [control for control in CONTROLS[name] if control not in known]
        if missing:
            raise ValueError(
                f"chat format {name!r} needs the tokens {', '.join(missing)}, which the tokenizer "
                f"{tokenizer.name_or_path!r} lacks; set model.chat_format to auto, or take another "
                "model"
            )
        return cls.llama3(tokenizer) if name == "llama3" else cls.chatml(tokenizer)

    @classmethod
    def from_folder(cls, folder: Path, name: str = "auto") -> Self:
        """The chat format of a Hugging Face model folder."""
        from transformers import AutoTokenizer

        return cls.for_tokenizer(AutoTokenizer.from_pretrained(folder), name)

    @classmethod
    def llama3(cls, tokenizer: "PreTrainedTokenizerBase") -> Self:
        begin, header, end_header, end = control_ids(tokenizer, CONTROLS["llama3"])

        def role(name: str) -> tuple[int, ...]:
            return (header, *encode_plain(tokenizer, name), end_header)

        return cls(
            tokenizer,
            begin=(begin,),
            user_header=role("user"),
            user_lead="\n\n",
            assistant_header=(end, *role("assistant"), *encode_plain(tokenizer, "\n\n")),
            end_of_turn=end,
            between=(),
            stop_token_ids=stops(tokenizer, end, "<|end_of_text|>", "<|eom_id|>"),
        )

    @classmethod
    def chatml(cls, tokenizer: "PreTrainedTokenizerBase") -> Self:
        start, end = control_ids(tokenizer, CONTROLS["chatml"])
        newline = encode_plain(tokenizer, "\n")
        return cls(
            tokenizer,
            begin=(),
            user_header=(start,),
            user_lead="user\n",
            assistant_header=(end, *newline, start, *encode_plain(tokenizer, "assistant\n")),
            end_of_turn=end,
            between=tuple(newline),
            stop_token_ids=stops(tokenizer, end, "<|endoftext|>"),
        )

    def open(self, text: str) -> list[int]:
        """The first user message, with the assistant's turn open after it."""
        return [*self.begin, *self.ask(text)]

    def observe(self, text: str, ended: bool) -> list[int]:
        """What is appended, verbatim, to a response that the model `ended` (else the engine, for
        its length).
        """
        end = () if ended else (self.end_of_turn,)
        return [*end, *self.between, *self.ask(text)]

    def ask(self, text: str) -> list[int]:
        message = encode_plain(self.tokenizer, self.user_lead + text.strip())
        return [*self.user_header, *message, *self.assistant_header]

    def respond(self, text: str) -> list[int]:
        """A response as a model would sample it, end of turn included: targets of the supervised
        stage.
        """
        return [*encode_plain(self.tokenizer, text), self.end_of_turn]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response, without what ended it."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        text = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


CONTROLS = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}


def control_ids(tokenizer: "PreTrainedTokenizerBase", controls: Sequence[str]) -> list[int]:
    """Ids of control tokens. ValueError if text that spells one would be encoded as one."""
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[control] for control in controls]
    for control, token_id in zip(controls, ids, strict=True):
        if token_id in encode_plain(tokenizer, control):
            raise ValueError(
                f"{control!r} is not a special token of the tokenizer {tokenizer.name_or_path!r}: "
                "text that spells it would control the dialogue; mark it special in tokenizer.json"
            )
    return ids


def stops(tokenizer: "PreTrainedTokenizerBase", end: int, *others: str) -> tuple[int, ...]:
    """The end of a turn, and what else the model may have learnt to end with."""
    added = tokenizer.get_added_vocab()
    return (end, *(added[token] for token in others if token in added))


def encode_plain(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of `text` alone: nothing is added, and control tokens in it are characters."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert isinstance(ids, list)
    return ids
