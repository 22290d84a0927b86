"""Chat formats: dialogues to token ids, token-in token-out.

Messages are encoded one by one and appended to the ids that the engine sampled, which are never
decoded and encoded again. Pure functions, except for reading a tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatFormat:
    """Encodes the messages of a dialogue. A control token that is spelled out in a message is
    encoded as ordinary characters.

    `llama3` is Llama 3.1's format without its system message, which contains the current date.
    `chatml` has no default system message either.
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
    def for_tokenizer(cls, tokenizer: "PreTrainedTokenizerBase", name: str = "auto") -> Self:
        """Return the format llama3 or chatml; auto chooses by the tokenizer's control tokens."""
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
        """Return the chat format of a Hugging Face model folder."""
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
        message = encode_plain(self.tokenizer, self.user_lead + text.strip())
        start = encode_plain(self.tokenizer, begun) if begun else []
        return [*self.user_header, *message, *self.assistant_header, *start]

    def respond(self, text: str) -> list[int]:
        """Return a response as a model would sample it, end of turn included, for supervised
        training."""
        return [*encode_plain(self.tokenizer, text), self.end_of_turn]

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


CONTROLS = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}


def control_ids(tokenizer: "PreTrainedTokenizerBase", controls: Sequence[str]) -> list[int]:
    """Return the ids of control tokens. Raises ValueError if text that spells one would be encoded
    as one."""
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
    """Return the end-of-turn token, and others with which the model may end a response."""
    added = tokenizer.get_added_vocab()
    return (end, *(added[token] for token in others if token in added))


def encode_plain(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the ids of `text` without special tokens; control tokens in it are characters."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert isinstance(ids, list)
    return ids
