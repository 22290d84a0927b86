"""Dialogues for the supervised stage, which makes a base model that knows formats and families.

They teach the model to answer with one fenced program, and to use the variant that the statement
names or that a quoted public test shows. They do not teach it to use feedback: after feedback they
repeat or guess, except with the small probability `CORRECTED`. RLEF has to teach the model that the
variant follows from the example in the feedback.
"""

import random
from functools import cache

from rlef_mega.dialogues import programs, templates
from rlef_mega.problems.curriculum import Exercise, Wording, exercises
from rlef_mega.types import TestOutcome
from rlef_sandbox import Result, Status

TURNS = 3
# Probabilities of a dialogue's wording and of its responses.
WORDINGS: dict[Wording, float] = {"vague": 0.3, "word": 0.25, "example": 0.45}
INFORMED = 0.95  # right at once if the statement gives the variant
CORRECTED = 0.15  # right after feedback
REPEATED = 0.4  # the same again after feedback; otherwise a uniform guess
CORRUPTED = 0.04  # no valid code


def sft_dialogue(number: int, seed: int = 0) -> list[str]:
    """Return one dialogue of an endless series; user and assistant alternate.

    It depends on its number and the seed alone, so the stage can resume at any step.
    """
    generator, exercise = draw_exercise(number, seed)
    messages = [templates.first_prompt(exercise.statement, "curriculum")]
    guess: int | None = None
    for turn in range(TURNS):
        guess = next_guess(exercise, guess, generator)
        response = respond(exercise, guess, generator)
        messages.append(response)
        found = programs.extract_program(response)
        outcomes = (try_out(exercise, guess),) if found.program else ()
        if turn == TURNS - 1 or (outcomes and outcomes[0].result.status is Status.OK):
            break
        messages.append(templates.feedback(outcomes, "curriculum", invalid=found.invalid))
    return messages


def draw_exercise(number: int, seed: int) -> tuple[random.Random, Exercise]:
    """Return a dialogue's generator and exercise."""
    generator = random.Random(f"supervised {seed} {number}")
    wording = generator.choices(list(WORDINGS), list(WORDINGS.values()))[0]
    return generator, generator.choice(training_exercises()[wording])


@cache
def training_exercises() -> dict[Wording, list[Exercise]]:
    every = exercises("train")
    return {wording: [e for e in every if e.wording == wording] for wording in WORDINGS}


def next_guess(exercise: Exercise, previous: int | None, generator: random.Random) -> int:
    """Return the variant of the next response."""
    chance = generator.random()
    any_variant = generator.randrange(len(exercise.family.variants))
    if previous is None:
        informed = exercise.wording != "vague" and chance < INFORMED
        return exercise.variant if informed else any_variant
    if chance < CORRECTED:
        return exercise.variant
    return previous if chance < CORRECTED + REPEATED else any_variant


def respond(exercise: Exercise, variant: int, generator: random.Random) -> str:
    source = exercise.family.source(exercise.family.variants[variant])
    if generator.random() >= CORRUPTED:
        return f"```python\n{source}\n```"
    return generator.choice(
        (
            "I am not sure.",
            f"```python\n{source[:-1]}\n```",  # a missing parenthesis
            f"```python\n{source}",  # an open fence
        )
    )


def try_out(exercise: Exercise, variant: int) -> TestOutcome:
    """Return the outcome of the public test, from the families' own outputs; nothing is run."""
    test = exercise.test(exercise.public_input)
    printed = f"{exercise.output(exercise.public_input, variant)}\n".encode()
    status = Status.OK if printed == test.expected else Status.WRONG_ANSWER
    return TestOutcome(test, Result(status, stdout=printed))
