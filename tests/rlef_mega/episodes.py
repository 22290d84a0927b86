"""Hand-made episodes for tests."""

from rlef_mega.types import Episode, Turn, Verdict


def turn(context_len: int, actions: list[int], program: str | None = "print(1)") -> Turn:
    return Turn(
        context_len=context_len,
        action_ids=tuple(actions),
        action_logprobs=tuple(-0.1 * (i + 1) for i in range(len(actions))),
        weight_versions=(0,) * len(actions),
        program=program,
        verdict=Verdict(public=(), public_passed=False, solved=None),
    )


def episode(spans: list[tuple[int, int]], *, solved: bool, first_id: int = 0) -> Episode:
    """`spans` are (observed tokens, action tokens) a turn; ids count up from `first_id`."""
    turns, length = [], 0
    for observed, actions in spans:
        context_len = length + observed
        length = context_len + actions
        turns.append(turn(context_len, list(range(first_id + context_len, first_id + length))))
    ids = tuple(range(first_id, first_id + length))
    return Episode("problem", "family", ids, tuple(turns), solved)
