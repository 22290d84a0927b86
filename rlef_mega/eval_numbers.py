"""The numbers of an evaluation, from its file of dialogues alone."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlef_mega.behaviour import Dialogue
from rlef_mega.dialogue_file import Key, Record, key_of, read_dialogues, read_header, read_lines
from rlef_mega.eval_dialogues import PROTOCOLS, SINGLE, Part
from rlef_mega.summary import About, Held, NAtK, summarize

Ended = dict[Key, tuple[Dialogue | str, int]]  # the dialogue, or why it was dropped; tokens


def numbers_of(
    path: Path, parts: Sequence[Part], *, turns: int, n_at_k: Sequence[NAtK]
) -> dict[str, Any]:
    """What is written as JSON, of the parts that were held. Of those, every dialogue that was
    asked for has ended or was dropped: `asked` = `dialogues` + the sum of `dropped`. A part of
    which faults have dropped all is in `all_dropped` alone; RuntimeError if that are all parts."""
    problems = [
        About(**{**about, "tags": tuple(about["tags"])}) for about in read_header(path)["problems"]
    ]
    ended: Ended = {key_of(record): brief(record) for record in read_dialogues(path)}  # the later
    parts = [part for part in parts if any(key in ended for key in part.keys)]
    held = {part.protocol: gather(part, ended) for part in parts}
    lost = {name: dict(one.drops) for name, one in held.items() if not one.dialogues}
    if len(lost) == len(held):
        raise RuntimeError(
            f"every dialogue of the evaluation was dropped: {lost or 'none was held'}"
        )
    single = None if SINGLE in lost else held.get(SINGLE)
    return {
        "n_at_k": [f"{n}@{k}" for n, k in n_at_k],
        "protocols": {
            part.protocol: {
                "asked": len(part.keys),
                "response_tokens": sum(ended[key][1] for key in part.keys),
                **summarize(
                    problems,
                    held[part.protocol],
                    samples=turns,
                    n_at_k=n_at_k,
                    # with private tests shown, passing them is another thing
                    single=None if part.protocol == PROTOCOLS["private"] else single,
                    chrf=True,
                ),
            }
            for part in parts
            if part.protocol not in lost
        },
        "all_dropped": lost,
        "sessions": [line["session"] for line in read_lines(path) if "session" in line],
    }


def brief(record: Record) -> tuple[Dialogue | str, int]:
    if "dropped" in record:
        return record["dropped"], 0
    turns = record["turns"]
    dialogue = Dialogue(
        record["problem_id"],
        tuple(turn["outcome"] for turn in turns),
        tuple(turn["program"] for turn in turns),
    )
    return dialogue, sum(turn.get("tokens", 0) for turn in turns)


def gather(part: Part, ended: Ended) -> Held:
    missing = sum(key not in ended for key in part.keys)
    assert not missing, f"{missing} dialogues of {part.protocol} neither ended nor were dropped"
    outcomes = [ended[key][0] for key in part.keys]
    return Held(
        part.turns,
        [outcome for outcome in outcomes if isinstance(outcome, Dialogue)],
        Counter(outcome for outcome in outcomes if isinstance(outcome, str)),
    )
