"""The shipped 8B and 70B layouts, without their hardware: every rank's policy and critic is built
on the meta device, and what the ranks hold adds up to Hugging Face's model.

One process takes each rank in turn, in a world whose process groups are torch's fake ones: they
have sizes and ranks, and exchange nothing. Not tested: whether the weights fit a GPU
together with gradients and activations.
"""

import functools
import resource
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlef_mega.config import ParallelConfig, TrainConfig, find_recipe, load_config
from rlef_mega.flops import LLAMA_31_8B, LLAMA_31_70B, LlamaShape
from rlef_mega.megatron import cpu_shim
from rlef_mega.megatron.hf_names import HFTensor, name_map, stage_of
from rlef_mega.megatron.hf_weights import holds_copy_of_embedding
from rlef_mega.megatron.network.families import DenseConfig
from rlef_mega.megatron.network.packed_llama import CriticModel, PackedLlama, PolicyModel
from rlef_mega.megatron.parallel import CRITIC, POLICY, Ranks, initialize, shutdown

NETWORKS = {
    POLICY: (PolicyModel, AutoModelForCausalLM),
    CRITIC: (CriticModel, AutoModelForTokenClassification),
}


def recipe_layout(name: str) -> ParallelConfig:
    return load_config(find_recipe(name), [], TrainConfig).parallel


def one_replica(parallel: ParallelConfig, **changes: int) -> ParallelConfig:
    return parallel.model_copy(update={"data_parallel_size": 1} | changes)


CONFIGS: dict[str, DenseConfig] = {
    "8B": LlamaConfig(**LLAMA_31_8B.hf_settings(), num_labels=1),
    "70B": LlamaConfig(**LLAMA_31_70B.hf_settings(), num_labels=1),
    # of Qwen2.5-0.5B and Qwen3-0.6B: biases that are split, norms that are not, a tied head
    "qwen2": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
        num_labels=1,
    ),
    "qwen3": Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
        num_labels=1,
    ),
}
TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
LAYOUTS = {
    "8B": one_replica(recipe_layout("llama31_8b")),
    "70B": one_replica(recipe_layout("llama31_70b")),
    "70B-virtual": one_replica(
        recipe_layout("llama31_70b"), virtual_pipeline_model_parallel_size=4
    ),
    "qwen2": TP2_PP2,
    "qwen3": TP2_PP2,
}


def config_of(case: str) -> DenseConfig:
    return CONFIGS[case.removesuffix("-virtual")]


@contextmanager
def standing_at(rank: int, parallel: ParallelConfig) -> Iterator[Ranks]:
    def join(world_size: int, *layouts: ParallelConfig) -> torch.device:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        return torch.device("cpu")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlef_mega.megatron.parallel.join_world", join)
        patch.setenv("WORLD_SIZE", str(parallel.world_size))
        ranks = initialize(parallel, seed=0)
    try:
        yield ranks
    finally:
        shutdown(ranks)


@functools.cache
def tensors_of(network: str, case: str) -> list[HFTensor]:
    return name_map(config_of(case), network)


def build(network: str, case: str, ranks: Ranks) -> list[PackedLlama]:
    model = NETWORKS[network][0]
    with cpu_shim.device_mode(), torch.device("meta"):
        return [
            model(config_of(case), ranks, dtype=torch.bfloat16, chunk=chunk)
            for chunk in range(ranks.layout.virtual_pipeline_model_parallel_size)
        ]


@dataclass
class Held:
    """What one rank holds of a network."""

    tensor_parallel_rank: int
    shapes: dict[str, tuple[int, ...]]  # of this rank's part, under Hugging Face's names
    copied: int  # parameters of the last stage's copy of a tied embedding
    layers: list[int]  # of each chunk
    split: int  # parameters that each tensor-parallel rank has its own part of
    replicated: int  # and those that are the same on all of them


def held_by(network: str, case: str, ranks: Ranks) -> Held:
    chunks = build(network, case, ranks)
    assert all(
        parameter.device.type == ("cpu" if getattr(parameter, "is_value_head", False) else "meta")
        for chunk in chunks
        for parameter in chunk.parameters()
    )
    held = Held(ranks.groups.tp.rank(), {}, 0, [], 0, 0)
    for number, chunk in enumerate(chunks):
        covered: dict[int, int] = defaultdict(int)
        for tensor in tensors_of(network, case):
            place = chunk.stages.place(stage_of(tensor, chunk.stages))
            if place == (ranks.groups.pp.rank(), number):
                assert tensor.name not in held.shapes
                held.shapes[tensor.name] = local_shape(tensor, chunk)
                covered[storage(tensor.view(chunk))] += tensor.view(chunk).numel()
        if holds_copy_of_embedding(chunk):
            held.copied = chunk.output_layer.weight.numel()
            covered[storage(chunk.output_layer.weight)] += held.copied
        # every entry of every parameter has one name
        assert covered == {storage(each): each.numel() for each in chunk.parameters()}
        held.layers.append(len(chunk.decoder.layers))
        for parameter in chunk.parameters():
            if getattr(parameter, "tensor_model_parallel", False):
                held.split += parameter.numel()
            else:
                held.replicated += parameter.numel()
    return held


