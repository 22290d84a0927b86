"""Dialogues for the supervised stage of a pretrained model: functions, wrong at first and repaired.

They are made of the training problems of `functions:`, with their solutions and wrong programs, in
the format of rollouts: the same prompts, and feedback from real runs in the sandbox. They teach the
format and, to a degree, the use of feedback: after a failure the next program is right no more
often than `REPAIRED`, so that RLEF has something to learn.
"""

import random
from collections.abc import Sequence
from functools import cache

from rlef_mega.dialogues import templates
from rlef_mega.problems.functions import solved
from rlef_mega.types import Problem, TestOutcome
from rlef_sandbox import Sandbox, Status

TURNS = 3
RIGHT_AT_ONCE = 0.6  # if the statement tells all; otherwise a uniform guess
REPAIRED = 0.5

Graded = Sequence[TestOutcome]
Task = tuple[Problem, dict[str, Graded]]  # programs with their outcomes, the solution first


def repair_dialogue(number: int, seed: int = 0) -> tuple[str, list[str]]:
    """Return one dialogue of an endless series: the prefix of all its responses, which belongs to
    the prompt, and its messages, user and assistant in turn. It depends on its number and the seed
    alone."""
    generator = random.Random(f"repairs {seed} {number}")
    problem, programs = generator.choice(graded_programs())
    solution, *wrong = programs
    begun = templates.response_start(problem.statement, problem.template)
    messages = [templates.first_prompt(problem.statement, problem.template)]
    right = 1 / len(programs) if "withheld" in problem.tags else RIGHT_AT_ONCE
    for turn in range(TURNS):
        program = solution if generator.random() < right else generator.choice(wrong)
        messages.append(response(program))
        if program == solution or turn == TURNS - 1:
            break
        messages.append(templates.feedback(programs[program], problem.template))
        right = REPAIRED
    return begun, messages


def response(program: str) -> str:
    """Return what follows the program's first line, which the prefix already has, and add the
    closing fence."""
    return program.rstrip("\n").partition("\n")[2] + "\n```"


@cache
def graded_programs() -> list[Task]:
    """Run the wrong programs of all training problems on their public tests. Programs that pass
    although they are wrong are left out; solutions are not run."""
    tasks = []
    with Sandbox(workers=1) as sandbox:
        for problem, solution, wrong in solved("train"):
            tests = problem.public_tests
            programs: dict[str, Graded] = {solution: ()}
            for program in wrong:
                results = sandbox.grade(
                    program, tests, limits=problem.limits, stop_at_first_failure=False
                )
                if any(result.status is not Status.OK for result in results):
                    programs[program] = tuple(map(TestOutcome, tests, results))
            if len(programs) > 1:
                tasks.append((problem, programs))
    return tasks
