"""Episodes as lines of JSON, for a person to read: texts in place of token ids, and the numbers of
each token of a response.

A record holds no more than `TEXT_LIMIT` characters of any one text. Of tokens it has how many
characters of the response each one is (`pieces`), and their log-probs in thousandths of a nat:
`logprobs` when they were sampled, `ref_logprobs` under the initial policy. Nothing reads records
back but the report.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.problems import named
from rlef_mega.types import (
    AssertTest,
    Batch,
    Episode,
    Problem,
    Scores,
    Targets,
    TestOutcome,
    Turn,
    Verdict,
)
from rlef_sandbox import AnyTest, CallTest, Status, Test

TEXT_LIMIT = 10_000  # characters of any one text


@dataclass(frozen=True)
class TurnNumbers:
    """What the trainer made of a turn."""

    value: float
    turn_return: float
    advantage: float
    ref_logprobs: list[float] | None  # of its tokens; None where the reference was not scored
    advantages: list[float] | None  # of its tokens, where each has its own


def episode_records(
    episodes: Sequence[Episode],
    problems: Sequence[Problem],
    chat: ChatFormat,
    batch: Batch,
    scores: Scores,
    targets: Targets,
) -> list[dict[str, Any]]:
    """A step's episodes, each turn with its value, return and advantage (its first token's, where
    every token has its own)."""
    by_id = named(problems, {episode.problem_id for episode in episodes})
    numbers = turn_numbers(batch, scores, targets)
    records = []
    for episode in episodes:
        mine, numbers = numbers[: len(episode.turns)], numbers[len(episode.turns) :]
        records.append(episode_record(episode, chat, by_id[episode.problem_id], mine))
    return records


def turn_numbers(batch: Batch, scores: Scores, targets: Targets) -> list[TurnNumbers]:
    """Of all turns of the batch, in their order."""
    action_T = batch.action_mask_T
    lengths = torch.bincount(batch.turn_index_T[action_T], minlength=batch.num_turns)
    starts = lengths.cumsum(0) - lengths
    by_token = targets.returns_N.numel() != batch.num_turns
    of_turn = starts if by_token else torch.arange(batch.num_turns)
    rows = torch.stack([targets.old_values_N, targets.returns_N, targets.advantages_N])
    references = scores.ref_logprobs_T[action_T].split(lengths.tolist())
    scored = bool(scores.ref_logprobs_T.any())  # all 0 where there is no KL penalty
    advantages = targets.advantages_N.split(lengths.tolist()) if by_token else None
    return [
        TurnNumbers(
            value,
            turn_return,
            advantage,
            ref_logprobs=references[turn].tolist() if scored else None,
            advantages=advantages[turn].tolist() if advantages else None,
        )
        for turn, (value, turn_return, advantage) in enumerate(rows[:, of_turn].T.tolist())
    ]


def episode_record(
    episode: Episode,
    chat: ChatFormat,
    problem: Problem,
    numbers: Sequence[TurnNumbers] | None = None,
) -> dict[str, Any]:
    """An episode; `numbers` are of its turns, where it was trained on."""
    turns = []
    end = 0
    for place, turn in enumerate(episode.turns):
        observed = episode.token_ids[end : turn.context_len]
        end = turn.context_len + len(turn.action_ids)
        turns.append(
            {
                "observation": chat.decode(observed)[:TEXT_LIMIT],
                **judged_record(turn.program, turn.verdict, problem),
                "tokens": len(turn.action_ids),
                "logprob_mean": sum(turn.action_logprobs) / len(turn.action_logprobs),
                **token_records(turn, chat, numbers[place] if numbers else None),
            }
        )
    return {**problem_record(problem), "solved": episode.solved, "turns": turns}


def problem_record(problem: Problem) -> dict[str, Any]:
    return {
        "problem_id": problem.id,
        "family": problem.family,
        "language": problem.language,
        "tags": list(problem.tags),
    }


def judged_record(program: str | None, verdict: Verdict, problem: Problem) -> dict[str, Any]:
    """A response's program, and what became of it."""
    return {
        "program": program,
        "public": [outcome_record(outcome) for outcome in verdict.public],
        "public_passed": verdict.public_passed,
        "private": private_record(verdict, problem),
        "solved": verdict.solved,
    }


def token_records(turn: Turn, chat: ChatFormat, numbers: TurnNumbers | None) -> dict[str, Any]:
    """The response and its numbers, of the turn and of its tokens."""
    pieces = chat.pieces(turn.action_ids)
    shown = whole_tokens(pieces)
    record: dict[str, Any] = {
        "response": "".join(pieces)[:TEXT_LIMIT],
        "pieces": [len(piece) for piece in pieces[:shown]],
        "logprobs": thousandths(turn.action_logprobs[:shown]),
        "versions": [[version, len(list(run))] for version, run in groupby(turn.weight_versions)],
        "value": None,
        "return": None,
        "advantage": None,
    }
    if numbers:
        record |= {
            "value": numbers.value,
            "return": numbers.turn_return,
            "advantage": numbers.advantage,
        }
        if numbers.ref_logprobs is not None:
            record["ref_logprobs"] = thousandths(numbers.ref_logprobs[:shown])
        if numbers.advantages is not None:
            record["advantages"] = thousandths(numbers.advantages[:shown])
    return record


def whole_tokens(pieces: Sequence[str]) -> int:
    """How many of the first tokens the recorded text holds."""
    length = 0
    for number, piece in enumerate(pieces):
        length += len(piece)
        if length > TEXT_LIMIT:
            return number
    return len(pieces)


def thousandths(numbers: Sequence[float]) -> list[int]:
    return [round(1000 * number) for number in numbers]


def private_record(verdict: Verdict, problem: Problem) -> dict[str, Any] | None:
    """What the reward saw: how many private tests there are, were run and passed, and how the one
    failed that ended grading. None where none was run."""
    statuses = verdict.private_statuses
    if not statuses:
        return None
    passed = statuses.count(Status.OK)
    tests = len(problem.private_tests.tests)
    record: dict[str, Any] = {"tests": tests, "run": len(statuses), "passed": passed}
    if passed == len(statuses):
        return record
    record |= {"status": statuses[-1].name}
    if len(verdict.public) == len(problem.public_tests):  # else some were shown: B.3's feedback
        record |= {"failed": test_record(problem.private_tests.tests[len(statuses) - 1])}
    return record


def outcome_record(outcome: TestOutcome) -> dict[str, str]:
    returned = outcome.result.returned if isinstance(outcome.test, CallTest) else None
    return {
        **test_record(outcome.test),
        "observed": text(outcome.result.stdout if returned is None else returned),
        "status": outcome.result.status.name,
        "stderr": text(outcome.result.stderr),
    }


def test_record(test: AnyTest | AssertTest) -> dict[str, str]:
    if isinstance(test, CallTest):
        arguments = ", ".join(map(repr, test.args))
        given, expected = f"{test.entry_point}({arguments})", repr(test.expected)
    elif isinstance(test, AssertTest):
        given, expected = test.statement, ""
    elif isinstance(test, Test):
        given, expected = text(test.stdin), text(test.expected)
    else:
        given, expected = test.code, ""
    return {"input": given[:TEXT_LIMIT], "expected": expected[:TEXT_LIMIT]}


def text(content: bytes | str) -> str:
    readable = content.decode(errors="replace") if isinstance(content, bytes) else content
    return readable[:TEXT_LIMIT]
