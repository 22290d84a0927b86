"""Encode dialogues as token ids in a model's chat format, token-in token-out.

A format is read from the model's own chat template: it is rendered once, with two turns, and cut
into the ids around the messages. Messages are then encoded one by one and appended to the ids that
the engine sampled, which are never decoded and encoded again. Pure functions, except for reading a
model folder.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from jinja2 import TemplateError
from tokenizers import Tokenizer

from rlef_mega.config import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROLS = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
TEMPLATES = {
    "llama3": (
        "{{ '<|begin_of_text|>' }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
        "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
        "+ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
OTHER_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|endoftext|>")  # of responses, where they exist
# The messages with which every template is rendered.
QUESTION, ANSWER, FEEDBACK = "Sum it: <3 äöü\n\n  x = 1", "```python\nprint(1)\n```", "Try again."
DATES = ("strftime_now", "date_string")  # what templates read the current date from


@dataclass(frozen=True)
class ChatFormat:
    """Encodes the messages of a dialogue as the model's chat template does. A control token that is
    spelled out in a message is encoded as ordinary characters.

    The template's default system message is kept, except one with the current date (Llama 3.1's):
    the ids of a run would change from day to day.
    """

    tokenizer: "PreTrainedTokenizerBase"
    begin: tuple[int, ...]  # before the first message
    user_header: tuple[int, ...]  # control tokens that open a user message
    user_lead: str  # plain text after them, encoded together with the message
    assistant_header: tuple[int, ...]  # closes the user message and opens the assistant's
    end_of_turn: int
    between: tuple[int, ...]  # after the end of a response, before the next header
    stop_token_ids: tuple[int, ...]
    texts: dict[int, str] = field(default_factory=dict, compare=False, repr=False)  # of tokens seen

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Return the chat format of a Hugging Face model folder. Responses end with the
        template's end of turn, and with every token that tokenizer, config.json or
        generation_config.json declares as an end.

        Raises ValueError, with the remedy, if the folder has no usable format, or if the text of a
        message could become control tokens.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder}: transformers cannot load its tokenizer "
                f"({str(error).strip().partition(chr(10))[0]}); copy tokenizer.json and "
                "tokenizer_config.json from where the model was published"
            ) from None
        if not tokenizer.is_fast:
            raise ValueError(
                f"{folder} has no tokenizer.json; write one with transformers (AutoTokenizer."
                "from_pretrained(FOLDER).save_pretrained(FOLDER), with sentencepiece installed)"
            )
        return cls.for_tokenizer(tokenizer, declared_ends(folder))

    @classmethod
    def for_tokenizer(cls, tokenizer: "PreTrainedTokenizerBase", ends: Sequence[int] = ()) -> Self:
        """Read the format from the tokenizer's template (`template_of`). `ends` are further tokens
        that end a response. Raises ValueError if the template does not put the same ids around each
        message, or if the text of a message could become control tokens."""
        template = template_of(tokenizer)
        added = tokenizer.get_added_vocab()
        whole, pieces = render(tokenizer, template)
        opening, _, following, assistant = pieces

        def cut(text: str) -> tuple[tuple[int, ...], str]:
            """Return the ids up to the last control token, and the plain text after it."""
            end = max((text.rfind(c) + len(c) for c in added if c in text), default=0)
            return encode_controls(tokenizer, text[:end]), text[end:]

        # begin, user header, plain text; end of turn, between, user header, plain text
        (first, lead), (later, later_lead) = cut(opening), cut(following)
        controls = [n for n, token in enumerate(later) if token in added.values()]
        user = later[controls[1] :] if len(controls) > 1 else ()
        if not (user and controls[0] == 0 and lead == later_lead and first[-len(user) :] == user):
            raise unusable_template(
                tokenizer, "its messages do not all begin and end with the same control tokens"
            )
        dated = any(word in template for word in DATES)
        found = cls(
            tokenizer,
            begin=first[: first.index(user[0]) if dated else -len(user)],
            user_header=user,
            user_lead=lead,
            assistant_header=encode_controls(tokenizer, assistant),
            end_of_turn=later[0],
            between=later[1 : controls[1]],
            stop_token_ids=stops(tokenizer, later[0], ends),
        )
        frame = {*user, *found.assistant_header, found.end_of_turn} & set(added.values())
        for control in (c for c, token in added.items() if token in frame):
            if added[control] in found.encode(control):
                raise unusable_template(tokenizer, f"the text {control!r} becomes that token")
        ours = [*found.open(QUESTION), *found.respond(ANSWER), *found.observe(FEEDBACK, True)]
        theirs = [*found.begin, *whole[len(first) - len(user) :]]
        if ours != theirs:
            whole_text, joined_text = tokenizer.decode(theirs), tokenizer.decode(ours)
            raise unusable_template(
                tokenizer, f"it renders {whole_text!r}, but messages one by one {joined_text!r}"
            )
        return found

    @cached_property
    def plain(self) -> Tokenizer:
        """Return the tokenizer without its added tokens, which encodes text that spells one as
        ordinary characters."""
        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        plain = {**content, "added_tokens": [], "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(plain))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` as ordinary characters, even if it spells control tokens."""
        return self.plain.encode(text, add_special_tokens=False).ids

    def open(self, text: str, begun: str = "") -> list[int]:
        """Return the first user message and the assistant's header, followed by the text `begun`
        with which the response begins."""
        return [*self.begin, *self.ask(text, begun)]

    def observe(self, text: str, ended: bool, begun: str = "") -> list[int]:
        """Return the ids to append to a response: the next user message and the assistant's header.
        `ended` is whether the model ended the response; else the length limit cut it off."""
        end = () if ended else (self.end_of_turn,)
        return [*end, *self.between, *self.ask(text, begun)]

    def ask(self, text: str, begun: str = "") -> list[int]:
        """Return a user message and the assistant's header, followed by `begun`."""
        message = self.encode(self.user_lead + text.strip())
        start = self.encode(begun) if begun else []
        return [*self.user_header, *message, *self.assistant_header, *start]

    def respond(self, text: str) -> list[int]:
        """Return a response as a model would sample it, end of turn included, for supervised
        training."""
        return [*self.encode(text), self.end_of_turn]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a response, without its end-of-turn token."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        text = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text that each token adds to the response, so that the pieces join to its
        whole text. The end-of-turn token adds nothing. If several tokens make up one character, the
        last one adds it."""
        whole = self.decode(token_ids)
        for token in set(token_ids) - self.texts.keys():
            self.texts[token] = self.decode([token])
        pieces = [self.texts[token] for token in token_ids]
        if "".join(pieces) == whole:
            return pieces
        pieces, start, read = [], 0, 0
        for end in range(1, len(token_ids) + 1):
            text = self.decode(token_ids[start:end])
            if text.endswith("\ufffd") and end < len(token_ids):
                pieces.append("")  # the character is not whole yet
                continue
            # decode with the token before it: some tokenizers drop a leading blank
            pieces.append(text[len(self.decode(token_ids[start:read])) :])
            start, read = read, end
        same = "".join(pieces) == whole
        return pieces if same else [*[""] * (len(token_ids) - 1), whole]


def template_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the tokenizer's chat template or, without one, that of the known format whose control
    tokens it has. Raises ValueError if there is neither."""
    if tokenizer.chat_template:
        return tokenizer.get_chat_template()
    known = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    for name, controls in CONTROLS.items():
        if known.issuperset(controls):
            return TEMPLATES[name]
    raise ValueError(
        f"the tokenizer {tokenizer.name_or_path!r} has neither a chat template nor the control "
        f"tokens of a known chat format ({', '.join(CONTROLS)}); use an instruction-tuned model"
    )


