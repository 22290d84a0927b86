"""Seconds of one network's passes, as a roofline: each term is work divided by a rate.

The terms add up, except where the trainer overlaps them. They are those of the slowest pipeline
stage of the fullest data-parallel rank, with T tokens; the other letters are those of memory.py:

    products     FLOPs (flops.py) / t / (flops x products); backward takes twice the
                 time of forward, recomputation up to once more
    head         its products, for the tokens that it reads
    memory       reads and writes of norms, rotations, activations and residuals: about 20 h +
                 4 (a + k) + 6 f bytes per token and layer forward, twice that backward; each
                 micro-batch also reads and writes the fp32 gradients, 8 bytes per parameter
    tensor       tensor-parallel exchange: with sequence parallelism 4 collectives of [T, h] per
                 layer forward and 6 backward, each moving (t - 1) / t of it; none is overlapped
    bubble       (P - 1) / V of a micro-batch's time; without chunks, one exchange of [T, h] a pass
    data         reducing the gradients (4 bytes) and gathering new weights, less what the last
                 micro-batch's backward and the first one's forward overlap
    optimizer    38 bytes per parameter of this rank's share: gradient norm, clipping, Adam

Latencies of kernels and collectives, and the host's launches, are left out: a pass of many small
kernels takes longer than this.
"""

from dataclasses import dataclass
from functools import cache

from rlef_mega.flops import LlamaShape
from rlef_mega.packing import microbatches
from rlef_mega.plan.hardware import LINK, MEMORY, NETWORK, Device
from rlef_mega.plan.memory import Network
from rlef_mega.plan.rollouts import DialogueSample

Terms = dict[str, float]
FORWARD, TRAINING = "forward", "training"


@dataclass(frozen=True)
class Load:
    """The work of the fullest data-parallel rank in one pass: sums over its sequences."""

    tokens: float
    squares: float  # of the sequences' lengths
    read: float  # tokens that the head reads
    microbatches: int


@cache
def fullest_load(
    shape: LlamaShape,
    dialogues: DialogueSample,
    sequences: int,
    budget: int,
    ranks: int,
    multiple: int,
) -> Load:
    """Cut a batch into micro-batches as the trainer does, and return the fullest rank's load."""
    lengths, reads = dialogues.batch(sequences)
    costs = list(map(shape.flops, lengths, reads))
    plan = microbatches(lengths, budget, ranks, costs=costs, multiple=multiple)
    fullest = max(plan, key=lambda parts: sum(costs[i] for part in parts for i in part))
    members = [i for part in fullest for i in part]
    tokens, squares = sum(lengths[i] for i in members), sum(lengths[i] ** 2 for i in members)
    return Load(tokens, squares, sum(reads[i] for i in members), len(fullest))


def seconds(network: Network, device: Device, load: Load, passes: str) -> Terms:
    """Compute the seconds of each term. TRAINING is forward, backward and the optimizer's step."""
    forwards = [stage_seconds(network, device, load, rank) for rank in range(network.pipeline)]
    if passes == FORWARD:
        stages = forwards
    else:
        stages = [
            plus(forward, backward_terms(network, device, load, rank, forward))
            for rank, forward in enumerate(forwards)
        ]
    slowest = max(range(network.pipeline), key=lambda rank: sum(stages[rank].values()))
    terms = dict(stages[slowest])
    body = sum(terms.values()) / load.microbatches
    terms["bubble"] = (network.pipeline - 1) / network.stages.chunks * body
    terms["bubble"] += load.microbatches * boundary(network, device, load, passes)
    if passes == TRAINING:
        forward_s = sum(forwards[slowest].values()) / load.microbatches
        backward_s = sum(stages[slowest].values()) / load.microbatches - forward_s
        terms |= after_update(network, device, slowest, forward_s=forward_s, backward_s=backward_s)
    return terms


def stage_seconds(network: Network, device: Device, load: Load, rank: int) -> Terms:
    """Compute the terms of a forward pass over the load on one stage."""
    shape, t, layers = network.shape, network.tensor, network.layers[rank]
    attention = shape.heads * shape.head_dim * load.squares
    flops = 2 * layers * (shape.layer_products * load.tokens + attention)
    has_head = network.is_last(rank) and network.head != "value"
    rate = t * device.flops * device.products
    return {
        "products": flops / rate,
        "head": 2 * shape.table_parameters * load.read / rate if has_head else 0.0,
        "memory": load.tokens * layers * elementwise_bytes(network) / (device.bandwidth * MEMORY),
        "tensor": 4 * layers * exchange(network, device, load.tokens),
    }


def elementwise_bytes(network: Network) -> float:
    """Return the bytes read and written between products, for a token and a layer, forward."""
    shape, t = network.shape, network.tensor
    rotated = (shape.heads + shape.key_value_heads) * shape.head_dim / t
    numbers = 10 * shape.hidden / network.sequence_shards + 2 * rotated + 3 * shape.ffn / t
    return network.weight_bytes * numbers


def exchange(network: Network, device: Device, tokens: float) -> float:
    """Return the seconds of one collective of [T, h] over the tensor-parallel ranks."""
    t = network.tensor
    moved = network.weight_bytes * network.shape.hidden * tokens * (t - 1) / t
    return moved / device.group_bandwidth(t, 1)


def boundary(network: Network, device: Device, load: Load, passes: str) -> float:
    """Return the seconds of a micro-batch's exchange between neighbouring stages.

    Interleaved chunks overlap it with computation.
    """
    if network.pipeline == 1 or network.stages.chunks > 1:
        return 0.0
    moved = network.weight_bytes * network.shape.hidden * load.tokens / load.microbatches
    inside = network.parallel.world_size <= device.per_node
    rate = device.link * LINK if inside else device.network * NETWORK
    return (2 if passes == TRAINING else 1) * moved / network.sequence_shards / rate


def backward_terms(
    network: Network, device: Device, load: Load, rank: int, forward: Terms
) -> Terms:
    """Return the terms of the backward pass on one stage, given those of its forward pass."""
    again = {"none": 0.0, "selective": 0.0, "full": 1.0}[network.recompute]
    backward = {
        "products": (2 + again) * forward["products"],
        "head": 2 * forward["head"],
        "memory": (2 + again) * forward["memory"],
        "tensor": (1.5 + again) * forward["tensor"],
    }
    if network.recompute == "selective":  # the feed-forward block
        shape = network.shape
        block = 2 * network.layers[rank] * 3 * shape.hidden * shape.ffn * load.tokens
        backward["products"] += block / network.tensor / (device.flops * device.products)
        backward["tensor"] += 0.25 * forward["tensor"]  # its input, gathered once more
    summed = 8 * load.microbatches * network.parameters(rank)
    backward["memory"] += summed / (device.bandwidth * MEMORY)
    return backward


def after_update(
    network: Network, device: Device, rank: int, *, forward_s: float, backward_s: float
) -> Terms:
    """Compute the terms of an update after its micro-batches."""
    parameters, replicas = network.parameters(rank), network.data
    share = (replicas - 1) / replicas / device.group_bandwidth(replicas, network.tensor)
    reduce_s, gather_s = 4 * parameters * share, network.weights(rank) * share
    if network.parallel.overlap:
        reduce_s, gather_s = max(0.0, reduce_s - backward_s), max(0.0, gather_s - forward_s)
    optimizer = 38 * parameters / replicas / (device.bandwidth * MEMORY)
    return {"data": reduce_s + gather_s, "optimizer": optimizer}


def plus(*parts: Terms) -> Terms:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}
