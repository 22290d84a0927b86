"""Hand-made episodes for tests."""

from rlef_mega.types import Completion, Episode, Turn, Verdict


def episode(spans: list[tuple[int, int]], *, solved: bool, first_id: int = 0) -> Episode:
    """Return an episode with (observed tokens, response tokens) for each turn; ids count up from
    `first_id`."""
    turns, length = [], first_id
    for number, (observed, sampled) in enumerate(spans, 1):
        middle, end = length + observed, length + observed + sampled
        logprobs = tuple(-0.1 * (i + 1) for i in range(sampled))
        completion = Completion(tuple(range(middle, end)), logprobs, (0,) * sampled, "stop")
        verdict = Verdict((), public_passed=False, solved=solved if number == len(spans) else None)
        turns.append(Turn(tuple(range(length, middle)), completion, "print(1)", verdict))
        length = end
    return Episode("problem", tuple(turns))
