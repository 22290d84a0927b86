"""Helpers of the Megatron tests, and the worker that runs the same updates in several layouts.

`python -m tests.rlef_mega.megatron.megatron_worker FOLDER START:LAYOUT...`: START is `model`, or a
layout whose checkpoint is resumed. The writer of each leaves its results in FOLDER/START_LAYOUT.pt.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlef_mega.config import LearnerConfig, OptimizerConfig, ParallelConfig, PPOConfig
from rlef_mega.packing import pack
from rlef_mega.targets import targets_of
from rlef_mega.types import Batch, Completion, Episode, Scores, Turn, Verdict
from tests.rlef_mega.distributed import next_world


@dataclass(frozen=True)
class Layout:
    """The policy's layout, the critic's if it has its own ranks, and the learner's offloading."""

    parallel: ParallelConfig
    critic: ParallelConfig | None = None
    offload: str = "none"

    @property
    def processes(self) -> int:
        return self.parallel.world_size + (self.critic.world_size if self.critic else 0)


def layout(
    tp: int = 1, pp: int = 1, dp: int = 1, vpp: int = 1, sp: bool = False, **options: Any
) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        data_parallel_size=dp,
        sequence_parallel=sp,
        **options,
    )


LAYOUTS = {
    "one": Layout(layout()),
    "tp2": Layout(layout(tp=2)),
    "tp2_sp": Layout(layout(tp=2, sp=True)),
    "pp2_uneven": Layout(layout(pp=2, pipeline_layers=(3, 1))),
    "pp2_vpp2": Layout(layout(pp=2, vpp=2)),
    "dp2": Layout(layout(dp=2)),
    "dp2_without_overlap": Layout(layout(dp=2, overlap=False)),
    "dp2_offload": Layout(layout(dp=2), offload="idle"),
    "tp2_pp2_sp": Layout(layout(tp=2, pp=2, sp=True)),
    "pp2_vpp2_dp2": Layout(layout(pp=2, vpp=2, dp=2)),
    "split": Layout(layout(tp=2), layout()),
    "split_wide": Layout(layout(pp=2), layout(dp=2), offload="idle"),
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VOCABULARY = 64


def make_model(folder: Path, *, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """Save a small Llama, with weights large enough that every part affects the log-probs."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(shape | options)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1, 0.1)
            else:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return model.eval()


def make_episodes(number: int, *, seed: int = 0) -> list[Episode]:
    """Return dialogues of one to three turns with prompts and responses of random lengths and
    tokens."""
    random_source = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        count = random_source.randrange(low, high)
        return tuple(random_source.randrange(VOCABULARY) for _ in range(count))

    def turn() -> Turn:
        observed, response = ids(2, 20), ids(1, 8)
        logprobs = tuple(random_source.gauss(-4.2, 0.3) for _ in response)
        return Turn(
            observed,
            Completion(response, logprobs, (0,) * len(response), "stop"),
            random_source.choice(["print(1)", None]),
            Verdict((), public_passed=False, solved=random_source.random() < 0.5),
        )

    return [
        Episode("made up", tuple(turn() for _ in range(random_source.randint(1, 3))))
        for _ in range(number)
    ]


def make_batch(sequences: int, *, seed: int = 0) -> Batch:
    return pack(make_episodes(sequences, seed=seed))


def make_learner(ranks, folder: Path, *, offload: str = "none", **options: Any):
    from rlef_mega.megatron.learner import Learner

    optimizer = OptimizerConfig(lr=3e-3, warmup_updates=2)
    settings: dict[str, Any] = {
        # a budget of about a third of the batch: several micro-batches per update
        "learner": LearnerConfig(
            microbatch_tokens=120, policy=optimizer, critic=optimizer, offload=offload
        ),
        "ppo": PPOConfig(updates_per_batch=2),
        "dtype": "float32",
        "temperature": 0.9,
    }
    return Learner(ranks, folder, **(settings | options))


def one_batch(learner, batch: Batch, *, seed: int) -> dict[str, Any]:
    """Score and update. Returns the results, and the weights afterwards."""
    scores = learner.score(batch)
    targets, _ = targets_of(batch, scores, learner.ppo)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(batch.num_sequences, generator=generator)
    stats = learner.update(batch, targets, order)
    weights = {name: tensor.clone() for name, tensor in learner.policy_weights()}
    return {"scores": tensors_of(scores), "stats": stats, "weights": weights}


def tensors_of(scores: Scores) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in vars(scores).items() if tensor is not None}


def move_reference(learner) -> None:
    """Scale the reference's weights, so that its KL from the policy is not zero at the start."""
    from rlef_mega.megatron.trained_model import Residence

    if learner.reference is not None:
        learner.settle(reference=Residence.WEIGHTS)
        with torch.no_grad():
            for chunk in learner.reference.chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(1.1)
        learner.settle()


def run_layout(folder: Path, start: str, layout: str) -> None:
    """Train a layout: from the model two batches with a checkpoint between them, from a checkpoint
    the second batch."""
    from rlef_mega.megatron.checkpoints.checkpoints import Checkpoints
    from rlef_mega.megatron.parallel import initialize, shutdown

    chosen = LAYOUTS[layout]
    ranks = initialize(chosen.parallel, critic=chosen.critic, seed=7)
    batch = make_batch(12)
    learner = make_learner(ranks, folder / "model", offload=chosen.offload)
    move_reference(learner)
    results: dict[str, Any] = {}
    if start == "model":
        if ranks.world_size in (1, 4):
            imported = make_learner(ranks, folder / "model", weights=folder / "imported")
            results["imported"] = {
                "weights": {name: tensor.clone() for name, tensor in imported.policy_weights()},
                "values": imported.score(batch).values_M,
            }
        results["loaded"] = {name: tensor.clone() for name, tensor in learner.policy_weights()}
        sampled = learner.ppo
        results["sampled"] = tensors_of(learner.score(batch))
        learner.ppo = sampled.model_copy(update={"kl": "exact"})
        results["first"] = one_batch(learner, batch, seed=1)
        learner.ppo = sampled
        learner.make_room()  # what this offloads must come back unchanged
        checkpoints = Checkpoints(folder / layout, learner, keep=1)
        checkpoints.save(1, {"note": layout})
        # training continues during the write: the checkpoint must have the state of the call
        results["second"] = one_batch(learner, batch, seed=2)
        checkpoints.require_saved()
    else:
        results["loaded"] = Checkpoints(folder / start, learner, keep=1).resume()
        # what was loaded, saved again from this layout
        checkpoints = Checkpoints(folder / f"{start}_{layout}", learner, keep=1)
        checkpoints.save(1, {"note": start})
        checkpoints.require_saved()
        results["second"] = one_batch(learner, batch, seed=2)
    if ranks.is_writer:
        torch.save(results, folder / f"{start}_{layout}.pt")
    shutdown(ranks)


def main() -> None:
    folder, *jobs = sys.argv[1:]
    torch.set_num_threads(1)
    for job in jobs:
        start, layout = job.split(":")
        next_world()
        run_layout(Path(folder), start, layout)


if __name__ == "__main__":
    main()
