"""`rlef bench rollout`: generation by the embedded engine, grading in the sandbox, and the rest of
a wave of dialogues.

Random weights write no valid code, so without the recipe's model hardly anything is graded and only
generation is meaningful. Run as a module it is the worker.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlef_mega.bench.results import Figure, Results, shares
from rlef_mega.bench.workload import run_rank, workload
from rlef_mega.config import TrainConfig
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.dialogues.judge import Judge, open_grader
from rlef_mega.dialogues.programs import Extracted
from rlef_mega.dialogues.rollout import DialogueLoop, derive_seed
from rlef_mega.engines import GenerationRequest
from rlef_mega.engines.local import LocalEngine
from rlef_mega.megatron.parallel import Ranks
from rlef_mega.parts import dialogue_rules
from rlef_mega.problems import load_problems, sample
from rlef_mega.run.ranks import gather
from rlef_mega.types import Completion, Problem, Verdict

REPEATS = 5


def benchmark(recipe: str) -> Results:
    with workload(recipe) as work:
        measured = work.run("rlef_mega.bench.rollout")
        config = work.config
        about = work.about(
            problems=config.data.train,
            dialogues=config.rollout.episodes_per_batch,
            judge_workers=config.judge.workers,
            threads_per_process=measured["threads"],
        )
    return Results(f"rlef bench rollout: {recipe}", about, figures(measured["waves"]))


def figures(waves: Sequence[dict]) -> tuple[Figure, ...]:
    """Return the figures. `waves` holds each rank's counts, one list for each repeat."""

    def total(name: str) -> list[float]:
        return [sum(rank[name] for rank in wave) for wave in waves]

    def mean(name: str) -> list[float]:
        return [sum(rank[name] for rank in wave) / len(wave) for wave in waves]

    def rate(counted: str, phase: str) -> tuple[float, ...]:
        pairs = zip(total(counted), mean(phase), strict=True)
        return tuple(count / max(seconds, 1e-9) for count, seconds in pairs)

    phases = [
        {"generate": generate, "grade": grade, "rest": wall - generate - grade, "step": wall}
        for generate, grade, wall in zip(mean("generate"), mean("grade"), mean("wall"), strict=True)
    ]
    return (
        Figure("generation, while generating", "tokens/s", rate("tokens", "generate")),
        Figure("generation, over the wave", "tokens/s", rate("tokens", "wall")),
        Figure("graded runs, while grading", "runs/s", rate("runs", "grade")),
        Figure("dialogues", "dialogues/s", rate("dialogues", "wall")),
        *shares(phases),
    )


class TimedEngine(LocalEngine):
    """Counts the tokens it generates and the seconds it takes."""

    tokens = 0
    seconds = 0.0

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        begun = time.perf_counter()
        completions = super().generate(requests)
        self.seconds += time.perf_counter() - begun
        self.tokens += sum(len(completion.token_ids) for completion in completions)
        return completions


class TimedJudge(Judge):
    """Counts the seconds in which at least one program is being judged. The engine generates only
    when no dialogue is with the judge, so the two never overlap."""

    judging = 0
    seconds = 0.0

    async def judge(self, problem: Problem, found: Extracted, *, last_turn: bool) -> Verdict:
        if not self.judging:
            self.begun = time.perf_counter()
        self.judging += 1
        try:
            return await super().judge(problem, found, last_turn=last_turn)
        finally:
            self.judging -= 1
            if not self.judging:
                self.seconds += time.perf_counter() - self.begun


def measure(folder: Path, config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    problems = load_problems(config.data.train)
    chat = ChatFormat.from_folder(Path(config.model.path))
    rules = dialogue_rules(config, chat)
    dtype = getattr(torch, config.model.dtype)
    engine = TimedEngine(config.model.path, dtype=dtype, device=ranks.device)
    waves = []
    with open_grader(config.judge) as grader:
        judge = TimedJudge(grader)
        for repeat in range(1 + REPEATS):
            engine.tokens, engine.seconds = 0, 0.0
            judge.runs, judge.seconds = 0, 0.0
            chosen = sample(problems, repeat, config.rollout.episodes_per_batch, config.run.seed)
            dist.barrier()  # all ranks begin together
            begun = time.perf_counter()
            rolled_out = DialogueLoop(engine, judge, chat, rules).run_on_all_ranks(
                chosen, derive_seed(config.run.seed, repeat)
            )
            counted = {
                "wall": time.perf_counter() - begun,
                "generate": engine.seconds,
                "grade": judge.seconds,
                "tokens": engine.tokens,
                "runs": judge.runs,
                "dialogues": len(rolled_out.episodes) / ranks.world_size,
            }
            waves.append(gather(counted))
    return {"waves": waves[1:], "threads": torch.get_num_threads()}


if __name__ == "__main__":
    run_rank(measure)
