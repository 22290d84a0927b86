"""The slice that `rlef bench slice` trains: a model's own layers, embedding and head, but fewer
layers, with random weights, and episodes as long as its recipe's.

No checkpoint is needed: the weights are drawn on the device and written to a temporary Hugging Face
folder, from which our learner and its peers start alike.
"""

import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlef_mega.config import ConfigError, RolloutConfig, SFTConfig, find_recipe, load_config
from rlef_mega.flops import LLAMA_31_8B, LLAMA_31_70B, LlamaShape
from rlef_mega.packing import microbatches
from rlef_mega.types import Completion, Episode, Turn, Verdict

REQUEST = "request.json"  # to a worker, in its folder
SHAPES = {"llama31_8b": LLAMA_31_8B, "llama31_70b": LLAMA_31_70B}
LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
UNGRADED = Verdict((), public_passed=False, solved=None)

# Bytes a parameter on the device. Trained in bfloat16: weight 2, fp32 gradient, main copy and two
# moments 4 each. In fp32 the main copy is the weight. The peer holds bfloat16 gradients besides.
TRAINED = {torch.bfloat16: 18, torch.float32: 16}
PEER = {torch.bfloat16: 20, torch.float32: 16}
# of the device: logits, workspaces, the allocator's fragments
RESERVE_BYTES = 8 * 10**9
MOST_OF_MEMORY = 0.97


def find_shape(recipe: str) -> LlamaShape:
    """A published shape by the recipe's name; the demo's for recipes that state none."""
    name = Path(recipe).stem
    if name in SHAPES:
        return SHAPES[name]
    if name != "demo":
        raise ConfigError(
            f"no shape is known for {recipe!r}: use one of {', '.join((*SHAPES, 'demo'))}"
        )
    return demo_shape()


def demo_shape() -> LlamaShape:
    base = load_config(find_recipe("demo_base"), [], SFTConfig)
    return LlamaShape(
        layers=base.num_layers,
        hidden=base.hidden_size,
        ffn=base.ffn_hidden_size,
        heads=base.num_attention_heads,
        key_value_heads=base.num_key_value_heads,
        head_dim=base.hidden_size // base.num_attention_heads,
        vocabulary=base.vocab_size,
    )


def layers_that_fit(shape: LlamaShape, memory: int, dtype: torch.dtype, tokens: int) -> int:
    """The most layers, at least 1, with which both parts of the benchmark fit `memory` bytes:
    policy, critic and reference; and policy beside a peer's.
    """
    budget = MOST_OF_MEMORY * memory - min(RESERVE_BYTES, memory / 8)
    fitting = [
        layers
        for layers in range(1, shape.layers + 1)
        if bytes_needed(shape.with_layers(layers), dtype, tokens) <= budget
    ]
    if not fitting:
        need = bytes_needed(shape.with_layers(1), dtype, tokens)
        raise ConfigError(
            f"one layer with embedding and head needs {need / 1e9:.0f} GB, of {memory / 1e9:.0f} "
            "GB here; choose a smaller recipe, or give --layers to try nevertheless"
        )
    return fitting[-1]


def bytes_needed(shape: LlamaShape, dtype: torch.dtype, tokens: int) -> float:
    policy, critic = shape.parameters, shape.parameters - shape.table_parameters
    trained = TRAINED[dtype]
    three = trained * (policy + critic) + dtype.itemsize * policy
    beside = (trained + PEER[dtype]) * policy
    return max(three, beside) + activation_bytes(shape, dtype, tokens)


def activation_bytes(shape: LlamaShape, dtype: torch.dtype, tokens: int) -> int:
    """What backward keeps without recomputation: the inputs and outputs of norms and projections,
    queries, keys and values before and after RoPE, about 12 numbers of the hidden size, and 4 of
    the feed-forward size.
    """
    return dtype.itemsize * tokens * shape.layers * (12 * shape.hidden + 4 * shape.ffn)


def write_model(folder: Path, shape: LlamaShape, dtype: torch.dtype, device: torch.device) -> None:
    """A Hugging Face folder with random weights: 0.02 everywhere, norms 1."""
    size = shape.parameters * dtype.itemsize
    folder.mkdir(parents=True)
    if shutil.disk_usage(folder).free < size + 10**9:
        raise ConfigError(f"{folder} has no room for {size / 1e9:.0f} GB; set TMPDIR elsewhere")
    published = shape.vocabulary == LLAMA_31_8B.vocabulary
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=shape.tied,
        rope_parameters=LLAMA_31_ROPE
        if published
        else {"rope_type": "default", "rope_theta": 10_000.0},
        dtype=str(dtype).removeprefix("torch."),
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        wanted = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, size_of in wanted.items():
        weight = torch.ones(size_of, dtype=dtype, device=device)
        if len(size_of) > 1:
            weight.normal_(std=0.02, generator=generator)
        tensors[name] = weight.cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def slice_episodes(
    rollout: RolloutConfig, vocabulary: int, token_budget: int, count: int, seed: int
) -> list[Episode]:
    """Dialogues that fill `count` micro-batches of `token_budget` tokens.

    Lengths are log-normal, as those of programs and problems are: many short, a few at the recipe's
    limits. Medians, as parts of `max_context` (8,192 in the paper): a problem 1/16, a response
    1/20, feedback 1/50; each with a spread of 0.6 in the logarithm.
    """
    generator = random.Random(seed)
    episodes: list[Episode] = []
    while True:
        episode = draw_episode(
            rollout, vocabulary, min(token_budget, rollout.max_context), generator
        )
        lengths = [len(e.token_ids) for e in (*episodes, episode)]
        if episodes and len(microbatches(lengths, token_budget, 1)[0]) > count:
            return episodes
        episodes.append(episode)


def draw_episode(
    rollout: RolloutConfig, vocabulary: int, max_context: int, generator: random.Random
) -> Episode:
    length = 0
    turns: list[Turn] = []

    def draw(part: float, limit: int) -> tuple[int, ...]:
        median = math.log(part * rollout.max_context)
        length = round(generator.lognormvariate(median, 0.6))
        count = min(max(length, 2), limit)
        return tuple(generator.randrange(vocabulary) for _ in range(count))

    for turn in range(generator.randint(1, rollout.turns)):
        observed = draw(1 / 50 if turn else 1 / 16, max_context // 3)
        answer = draw(1 / 20, min(rollout.max_new_tokens, max_context // 3))
        if turns and length + len(observed) + len(answer) > max_context:
            break
        logprobs = (-math.log(vocabulary),) * len(answer)
        sampled = Completion(answer, logprobs, (0,) * len(answer), "stop")
        turns.append(Turn(tuple(observed), sampled, "print(1)", UNGRADED))
        length += len(observed) + len(answer)
    verdict = replace(UNGRADED, solved=generator.random() < 0.5)
    turns[-1] = replace(turns[-1], verdict=verdict)
    return Episode("made up", "", tuple(turns))
