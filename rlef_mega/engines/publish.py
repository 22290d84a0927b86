"""Weights flow back: the policy's weights into the engines, stamped with a version."""

import sys
from collections.abc import Callable, Iterator

import torch

from rlef_mega.engines import Engine, EngineError, EngineLostError, WeightsMismatchError
from rlef_mega.run.ranks import gather

TRIES = 3  # of a publication: a server may die in the middle of one, and the others go on
# Draws every weight of the policy under its Hugging Face name; collective.
PolicyWeights = Callable[[], Iterator[tuple[str, torch.Tensor]]]
FINAL = (EngineLostError, WeightsMismatchError)


def publish(policy_weights: PolicyWeights, engine: Engine | None, version: int) -> None:
    """Hand the policy to this rank's engine, if it has one. Collective: the weights are gathered
    over all ranks, and all learn how it ended.

    The engine itself verifies what it received (Engine.update_weights). A publication that fails is
    tried again; EngineLostError, on every rank, if no try succeeds or there is no engine left, and
    WeightsMismatchError, at once, where the weights are not those of the engine's model.
    """
    failures: list[str] = []
    for _ in range(TRIES):
        mine = hand_over(policy_weights, engine, version)
        failed = [failure for failure in gather(mine) if failure is not None]
        if engine is not None:
            engine.end_update(None if failed else version)
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
    if engine is not None and engine.weight_version != version:
        raise EngineError(
            f"published version {version}, but the engine serves version {engine.weight_version}"
        )


def hand_over(
    policy_weights: PolicyWeights, engine: Engine | None, version: int
) -> EngineError | EngineLostError | None:
    """One try: why it failed here, if it did. All weights are drawn in any case, for all ranks
    gather each of them together."""
    weights = policy_weights()
    failure: EngineError | EngineLostError | None = None
    try:
        if engine is not None:
            engine.update_weights(weights, version)
    except (EngineError, EngineLostError) as error:
        failure = error.with_traceback(None)  # which holds on to tensors
    for _ in weights:
        pass
    return failure
