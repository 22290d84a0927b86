"""A recorded episode is what was sampled, graded and trained on."""

import json

import pytest
import torch

from rlef_mega.config import PPOConfig
from rlef_mega.dialogues.records import TEXT_LIMIT, episode_record, episode_records
from rlef_mega.packing import pack
from rlef_mega.targets import targets_of
from rlef_mega.types import (
    Completion,
    Episode,
    PrivateTests,
    Problem,
    Scores,
    TestOutcome,
    Turn,
    Verdict,
)
from rlef_sandbox import Result, Status, Test
from tests.rlef_mega.dialogues.test_chat import CONTROLS, ChatFormat, byte_tokenizer

PUBLIC = Test(b"1\n", b"2\n")
PROBLEM = Problem(
    "sum", "Add one.", (PUBLIC,), PrivateTests((Test(b"5\n", b"6\n"), Test(b"\xff\n", b"0\n")))
)


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat.for_tokenizer(byte_tokenizer(CONTROLS["chatml"]))


def result(status: Status, stdout: bytes = b"") -> Result:
    return Result(
        status=status,
        stdout=stdout,
        stderr=b"",
        exit_code=0,
        signal=None,
        cpu_s=0.0,
        wall_s=0.0,
        max_rss_bytes=0,
    )


def held(chat: ChatFormat, responses: list[str], verdicts: list[Verdict]) -> Episode:
    turns: list[Turn] = []
    for response, verdict in zip(responses, verdicts, strict=True):
        observed = chat.observe("Again.", ended=True) if turns else chat.open("Add one.")
        ids = chat.respond(response)
        logprobs = tuple(-0.25 * place for place in range(len(ids)))
        versions = (4,) * (len(ids) - 2) + (5, 5)
        sampled = Completion(tuple(ids), logprobs, versions, "stop")
        turns.append(Turn(tuple(observed), sampled, response, verdict))
    return Episode("sum", tuple(turns))


def failing(statuses: tuple[Status, ...]) -> Verdict:
    right = TestOutcome(PUBLIC, result(Status.OK, b"2\n"))
    return Verdict((right,), public_passed=True, solved=False, private_statuses=statuses)


def test_texts_pieces_and_versions_are_those_of_the_tokens(chat):
    wrong = Verdict((TestOutcome(PUBLIC, result(Status.WRONG_ANSWER, b"9")),), False, None)
    episode = held(chat, ["né", "x = 2"], [wrong, failing((Status.OK, Status.TIME_LIMIT))])
    record = episode_record(episode, chat, PROBLEM)
    first, second = json.loads(json.dumps(record))["turns"]
    assert first["response"] == "né" and second["response"] == "x = 2"
    assert first["pieces"] == [1, 0, 1, 0]  # n, two bytes of é, the end of the turn
    assert first["logprobs"] == [0, -250, -500, -750]
    assert second["versions"] == [[4, 4], [5, 2]]
    assert first["public"][0]["observed"] == "9" and first["private"] is None
    assert "ref_logprobs" not in first and first["value"] is None


def test_the_record_of_private_tests_is_what_the_reward_saw(chat):
    def private(statuses):
        return episode_record(held(chat, ["x"], [failing(statuses)]), chat, PROBLEM)["turns"][0][
            "private"
        ]

    assert private((Status.OK, Status.OK)) == {"tests": 2, "run": 2, "passed": 2}
    assert private((Status.OK, Status.TIME_LIMIT)) == {
        "tests": 2,
        "run": 2,
        "passed": 1,
        "status": "TIME_LIMIT",
        "failed": {"input": "\ufffd\n", "expected": "0\n"},
    }
    assert private((Status.WRONG_ANSWER,))["failed"]["input"] == "5\n"


@pytest.mark.parametrize("by_token", [False, True])
def test_numbers_of_turns_and_tokens_are_those_of_the_batch(chat, by_token):
    wrong = Verdict((), public_passed=False, solved=None)
    episodes = [
        held(chat, ["a", "bcd"], [wrong, failing((Status.WRONG_ANSWER,))]),
        held(chat, ["ef"], [failing((Status.WRONG_ANSWER,))]),
    ]
    batch = pack(episodes)
    reference_A = -0.001 * torch.arange(batch.num_actions)
    values = torch.arange(batch.num_actions if by_token else batch.num_turns).float()
    scores = Scores(batch.behaviour_logprobs_A, reference_A, values)
    settings = PPOConfig(normalize_advantages=False, token_level_value=by_token)
    found, _ = targets_of(batch, scores, settings)
    records = episode_records(episodes, [PROBLEM], chat, batch, scores, found)
    turns = [turn for record in records for turn in record["turns"]]
    assert [turn["tokens"] for turn in turns] == [2, 4, 3]
    assert [turn["value"] for turn in turns] == ([0, 2, 6] if by_token else [0, 1, 2])
    for number, turn in enumerate(turns):
        at = batch.turn_of_action_A == number
        assert turn["ref_logprobs"] == (-at.nonzero()[:, 0]).tolist()
        # the return is the same for all tokens of a turn, the value is not
        assert turn["advantage"] == pytest.approx(turn["return"] - turn["value"])
        assert ("advantages" in turn) == by_token
    if by_token:
        assert [a - turns[1]["advantages"][0] for a in turns[1]["advantages"]] == [
            0,
            -1000,
            -2000,
            -3000,
        ]


def test_without_a_penalty_there_is_no_reference_to_record(chat):
    episodes = [held(chat, ["a"], [failing((Status.WRONG_ANSWER,))])]
    batch = pack(episodes)
    scores = Scores(batch.behaviour_logprobs_A, None, torch.zeros(1))
    found, _ = targets_of(batch, scores, PPOConfig(beta=0))
    (record,) = episode_records(episodes, [PROBLEM], chat, batch, scores, found)
    assert "ref_logprobs" not in record["turns"][0]


def test_a_long_response_is_recorded_by_whole_tokens_up_to_the_limit(chat):
    episode = held(chat, ["x" * (TEXT_LIMIT + 5)], [failing((Status.WRONG_ANSWER,))])
    (turn,) = episode_record(episode, chat, PROBLEM)["turns"]
    assert len(turn["response"]) == sum(turn["pieces"]) == len(turn["logprobs"]) == TEXT_LIMIT
    assert turn["tokens"] == TEXT_LIMIT + 6
