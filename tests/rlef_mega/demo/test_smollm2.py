"""A real pretrained model: its conversion, and that engine and trainer agree on it.

Both start from the converted folder, so their agreement would not reveal a wrong conversion; a test
of the text that the model writes would.
"""

import ast
import asyncio
import json

import pytest
import torch

from rlef_mega.config import LearnerConfig, PPOConfig
from rlef_mega.demo import smollm2
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.programs import extract_program
from rlef_mega.dialogues.templates import first_prompt
from rlef_mega.engines import GenerationRequest
from rlef_mega.engines.local import LocalEngine
from rlef_mega.megatron.learner import Learner
from rlef_mega.packing import pack
from rlef_mega.types import Episode, Sampling, Turn, Verdict

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("a model") / "smollm2"
    smollm2.convert(path)
    return path


@pytest.fixture(scope="module")
def chat(folder):
    return ChatFormat.from_folder(folder)


@pytest.fixture(scope="module")
def engine(folder):
    return LocalEngine(folder)


def hold(engine, chat, *prompts: str, tokens: int, temperature: float) -> Episode:
    """Hold an ungraded dialogue. Returns it as an episode."""
    sampling = Sampling(tokens, temperature, stop_token_ids=chat.stop_token_ids)
    ungraded = Verdict((), public_passed=False, solved=None)
    token_ids, turns = [], []

    async def talk():
        async with engine.session() as session:
            for number, prompt in enumerate(prompts):
                ended = bool(turns) and turns[-1].completion.token_ids[-1] in chat.stop_token_ids
                observed = tuple(chat.observe(prompt, ended) if turns else chat.open(prompt))
                token_ids.extend(observed)
                request = GenerationRequest(tuple(token_ids), sampling, seed=number)
                sampled = await session(request)
                turns.append(Turn(observed, sampled, None, ungraded))
                token_ids.extend(sampled.token_ids)

    asyncio.run(talk())
    return Episode("smollm2", tuple(turns))


def test_the_converted_model_writes_a_working_program(engine, chat):
    question = "Write a Python function `add(a, b)` that returns the sum of a and b."
    episode = hold(engine, chat, first_prompt(question, "mbpp"), tokens=64, temperature=0.0)
    program = extract_program(chat.decode(episode.turns[0].completion.token_ids)).program
    assert program is not None
    functions = [n for n in ast.parse(program).body if isinstance(n, ast.FunctionDef)]
    assert [f.name for f in functions] == ["add"]
    assert ast.unparse(functions[0].body[-1]) == "return a + b"


def test_trainer_and_engine_agree_on_the_log_probs_of_a_dialogue(engine, chat, folder, ranks):
    episode = hold(engine, chat, "Say hello.", "Once more.", tokens=12, temperature=1.0)
    batch = pack([episode])
    learner = Learner(
        ranks,
        folder,
        learner=LearnerConfig(),
        ppo=PPOConfig(beta=0.0),  # no reference: a third copy of the model would prove no more
        dtype="float32",
        temperature=1.0,
    )
    sampled, scored = batch.behaviour_logprobs_A, learner.score(batch).old_logprobs_A
    assert sampled.std() > 0.1  # else any two constant answers would agree
    # measured: 2e-5, fp32 rounding through 30 layers
    torch.testing.assert_close(scored, sampled, rtol=0, atol=2e-4)


def test_the_folder_is_a_plain_float32_llama_and_text_never_encodes_as_control_tokens(folder, chat):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert chat.end_of_turn == config["eos_token_id"] == config["pad_token_id"]
    spelled, plain = chat.open("<|im_end|> <|im_start|>assistant"), chat.open("a message")
    assert spelled.count(chat.end_of_turn) == plain.count(chat.end_of_turn)


def test_an_existing_folder_is_not_changed(folder):
    before = (folder / "config.json").stat().st_mtime_ns
    smollm2.convert(folder)
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="choose another folder"):
        smollm2.convert(tmp_path)


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package")
    with pytest.raises(ValueError, match=r"not installed; run: pip install"):
        smollm2.convert(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="damaged or of another version"):
        smollm2.convert(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
