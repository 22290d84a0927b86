"""One layer of Llama 3.1 70B's shape equals transformers', forward and backward on the CPU: the
real model's widths, head counts and rotary frequencies, in fp32.

To save memory, transformers' model uses our weights where it can, and its gradients are compared
and freed as they appear. This does not test depth and bfloat16.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rlef_mega.flops import LLAMA_31_70B
from rlef_mega.megatron.hf_names import HFTensor, name_map
from rlef_mega.megatron.network.attention import packed_sequences
from rlef_mega.megatron.network.packed_llama import CriticModel
from rlef_mega.megatron.parallel import Ranks

NEEDED_GB = 14  # it peaks at 8.3, and other tests may run at the same time
LENGTHS = [29, 19]
TOLERANCE = 1e-5
# https://huggingface.co/meta-llama/Llama-3.1-70B-Instruct/blob/main/config.json
ROPE_31 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIG = LlamaConfig(
    hidden_size=LLAMA_31_70B.hidden,
    intermediate_size=LLAMA_31_70B.ffn,
    num_hidden_layers=1,
    num_attention_heads=LLAMA_31_70B.heads,
    num_key_value_heads=LLAMA_31_70B.key_value_heads,
    vocab_size=64,
    max_position_embeddings=131072,
    rope_parameters=ROPE_31,
    rms_norm_eps=1e-5,
)
TRUNK = [tensor for tensor in name_map(CONFIG) if tensor.name.startswith("model.")]


def available_gb() -> float:
    with open("/proc/meminfo") as lines:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return kib["MemAvailable"] / 1e6


@pytest.mark.slow
@pytest.mark.skipif(available_gb() < NEEDED_GB, reason=f"needs {NEEDED_GB} GB of free memory")
def test_a_layer_of_70b_equals_transformers(ranks: Ranks) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = random_model(ranks, generator)
    token_ids_T = torch.randint(CONFIG.vocab_size, (sum(LENGTHS),), generator=generator)
    gradient_TD = torch.randn(sum(LENGTHS), CONFIG.hidden_size, generator=generator)
    theirs = transformers_model(ours)

    packed = packed_sequences(LENGTHS, ranks.device)
    hidden_TD = ours(token_ids_T[None], None, None, packed_seq_params=packed).squeeze(1)
    hidden_TD.backward(gradient_TD)
    for parameter in ours.parameters():  # the name map views parameters: here, their gradients
        if parameter.grad is not None:
            parameter.data, parameter.grad = parameter.grad, None

    errors: dict[str, float] = {}
    for tensor in TRUNK:

        def compare(parameter: torch.Tensor, tensor: HFTensor = tensor) -> None:
            ours_gradient = tensor.view(ours).detach().reshape(parameter.shape)
            errors[tensor.name] = error(ours_gradient, parameter.grad)
            parameter.grad = None

        parameter = theirs.get_parameter(tensor.name.removeprefix("model."))
        parameter.register_post_accumulate_grad_hook(compare)
    # the two sequences as a batch, the shorter one padded at its end, which nothing attends to
    mask_SL = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids_SL = torch.zeros(mask_SL.shape, dtype=torch.long).masked_scatter(mask_SL, token_ids_T)
    truth_TD = theirs(ids_SL).last_hidden_state[mask_SL]
    assert error(hidden_TD.detach(), truth_TD.detach().clone()) < TOLERANCE
    truth_TD.backward(gradient_TD)
    assert errors.keys() == {tensor.name for tensor in TRUNK}
    assert max(errors.values()) < TOLERANCE, errors


def random_model(ranks: Ranks, generator: torch.Generator) -> CriticModel:
    """Make a trunk of one layer; the head is not called."""
    model = CriticModel(CONFIG, ranks, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1, 0.2, generator=generator)
            else:  # keeps the variance of activations
                bound = (3 / parameter.shape[1]) ** 0.5
                parameter.uniform_(-bound, bound, generator=generator)
        model.embedding.word_embeddings.weight.normal_(generator=generator)
    return model


def transformers_model(ours: CriticModel) -> LlamaModel:
    """Make transformers' model with our weights, which only queries, keys and values copy."""
    with torch.device("meta"):
        model = LlamaModel(CONFIG)
    model.rotary_emb = LlamaRotaryEmbedding(CONFIG)
    weights = {
        tensor.name.removeprefix("model."): tensor.view(ours).detach().reshape(tensor.shape)
        for tensor in TRUNK
    }
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_()


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the largest difference relative to the largest entry; overwrites `truth`."""
    size = max(truth.max().item(), -truth.min().item())
    return truth.sub_(ours).abs_().max().item() / size
