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
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlef_mega.bench.random_model import write_model
from rlef_mega.bench.results import describe_benchmark
from rlef_mega.config import (
    ConfigError,
    RolloutConfig,
    SFTConfig,
    TrainConfig,
    dump_toml,
    find_recipe,
    load_config,
)
from rlef_mega.demo.base_model import UNGRADED, make_initial_model
from rlef_mega.flops import LlamaShape
from rlef_mega.packing import microbatches
from rlef_mega.preflight import model_shape, plan_train
from rlef_mega.run.hub import find_model
from rlef_mega.run.launch import STOPPED, launch, worker_main
from rlef_mega.types import Batch, Completion, Episode, Turn

if TYPE_CHECKING:
    from rlef_mega.megatron.parallel import Ranks

# Observed in the demo's dialogues (prompts of 30 to 54 tokens, feedback of 28 to 52, responses of 6
# to 25), as fractions of the recipe's limits, so that lengths scale with those of other recipes.
OBSERVED = (1 / 10, 1 / 6)  # of rollout.max_context: a prompt, or one turn's feedback
ANSWERED = (0.15, 0.65)  # of rollout.max_new_tokens: a response
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
        result = self.folder / RESULT
        result.unlink(missing_ok=True)
        layouts = filter(None, (self.config.parallel, self.config.critic_parallel))
        code = launch(module, self.folder, *layouts)
        if code or not result.is_file():
            raise RuntimeError(f"{module} ended with exit code {code} and wrote no figures")
        return json.loads(result.read_text())

    def about(self, **more: Any) -> dict[str, Any]:
        """Return the conditions of the measurement, and what the benchmark adds."""
        return describe_benchmark(
            layout=self.config.parallel.model_dump(),
            critic_layout=self.config.critic_parallel and self.config.critic_parallel.model_dump(),
            dtype=self.config.model.dtype,
            model=self.model,
            **more,
        )


def run_rank(measure: Callable[[Path, TrainConfig, "Ranks"], dict[str, Any]]) -> None:
    """Run one rank of a worker: measure, and on rank 0 write the result. Ctrl-C creates the file
    `stop`; a benchmark has nothing to save, so it ends at once."""
    from rlef_mega.megatron import parallel  # not needed by the command

    def end_when_stopped(file: Path) -> None:
        while not file.exists():
            time.sleep(0.5)
        os._exit(STOPPED)

    def work(folder: Path) -> int:
        threading.Thread(target=end_when_stopped, args=[folder / "stop"], daemon=True).start()
        config = load_config(folder / "config.toml", [], TrainConfig)
        ranks = parallel.initialize(
            config.parallel, critic=config.critic_parallel, seed=config.run.seed
        )
        measured = measure(folder, config, ranks)
        if ranks.is_writer:
            (folder / RESULT).write_text(json.dumps(measured))
        parallel.shutdown(ranks)
        return 0

    worker_main(work)


@contextmanager
def workload(recipe: str, otherwise: LlamaShape | None = None) -> Iterator[Workload]:
    """Load the recipe with its model or, if that is not on this machine, with random weights of the
    shape `otherwise`, by default the demo's. Raises ConfigError if the model is missing and the
    recipe states its shape."""
    source = find_recipe(recipe)
    config = load_config(source, [], TrainConfig)
    with tempfile.TemporaryDirectory(prefix="rlef-bench-") as name:
        folder = Path(name)
        words, path = config.model.path, find_model(config.model.path, fetch=False)
        if not (path / "config.json").is_file():
            if config.model.shape:
                raise ConfigError(f"no model in {config.model.path}; {source} cannot be measured")
            if otherwise:
                path, words = folder / "large", f"{otherwise.layers} layers of {otherwise.hidden}"
                write_model(path, otherwise, getattr(torch, config.model.dtype))
            else:
                path, words = folder / "base/init", "the shape of demo_base"
                base = f"dir={json.dumps(str(folder / 'base'))}"
                make_initial_model(load_config(find_recipe("demo_base"), [base], SFTConfig))
            words = f"random weights, {words}"
        config = load_config(source, [f"model.path={json.dumps(str(path))}"], TrainConfig)
        plan_train(config, model_shape(config))
        (folder / "config.toml").write_text(dump_toml(config))
        yield Workload(folder, config, words)


def describe_batch(batch: Batch) -> dict[str, int]:
    return {
        "sequences": batch.num_sequences,
        "tokens": batch.num_tokens,
        "response_tokens": batch.num_actions,
    }


# ------------------------------------------------------------------------------- random episodes


def random_batch(rollout: RolloutConfig, vocab_size: int, seed: int) -> list[Episode]:
    """Make a batch of the recipe's size; equal for equal seeds."""
    return list(islice(random_episodes(rollout, vocab_size, seed), rollout.episodes_per_batch))


def fill_microbatches(episodes: Iterator[Episode], token_budget: int, count: int) -> list[Episode]:
    """Take the episodes that fit `count` micro-batches of `token_budget` tokens."""
    taken: list[Episode] = []
    for episode in episodes:
        lengths = [len(e.token_ids) for e in (*taken, episode)]
        if taken and len(microbatches(lengths, token_budget, 1)[0]) > count:
            break
        taken.append(episode)
    return taken


def random_episodes(rollout: RolloutConfig, vocab_size: int, seed: int) -> Iterator[Episode]:
    """Yield dialogues of one to `rollout.turns` turns, without end, with lengths like the demo's.
    Log-probs are what an untrained model assigns."""
    generator = random.Random(seed)

    def draw(bounds: tuple[float, float], limit: int) -> tuple[int, ...]:
        length = max(1, round(generator.uniform(*bounds) * limit))
        return tuple(generator.randrange(vocab_size) for _ in range(length))

    while True:
        tokens = 0
        made: list[Turn] = []
        for _ in range(generator.randint(1, rollout.turns)):
            observed = draw(OBSERVED, rollout.max_context)
            answer = draw(ANSWERED, rollout.max_new_tokens)
            tokens += len(observed) + len(answer)
            if made and tokens > rollout.max_context:
                break
            logprobs = (-math.log(vocab_size),) * len(answer)
            sampled = Completion(answer, logprobs, (0,) * len(answer), "stop")
            made.append(Turn(observed, sampled, "print(1)", UNGRADED))
        verdict = replace(UNGRADED, solved=generator.random() < 0.5)
        made[-1] = replace(made[-1], verdict=verdict)
        yield Episode("random", tuple(made))
