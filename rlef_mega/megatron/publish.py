"""Weights flow back: the policy's weights into the engines, stamped with a version."""

from rlef_mega.engines import Engine, EngineError
from rlef_mega.megatron.learner import Learner


def publish(learner: Learner, engine: Engine | None, version: int) -> None:
    """Hand the policy to this rank's engine, if it has one. Collective: the weights are gathered
    over all ranks.

    The engine itself verifies what it received (Engine.update_weights); a version that does not
    stick is a fault.
    """
    if engine is None:
        for _ in learner.policy_weights():
            pass
        return
    engine.update_weights(learner.policy_weights(), version)
    if engine.weight_version != version:
        raise EngineError(
            f"published version {version}, but the engine serves version {engine.weight_version}"
        )
