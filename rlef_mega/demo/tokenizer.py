"""The tokenizer of our own small models: byte-level BPE, trained on curriculum dialogues.

Digits, quotes, fences and words are separate pieces; a space before a word or a quote belongs to
its piece. A word after a quote is then the same token in feedback (`'Hello Bob'`) and in code
(`print('Hello',input())`), and copying it takes one step of attention. Control tokens have Llama
3's names, so the chat format is Llama 3.1's (`chat.ChatFormat`).
"""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlef_mega.demo.taught_dialogues import sft_dialogue
from rlef_mega.dialogues.chat import TEMPLATES

CONTROL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
DIALOGUES = 4000  # enough for every word of the curriculum to become a token
PIECES = r"```python\n|```| ?\p{L}+|\d| ?['\"]|[^\s\p{L}\d'\"]+|\n+|\s"


def train_tokenizer(folder: str | Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer and save it as a folder that `AutoTokenizer.from_pretrained` loads.

    The vocabulary has exactly `vocab_size` entries; reserved tokens fill it up. Raises ValueError
    if `vocab_size` is too small for bytes and control tokens.
    """
    least = len(CONTROL_TOKENS) + len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if vocab_size < least:
        raise ValueError(
            f"vocab_size = {vocab_size} is too small for bytes and control tokens; "
            f"use at least {least}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    missing = vocab_size - bpe.get_vocab_size()
    bpe.add_special_tokens([f"<|reserved_special_token_{n}|>" for n in range(missing)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        additional_special_tokens=["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATES["llama3"]
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def corpus() -> Iterator[str]:
    """Yield messages and, as often, the words of headers, so that each becomes one token."""
    for number in range(DIALOGUES):
        for message in sft_dialogue(number):
            yield from ("user", "assistant", "\n\n", message)
