"""The episodes of a run as data for the page's browser: an index to search, and the dialogues.

The page holds thousands of episodes, so that opening it must not mean reading them: the index has a
few numbers of each, and the dialogues lie in chunks, compressed, of which the browser opens the one
that it shows. Text passes `clip` and `visible` here, so that whatever shows it need only keep it
text.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, islice, pairwise
from typing import Any

from rlef_mega.report.display import clip, visible
from rlef_mega.report.run_files import Json, lookup, number, rows, text

OUTCOMES = {"at_once": "solved at once", "repair": "solved by repair", "failed": "failed"}
CHUNK = 50  # dialogues; one is opened in a few milliseconds

# Bounds on what one turn may add to the page, whatever a program printed.
OBSERVATION_CHARACTERS = 6000
RESPONSE_CHARACTERS = 10_000  # as recorded
FIELD_CHARACTERS = 1000
TESTS_SHOWN = 20
TURNS_SHOWN = 20
TOKENS_SHOWN = 4000
TOKEN_NUMBERS = {"logprobs": "logprobs", "refs": "ref_logprobs", "advantages": "advantages"}


@dataclass
class Index:
    """One entry an episode in each list; the names it refers to are listed once."""

    stages: dict[str, int] = field(default_factory=dict)
    problems: dict[str, int] = field(default_factory=dict)
    families: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)  # of failure
    rows: list[list[Any]] = field(default_factory=list)

    def add(self, stage: str, episode: Json, shown: Json) -> None:
        turns = shown["turns"]
        self.rows.append(
            [
                place_of(stage, self.stages),
                place_of(shown["problem"], self.problems),
                place_of(" · ".join([shown["family"], *shown["tags"]]), self.families),
                list(OUTCOMES).index(outcome_of(episode)),
                [place_of(turn["error"], self.kinds) for turn in turns],
                sum(turn["facts"].get("tokens", 0) for turn in turns),
                worst(turn["facts"].get("kl") for turn in turns),
            ]
        )

    def content(self) -> Json:
        names = ("stages", "problems", "families", "kinds")
        return {
            **{name: list(getattr(self, name)) for name in names},
            "outcomes": OUTCOMES,
            "chunk": CHUNK,
            "rows": self.rows,
        }


def place_of(name: str, names: dict[str, int]) -> int:
    return names.setdefault(name, len(names))


def worst(numbers: Iterable[float | None]) -> float | None:
    return max((number for number in numbers if number is not None), default=None)


@dataclass(frozen=True)
class PackedEpisodes:
    index: str
    chunks: tuple[str, ...]
    count: int


def pack_episodes(stages: Mapping[str, Iterable[Json]], limit: int) -> PackedEpisodes:
    """For the page, no more than `limit` of them.

    Stages share the limit evenly; of each it is the first in file order: nobody picks the pretty
    ones.
    """
    index, chunks, waiting = Index(), [], []
    for stage, episode in share_out(stages, limit):
        shown = view_episode(episode)
        protocol = text(episode, "protocol").replace("_", " ")  # of an evaluation that has several
        full_stage = f"{stage}, {protocol}" if protocol else stage
        index.add(visible(clip(full_stage, 120)), episode, shown)
        waiting.append(shown)
        if len(waiting) == CHUNK:
            chunks.append(squeeze(waiting))
            waiting = []
    if waiting:
        chunks.append(squeeze(waiting))
    return PackedEpisodes(squeeze(index.content()), tuple(chunks), len(index.rows))


def share_out(stages: Mapping[str, Iterable[Json]], limit: int) -> Iterator[tuple[str, Json]]:
    """Stage by stage; what a short stage leaves of its share, the later ones have."""
    left = limit
    for place, (stage, episodes) in enumerate(stages.items()):
        share = left // (len(stages) - place)
        for episode in islice(episodes, share):
            left -= 1
            yield stage, episode


def squeeze(content: Any) -> str:
    """JSON, deflated, in base64: nothing in it can end the element that holds it."""
    packed = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 5)
    return base64.b64encode(packed).decode()


def outcome_of(episode: Json) -> str:
    if not lookup(episode, "solved"):
        return "failed"
    return "at_once" if len(rows(episode, "turns")) <= 1 else "repair"


def view_episode(episode: Json) -> Json:
    tags = lookup(episode, "tags")
    return {
        "problem": shown(text(episode, "problem_id"), 80),
        "family": shown(text(episode, "family"), 80),
        "tags": [shown(str(tag), 40) for tag in tags[:6]] if isinstance(tags, list) else [],
        "language": shown(text(episode, "language"), 20) or "python",
        "turns": [view_turn(turn) for turn in rows(episode, "turns")[:TURNS_SHOWN]],
    }


def shown(value: str, characters: int) -> str:
    return visible(clip(value, characters))


def view_turn(turn: Json) -> Json:
    tests = rows(turn, "public")
    program = lookup(turn, "program")
    error, verdict = judge_turn(turn)
    view = {
        "observation": shown(text(turn, "observation"), OBSERVATION_CHARACTERS),
        "response": shown(text(turn, "response"), RESPONSE_CHARACTERS),
        "program": None if program is None else shown(str(program), RESPONSE_CHARACTERS),
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
    """The kind of failure, empty where it is none, and what the judge said of the response."""
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
    return shown(kind, 40), "fails a public test"


def view_test(test: Json) -> Json:
    fields = {
        name: shown(text(test, name), FIELD_CHARACTERS)
        for name in ("input", "expected", "observed", "stderr")
    }
    return {"status": shown(text(test, "status"), 40) or "UNKNOWN", **fields}


def view_private(turn: Json) -> Json | None:
    private = lookup(turn, "private")
    if not isinstance(private, dict):
        return None
    failed = lookup(private, "failed")
    return {
        **{name: number(private, name) for name in ("tests", "run", "passed")},
        "status": shown(text(private, "status"), 40),
        "failed": view_test(failed) if isinstance(failed, dict) else None,
    }


def turn_facts(turn: Json) -> dict[str, float]:
    """Numbers of a turn that were recorded; an evaluation has no values and no advantages."""
    facts = {
        "value": number(turn, "value"),
        "return": number(turn, "return"),
        "advantage": number(turn, "advantage"),
        "tokens": number(turn, "tokens"),
        "logprob": number(turn, "logprob_mean"),
        "kl": mean_kl(turn),
    }
    return {name: round(value, 4) for name, value in facts.items() if value is not None}


def mean_kl(turn: Json) -> float | None:
    """Of the recorded tokens, as the reward has it: log pi_b - log rho."""
    mine, reference = integers(turn, "logprobs"), integers(turn, "ref_logprobs")
    if not mine or len(mine) != len(reference):
        return None
    return (sum(mine) - sum(reference)) / len(mine) / 1000


def view_versions(turn: Json) -> list[list[int]]:
    """Runs of tokens that the same version of the weights sampled."""
    runs = lookup(turn, "versions")
    if not isinstance(runs, list):
        return []
    return [run for run in runs[:TURNS_SHOWN] if is_integers(run) and len(run) == 2]


def view_tokens(turn: Json) -> Json:
    """Lengths of the tokens in the text shown, and their numbers in hundredths; nothing unless they
    fit the text."""
    lengths = integers(turn, "pieces")[:TOKENS_SHOWN]
    response = text(turn, "response")
    told = sum(lengths)
    if not lengths or min(lengths) < 0 or not told <= len(response) <= RESPONSE_CHARACTERS:
        return {}
    tokens: Json = {"pieces": lengths}
    if not as_recorded(response):
        pieces = [visible(response[a:b]) for a, b in pairwise(accumulate(lengths, initial=0))]
        tokens = {
            "response": "".join([*pieces, visible(response[told:])]),
            "pieces": list(map(units, pieces)),
        }
    for name, key in TOKEN_NUMBERS.items():
        values = integers(turn, key)[: len(lengths)]
        if len(values) == len(lengths):
            tokens[name] = [round(value / 10) for value in values]
    return tokens


def as_recorded(response: str) -> bool:
    """Each character is shown as it is, and is one to JavaScript."""
    return response.isascii() and visible(response) == response


def units(piece: str) -> int:
    """Length as JavaScript counts: in units of UTF-16."""
    return len(piece) + sum(character > "\uffff" for character in piece)


def integers(record: Json, key: str) -> list[int]:
    values = lookup(record, key)
    return values if is_integers(values) else []


def is_integers(values: Any) -> bool:
    return isinstance(values, list) and set(map(type, values)) <= {int}
