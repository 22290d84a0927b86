"""What is measured: a recipe with a model that this machine has, and random episodes of the
recipe's size. Speed depends on the lengths of episodes, not on which tokens they hold."""

import json
import math
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlef_mega.bench.results import describe_benchmark
from rlef_mega.config import (
    ConfigError,
    RolloutConfig,
    SFTConfig,
    TrainConfig,
    check_layout,
    dump_toml,
    find_recipe,
    load_config,
)
from rlef_mega.demo.base_model import make_initial_model
from rlef_mega.packing import microbatches
from rlef_mega.preflight import model_shape
from rlef_mega.run.launch import STOPPED, launch, worker_main
from rlef_mega.types import Batch, Completion, Episode, Turn, Verdict

if TYPE_CHECKING:
    from rlef_mega.megatron.parallel import Ranks

# Observed in the demo's dialogues (prompts of 30 to 54 tokens, feedback of 28 to 52, responses of 6
# to 25), as fractions of the recipe's limits, so that other recipes get theirs in proportion.
OBSERVED = (1 / 10, 1 / 6)  # of rollout.max_context: a prompt, or one turn's feedback
ANSWERED = (0.15, 0.65)  # of rollout.max_new_tokens: a response
UNGRADED = Verdict((), public_passed=False, solved=None)
REQUEST = "request.json"  # from a command to its worker, in the worker's folder
RESULT = "measured.json"  # what the worker measured


@dataclass(frozen=True)
class Workload:
    """A folder for the workers, which holds the resolved config."""

    folder: Path
    config: TrainConfig
    model: str  # a path, or a description

    def run(self, module: str) -> dict[str, Any]:
        """Run the worker module on the recipe's ranks. Returns what rank 0 wrote. Raises
        RuntimeError if it failed."""
        return run_worker(module, self.folder, self.config.parallel.world_size)

    def about(self, **more: Any) -> dict[str, Any]:
        """Return the conditions of the measurement, and what the benchmark adds."""
        return describe_benchmark(
            layout=self.config.parallel.model_dump(),
            dtype=self.config.model.dtype,
            model=self.model,
            **more,
        )


def run_worker(module: str, folder: Path, processes: int) -> dict[str, Any]:
    result = folder / RESULT
    result.unlink(missing_ok=True)
    code = launch(module, folder, processes)
    if code or not result.is_file():
        raise RuntimeError(f"{module} ended with exit code {code} and wrote no figures")
    return json.loads(result.read_text())


def run_rank(measure: Callable[[Path, TrainConfig, "Ranks"], dict[str, Any]]) -> None:
    """Be a rank of a worker: measure, and as rank 0 write what was measured. A Ctrl-C leaves a file
    `stop`; a benchmark has nothing to save, so it ends at once."""
    from rlef_mega.megatron import parallel  # not needed by the command

    def end_when_stopped(file: Path) -> None:
        while not file.exists():
            time.sleep(0.5)
        os._exit(STOPPED)

    def work(folder: Path) -> int:
        threading.Thread(target=end_when_stopped, args=[folder / "stop"], daemon=True).start()
        config = load_config(folder / "config.toml", [], TrainConfig)
        ranks = parallel.initialize(config.parallel, seed=config.run.seed)
        measured = measure(folder, config, ranks)
        if ranks.is_writer:
            (folder / RESULT).write_text(json.dumps(measured))
        parallel.shutdown(ranks)
        return 0

    worker_main(work)


@contextmanager
def workload(recipe: str) -> Iterator[Workload]:
    """Open the recipe with its model, or if that is not on this machine, with random weights of the
    demo's shape. Raises ConfigError if the recipe states another shape."""
    source = find_recipe(recipe)
    config = load_config(source, [], TrainConfig)
    with tempfile.TemporaryDirectory(prefix="rlef-bench-") as name:
        folder = Path(name)
        words = config.model.path
        if not (Path(config.model.path) / "config.json").is_file():
            if config.model.shape:
                raise ConfigError(f"no model in {config.model.path}; {source} cannot be measured")
            path = random_model(folder / "base")
            config = load_config(source, [f"model.path={json.dumps(str(path))}"], TrainConfig)
            words = "random weights, the shape of demo_base"
        check_layout(parallel=config.parallel, **model_shape(config))
        (folder / "config.toml").write_text(dump_toml(config))
        yield Workload(folder, config, words)


