"""Devices' data-sheet rates, and the fractions of them that are reached.

The fractions are the same for every layout. `products` is fitted to one published run of each kind
of GPU, if there is one; tests compare all other published runs with it
(tests/rlef_mega/plan/published.toml). The others are round numbers.
"""

from dataclasses import dataclass

from rlef_mega.config import ConfigError

MEMORY = 0.8  # of a device's memory bandwidth, by norms, activations and the optimizer
HASH = 0.3  # of the same, by the hash of weights: 40 integer operations per word (assumed)
LINK = 0.8  # of NVLink, by collectives
NETWORK = 0.8  # of a node's network cards, by collectives
HOST_LINK = 0.8  # of PCIe, by copies from and to pinned memory
# SGLang's (assumed): bandwidth in decoding, products in prefill, an all-reduce
DECODE_MEMORY, PREFILL_PRODUCTS, ALL_REDUCE_S = 0.7, 0.5, 20e-6
DISK = 5e9  # bytes/s of a shared file system, written by one rank or read by all servers (assumed)
# Memory outside PyTorch's allocations: context, cuBLAS, NCCL's buffers. And what the caching
# allocator loses to fragmentation, as a fraction of its allocations. Both assumed.
CONTEXT_GIB, FRAGMENTS = 2.0, 0.05
# What a server on a trainer's GPU holds beside weights and KV cache, also while the trainer uses
# the GPU: its own CUDA context, captured graphs, buffers (assumed)
SERVER_GIB = 4.0
EMBEDDED_BATCH = 128  # dialogues that the embedded engine samples at once (engines/local.py)
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A device's rates, in bytes and operations per second; links in each direction."""

    name: str
    flops: float  # of dense bf16 matrix products
    products: float  # fraction of `flops` that a layer's matrix products reach
    memory_gib: float  # as CUDA reports, rounded down
    bandwidth: float
    link: float  # to the other GPUs of the node
    network: float  # to other nodes, of each GPU
    host_link: float
    per_node: int = 8

    @property
    def usable(self) -> float:
        """Return the bytes available to tensors."""
        return (self.memory_gib - CONTEXT_GIB) * GIB / (1 + FRAGMENTS)

    @property
    def server_share(self) -> float:
        """Return the bytes of which an SGLang server takes its `memory_fraction`."""
        return (self.memory_gib - CONTEXT_GIB) * GIB

    def group_bandwidth(self, size: int, stride: int) -> float:
        """Return the bytes/s of each rank in a ring of `size` ranks that are `stride` ranks apart.

        Between nodes the ring uses the network cards of all its ranks in a node.
        """
        if size * stride <= self.per_node:
            return self.link * LINK
        return self.network * NETWORK * max(1, min(size, self.per_node // stride))


# NVIDIA's data sheets (dense rates; NVLink's printed rate is for both directions, so half of it),
# and the network of DGX systems, per GPU: A100 200 Gb/s; H100, H200 and B200 400 Gb/s.
DEVICES = {
    device.name: device
    for device in (
        Device("a100-80gb", 312e12, 0.685, 79, 2.04e12, 300e9, 25e9, 32e9),
        Device("h100-80gb", 989e12, 0.685, 79, 3.35e12, 450e9, 50e9, 64e9),
        Device("h200", 989e12, 0.685, 139, 4.8e12, 450e9, 50e9, 64e9),
        Device("b200", 2250e12, 0.43, 178, 8e12, 900e9, 50e9, 64e9),
        Device("rtx4090", 165e12, 0.685, 23, 1.01e12, 32e9, 3e9, 32e9, per_node=1),
    )
}


def find_device(name: str) -> Device:
    if name not in DEVICES:
        raise ConfigError(f"--gpu {name} is not known; use one of {', '.join(DEVICES)}")
    return DEVICES[name]
