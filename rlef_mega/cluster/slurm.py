"""Helper of the scripts in slurm/: `python -m rlef_mega.cluster.slurm layout|prepare RECIPE`.

`layout` reads only the recipe, and prints the run's ranks, servers and folder as shell assignments.
`prepare` does what `rlef train` does before it starts ranks: it checks everything, servers
included, and writes the run directory. srun then starts `rlef_mega.train` on that directory.
"""

import argparse
import shlex
import sys
from pathlib import Path

from rlef_mega.config import ConfigError, TrainConfig, check_placement, find_recipe, load_config
from rlef_mega.run.launch import FAILED, sandbox_token


def layout(config: TrainConfig) -> dict[str, str | int]:
    """Return a run's shell variables; PLACEMENT says why servers may not run on the training nodes.
    Raises ConfigError if its ranks do not fill whole nodes."""
    ranks = config.world_size
    per_node = min(config.parallel.processes_per_node, ranks)
    if ranks % per_node:
        raise ConfigError(
            f"{ranks} ranks do not fill nodes of parallel.processes_per_node = {per_node}; "
            "change the layout or the processes per node"
        )
    servers, refusal = config.rollout.servers, ""
    try:
        check_placement(config)
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
        "USES_IPC": int(servers.publish == "tensor"),
        "GPUS_PER_SERVER": servers.tensor_parallel_size if servers.device == "cuda" else 0,
    }


def prepare(config: TrainConfig) -> None:
    """Check a run and write its directory. Raises ConfigError, ValueError or RuntimeError."""
    from rlef_mega.preflight import check_rollout_servers, check_train, claim_run_directory

    inputs = check_train(config, grading_token=sandbox_token())
    check_rollout_servers(config)
    claim_run_directory(config, Path(config.run.dir), inputs)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rlef_mega.cluster.slurm", description=__doc__)
    parser.add_argument("what", choices=("layout", "prepare"))
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    asked = parser.parse_args()
    try:
        config = load_config(find_recipe(asked.recipe), asked.overrides, TrainConfig)
        if asked.what == "prepare":
            prepare(config)
        else:
            for name, value in layout(config).items():
                print(f"{name}={shlex.quote(str(value))}")
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
