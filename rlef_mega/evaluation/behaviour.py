"""What a model did in its dialogues: how each response ended, what the next one made of it, and how
much of the program it kept (RLEF 3.3, fig. 3). Pure.

A dialogue is reduced to the outcomes of its responses, in order. All of n@k follows from them, also
for fewer turns than were allowed: a dialogue cut after t responses is what a dialogue of at most t
turns would have been, as the model is not told of the limit.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from rlef_mega.types import Episode, Verdict

SOLVED = "OK"
PRIVATE_TEST = "PRIVATE_TEST"  # passes the public tests, and fails a private one
NO_VALID_CODE = "NO_VALID_CODE"
PASSED = (SOLVED, PRIVATE_TEST)  # the public tests, so the dialogue ended
CHRF_PAIRS = 300  # of programs, for each turn: a pair of 1,500 characters takes 14 ms


@dataclass(frozen=True)
class DialogueOutcomes:
    """How its responses ended (`outcome_of`), and their programs."""

    problem_id: str
    outcomes: tuple[str, ...]
    programs: tuple[str | None, ...]

    @classmethod
    def of(cls, episode: Episode) -> Self:
        return cls(
            episode.problem_id,
            tuple(outcome_of(turn.program, turn.verdict) for turn in episode.turns),
            tuple(turn.program for turn in episode.turns),
        )


def outcome_of(program: str | None, verdict: Verdict) -> str:
    """SOLVED, NO_VALID_CODE, PRIVATE_TEST, or the first status of a public test that is not OK."""
    if program is None:
        return NO_VALID_CODE
    if not verdict.public_passed:
        statuses = (outcome.result.status.name for outcome in verdict.public)
        return next(status for status in statuses if status != SOLVED)
    return SOLVED if verdict.solved else PRIVATE_TEST


def tally(dialogues: Iterable[DialogueOutcomes], turns: int) -> dict[str, tuple[int, int, int]]:
    """Of each problem, within so many turns: dialogues held, those that passed the public tests,
    and the correct ones among these."""
    found: dict[str, list[int]] = {}
    for dialogue in dialogues:
        counts = found.setdefault(dialogue.problem_id, [0, 0, 0])
        last = dialogue.outcomes[:turns][-1]
        counts[0] += 1
        counts[1] += last in PASSED
        counts[2] += last == SOLVED
    return {name: (held, passed, correct) for name, (held, passed, correct) in found.items()}


def failures(dialogues: Sequence[DialogueOutcomes], turn: int) -> dict[str, int]:
    """How the responses of one turn (from 0) failed."""
    outcomes = (d.outcomes[turn] for d in dialogues if len(d.outcomes) > turn)
    return dict(sorted(Counter(o for o in outcomes if o != SOLVED).items()))


def repair_rate(dialogues: Sequence[DialogueOutcomes], turn: int) -> float | None:
    """Of the dialogues that came to this turn (from 0), the share that it solved."""
    came = [d.outcomes[turn] == SOLVED for d in dialogues if len(d.outcomes) > turn]
    return sum(came) / len(came) if came else None


def became(dialogues: Sequence[DialogueOutcomes], turn: int) -> dict[str, dict[str, int]]:
    """Of each kind of failure of a turn (from 0) that was answered: what the next turn was."""
    table: dict[str, Counter[str]] = {}
    for dialogue in dialogues:
        if len(dialogue.outcomes) > turn + 1:
            before, after = dialogue.outcomes[turn : turn + 2]
            table.setdefault(before, Counter())[after] += 1
    return {before: dict(sorted(table[before].items())) for before in sorted(table)}


def chrf_of_next(dialogues: Sequence[DialogueOutcomes], turn: int) -> dict[str, Any] | None:
    """chrF (0 to 100) of the program of the next turn, with that of this turn (from 0) as its
    reference; None where there is no such pair.

    Of many pairs, evenly chosen ones. `unchanged` is the share of identical programs.
    """
    from sacrebleu.metrics import CHRF  # a third of a second, wanted here alone

    came = (d.programs[turn : turn + 2] for d in dialogues if len(d.programs) > turn + 1)
    pairs = [(before, after) for before, after in came if before and after]
    if not pairs:
        return None
    step = -(-len(pairs) // CHRF_PAIRS)
    scored, chrf = pairs[::step], CHRF()
    scores = [chrf.sentence_score(after, [before]).score for before, after in scored]
    histogram = Counter(min(int(score // 10), 9) for score in scores)
    return {
        "mean": sum(scores) / len(scores),
        "unchanged": sum(before == after for before, after in pairs) / len(pairs),
        "by_ten": [histogram[place] for place in range(10)],
        "scored": len(scored),
        "pairs": len(pairs),
        "signature": str(chrf.get_signature()),
    }
