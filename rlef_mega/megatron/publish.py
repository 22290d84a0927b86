"""Weights flow back: the policy's weights into the engines, stamped with a version."""

import sys

from rlef_mega.engines import Engine, EngineError, EngineLostError
from rlef_mega.megatron.learner import Learner
from rlef_mega.shares import gather

TRIES = 3  # of a publication: a server may die in the middle of one, and the others go on


def publish(learner: Learner, engine: Engine | None, version: int) -> None:
    """Hand the policy to this rank's engine, if it has one. Collective: the weights are gathered
    over all ranks, and all learn how it ended.

    The engine itself verifies what it received (Engine.update_weights). A publication that fails is
    tried again; EngineLostError, on every rank, if no try succeeds or there is no engine left.
    """
    failures: list[str] = []
    for _ in range(TRIES):
        mine, lost = hand_over(learner, engine, version)
        everyone = gather((mine, lost))
        failed = [failure for failure, _ in everyone if failure]
        if engine is not None:
            engine.end_update(None if failed else version)
        if not failed:
            break
        failures.append(failed[0])
        if any(lost for _, lost in everyone):
            raise EngineLostError(failed[0])
        if mine:
            print(f"WARNING: version {version}: {mine}; trying again", file=sys.stderr, flush=True)
    else:
        raise EngineLostError(f"version {version} was not published: {'; '.join(failures)}")
    if engine is not None and engine.weight_version != version:
        raise EngineError(
            f"published version {version}, but the engine serves version {engine.weight_version}"
        )


def hand_over(learner: Learner, engine: Engine | None, version: int) -> tuple[str, bool]:
    """One try: why it failed here, if it did, and whether the engine is lost. All weights are drawn
    in any case, for all ranks gather each of them together."""
    weights = learner.policy_weights()
    failure, lost = "", False
    try:
        if engine is not None:
            engine.update_weights(weights, version)
    except (EngineError, EngineLostError) as error:
        failure, lost = str(error) or type(error).__name__, isinstance(error, EngineLostError)
    for _ in weights:
        pass
    return failure, lost