def random_model(folder: Path) -> Path:
    base = load_config(find_recipe("demo_base"), [f"dir={json.dumps(str(folder))}"], SFTConfig)
    make_initial_model(base)
    return folder / "init"


def describe_batch(batch: Batch) -> dict[str, int]:
    return {
        "sequences": batch.num_sequences,
        "tokens": batch.num_tokens,
        "response_tokens": batch.num_actions,
    }


# ------------------------------------------------------------------------------- random episodes


def random_episodes(rollout: RolloutConfig, vocab_size: int, seed: int) -> list[Episode]:
    """Make a batch of the recipe's size with lengths like the demo's; equal for equal seeds."""
    generator = random.Random(seed)

    def length(of: str) -> int:
        bounds, limit = (
            (ANSWERED, rollout.max_new_tokens)
            if of == "response"
            else (OBSERVED, rollout.max_context)
        )
        return max(1, round(generator.uniform(*bounds) * limit))

    return [
        random_episode(rollout.turns, rollout.max_context, vocab_size, generator, length)
        for _ in range(rollout.episodes_per_batch)
    ]


def slice_episodes(
    rollout: RolloutConfig, vocab_size: int, token_budget: int, count: int, seed: int
) -> list[Episode]:
    """Make dialogues that fill `count` micro-batches of `token_budget` tokens.

    Lengths are log-normal, as those of programs and problems are: many short, a few at the recipe's
    limits. Medians, as fractions of `max_context` (8,192 in the paper): a prompt 1/16, a response
    1/20, feedback 1/50; each with a spread of 0.6 in the logarithm.
    """
    generator = random.Random(seed)
    max_context = min(token_budget, rollout.max_context)
    medians = {"prompt": 1 / 16, "feedback": 1 / 50, "response": 1 / 20}

    def length(of: str) -> int:
        limit = max_context // 3
        if of == "response":
            limit = min(limit, rollout.max_new_tokens)
        median = math.log(medians[of] * rollout.max_context)
        return min(max(round(generator.lognormvariate(median, 0.6)), 2), limit)

    episodes: list[Episode] = []
    while True:
        episode = random_episode(rollout.turns, max_context, vocab_size, generator, length)
        lengths = [len(e.token_ids) for e in (*episodes, episode)]
        if episodes and len(microbatches(lengths, token_budget, 1)[0]) > count:
            return episodes
        episodes.append(episode)


def random_episode(
    turns: int,
    max_context: int,
    vocab_size: int,
    generator: random.Random,
    length: Callable[[str], int],
) -> Episode:
    """Make a dialogue of one to `turns` turns; `length` draws that of a "prompt", "feedback" or
    "response". Log-probs are what an untrained model assigns."""
    tokens = 0
    made: list[Turn] = []

    def draw(of: str) -> tuple[int, ...]:
        return tuple(generator.randrange(vocab_size) for _ in range(length(of)))

    for number in range(generator.randint(1, turns)):
        observed, answer = draw("feedback" if number else "prompt"), draw("response")
        if made and tokens + len(observed) + len(answer) > max_context:
            break
        logprobs = (-math.log(vocab_size),) * len(answer)
        sampled = Completion(answer, logprobs, (0,) * len(answer), "stop")
        made.append(Turn(observed, sampled, "print(1)", UNGRADED))
        tokens += len(observed) + len(answer)
    verdict = replace(UNGRADED, solved=generator.random() < 0.5)
    made[-1] = replace(made[-1], verdict=verdict)
    return Episode("random", "", tuple(made))
