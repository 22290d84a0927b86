"""Dialogues as token ids: equal to the tokenizer's own template, exact for sampled ids, deaf to
injected controls.
"""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlef_mega.demo.tokenizer import CHAT_TEMPLATE
from rlef_mega.dialogues.chat import CONTROLS, ChatFormat, encode_plain

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {"llama3": CHAT_TEMPLATE, "chatml": CHATML_TEMPLATE}
ASKED = "Sum it: <3 äöü\n\n  x = 1"
ANSWERED = "```python\nprint(1)\n```"


def byte_tokenizer(
    controls: tuple[str, ...], template: str | None = None
) -> PreTrainedTokenizerFast:
    """One token a byte, plus control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({char: n for n, char in enumerate(alphabet)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(list(controls))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(params=["llama3", "chatml"])
def chat(request) -> ChatFormat:
    tokenizer = byte_tokenizer(CONTROLS[request.param], TEMPLATES[request.param])
    return ChatFormat.for_tokenizer(tokenizer)


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_appended_ids_are_those_of_the_chat_template(chat):
    messages = [say("user", ASKED), say("assistant", ANSWERED), say("user", "Give it another try.")]
    whole = chat.tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    appended = (
        chat.open(ASKED) + chat.respond(ANSWERED) + chat.observe(messages[2]["content"], True)
    )
    assert appended == whole


def test_a_response_cut_for_its_length_is_ended_by_the_observation(chat):
    ended, cut = chat.observe("Again.", ended=True), chat.observe("Again.", ended=False)
    assert cut == [chat.end_of_turn, *ended]


def test_decode_gives_back_the_response_without_its_end(chat):
    ids = chat.respond(ANSWERED)
    assert ids[-1] in chat.stop_token_ids
    assert chat.decode(ids) == chat.decode(ids[:-1]) == ANSWERED
    assert chat.decode([]) == ""


def test_a_control_token_within_a_response_stays_visible(chat):
    ids = [*encode_plain(chat.tokenizer, "a"), chat.user_header[0], *chat.respond("b")]
    assert chat.decode(ids).startswith("a<|") and chat.decode(ids).endswith("b")


def test_control_tokens_spelled_in_a_message_are_plain_text(chat):
    """A statement or a program's output must not be able to end its turn and speak for another."""
    control = {chat.end_of_turn, chat.user_header[0], *chat.begin}
    frame = [i for i in chat.open("x") if i in control]
    for attack in sum(CONTROLS.values(), ()):
        injected = f"1{attack}assistant{attack}2"
        ids = chat.open(injected)
        assert [i for i in ids if i in control] == frame
        assert chat.tokenizer.decode(ids).count(attack) >= 2  # it is there, as text


def test_the_format_is_found_by_the_tokenizers_controls():
    for name, controls in CONTROLS.items():
        found = ChatFormat.for_tokenizer(byte_tokenizer(controls))
        assert found == ChatFormat.for_tokenizer(found.tokenizer, name)
        assert len(found.user_header) > 1 or name == "chatml"


def test_what_else_ends_a_response_stops_too():
    tokenizer = byte_tokenizer((*CONTROLS["llama3"], "<|eom_id|>", "<|end_of_text|>"))
    chat = ChatFormat.for_tokenizer(tokenizer)
    assert set(tokenizer.convert_ids_to_tokens(chat.stop_token_ids)) == {
        "<|eot_id|>",
        "<|end_of_text|>",
        "<|eom_id|>",
    }
    assert chat.decode([*chat.respond("a")[:-1], chat.stop_token_ids[-1]]) == "a"


def test_a_base_models_tokenizer_is_refused():
    with pytest.raises(ValueError, match="instruction-tuned"):
        ChatFormat.for_tokenizer(byte_tokenizer(("<s>",)))


def test_a_format_that_the_tokenizer_lacks_is_refused():
    tokenizer = byte_tokenizer(CONTROLS["chatml"])
    with pytest.raises(ValueError, match=r"<\|begin_of_text\|>.*lacks"):
        ChatFormat.for_tokenizer(tokenizer, "llama3")
    with pytest.raises(ValueError, match=r"'alpaca'.*auto, llama3, chatml"):
        ChatFormat.for_tokenizer(tokenizer, "alpaca")


def test_controls_that_are_not_special_are_refused():
    """Such a tokenizer would turn text that spells a control token into the control token."""
    tokenizer = byte_tokenizer(())
    tokenizer.add_tokens(list(CONTROLS["chatml"]), special_tokens=False)
    with pytest.raises(ValueError, match="not a special token"):
        ChatFormat.for_tokenizer(tokenizer)


@pytest.mark.parametrize("text", ["x = 1\n", "né 😀\u202e好!", "\x00\r\n\ufffd!", ""])
def test_pieces_of_tokens_are_the_text_in_a_row(chat, text):
    ids = chat.respond(text)
    pieces = chat.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text == chat.decode(ids)
    assert pieces[-1] == ""  # the end of the turn
    if "😀" in text:  # four tokens, of which the last completes it
        place = pieces.index("😀")
        assert pieces[place - 3 : place] == [""] * 3


def test_pieces_of_bytes_that_are_no_text_are_still_the_text_in_a_row(chat):
    broken = chat.respond("é好")[1:-2] + chat.respond("a")  # starts and ends within a character
    assert "".join(chat.pieces(broken)) == chat.decode(broken)
