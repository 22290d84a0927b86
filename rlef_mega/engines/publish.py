"""Publish the policy's weights to the engines, stamped with a version."""

import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from rlef_mega.engines import Engine, EngineError, EngineLostError, WeightsMismatchError
from rlef_mega.run.ranks import gather

TRIES = 3  # of a publication: if a server dies in one try, the next one goes on without it
# Yields every weight of the policy under its Hugging Face name; collective. A tensor that was
# yielded is not written to again.
PolicyWeights = Callable[[], Iterator[tuple[str, torch.Tensor]]]
FINAL = (EngineLostError, WeightsMismatchError)


def publish(policy_weights: PolicyWeights, engine: Engine | None, version: int) -> None:
    """Send the policy to this rank's engine, if it has one, and retry a publication that fails.

    Collective: all ranks gather the weights and learn each rank's outcome. The engine verifies
    what it received (Engine.update_weights). Raises on every rank: EngineLostError if all
    tries fail or no engine is left, WeightsMismatchError at once if the weights are not those of
    the engine's model.
    """
    failures: list[str] = []
    for _ in range(TRIES):
        mine, served = try_update(policy_weights, engine, version)
        outcomes = gather((mine, served))
        failed = [failure for failure, _ in outcomes if failure is not None]
        if engine is not None:
            # every engine is told: otherwise a thousand ranks would ask hundreds of servers
            known = [url for _, urls in outcomes for url in urls]
            engine.end_update(None if failed else version, known)
        if not failed:
            break
        for failure in failed:
            if isinstance(failure, FINAL):
                raise type(failure)(f"version {version} was not published: {failure}")
        failures.append(str(failed[0]))
        if mine is not None:
            print(f"WARNING: version {version}: {mine}; trying again", file=sys.stderr, flush=True)
    else:
        raise EngineLostError(
            f"{TRIES} tries to publish version {version} failed: {'; '.join(failures)}"
        )
    assert engine is None or engine.weight_version == version


def try_update(
    policy_weights: PolicyWeights, engine: Engine | None, version: int
) -> tuple[EngineError | EngineLostError | None, Sequence[str]]:
    """Try once. Returns this rank's failure, if any, and the URLs of the servers that have the
    weights. Exhausts the weights even after a failure, because all ranks gather each of them
    together."""
    weights = policy_weights()
    served: Sequence[str] = ()
    failure: EngineError | EngineLostError | None = None
    try:
        if engine is not None:
            served = engine.update_weights(weights, version)
    except (EngineError, EngineLostError) as error:
        failure = error.with_traceback(None)  # a traceback would keep tensors alive
    for _ in weights:
        pass
    return failure, served
