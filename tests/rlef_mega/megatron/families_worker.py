"""Compares policies and critics of every family with transformers: scores, and the gradient of each
parameter. In the test's process for one rank, and as a worker for several.

`python -m tests.rlef_mega.megatron.families_worker FOLDER LAYOUT...`: the cases of these layouts,
one after the other, each rank comparing its own part.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlef_mega.config import LearnerConfig, OptimizerConfig, PPOConfig
from rlef_mega.types import Batch
from tests.rlef_mega.distributed import next_world
from tests.rlef_mega.megatron.hugging_face import TEMPERATURE, hf_logprobs, hf_values
from tests.rlef_mega.megatron.megatron_worker import LAYOUTS, VOCABULARY, make_batch

if TYPE_CHECKING:
    from rlef_mega.megatron.microbatch import Microbatch

SCALE = 100  # of both losses: any number will do
Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]
# Llama 3.1's, for a model that was trained on contexts of 16: most of the batch is longer
ROPE_31 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROPE_QWEN = {"rope_type": "default", "rope_theta": 1_000_000.0}
CASES: dict[str, dict[str, Any]] = {
    "llama31": {"rope_parameters": ROPE_31},
    "llama32-tied": {"rope_parameters": ROPE_31, "tie_word_embeddings": True},
    # SmolLM2's heads: nine queries on three keys, tied; their dimension is not a power of two
    "nine-heads": {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 54,
        "tie_word_embeddings": True,
    },
    "one-query-per-key": {"num_key_value_heads": 4, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "rope_parameters": ROPE_QWEN, "rms_norm_eps": 1e-6},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 4},
    # heads wider than the model, as in Qwen3's small ones
    "qwen3": {
        "model_type": "qwen3",
        "rope_parameters": ROPE_QWEN,
        "rms_norm_eps": 1e-6,
        "head_dim": 16,
    },
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 16},
}
IN_LAYOUT = {
    "tp2": ("qwen2-tied", "qwen3"),
    "tp2_sp": ("llama32-tied", "qwen2", "qwen3"),
    "pp2_uneven": ("nine-heads", "qwen2", "qwen3-tied"),
}


def make_family(folder: Path, case: str) -> PreTrainedModel:
    """Save a small model of this case, with weights large enough that every part matters."""
    shape = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    } | CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.15)
            else:
                parameter.normal_(0 if name.endswith("bias") else 1, 0.2)
    model.save_pretrained(folder)
    return model.eval()


def hf_gradients(
    model: PreTrainedModel, head: torch.nn.Linear, batch: Batch
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the gradients of both losses (`check`), under Hugging Face's names."""
    (-hf_logprobs(model, batch).sum() / SCALE).backward()
    policy = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    (hf_values(model, head, batch) - batch.valid_code_N.float()).square().sum().div(
        SCALE
    ).backward()
    critic = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return policy, critic | {"score.weight": head.weight.grad, "score.bias": head.bias.grad}


def check(folder: Path, ranks, truth: PreTrainedModel) -> None:
    """Compare scores on all ranks, gradients on the rank that holds them, and gathered weights."""
    from rlef_mega.megatron.hf_names import name_map
    from rlef_mega.megatron.learner import Learner
    from rlef_mega.megatron.network.packed_llama import ValueHead

    batch = make_batch(6)
    optimizer = OptimizerConfig(lr=1e-3, clip_grad=0)
    learner = Learner(
        ranks,
        folder,
        learner=LearnerConfig(microbatch_tokens=120, policy=optimizer, critic=optimizer),
        ppo=PPOConfig(beta=0),
        dtype="float32",
        temperature=TEMPERATURE,
    )
    stored = load_file(folder / "model.safetensors")
    gathered = dict(learner.policy_weights())
    assert gathered.keys() == stored.keys()
    assert all(torch.equal(gathered[name], tensor) for name, tensor in stored.items())

    scores = learner.score(batch)
    close(scores.old_logprobs_A, hf_logprobs(truth, batch).detach(), "log-probs")
    head = ValueHead(truth.config.hidden_size, ranks)
    close(scores.values_M, hf_values(truth, head, batch).detach(), "values")

    policy_model, critic_model = learner.policy.last_chunk, learner.critic.last_chunk

    def policy_loss(hidden: torch.Tensor, microbatch: "Microbatch") -> Loss:
        logprobs_R = policy_model.logprobs(hidden, microbatch, temperature=TEMPERATURE)
        loss = -logprobs_R.sum() / SCALE
        return loss, {"loss": loss.detach()}

    def critic_loss(hidden: torch.Tensor, microbatch: "Microbatch") -> Loss:
        values_V = critic_model.values(hidden, microbatch)
        wanted_V = batch.valid_code_N[microbatch.values_V].float()
        loss = (values_V - wanted_V).square().sum() / SCALE
        return loss, {"loss": loss.detach()}

    microbatches = learner.cutting.cut(batch, range(batch.num_sequences))
    assert len(microbatches) > 1
    learner.policy.forward_backward(microbatches, policy_loss, ("loss",))
    learner.critic.forward_backward(microbatches, critic_loss, ("loss",))
    policy, critic = hf_gradients(truth, head, batch)
    compare_gradients(learner.policy.chunks, ranks, name_map(truth.config), policy)
    compare_gradients(learner.critic.chunks, ranks, name_map(truth.config, "critic"), critic)


def compare_gradients(chunks, ranks, tensors, truth: dict[str, torch.Tensor]) -> None:
    """Compare this rank's part of each gradient. The name map views parameters, so parameters are
    replaced by their gradients."""
    from rlef_mega.megatron.hf_names import EMBEDDING, stage_of
    from rlef_mega.megatron.hf_weights import holds_copy_of_embedding

    assert {tensor.name for tensor in tensors} == truth.keys()
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad
    for tensor in tensors:
        expected = truth[tensor.name]
        if tensor.split_dim is not None:
            shards = expected.chunk(ranks.groups.tp.size(), tensor.split_dim)
            expected = shards[ranks.groups.tp.rank()]
        stages = chunks[0].stages
        rank, chunk = stages.place(stage_of(tensor, stages))
        if rank == ranks.groups.pp.rank():
            gradient = tensor.view(chunks[chunk])
            close(gradient.reshape(expected.shape), expected, tensor.name)
        if tensor.name == EMBEDDING and holds_copy_of_embedding(chunks[-1]):
            close(chunks[-1].output_layer.weight, expected, f"the last stage's {tensor.name}")


def close(ours: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Compare up to fp32 rounding of the largest entry, which must not be 0."""
    size = expected.abs().max().item()
    assert size > 0, what
    torch.testing.assert_close(
        ours, expected, rtol=0, atol=1e-5 * size, msg=lambda text: f"{what}: {text}"
    )


def main() -> None:
    from rlef_mega.megatron.parallel import initialize, shutdown

    folder, *layouts = sys.argv[1:]
    torch.set_num_threads(1)
    for layout in layouts:
        next_world()
        ranks = initialize(LAYOUTS[layout].parallel, seed=7)
        for case in IN_LAYOUT[layout]:
            path = Path(folder) / case
            truth = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            try:
                check(path, ranks, truth.eval())
            except AssertionError as error:
                raise AssertionError(f"{case} in {layout}: {error}") from error
        shutdown(ranks)


if __name__ == "__main__":
    main()
