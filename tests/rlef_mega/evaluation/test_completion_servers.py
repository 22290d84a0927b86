"""The engine for completion servers, against a double; the evaluation through it:
test_evaluation.py."""

import asyncio
import math

import pytest

from rlef_mega.dialogues.chat import CONTROLS, ChatFormat
from rlef_mega.engines import EngineError
from rlef_mega.evaluation.completion_servers import OpenAIEngine
from rlef_mega.types import Completion, Sampling
from tests.rlef_mega.dialogues.test_chat import byte_tokenizer
from tests.rlef_mega.evaluation.completion_server_double import CompletionServer

RESPONSES = ["```python\nprint('ä')\n```", "I <|eot_id|> do not know."]


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat.for_tokenizer(byte_tokenizer(CONTROLS["llama3"]))


@pytest.fixture
def server(chat, request):
    with CompletionServer(chat, RESPONSES, getattr(request, "param", "ids")) as server:
        yield server


def sampling(chat: ChatFormat, tokens: int = 100) -> Sampling:
    return Sampling(tokens, temperature=0.5, top_p=0.9, stop_token_ids=chat.stop_token_ids)


def ask(engine: OpenAIEngine, chat: ChatFormat, *seeds: int, tokens: int = 100) -> list[Completion]:
    async def one(seed: int) -> Completion:
        async with engine.session() as session:
            return await session.generate(chat.open("Hi."), sampling(chat, tokens), seed)

    async def together() -> list[Completion]:
        return await asyncio.gather(*map(one, seeds))

    return asyncio.run(together())


def test_ids_are_those_that_the_server_sampled(chat, server):
    with OpenAIEngine([server.url + "/v1/"], chat) as engine:
        first, second = ask(engine, chat, 0, 1)
        (cut,) = ask(engine, chat, 0, tokens=5)
        assert engine.facts["token_ids"] == "as sampled"
        assert engine.facts["prompts"] == "checked, id by id"
    assert list(first.token_ids) == chat.respond(RESPONSES[0])
    assert list(second.token_ids) == chat.respond(RESPONSES[1])
    assert set(first.logprobs) == {-0.25} and first.finish_reason == "stop"
    assert list(cut.token_ids) == chat.respond(RESPONSES[0])[:5] and cut.finish_reason == "length"
    body = server.sampled[0]
    assert body["prompt"] == chat.open("Hi.") and body["model"] == "tiny"
    assert body["temperature"] == 0.5 and body["top_p"] == 0.9
    assert body["stop_token_ids"] == list(chat.stop_token_ids)


@pytest.mark.parametrize("server", ["text"], indirect=True)
def test_a_server_of_text_alone_is_asked_plainly_and_said_to_be_one(chat, server):
    with OpenAIEngine([server.url], chat) as engine:
        first, cut = ask(engine, chat, 0)[0], ask(engine, chat, 0, tokens=5)[0]
        assert engine.facts["token_ids"] == "its text, encoded again"
        assert engine.facts["prompts"] == "checked, by their length"
        assert engine.facts["log_probs"] == "none"
    assert list(first.token_ids) == chat.respond(RESPONSES[0])
    assert all(map(math.isnan, first.logprobs))
    assert list(cut.token_ids) == chat.respond(RESPONSES[0])[:5]
    assert server.sampled[0]["stop"] == [chat.tokenizer.decode([chat.end_of_turn])]
    assert not server.sampled[0].keys() & {"stop_token_ids", "return_token_ids"}


@pytest.mark.parametrize("server", ["extra"], indirect=True)
def test_a_server_that_reads_another_prompt_is_refused(chat, server):
    with pytest.raises(ValueError, match="adds some"), OpenAIEngine([server.url], chat):
        pass


@pytest.mark.parametrize("server", ["flaky"], indirect=True)
def test_what_fails_in_passing_is_asked_again_elsewhere(chat, server):
    with CompletionServer(chat, RESPONSES) as other:
        with OpenAIEngine([server.url, other.url], chat) as engine:
            answers = ask(engine, chat, *range(12))
        assert {tuple(a.token_ids) for a in answers} == {
            tuple(map(int, chat.respond(r))) for r in RESPONSES
        }
        assert len(server.sampled) + len(other.sampled) > 12


def test_a_silent_server_costs_the_dialogue_not_the_evaluation(chat, server):
    with OpenAIEngine([server.url], chat, deadline_s=0.5) as engine:
        server.mode = "hang"
        with pytest.raises(EngineError, match="no answer in"):
            ask(engine, chat, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "large"}, "no model 'large', but tiny.*--served-model"),
        ({"context": 5000}, "room for 4096 tokens.*--max-context"),
    ],
)
def test_a_server_without_the_model_or_the_room_is_refused(chat, server, options, message):
    with pytest.raises(ValueError, match=message), OpenAIEngine([server.url], chat, **options):
        pass


def test_nobody_listens(chat):
    with (
        pytest.raises(ValueError, match="cannot connect"),
        OpenAIEngine(["http://127.0.0.1:9"], chat),
    ):
        pass
