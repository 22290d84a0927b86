"""Choose the episodes that a person reads, and lay each out turn by turn.

Chosen are some of every outcome (solved at once, solved by repair, failed), spread over the problem
families, the first of each in file order: the same file gives the same choice, and nobody picks the
pretty ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

from rlef_mega.report.display import clip, significant
from rlef_mega.report.highlight import highlight_response
from rlef_mega.report.run_files import Json, lookup, number, rows, text

OUTCOMES = {"at_once": "solved at once", "repair": "solved by repair", "failed": "failed"}

# Bounds on what one turn may add to the page, whatever a program printed.
OBSERVATION_CHARACTERS = 4000
RESPONSE_CHARACTERS = 6000
FIELD_CHARACTERS = 400
TESTS_SHOWN = 6


@dataclass(frozen=True)
class TestView:
    __test__ = False  # not a pytest class

    status: str
    input: str
    expected: str
    observed: str
    stderr: str


@dataclass(frozen=True)
class TurnView:
    observation: str
    response: Markup
    has_program: bool
    verdict: str
    passed: bool
    tests: tuple[TestView, ...]
    tests_hidden: int
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Elsewhere:
    """How the same problem went at another stage."""

    stage: str
    outcome: str
    anchor: str  # empty unless that episode is on the page too


@dataclass(frozen=True)
class EpisodeView:
    anchor: str
    stage: str  # "before", "after", "training step N"
    problem: str
    family: str
    tags: tuple[str, ...]
    outcome: str  # a key of OUTCOMES
    elsewhere: tuple[Elsewhere, ...]
    turns: tuple[TurnView, ...]


def outcome_of(episode: Json) -> str:
    if not lookup(episode, "solved"):
        return "failed"
    return "at_once" if len(rows(episode, "turns")) <= 1 else "repair"


def choose(episodes: Iterable[Json], count: int) -> tuple[list[Json], dict[str, str]]:
    """About `count` episodes, and the outcome of every problem of the file.

    Keeps no more than `count` an outcome and family while it reads.
    """
    outcomes: dict[str, str] = {}
    kept: dict[str, dict[str, list[Json]]] = {outcome: {} for outcome in OUTCOMES}
    for episode in episodes:
        outcome = outcome_of(episode)
        outcomes.setdefault(text(episode, "problem_id"), outcome)
        family = kept[outcome].setdefault(text(episode, "family"), [])
        if len(family) < count:
            family.append(episode)
    queues = {outcome: take_turns(list(families.values())) for outcome, families in kept.items()}
    chosen = take_turns(list(queues.values()))[:count]
    return sorted(chosen, key=lambda episode: list(OUTCOMES).index(outcome_of(episode))), outcomes


def take_turns(queues: list[list[Json]]) -> list[Json]:
    """One of each queue, then the second of each, and so on."""
    longest = max(map(len, queues), default=0)
    return [queue[place] for place in range(longest) for queue in queues if place < len(queue)]


def view_stages(stages: dict[str, Iterable[Json]], count: int) -> list[EpisodeView]:
    """The chosen episodes of every stage, each told how its problem went at the other stages."""
    chosen = {stage: choose(episodes, count) for stage, episodes in stages.items()}
    anchors = {
        (stage, text(episode, "problem_id")): f"{stage.replace(' ', '-')}-{place}"
        for stage, (episodes, _) in chosen.items()
        for place, episode in enumerate(episodes, start=1)
    }

    def elsewhere(stage: str, problem: str) -> tuple[Elsewhere, ...]:
        return tuple(
            Elsewhere(other, outcomes[problem], anchors.get((other, problem), ""))
            for other, (_, outcomes) in chosen.items()
            if other != stage and problem in outcomes
        )

    return [
        view_episode(
            episode,
            stage,
            f"{stage.replace(' ', '-')}-{place}",
            elsewhere(stage, text(episode, "problem_id")),
        )
        for stage, (episodes, _) in chosen.items()
        for place, episode in enumerate(episodes, start=1)
    ]


def view_episode(
    episode: Json, stage: str, anchor: str, elsewhere: tuple[Elsewhere, ...]
) -> EpisodeView:
    tags = lookup(episode, "tags")
    return EpisodeView(
        anchor=anchor,
        stage=stage,
        problem=clip(text(episode, "problem_id"), 80),
        family=clip(text(episode, "family"), 80),
        tags=tuple(clip(str(tag), 40) for tag in tags[:6]) if isinstance(tags, list) else (),
        outcome=outcome_of(episode),
        elsewhere=elsewhere,
        turns=tuple(view_turn(turn) for turn in rows(episode, "turns")),
    )


def view_turn(turn: Json) -> TurnView:
    tests = rows(turn, "public")
    program = lookup(turn, "program")
    response = text(turn, "response")
    begun = isinstance(program, str) and response.lstrip().startswith(program.strip()[:40] or "```")
    verdict, passed = judge_turn(turn)
    return TurnView(
        observation=clip(text(turn, "observation"), OBSERVATION_CHARACTERS),
        response=highlight_response(
            clip(response, RESPONSE_CHARACTERS),
            starts_in_code=begun and not response.lstrip().startswith("```"),
        ),
        has_program=program is not None,
        verdict=verdict,
        passed=passed,
        tests=tuple(view_test(test) for test in tests[:TESTS_SHOWN]),
        tests_hidden=max(0, len(tests) - TESTS_SHOWN),
        facts=turn_facts(turn),
    )


def judge_turn(turn: Json) -> tuple[str, bool]:
    """What the judge said of a response, and whether it was good news."""
    if lookup(turn, "solved") is True:
        return "passes all tests", True
    if lookup(turn, "program") is None:
        return "no valid code", False
    if lookup(turn, "public_passed") and lookup(turn, "solved") is False:
        return "passes the public tests, fails a private one", False
    if lookup(turn, "public_passed"):
        return "passes the public tests", True
    return "fails a public test", False


def view_test(test: Json) -> TestView:
    fields = {
        name: clip(text(test, name), FIELD_CHARACTERS)
        for name in ("input", "expected", "observed", "stderr")
    }
    return TestView(status=clip(text(test, "status"), 40) or "UNKNOWN", **fields)


def turn_facts(turn: Json) -> tuple[tuple[str, str], ...]:
    """Numbers of a turn that were recorded; an evaluation has no values and no advantages."""
    facts = [
        (label, significant(number(turn, key)))
        for label, key in (("value", "value"), ("return", "return"), ("advantage", "advantage"))
        if number(turn, key) is not None
    ]
    if (tokens := number(turn, "tokens")) is not None:
        facts.append(("tokens", f"{tokens:,.0f}"))
    if (logprob := number(turn, "logprob_mean")) is not None:
        facts.append(("mean log-prob", significant(logprob)))
    return tuple(facts)
