"""Devices by their data sheets, and which part of that is reached.

The parts are constants, the same for every row and layout. `products` is fitted: to one published
run of each kind of GPU where there is one (`published.toml`, fitted = true), and every other row
checks it. The others are round numbers.
"""

from dataclasses import dataclass

from rlef_mega.config import ConfigError

MEMORY = 0.8  # of a device's bandwidth, by norms, activations and the optimizer
LINK = 0.8  # of NVLink, by collectives
NETWORK = 0.8  # of a node's network cards, by collectives
HOST_LINK = 0.8  # of PCIe, by copies from and to pinned memory
# SGLang's, as in bench/scale.py: bandwidth in decoding, products in prefill, an all-reduce
DECODE_MEMORY, PREFILL_PRODUCTS, ALL_REDUCE_S = 0.7, 0.5, 20e-6
DISK = 5e9  # bytes/s of a shared file system, written by one rank or read by all servers (assumed)
# Outside PyTorch's allocations: the context, cuBLAS, NCCL's buffers (assumed); and inside, what the
# caching allocator loses to fragments (assumed).
CONTEXT_GIB, FRAGMENTS = 2.0, 0.05
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Bytes and operations a second, each way."""

    name: str
    flops: float  # dense bf16 products
    products: float  # part of it that a layer's products reach
    memory_gib: float  # as CUDA reports, rounded down
    bandwidth: float
    link: float  # to the other GPUs of the node
    network: float  # to other nodes, of each GPU
    host_link: float
    per_node: int = 8
    context_gib: float = CONTEXT_GIB

    @property
    def usable(self) -> float:
        """Bytes that tensors may take."""
        return (self.memory_gib - self.context_gib) * GIB / (1 + FRAGMENTS)

    def group_bandwidth(self, size: int, stride: int) -> float:
        """Bytes/s of each rank in a ring of `size` ranks that are `stride` ranks apart. Between
        nodes the ring has the network cards of all its ranks in a node."""
        if size * stride <= self.per_node:
            return self.link * LINK
        return self.network * NETWORK * max(1, min(size, self.per_node // stride))


# NVIDIA's data sheets (dense rates; of NVLink half of what they print, which is both ways), and of
# DGX systems their network: A100 200 Gb/s, the others 400 Gb/s a GPU.
DEVICES = {
    device.name: device
    for device in (
        Device("a100-80gb", 312e12, 0.685, 79, 2.04e12, 300e9, 25e9, 32e9),
        Device("h100-80gb", 989e12, 0.685, 79, 3.35e12, 450e9, 50e9, 64e9),
        Device("h200", 989e12, 0.685, 139, 4.8e12, 450e9, 50e9, 64e9),
        Device("b200", 2250e12, 0.43, 178, 8e12, 900e9, 50e9, 64e9),
    )
}
CPU = "cpu"


def find_device(name: str) -> Device:
    if name == CPU:
        return this_cpu()
    if name not in DEVICES:
        raise ConfigError(f"--gpu {name}: known are {', '.join((*DEVICES, CPU))}")
    return DEVICES[name]


def this_cpu() -> Device:
    """A core of the machine at hand, with one thread, in fp32: the rate of products and what Python
    and its packages take as `rlef bench plan` measured them (benchmarks/results/plan_cpu.json),
    `products` chosen between its models; the machine's memory is divided among its cores."""
    import psutil

    total = psutil.virtual_memory().total / GIB
    processes = max(1, psutil.cpu_count(logical=False) or 1)
    return Device(
        CPU, 135e9, 0.9, total / processes, 8e9, 2e9, 1e9, 2e9, per_node=processes, context_gib=0.7
    )
