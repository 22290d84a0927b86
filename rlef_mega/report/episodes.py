"""Pack the episodes of a run for the page's browser: an index to search, and the dialogues.

The page holds thousands of episodes and must open quickly. The index has a few numbers of each
episode; the dialogues are in compressed chunks, of which the browser unpacks the one that it shows.
Text passes `clip` and `visible` here, and the browser inserts it as text, never as HTML.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any

from rlef_mega.report.display import clip, visible
from rlef_mega.report.run_files import Json, lookup, number, rows, text

OUTCOMES = {"at_once": "solved at once", "repair": "solved by repair", "failed": "failed"}
CHUNK = 50  # dialogues; the browser opens one in a few milliseconds

# Bounds on what one turn may add to the page, whatever a program printed.
OBSERVATION_CHARACTERS = 6000
RESPONSE_CHARACTERS = 10_000  # as recorded
FIELD_CHARACTERS = 1000
TESTS_SHOWN = 20
TURNS_SHOWN = 20
TOKENS_SHOWN = 4000
TOKEN_NUMBERS = {"logprobs": "logprobs", "refs": "ref_logprobs", "advantages": "advantages"}


@dataclass(frozen=True)
class PackedEpisodes:
    index: str
    chunks: tuple[str, ...]
    count: int


def pack_episodes(stages: Mapping[str, Iterable[Json]], limit: int) -> PackedEpisodes:
    """Pack at most `limit` episodes. Stages share the limit evenly; of each stage the first
    episodes in file order are taken, so that the choice is not biased."""
    numbers: dict[str, dict[str, int]] = {
        name: {} for name in ("stages", "problems", "families", "kinds")
    }
    index: list[list[Any]] = []
    chunks: list[str] = []
    shown: list[Json] = []
    for stage, episode in share_out(stages, limit):
        dialogue = view_episode(episode)
        protocol = text(episode, "protocol").replace("_", " ")  # of an evaluation with several
        full_stage = f"{stage}, {protocol}" if protocol else stage
        index.append(index_row(readable(full_stage, 120), episode, dialogue, numbers))
        shown.append(dialogue)
        if len(shown) == CHUNK:
            chunks.append(squeeze(shown))
            shown = []
    if shown:
        chunks.append(squeeze(shown))
    names = {name: list(numbered) for name, numbered in numbers.items()}
    content = {**names, "outcomes": OUTCOMES, "chunk": CHUNK, "rows": index}
    return PackedEpisodes(squeeze(content), tuple(chunks), len(index))


def index_row(
    stage: str, episode: Json, dialogue: Json, numbers: dict[str, dict[str, int]]
) -> list[Any]:
    """Return what the index holds of an episode. Names are numbered in order of first use."""

    def numbered(name: str, kind: str) -> int:
        return numbers[kind].setdefault(name, len(numbers[kind]))

    turns = dialogue["turns"]
    return [
        numbered(stage, "stages"),
        numbered(dialogue["problem"], "problems"),
        numbered(" · ".join([dialogue["family"], *dialogue["tags"]]), "families"),
        list(OUTCOMES).index(outcome_of(episode)),
        [numbered(turn["error"], "kinds") for turn in turns],
        sum(turn["facts"].get("tokens", 0) for turn in turns),
        max((turn["facts"]["kl"] for turn in turns if "kl" in turn["facts"]), default=None),
    ]


def share_out(stages: Mapping[str, Iterable[Json]], limit: int) -> Iterator[tuple[str, Json]]:
    """Yield episodes stage by stage; a short stage leaves the rest of its share to later ones."""
    left = limit
    for done, (stage, episodes) in enumerate(stages.items()):
        for episode in islice(episodes, left // (len(stages) - done)):
            left -= 1
            yield stage, episode


def squeeze(content: Any) -> str:
    """Return compressed JSON in base64, which cannot end the element that holds it."""
    packed = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 5)
    return base64.b64encode(packed).decode()


def outcome_of(episode: Json) -> str:
    if not lookup(episode, "solved"):
        return "failed"
    return "at_once" if len(rows(episode, "turns")) <= 1 else "repair"


def view_episode(episode: Json) -> Json:
    tags = lookup(episode, "tags")
    return {
        "problem": readable(text(episode, "problem_id"), 80),
        "family": readable(text(episode, "family"), 80),
        "tags": [readable(str(tag), 40) for tag in tags[:6]] if isinstance(tags, list) else [],
        "language": readable(text(episode, "language"), 20) or "python",
        "turns": [view_turn(turn) for turn in rows(episode, "turns")[:TURNS_SHOWN]],
    }


def readable(value: str, characters: int) -> str:
    return visible(clip(value, characters))


def view_turn(turn: Json) -> Json:
    tests = rows(turn, "public")
    program = lookup(turn, "program")
    error, verdict = judge_turn(turn)
    view = {
        "observation": readable(text(turn, "observation"), OBSERVATION_CHARACTERS),
        "response": readable(text(turn, "response"), RESPONSE_CHARACTERS),
        "program": None if program is None else readable(str(program), RESPONSE_CHARACTERS),
        "error": error,
        "verdict": verdict,
        "tests": [view_test(test) for test in tests[:TESTS_SHOWN]],
        "hidden": max(0, len(tests) - TESTS_SHOWN),
        "private": view_private(turn),
        "facts": turn_facts(turn),
        "versions": view_versions(turn),
    }
    return view | view_tokens(turn)


def judge_turn(turn: Json) -> tuple[str, str]:
    """Return the kind of failure, empty if there is none, and the verdict in words."""
    if lookup(turn, "solved") is True:
        return "", "passes all tests"
    if lookup(turn, "program") is None:
        return "NO_VALID_CODE", "no valid code"
    if lookup(turn, "public_passed") and lookup(turn, "solved") is False:
        return "PRIVATE_TEST", "passes the public tests, fails a private one"
    if lookup(turn, "public_passed"):
        return "", "passes the public tests"
    statuses = [text(test, "status") for test in rows(turn, "public")]
    kind = next((status for status in statuses if status != "OK"), "") or "PUBLIC_TEST"
    return readable(kind, 40), "fails a public test"


def view_test(test: Json) -> Json:
    fields = {
        name: readable(text(test, name), FIELD_CHARACTERS)
        for name in ("input", "expected", "observed", "stderr")
    }
    return {"status": readable(text(test, "status"), 40) or "UNKNOWN", **fields}


def view_private(turn: Json) -> Json | None:
    private = lookup(turn, "private")
    if not isinstance(private, dict):
        return None
    failed = lookup(private, "failed")
    return {
        **{name: number(private, name) for name in ("tests", "run", "passed")},
        "status": readable(text(private, "status"), 40),
        "failed": view_test(failed) if isinstance(failed, dict) else None,
    }


def turn_facts(turn: Json) -> dict[str, float]:
    """Return the recorded numbers of a turn; an evaluation has no values and no advantages."""
    facts = {name: number(turn, name) for name in ("value", "return", "advantage", "tokens")}
    facts |= {"logprob": number(turn, "logprob_mean"), "kl": mean_kl(turn)}
    return {name: round(value, 4) for name, value in facts.items() if value is not None}


def mean_kl(turn: Json) -> float | None:
    """Return the KL of the recorded tokens as in the reward: the mean of log pi_b - log pi_ref."""
    sampled, reference = integers(turn, "logprobs"), integers(turn, "ref_logprobs")
    if not sampled or len(sampled) != len(reference):
        return None
    return (sum(sampled) - sum(reference)) / len(sampled) / 1000  # recorded in thousandths


def view_versions(turn: Json) -> list[list[int]]:
    """Return [version, count] of successive tokens that the same weights sampled."""
    runs = lookup(turn, "versions")
    if not isinstance(runs, list):
        return []
    return [run for run in runs[:TURNS_SHOWN] if is_integers(run) and len(run) == 2]


def view_tokens(turn: Json) -> Json:
    """Return the tokens' lengths in the shown text, and their log-probs and advantages times 100;
    an empty object if the lengths do not fit the text."""
    lengths = integers(turn, "pieces")[:TOKENS_SHOWN]
    response = text(turn, "response")
    covered = sum(lengths)
    if not lengths or min(lengths) < 0 or not covered <= len(response) <= RESPONSE_CHARACTERS:
        return {}
    tokens: Json = {"pieces": lengths}
    # unless each character is shown as it is and has length 1 in JavaScript
    if not (response.isascii() and visible(response) == response):
        pieces = [visible(response[a:b]) for a, b in pairwise(accumulate(lengths, initial=0))]
        tokens = {
            "response": "".join([*pieces, visible(response[covered:])]),
            # JavaScript counts units of UTF-16
            "pieces": [len(piece.encode("utf-16-le")) // 2 for piece in pieces],
        }
    for name, key in TOKEN_NUMBERS.items():
        values = integers(turn, key)[: len(lengths)]
        if len(values) == len(lengths):
            tokens[name] = [round(value / 10) for value in values]
    return tokens


def integers(record: Json, key: str) -> list[int]:
    values = lookup(record, key)
    return values if is_integers(values) else []


def is_integers(values: Any) -> bool:
    return isinstance(values, list) and set(map(type, values)) <= {int}
