"""A rank of a run. Rank 0 publishes to the only server, a double in the test's process. Each rank
prints a line of JSON."""

import asyncio
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlef_mega.config import TrainConfig, find_recipe, load_config
from rlef_mega.engines import EngineLostError, GenerationRequest, WeightsMismatchError
from rlef_mega.engines.publish import publish
from rlef_mega.engines.sglang.weights import SentWeights
from rlef_mega.megatron import parallel
from rlef_mega.parts import open_engine
from rlef_mega.run.directory import RunDirectory
from rlef_mega.run.ranks import gather
from rlef_mega.types import Sampling


def failure_of(weights, engine, kind: type[Exception]) -> str:
    try:
        publish(lambda: iter(weights.items()), engine, 1)
    except kind as error:
        gather(None)  # all ranks have failed
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def main() -> None:
    model, run = sys.argv[1], RunDirectory(Path(sys.argv[2]))
    settings = ["rollout.engine=sglang", f"rollout.servers.urls=['{sys.argv[3]}']"]
    settings += [f"model.path={model}"]
    config = load_config(find_recipe("demo"), settings, TrainConfig)
    ranks = parallel.initialize(config.parallel, seed=1)
    weights = load_file(Path(model) / "model.safetensors")
    renamed = {name.replace("model.norm", "model.rotary"): t for name, t in weights.items()}
    said: dict[str, object] = {}
    with open_engine(config, Path(model), ranks, run) as engine:
        blocked = run.path / "weights"
        blocked.touch()  # a file: rank 0 cannot write the folder
        said["unwritable"] = failure_of(weights, engine, EngineLostError)
        gather(blocked.unlink(missing_ok=True))
        said["renamed"] = failure_of(renamed, engine, WeightsMismatchError)
        publish(lambda: iter(weights.items()), engine, 2)

        async def generate() -> list[int]:
            async with engine.session() as session:
                return (await session(GenerationRequest((1, 2), Sampling(3), 0))).weight_versions

        said["versions"] = asyncio.run(generate())
        sharded = SentWeights(weights.items(), engine.model, torch.float32, 2)
        list(sharded)
        said |= {"checksums": sharded.checksums, "share": len(sharded.mine)}
    sys.stdout.write(json.dumps(said) + "\n")
    parallel.shutdown(ranks)


if __name__ == "__main__":
    main()
