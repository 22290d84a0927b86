"""The supervised dialogues and the tokenizer learnt from them."""

from collections import Counter

import pytest
from transformers import AutoTokenizer

from rlef_mega.demo import taught_dialogues
from rlef_mega.demo.taught_dialogues import sft_dialogue
from rlef_mega.demo.tokenizer import train_tokenizer
from rlef_mega.dialogues import templates
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.programs import extract_program
from rlef_mega.problems.curriculum import FAMILIES, Exercise, exercises
from rlef_mega.problems.splits import Split

VOCAB = 720  # as in recipes/demo_base.toml
DIALOGUES = [sft_dialogue(number) for number in range(3000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, VOCAB)
    return folder


@pytest.fixture(scope="module")
def chat(folder) -> ChatFormat:
    return ChatFormat.for_tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))


def prompts_of(split: Split) -> dict[str, set[str]]:
    """Return a split's first prompts, each with the feedback lines that show its public tests."""
    prompts: dict[str, set[str]] = {}
    for e in exercises(split):
        prompt = templates.first_prompt(e.statement, "curriculum")
        shown = f"'{e.public_input}' failed: Expected output '{e.output(e.public_input)}'"
        prompts.setdefault(prompt, set()).add(shown)
    return prompts


def test_a_dialogue_depends_on_its_number_and_the_seed_alone():
    ones = [sft_dialogue(number, seed=1) for number in range(8)]
    assert [sft_dialogue(number, seed=1) for number in reversed(range(8))] == ones[::-1]
    assert [sft_dialogue(number, seed=2) for number in range(8)] != ones


def test_no_dialogue_shows_a_held_out_public_test():
    training = prompts_of("train")
    for first, *rest in DIALOGUES:
        assert first in training
        for told in rest[1::2]:
            shown = told.splitlines()[1].removeprefix("- input ").partition(" but got")[0]
            faults = ("SyntaxError", "No code block", "The code block has no end")
            assert shown.startswith(tuple(f"- {f}" for f in faults)) or shown in training[first]


def test_dialogues_take_turns_and_end_with_a_response():
    lengths = Counter(map(len, DIALOGUES))
    assert set(lengths) == {2, 4, 6}
    for dialogue in DIALOGUES:
        assert all(told.startswith("Your code failed") for told in dialogue[2::2])


def test_responses_to_feedback_are_right_no_more_often_than_stated():
    """The supervised stage does not teach the use of feedback."""
    follow_ups = []
    for number, dialogue in enumerate(DIALOGUES):
        exercise = exercise_of(number)
        for told, response in zip(dialogue[2::2], dialogue[3::2], strict=True):
            if "Expected output" in told:
                follow_ups.append(extract_program(response).program == exercise.source)
    assert len(follow_ups) > 1000
    lucky = (1 - taught_dialogues.CORRECTED - taught_dialogues.REPEATED) / 12
    assert sum(follow_ups) / len(follow_ups) < taught_dialogues.CORRECTED + lucky + 0.03


def exercise_of(number: int) -> Exercise:
    return taught_dialogues.draw_exercise(number, 0)[1]


def test_statements_that_give_the_variant_are_answered_correctly_at_once():
    told = right = 0
    for number in range(2000):
        exercise = exercise_of(number)
        if exercise.wording != "vague":
            told += 1
            right += extract_program(DIALOGUES[number][1]).program == exercise.source
    assert right / told > taught_dialogues.INFORMED - taught_dialogues.CORRUPTED - 0.03


def test_corrupted_responses_hold_no_valid_code():
    invalid = sum(extract_program(d[1]).program is None for d in DIALOGUES) / len(DIALOGUES)
    assert invalid == pytest.approx(taught_dialogues.CORRUPTED, abs=0.015)


def test_training_a_tokenizer_twice_gives_the_same_files(folder, tmp_path):
    train_tokenizer(tmp_path, VOCAB)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_the_vocabulary_has_exactly_the_size_asked_for(tmp_path):
    assert len(train_tokenizer(tmp_path, 2048)) == 2048  # more than the dialogues fill
    with pytest.raises(ValueError, match="use at least"):
        train_tokenizer(tmp_path, 100)


def test_all_dialogues_round_trip(chat):
    for dialogue in DIALOGUES[:300]:
        for message in dialogue:
            assert chat.decode(chat.respond(message)) == message


def test_any_text_can_be_encoded(chat):
    text = "Größe 漢字 \t\r\n <|eot_id|> `` 1e-9 🙂"
    assert chat.decode(chat.respond(text)) == text


def test_each_part_of_a_header_is_one_token(chat):
    """<|start_header_id|> user <|end_header_id|> \\n\\n: as in Llama 3's own vocabulary."""
    assert len(chat.user_header) == 3
    assert len(chat.assistant_header) == 1 + 3 + 1
    text = "Join the integers."
    message = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(chat.open(text)) == 1 + 3 + 1 + len(message) + 5


def test_our_chat_template_is_our_chat_format(chat):
    roles = ("user", "assistant") * 3
    for dialogue in DIALOGUES[:100]:
        messages = [dict(role=r, content=m) for r, m in zip(roles, dialogue, strict=False)]
        ids = chat.open(dialogue[0])
        for place, message in enumerate(dialogue[1:]):
            ids += chat.observe(message, ended=True) if place % 2 else chat.respond(message)
        template = chat.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids == template


def test_every_word_that_is_copied_is_one_token(chat):
    words = {part for family in FAMILIES for variant in family.variants for part in variant}
    words |= {text for family in FAMILIES for text in family.public_inputs if text.isalpha()}
    for word in words:
        assert len(chat.tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word


def test_a_word_of_the_curriculum_is_the_same_token_in_feedback_and_in_code(chat):
    """Copying it from feedback into code is then one step."""
    for family in FAMILIES:
        for variant in family.variants:
            word = variant[0]
            output = family.output(family.public_inputs[0], variant)
            if not output.startswith(word):
                continue  # units follow a space, signs follow another word
            (token,) = chat.tokenizer(word, add_special_tokens=False)["input_ids"]
            told = chat.tokenizer(f"Expected output '{output}'", add_special_tokens=False)
            assert token in told["input_ids"]


def test_dialogues_and_responses_fit_a_small_model(chat):
    lengths, responses = [], []
    for dialogue in DIALOGUES[:500]:
        parts = [chat.open(dialogue[0])]
        for place, message in enumerate(dialogue[1:]):
            parts.append(chat.observe(message, True) if place % 2 else chat.respond(message))
        lengths.append(sum(map(len, parts)))
        responses += map(len, parts[1::2])
    assert max(lengths) <= 256 and max(responses) <= 40
