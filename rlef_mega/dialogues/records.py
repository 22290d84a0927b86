"""Episodes as lines of JSON, for a person to read: texts instead of token ids, and the numbers of
each token of a response.

A record holds at most `TEXT_LIMIT` characters of any text but the program. For each token of a
response it has the number of characters (`pieces`) and the log-probs in thousandths of a nat:
`logprobs` when sampled, `ref_logprobs` under the initial policy. The report reads records.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, groupby, islice
from typing import Any

import torch

from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.problems import named
from rlef_mega.problems.literals import to_literal
from rlef_mega.types import (
    AssertTest,
    Batch,
    Completion,
    Episode,
    Problem,
    Scores,
    Targets,
    TestOutcome,
    Verdict,
)
from rlef_sandbox import AnyTest, CallTest, Status, Test

TEXT_LIMIT = 10_000  # characters of any one text but a program


def episode_records(
    episodes: Sequence[Episode],
    problems: Sequence[Problem],
    chat: ChatFormat,
    batch: Batch,
    scores: Scores,
    targets: Targets,
) -> list[dict[str, Any]]:
    """Return the records of a step's episodes. Each turn has a return, an advantage and, with a
    critic, a value; if values are token-level, these are the ones of its first token."""
    by_id = named(problems, {episode.problem_id for episode in episodes})
    numbers = iter(turn_numbers(batch, scores, targets))
    return [
        episode_record(e, chat, by_id[e.problem_id], list(islice(numbers, len(e.turns))))
        for e in episodes
    ]


def turn_numbers(batch: Batch, scores: Scores, targets: Targets) -> list[dict[str, Any]]:
    """Return the trainer's numbers of each turn of the batch, in order. Those of its tokens are
    tensors: `ref_logprobs` with a KL penalty, `advantages` with token-level values."""
    lengths = torch.bincount(batch.turn_of_action_A, minlength=batch.num_turns)
    first_action_N = lengths.cumsum(0) - lengths
    by_token = targets.returns_M.numel() != batch.num_turns
    of_turn = first_action_N if by_token else torch.arange(batch.num_turns)
    columns = {
        "return": targets.returns_M[of_turn].tolist(),
        "advantage": targets.advantages_A[first_action_N].tolist(),
    }
    if targets.old_values_M is not None:
        columns["value"] = targets.old_values_M[of_turn].tolist()
    if scores.ref_logprobs_A is not None:
        columns["ref_logprobs"] = scores.ref_logprobs_A.split(lengths.tolist())
    if by_token:
        columns["advantages"] = targets.advantages_A.split(lengths.tolist())
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def episode_record(
    episode: Episode, chat: ChatFormat, problem: Problem, numbers: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Return an episode's record. `numbers` are those of its turns, if it was trained on."""
    turns = []
    for index, turn in enumerate(episode.turns):
        logprobs = turn.completion.logprobs
        turns.append(
            {
                "observation": chat.decode(turn.observed_ids)[:TEXT_LIMIT],
                **judged_record(turn.program, turn.verdict, problem),
                "tokens": len(logprobs),
                "logprob_mean": sum(logprobs) / len(logprobs),
                **token_records(turn.completion, chat, numbers[index] if numbers else {}),
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
    """Return a response's program and test results, from which `rlef eval` computes its numbers."""
    return {
        "program": program,
        "fault": verdict.invalid[:TEXT_LIMIT],
        "public": [outcome_record(outcome) for outcome in verdict.public],
        "public_passed": verdict.public_passed,
        "private": private_record(verdict, problem),
        "solved": verdict.solved,
    }


def token_records(sampled: Completion, chat: ChatFormat, numbers: dict[str, Any]) -> dict[str, Any]:
    """Return the response with the numbers of the turn and of its tokens."""
    pieces = chat.pieces(sampled.token_ids)
    # the first tokens that fit into the recorded text
    shown = bisect_right(list(accumulate(map(len, pieces))), TEXT_LIMIT)
    return {
        "response": "".join(pieces)[:TEXT_LIMIT],
        "pieces": [len(piece) for piece in pieces[:shown]],
        "logprobs": thousandths(sampled.logprobs[:shown]),
        "versions": [
            [version, len(list(run))] for version, run in groupby(sampled.weight_versions)
        ],
        **dict.fromkeys(("value", "return", "advantage")),
        **{
            name: thousandths(found[:shown].tolist()) if isinstance(found, torch.Tensor) else found
            for name, found in numbers.items()
        },
    }


def thousandths(numbers: Sequence[float]) -> list[int]:
    return [round(1000 * number) for number in numbers]


def private_record(verdict: Verdict, problem: Problem) -> dict[str, Any] | None:
    """Return how many private tests there are, were run and passed, and the failure that ended
    grading; None if no private test was run."""
    statuses = verdict.private_statuses
    if not statuses:
        return None
    passed = statuses.count(Status.OK)
    tests = len(problem.private_tests.tests)
    record: dict[str, Any] = {"tests": tests, "run": len(statuses), "passed": passed}
    if passed == len(statuses):
        return record
    record |= {"status": statuses[-1].name}
    if len(verdict.public) == len(problem.public_tests):  # private tests were not shown (RLEF B.3)
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
        arguments = ", ".join(map(to_literal, test.args))
        given, expected = f"{test.entry_point}({arguments})", to_literal(test.expected)
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