def render(
    tokenizer: "PreTrainedTokenizerBase", template: str
) -> tuple[tuple[int, ...], list[str]]:
    """Render two turns. Returns their ids, and the texts before, between and after the messages."""
    contents = (QUESTION, ANSWER, FEEDBACK)
    roles = ("user", "assistant", "user")
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    try:
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, TypeError) as error:
        raise unusable_template(
            tokenizer, f"it refuses two turns of user and assistant ({error})"
        ) from None
    pieces, rest = [], str(rendered)
    for content in contents:
        piece, content, rest = rest.partition(content)
        if not content:
            raise unusable_template(tokenizer, "it changes the text of messages")
        pieces.append(piece)
    return encode_controls(tokenizer, str(rendered)), [*pieces, rest]


def unusable_template(tokenizer: "PreTrainedTokenizerBase", why: str) -> ValueError:
    """Return the error for a chat template that cannot be applied message by message."""
    return ValueError(
        f"the chat template of the tokenizer {tokenizer.name_or_path!r} cannot be followed token "
        f"by token: {why}; use a model with a template like Llama 3's or ChatML, or correct "
        "chat_template (chat_template.jinja or tokenizer_config.json in the model's folder)"
    )


def stops(tokenizer: "PreTrainedTokenizerBase", end: int, ends: Sequence[int]) -> tuple[int, ...]:
    """Return the end-of-turn token, and others with which the model may end a response."""
    added, eos = tokenizer.get_added_vocab(), tokenizer.eos_token_id
    others = [added[token] for token in OTHER_ENDS if token in added]
    return tuple(dict.fromkeys([end, *([] if eos is None else [eos]), *ends, *others]))


def declared_ends(folder: Path) -> list[int]:
    """Return the tokens that the model's configs declare as `eos_token_id`, alone or in a list."""
    found = []
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.is_file():
            declared = read_json(path).get("eos_token_id")
            found += declared if isinstance(declared, list) else [declared]
    return [token for token in found if isinstance(token, int)]


def encode_controls(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[int, ...]:
    """Return the ids of a template's own text, in which control tokens are control tokens."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
