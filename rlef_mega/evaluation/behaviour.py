"""Analyse a model's behaviour in dialogues: the outcome of each response, how the next response
repairs it, and how much of the program it keeps (RLEF 3.3, fig. 3). Pure functions.

A dialogue is reduced to the outcomes of its responses, in order. n@k follows from them, also for
fewer turns than were allowed: the model does not know the limit, so the first t responses of a
dialogue are what a dialogue of at most t turns would have been.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from rlef_mega.dialogues.rollout import TOO_LONG
from rlef_mega.types import Episode, Verdict

SOLVED = "OK"
PRIVATE_TEST = "PRIVATE_TEST"  # passes the public tests, and fails a private one
NO_VALID_CODE = "NO_VALID_CODE"
PROMPT_TOO_LONG = "PROMPT_TOO_LONG"  # no response was sampled
PASSED = (SOLVED, PRIVATE_TEST)  # passes the public tests, which ends the dialogue
CHRF_PAIRS = 300  # scored per turn: a pair of 1,500 characters takes 14 ms


@dataclass(frozen=True)
class DialogueOutcomes:
    """The outcomes of a dialogue's responses (`outcome_of`), their programs, and their total
    number of tokens if it was counted."""

    problem_id: str
    outcomes: tuple[str, ...]
    programs: tuple[str | None, ...]
    tokens: int = 0

    @classmethod
    def of(cls, problem_id: str, ended: Episode | str) -> Self | str:
        """Return the outcomes of a dialogue, or the reason why it was dropped. A prompt that
        exceeds the context is an outcome, too: the model cannot solve what it cannot read."""
        if ended == TOO_LONG:
            return cls(problem_id, (PROMPT_TOO_LONG,), (None,))
        if isinstance(ended, str):
            return ended
        programs = tuple(turn.program for turn in ended.turns)
        outcomes = (outcome_of(turn.program, turn.verdict) for turn in ended.turns)
        return cls(problem_id, tuple(outcomes), programs)


def outcome_of(program: str | None, verdict: Verdict) -> str:
    """Return SOLVED, NO_VALID_CODE, PRIVATE_TEST, or the first failing public test's status."""
    if program is None:
        return NO_VALID_CODE
    if not verdict.public_passed:
        statuses = (outcome.result.status.name for outcome in verdict.public)
        return next(status for status in statuses if status != SOLVED)
    return SOLVED if verdict.solved else PRIVATE_TEST


def failures(dialogues: Sequence[DialogueOutcomes], turn: int) -> dict[str, int]:
    """Count the failures of one turn (from 0) by kind."""
    outcomes = (d.outcomes[turn] for d in dialogues if len(d.outcomes) > turn)
    return dict(sorted(Counter(o for o in outcomes if o != SOLVED).items()))


def repair_rate(dialogues: Sequence[DialogueOutcomes], turn: int) -> float | None:
    """Return the share of dialogues solved at this turn (from 0), among those that reached it."""
    reached = [d.outcomes[turn] == SOLVED for d in dialogues if len(d.outcomes) > turn]
    return sum(reached) / len(reached) if reached else None


def became(dialogues: Sequence[DialogueOutcomes], turn: int) -> dict[str, dict[str, int]]:
    """Count, for each kind of failure of a turn (from 0), the outcomes of the next turn."""
    table: dict[str, Counter[str]] = {}
    for dialogue in dialogues:
        if len(dialogue.outcomes) > turn + 1:
            before, after = dialogue.outcomes[turn : turn + 2]
            table.setdefault(before, Counter())[after] += 1
    return {before: dict(sorted(table[before].items())) for before in sorted(table)}


def chrf_of_next(dialogues: Sequence[DialogueOutcomes], turn: int) -> dict[str, Any] | None:
    """Return chrF (0 to 100) of the next turn's program, with this turn's (from 0) as reference;
    None if no dialogue has both.

    At most `CHRF_PAIRS` pairs, evenly spaced, are scored. `unchanged` is the share of
    identical programs among all pairs.
    """
    from sacrebleu.metrics import CHRF  # takes a third of a second to import

    following = (d.programs[turn : turn + 2] for d in dialogues)
    pairs = [(both[0], both[1]) for both in following if len(both) == 2 and both[0] and both[1]]
    if not pairs:
        return None
    step = -(-len(pairs) // CHRF_PAIRS)
    scored, chrf = pairs[::step], CHRF()
    scores = [chrf.sentence_score(after, [before]).score for before, after in scored]
    histogram = Counter(min(int(score // 10), 9) for score in scores)
    return {
        "mean": sum(scores) / len(scores),
        "unchanged": sum(before == after for before, after in pairs) / len(pairs),
        "by_ten": [histogram[tens] for tens in range(10)],
        "scored": len(scored),
        "pairs": len(pairs),
        "signature": str(chrf.get_signature()),
    }