def storage(tensor: torch.Tensor) -> int:
    """Return an id that a parameter and its views share."""
    return tensor.untyped_storage()._cdata


def local_shape(tensor: HFTensor, chunk: PackedLlama) -> tuple[int, ...]:
    view = tensor.view(chunk)
    return tuple(view.flatten(0, 2).shape if tensor.rows else view.shape)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("case", LAYOUTS)
def test_the_ranks_add_up_to_hugging_faces_model(case: str, network: str) -> None:
    parallel = LAYOUTS[case]
    everyone = []
    for rank in range(parallel.world_size):
        with standing_at(rank, parallel) as ranks:
            everyone.append(held_by(network, case, ranks))
    with torch.device("meta"):
        truth = NETWORKS[network][1].from_config(config_of(case))
    expected = {name: tuple(parameter.shape) for name, parameter in truth.named_parameters()}

    parts: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for held in everyone:
        for name, part in held.shapes.items():
            parts[name].append(part)
    tensors = {tensor.name: tensor for tensor in tensors_of(network, case)}
    assert parts.keys() == tensors.keys() == expected.keys()
    for name, found in parts.items():
        # one pipeline stage has it, on each of its tensor-parallel ranks
        assert len(found) == parallel.tensor_model_parallel_size and len(set(found)) == 1, name
        whole, split_dim = list(found[0]), tensors[name].split_dim
        if split_dim is not None:
            whole[split_dim] *= len(found)
        assert tuple(whole) == expected[name], name

    # and by Megatron's own marks, which its gradient norm uses
    parameters = sum(held.split - held.copied for held in everyone)
    parameters += sum(held.replicated for held in everyone if held.tensor_parallel_rank == 0)
    assert parameters == truth.num_parameters()
    assert (sum(held.copied for held in everyone) > 0) == (
        config_of(case).tie_word_embeddings and network == POLICY
    )


@pytest.mark.parametrize("read_by_head", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("case", ["70B", "70B-virtual"])
def test_pipeline_stages_have_equal_work(case: str, network: str, read_by_head: float) -> None:
    """For sequences of 8,192 tokens, whatever part of them the policy's head reads. Only whole
    layers can be assigned: 21 where 20.3 would be even.
    """
    parallel, config = LAYOUTS[case], config_of(case)
    flops, tokens = LlamaShape.of(config).flops, 8192
    head = flops(tokens, tokens) - flops(tokens, 0) if network == POLICY else 0
    work = []
    for stage in range(parallel.pipeline_model_parallel_size):
        with standing_at(stage * parallel.tensor_model_parallel_size, parallel) as ranks:
            chunks = build(network, case, ranks)
            layers = sum(len(chunk.decoder.layers) for chunk in chunks)
            work.append(flops(tokens, 0) * layers / config.num_hidden_layers)
            if chunks[-1].post_process:
                work[-1] += head * read_by_head
    mean = sum(work) / len(work)
    assert sum(work) == pytest.approx(flops(tokens, 0) + head * read_by_head)
    assert max(work) <= 1.06 * mean, [each / mean for each in work]


@pytest.mark.parametrize("recipe, case", [("llama31_8b", "8B"), ("llama31_70b", "70B")])
def test_replicas_hold_the_same_parameters(recipe: str, case: str) -> None:
    """Compare the shipped recipe's first and last data-parallel rank, in its whole world."""
    parallel = recipe_layout(recipe)
    tensor, data = parallel.tensor_model_parallel_size, parallel.data_parallel_size
    last_stage = (parallel.pipeline_model_parallel_size - 1) * data * tensor
    found = []
    for replica in (0, data - 1):
        with standing_at(last_stage + replica * tensor + 1, parallel) as ranks:
            groups = ranks.groups
            assert (groups.dp.rank(), groups.tp.rank()) == (replica, 1)
            found.append(held_by(POLICY, case, ranks))
    assert found[0] == found[1]


def test_building_on_the_meta_device_takes_no_memory() -> None:
    """Of the 70B, a rank of the shipped layout holds more than 4 GB in bfloat16."""
    parallel = LAYOUTS["70B"]
    with standing_at(parallel.world_size - 1, parallel) as ranks:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
        chunks = build(POLICY, "70B", ranks)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = sum(p.numel() * p.itemsize for chunk in chunks for p in chunk.parameters())
    assert weights > 4e9
    assert (after - before) * 1024 < 100e6
