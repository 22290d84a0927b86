"""The commands of the scripts in slurm/: `python -m rlef_mega.cluster.slurm COMMAND RECIPE`.

    layout    print the run's ranks, servers, folder and disk space as NAME=VALUE, from the recipe
    find      check that model, data and the servers' Python exist, before a job is submitted
    check     check all inputs, in the job; this writes the store of problems
    prepare   do what `rlef train` does before it starts ranks: check everything, servers included,
              and write the run directory. srun then starts `rlef_mega.train` on that directory

The exit code is REFUSED if the settings or inputs are wrong, so another try would fail too.
"""

import argparse
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

from rlef_mega.config import (
    ConfigError,
    JudgeConfig,
    TrainConfig,
    check_placement,
    find_recipe,
    load_config,
    read_json,
)
from rlef_mega.flops import LlamaShape
from rlef_mega.run.directory import explain_error
from rlef_mega.run.launch import FAILED

REFUSED = 4  # as in slurm/lib/attempt.sh
GIB = 2**30


def layout(config: TrainConfig) -> dict[str, str | int]:
    """Return a run's shell variables; PLACEMENT says why servers may not run on the training nodes,
    and is empty if they may. Raises ConfigError if the ranks do not fill whole nodes."""
    ranks = config.world_size
    per_node = min(config.parallel.processes_per_node, ranks)
    if ranks % per_node:
        raise ConfigError(
            f"{ranks} ranks do not fill nodes of parallel.processes_per_node = {per_node}; "
            "change the layout or the processes per node"
        )
    servers, refusal = config.rollout.servers, ""
    try:
        check_placement(config, per_node)
    except ConfigError as error:
        refusal = str(error)
    return {
        "RANKS": ranks,
        "RANKS_PER_NODE": per_node,
        "RUN": config.run.dir,
        "STEPS": config.run.steps,
        "ENGINE": config.rollout.engine,
        "SERVERS_PER_NODE": servers.count,
        "PLACEMENT": refusal,
        "ISOLATION": config.judge.isolation,
        "PACKAGES": ",".join(config.judge.packages),
        "USES_IPC": int(servers.publish == "tensor"),
        "GPUS_PER_SERVER": servers.tensor_parallel_size if servers.device == "cuda" else 0,
        "CHECKPOINTS_GIB": -(-disk_bytes(config) // GIB),
    }


def disk_bytes(config: TrainConfig) -> int:
    """Return the maximum bytes of a run's checkpoints, one of them half-written, and of the weights
    that it publishes by disk; 0 if the model's shape is unknown.

    A checkpoint has weights, main copy and two moments of each trained network (an fp32 weight is
    its own main copy).
    """
    stated, file = config.model.shape, Path(config.model.path) / "config.json"
    if stated:
        shape = LlamaShape(**stated.sizes())
    elif file.is_file():  # without transformers, whose import takes seconds
        optional = {"num_key_value_heads": None, "tie_word_embeddings": False}
        shape = LlamaShape.of(SimpleNamespace(**optional | read_json(file)))
    else:
        return 0
    weight_bytes = 2 if config.model.dtype == "bfloat16" else 4
    critic = shape.parameters - (0 if shape.tied else shape.table_parameters) + shape.hidden + 1
    trained = shape.parameters + critic * (config.ppo.advantage == "critic")
    checkpoint = (14 if weight_bytes == 2 else 12) * trained
    kept = config.run.keep_checkpoints + config.run.keep_best + 1
    rollout = config.rollout
    by_disk = rollout.engine == "sglang" and rollout.servers.publish == "disk"
    return kept * checkpoint + (2 * weight_bytes * shape.parameters if by_disk else 0)


def find(config: TrainConfig) -> None:
    """Raise ConfigError or ValueError if the model, the data or the servers' Python is missing."""
    from rlef_mega.dialogues.chat import ChatFormat
    from rlef_mega.preflight import check_start
    from rlef_mega.problems import files_of

    ChatFormat.from_folder(check_start(config))
    for source in config.data.model_dump().values():
        if source:
            files_of(source)
    python = config.rollout.servers.python
    if config.rollout.engine == "sglang" and not shutil.which(python):
        raise ConfigError(
            f"rollout.servers.python: there is no {python}; make SGLang's environment "
            "(docs/rollouts.md), or name its Python"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rlef_mega.cluster.slurm", description=__doc__)
    parser.add_argument("what", choices=("layout", "find", "check", "prepare"))
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    asked = parser.parse_args()
    refused = True
    try:
        config = load_config(find_recipe(asked.recipe), asked.overrides, TrainConfig)
        if asked.what == "layout":
            for name, value in layout(config).items():
                print(f"{name}={value}")
        elif asked.what == "find":
            find(config)
        elif asked.what == "check":
            from rlef_mega.preflight import check_train

            # grading servers are checked later, once they run
            check_train(config.model_copy(update={"judge": JudgeConfig()}))
        else:
            from rlef_mega.preflight import check_rollout_servers, check_train, claim_run_directory

            refused = False  # `check` accepted the inputs: what fails here is a server
            inputs = check_train(config)
            check_rollout_servers(config, inputs.model)
            refused = True
            claim_run_directory(config, Path(config.run.dir), inputs)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {explain_error(error)}", file=sys.stderr)
        wrong = isinstance(error, ValueError | FileNotFoundError)
        return REFUSED if refused and wrong else FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
