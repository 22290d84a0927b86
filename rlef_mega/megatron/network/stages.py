"""How a network is split over a pipeline: which rank holds which layers.

A network of L layers is cut into P x V stages: P pipeline ranks, each with V chunks (Megatron's
virtual pipeline). Stage s, counted along the network, is chunk s // P of rank s mod P. The first
stage holds the embedding, the last one the final norm and the head. Model, name map, checkpoints
and planner all use this file.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from rlef_mega.config import ConfigError, ParallelConfig
from rlef_mega.flops import LlamaShape

# how much of a rank's weights one gather takes at most (hf_weights.buckets)
BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Stages:
    """`layers[s]` is the number of layers of stage s."""

    layers: tuple[int, ...]
    pipeline_size: int

    @property
    def chunks(self) -> int:
        """Return the number of chunks of each rank; 1 without a virtual pipeline."""
        return len(self.layers) // self.pipeline_size

    @property
    def last(self) -> int:
        return len(self.layers) - 1

    def place(self, stage: int) -> tuple[int, int]:
        """Return a stage's pipeline rank, and which of that rank's chunks it is."""
        return stage % self.pipeline_size, stage // self.pipeline_size

    def of_layer(self, layer: int) -> int:
        """Return the stage that holds this layer of the network."""
        return bisect_right(list(accumulate(self.layers)), layer)

    def megatron_layout(self) -> list[list[str]]:
        """Return the layout as `TransformerConfig.pipeline_model_parallel_layout` has it."""
        layout = [["decoder"] * count for count in self.layers]
        layout[0].insert(0, "embedding")
        layout[-1].append("loss")
        return layout


def split_layers(shape: LlamaShape, parallel: ParallelConfig, *, with_head: bool) -> Stages:
    """Assign layers to stages so that the most loaded stage has as little work as possible.

    A language model's head counts as (its parameters / a layer's) layers; a critic's value head is
    too small to count. The embedding is a lookup and costs no work. Of equally loaded stages the
    later one takes a layer: under one-forward-one-backward the first ranks have the most
    micro-batches in flight, and the first one also has the embedding.

    `parallel.pipeline_layers`, if given, is used as it is. Raises ConfigError if it does not fit.
    """
    pipeline = parallel.pipeline_model_parallel_size
    stages = pipeline * parallel.virtual_pipeline_model_parallel_size
    check_stages(shape.layers, stages, parallel.pipeline_layers)
    if parallel.pipeline_layers is not None:
        return Stages(tuple(parallel.pipeline_layers), pipeline)
    counts = [1] * stages
    loads = [1.0] * stages
    if with_head:
        loads[-1] += shape.table_parameters / shape.layer_products
    for _ in range(shape.layers - stages):
        lightest = min(range(stages), key=lambda stage: (loads[stage], -stage))
        counts[lightest] += 1
        loads[lightest] += 1
    return Stages(tuple(counts), pipeline)


def check_layout(shape: LlamaShape, parallel: ParallelConfig) -> None:
    """Raise ConfigError if Megatron would split a model of this shape wrongly or not at all."""
    tensor, pipeline = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    for what, count in (
        ("attention heads", shape.heads),
        ("key-value heads", shape.key_value_heads),
        ("feed-forward columns", shape.ffn),
        ("vocabulary entries", shape.vocabulary),
    ):
        if count % tensor:
            divisors = [n for n in range(1, min(count, 64) + 1) if count % n == 0]
            raise ConfigError(
                f"{count} {what} are not divisible by "
                f"parallel.tensor_model_parallel_size = {tensor}; use one of {divisors}"
            )
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual > 1 and pipeline == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline_model_parallel_size = {virtual} needs "
            "pipeline_model_parallel_size > 1; leave it at 1"
        )
    check_stages(shape.layers, pipeline * virtual, parallel.pipeline_layers)
    if parallel.sequence_parallel and tensor == 1:
        raise ConfigError(
            "parallel.sequence_parallel needs tensor_model_parallel_size > 1; switch it off"
        )


def check_stages(layers: int, stages: int, given: Sequence[int] | None) -> None:
    """Raise ConfigError if a pipeline stage would have no layer, or if `given` (the layers of each
    stage) does not match the model."""
    if layers < stages:
        raise ConfigError(
            f"{layers} layers cannot be split into {stages} stages: "
            f"parallel.pipeline_model_parallel_size x virtual_pipeline_model_parallel_size "
            f"may be at most {layers}"
        )
    if given is not None and (len(given) != stages or sum(given) != layers or min(given) < 1):
        raise ConfigError(
            f"parallel.pipeline_layers = {list(given)} must be {stages} numbers of at least 1 "
            f"(pipeline x virtual pipeline stages, in the network's order) that add up to "
            f"{layers} layers"
        )
