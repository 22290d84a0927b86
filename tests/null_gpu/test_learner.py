"""How often the host waits for the device in an update, as PyTorch's calls of the runtime say."""

from collections.abc import Iterator

import pytest

from tests.null_gpu.processes import counter

pytestmark = pytest.mark.null_gpu


@pytest.fixture(scope="module")
def ranks() -> Iterator:
    from rlef_mega.config import ParallelConfig
    from rlef_mega.megatron import parallel

    world = parallel.initialize(ParallelConfig(), seed=7)
    yield world
    parallel.shutdown(world)


def test_the_host_never_waits_inside_a_microbatch_and_rarely_in_an_update(ranks, model):
    """A copy from pageable memory may wait, so it counts."""
    from rlef_mega.bench.workload import random_episodes
    from rlef_mega.config import LearnerConfig, PPOConfig, RolloutConfig
    from rlef_mega.megatron.learner import Learner
    from rlef_mega.packing import pack
    from rlef_mega.targets import targets_of

    settings = PPOConfig(updates_per_batch=1)
    rollout = RolloutConfig(max_new_tokens=40, max_context=320)
    episode = next(random_episodes(rollout, 700, seed=0))
    batch = pack([episode] * 6)
    learner = Learner(
        ranks,
        model,
        learner=LearnerConfig(microbatch_tokens=batch.num_tokens // 6),  # a sequence each
        ppo=settings,
        dtype="float32",
        temperature=1.0,
    )
    targets, _ = targets_of(batch, learner.score(batch), settings, single_turn=False)

    def waits(update, sequences: int) -> int:
        before = counter("host_waits") + counter("pageable_copies")
        update(batch, targets, range(sequences))
        return counter("host_waits") + counter("pageable_copies") - before

    for update in (learner.update_policy, learner.update_critic):
        waits(update, 6)  # compiles, and makes the optimizer's state
        few, many = waits(update, 2), waits(update, 6)
        assert few == many, f"{few} waits with 2 micro-batches, {many} with 6"
        assert few <= 12  # a copy from pageable memory and the wait for it are two
