"""What is measured on: a recipe with a model that is there, and made-up episodes of its batch size.

The lengths follow what the demo's dialogues were seen to have (prompts of 30 to 54 tokens, feedback
of 28 to 52, responses of 6 to 25, one to three turns), written as fractions of the recipe's limits
so that other recipes get theirs in proportion. Speed depends on lengths, not on which tokens they
are.
"""

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlef_mega.bench.figures import describe_benchmark
from rlef_mega.config import (
    ConfigError,
    ParallelConfig,
    RolloutConfig,
    SFTConfig,
    TrainConfig,
    check_layout,
    dump_toml,
    find_recipe,
    load_config,
)
from rlef_mega.demo.base_model import make_initial_model
from rlef_mega.preflight import model_shape
from rlef_mega.run.launch import launch
from rlef_mega.types import Completion, Episode, Turn, Verdict

OBSERVED = (1 / 10, 1 / 6)  # of rollout.max_context: a prompt, or one turn's feedback
ANSWERED = (0.15, 0.65)  # of rollout.max_new_tokens: a response
UNGRADED = Verdict((), public_passed=False, solved=None)
RESULT = "measured.json"


@dataclass(frozen=True)
class Workload:
    """A folder for the workers with the resolved config in it."""

    folder: Path
    config: TrainConfig
    model: str  # in words

    def run(self, module: str) -> dict:
        """The worker module on the recipe's ranks; what rank 0 wrote. RuntimeError if it did not
        end well."""
        result = self.folder / RESULT
        result.unlink(missing_ok=True)
        code = launch(module, self.folder, self.config.parallel.world_size)
        if code or not result.is_file():
            raise RuntimeError(f"{module} ended with exit code {code} and wrote no figures")
        return json.loads(result.read_text())

    def about(self, **more: Any) -> dict[str, Any]:
        """What it was measured on, and what the benchmark adds."""
        return describe_benchmark(
            layout=self.config.parallel.model_dump(),
            dtype=self.config.model.dtype,
            model=self.model,
            **more,
        )

    def in_data_parallel(self) -> "Workload":
        """The same on as many ranks, each with a whole model: no layer is split."""
        world = self.config.parallel.world_size
        return self.variant("data-parallel", ParallelConfig(data_parallel_size=world))

    def in_one_process(self) -> "Workload":
        return self.variant("one-process", ParallelConfig())

    def variant(self, name: str, parallel: ParallelConfig) -> "Workload":
        """The same in another layout."""
        config = self.config.model_copy(
            update={
                "parallel": parallel.model_copy(
                    update={"processes_per_node": self.config.parallel.processes_per_node}
                )
            }
        )
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "config.toml").write_text(dump_toml(config))
        # read back, so that it is validated
        return Workload(folder, load_config(folder / "config.toml", [], TrainConfig), self.model)


@contextmanager
def workload(recipe: str) -> Iterator[Workload]:
    """The recipe with its model, or where that is not on this machine, with random weights of the
    demo's shape."""
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


def random_episodes(rollout: RolloutConfig, vocab_size: int, seed: int) -> list[Episode]:
    """A batch of the recipe's size: random ids, some solved; the same for the same seed."""
    generator = random.Random(seed)
    return [
        random_episode(rollout, vocab_size, generator) for _ in range(rollout.episodes_per_batch)
    ]


def random_episode(rollout: RolloutConfig, vocab_size: int, generator: random.Random) -> Episode:
    length = 0
    turns: list[Turn] = []

    def draw(bounds: tuple[float, float], limit: int) -> list[int]:
        count = max(1, round(generator.uniform(*bounds) * limit))
        return [generator.randrange(vocab_size) for _ in range(count)]

    for _ in range(generator.randint(1, rollout.turns)):
        observed = draw(OBSERVED, rollout.max_context)
        answer = tuple(draw(ANSWERED, rollout.max_new_tokens))
        if turns and length + len(observed) + len(answer) > rollout.max_context:
            break
        # about what an untrained model assigns, so that the loss stays finite
        logprobs = tuple(generator.uniform(-7.0, -6.0) for _ in answer)
        sampled = Completion(answer, logprobs, (0,) * len(answer), "stop")
        turns.append(Turn(tuple(observed), sampled, "print(1)", UNGRADED))
        length += len(observed) + len(answer)
    verdict = replace(UNGRADED, solved=generator.random() < 0.5)
    turns[-1] = replace(turns[-1], verdict=verdict)
    return Episode("made up", "", tuple(turns))
