"""Steps an hour at the paper's scale, simulated: how many GPUs should train, and how many sample.

The same simulation as overlap.py, with the paper's batch of 1,024 episodes and its numbers of
H100s. **Nothing here was measured on a GPU.** What a server and a training step take follows from
data sheets and assumed efficiencies, which `Cluster` has as arguments:

- a server of `tensor_parallel_size` H100s reads its weights and the running requests' contexts at
  `bandwidth_share` of 3.35 TB/s each, computes prompts at `prefill_share` of 989 dense TFLOP/s,
  and spends `all_reduce_s` twice a layer where it is more than one GPU;
- learning from a batch is `ppo_flops` (flops.py) of episodes of MEAN_TOKENS, at `training_share` of
  989 TFLOP/s on each training GPU, and takes so much less on more of them;
- a publication takes `publish_s`, whatever the number of servers.

Servers do not know of each other, so an eighth of them is simulated, with an eighth of the batch.
"""

from dataclasses import dataclass, replace

from rlef_mega.bench.dialogues import curriculum_chat
from rlef_mega.bench.figures import Figure, Report, describe_benchmark
from rlef_mega.bench.overlap import Workload, simulate
from rlef_mega.bench.simulated import ServerSpeed
from rlef_mega.dialogues.chat import ChatFormat
from rlef_mega.flops import LLAMA_31_8B, LLAMA_31_70B, LlamaShape, ppo_flops

BANDWIDTH, FLOPS = 3.35e12, 989e12  # of an H100 SXM by its data sheet, dense bfloat16
MEAN_CONTEXT = 1700  # tokens of a running request, about, of the simulated dialogues
MEAN_TOKENS = 2600  # of an episode


@dataclass(frozen=True)
class Cluster:
    """H100s that train and H100s that sample. All shares and the last two times are assumed."""

    shape: LlamaShape
    training: int
    sampling: int
    tensor_parallel_size: int  # of a server
    bandwidth_share: float = 0.7
    prefill_share: float = 0.5
    training_share: float = 0.35
    all_reduce_s: float = 20e-6
    publish_s: float = 3.0

    def speed(self) -> ServerSpeed:
        gpus, shape = self.tensor_parallel_size, self.shape
        bandwidth = gpus * BANDWIDTH * self.bandwidth_share
        context_bytes = 4 * shape.layers * shape.key_value_heads * shape.head_dim * MEAN_CONTEXT
        all_reduce_s = 2 * shape.layers * self.all_reduce_s if gpus > 1 else 0.0
        return ServerSpeed(
            step_s=2 * shape.parameters / bandwidth + all_reduce_s,
            step_per_request_s=context_bytes / bandwidth,
            prefill_token_s=2 * shape.parameters / (gpus * FLOPS * self.prefill_share),
        )

    def train_s(self, batch: int) -> float:
        flops = batch * ppo_flops(self.shape, [MEAN_TOKENS])
        return flops / (self.training * FLOPS * self.training_share)

    def workload(self, batch: int) -> Workload:
        return Workload(
            batch=batch // PART,
            servers=self.sampling // self.tensor_parallel_size // PART,
            speed=self.speed(),
            train_s=self.train_s(batch),
            publish_s=self.publish_s,
            warmup=4,
            steps=6,
        )

    def divided(self, ninths: float) -> "Cluster":
        """As many GPUs, so many ninths of them training."""
        total = self.training + self.sampling
        training = round(total * ninths / 9)
        return replace(self, training=training, sampling=total - training)


PAPER = {
    "8B": Cluster(LLAMA_31_8B, training=128, sampling=160, tensor_parallel_size=1),
    "70B": Cluster(LLAMA_31_70B, training=1024, sampling=1280, tensor_parallel_size=8),
}
# Of about 20 hours (RLEF A.1): 12,000 and 8,000 updates, 4 a step.
PAPER_STEPS_AN_HOUR = {"8B": 150, "70B": 100}
SPLITS = (2, 4, 6, 7.5)  # ninths of the GPUs that train; the paper's is 4
BATCH = 1024
PART = 8


def benchmark(batch: int = BATCH) -> Report:
    chat = curriculum_chat()
    figures: list[Figure] = []
    for name, cluster in PAPER.items():
        for mode, max_staleness, splits in (("sync", 0, (4,)), ("async", 2, SPLITS)):
            for ninths in splits:
                split = cluster.divided(ninths)
                title = f"{name}, {split.training} + {split.sampling}, {mode}"
                figures += row(chat, title, split, max_staleness, batch)
    notes = [
        f"{name}: the paper's own run made about {steps} steps an hour"
        for name, steps in PAPER_STEPS_AN_HOUR.items()
    ]
    return Report(
        "rlef bench scale, simulated, training + sampling H100s",
        describe_benchmark(
            batch=batch,
            clusters={name: str(cluster) for name, cluster in PAPER.items()},
            speeds={name: str(cluster.speed()) for name, cluster in PAPER.items()},
        ),
        tuple(figures),
        tuple(notes),
        pivoted=True,
    )


def row(
    chat: ChatFormat, title: str, cluster: Cluster, max_staleness: int, batch: int
) -> list[Figure]:
    load = cluster.workload(batch)
    run = simulate(chat, load, max_staleness)
    values = {
        "steps an hour": ("steps/hour", run.steps_an_hour),
        "training": ("s a step", load.train_s),
        "trainer idle": ("share", run.trainer_idle),
        "servers idle": ("share", run.engine_idle),
        "staleness": ("versions", run.staleness),
    }
    return [Figure(f"{title} | {name}", unit, (value,)) for name, (unit, value) in values.items()]
