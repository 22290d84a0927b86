"""Which layers stand where: the one place that splits a network over a pipeline.

A network of L layers is cut into P x V stages, P the pipeline's ranks and V the chunks that each of
them holds (Megatron's virtual pipeline). Stage s, counted along the network, stands on rank s mod P
as its chunk s // P. The first stage holds the embedding, the last one the final norm and the head.
Model, name map, conversion and planner read this and nothing else.
"""

from dataclasses import dataclass

from rlef_mega.config import ParallelConfig, check_stages


@dataclass(frozen=True)
class Place:
    """A pipeline rank, and one of its chunks."""

    rank: int
    chunk: int


@dataclass(frozen=True)
class Stages:
    """`layers[s]` is how many layers stage s holds."""

    layers: tuple[int, ...]
    pipeline_size: int

    @property
    def chunks(self) -> int:
        """Of each rank; 1 without a virtual pipeline."""
        return len(self.layers) // self.pipeline_size

    @property
    def first(self) -> Place:
        return self.place(0)

    @property
    def last(self) -> Place:
        return self.place(len(self.layers) - 1)

    def place(self, stage: int) -> Place:
        return Place(stage % self.pipeline_size, stage // self.pipeline_size)

    def stage(self, place: Place) -> int:
        return place.chunk * self.pipeline_size + place.rank

    def layers_at(self, place: Place) -> range:
        """The layers of the network that this chunk holds."""
        stage = self.stage(place)
        before = sum(self.layers[:stage])
        return range(before, before + self.layers[stage])

    def place_of_layer(self, layer: int) -> Place:
        for stage, count in enumerate(self.layers):
            if layer < count:
                return self.place(stage)
            layer -= count
        raise IndexError(f"the network has {sum(self.layers)} layers")

    def megatron_layout(self) -> list[list[str]]:
        """`TransformerConfig.pipeline_model_parallel_layout`."""
        layout = [["decoder"] * count for count in self.layers]
        layout[0].insert(0, "embedding")
        layout[-1].append("loss")
        return layout


def split_layers(layers: int, parallel: ParallelConfig, *, head_cost: float) -> Stages:
    """Layers dealt so that the most loaded stage is as light as can be.

    `head_cost` is the work of what follows the last layer, in layers: V x H over a layer's
    parameters for a language model's head, 0 for a critic's. The embedding is a lookup and costs no
    work. Where stages tie, later ones take more: under one-forward-one-backward the first ranks
    hold the most micro-batches in flight, and the first also the embedding.

    `parallel.pipeline_layers`, if given, is taken as it is. Raises ConfigError where it does not
    fit.
    """
    pipeline = parallel.pipeline_model_parallel_size
    stages = pipeline * parallel.virtual_pipeline_model_parallel_size
    check_stages(layers, stages, parallel.pipeline_layers)
    if parallel.pipeline_layers is not None:
        return Stages(tuple(parallel.pipeline_layers), pipeline)
    counts = [1] * stages
    loads = [1.0] * stages
    loads[-1] += head_cost
    for _ in range(layers - stages):
        lightest = min(range(stages), key=lambda stage: (loads[stage], -stage))
        counts[lightest] += 1
        loads[lightest] += 1
    return Stages(tuple(counts), pipeline)
