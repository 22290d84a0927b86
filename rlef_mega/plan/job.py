"""A run as it is planned: its networks on their ranks, what a step is made of, and its cost.

A step is `update`s of critic and policy, one network after the other where they share ranks (the
longer of the two where they do not), after scores of policy, reference and critic, and before the
publication of the policy's weights. In sync mode a batch is generated first; in async mode the
longest of training, the servers' work and the longest dialogue's share is the step. Evaluations,
checkpoints, grading and the start are not in it.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from rlef_mega.config import ConfigError, ParallelConfig, TrainConfig
from rlef_mega.flops import LlamaShape
from rlef_mega.plan.hardware import DISK, GIB, HOST_LINK, NETWORK, Device
from rlef_mega.plan.memory import Head, Network
from rlef_mega.plan.rollouts import Dialogues, Generation, Server, draw_dialogues, generation
from rlef_mega.plan.step_time import FORWARD, TRAINING, Load, Terms, divided, plus, seconds

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class RankMemory:
    """Bytes on a rank of one pipeline stage; all its tensor- and data-parallel ranks are alike."""

    name: str
    parts: dict[str, float]  # what is there at the fullest moment
    phase: str  # when that is
    parked: float  # on the host at that moment

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Step:
    """Seconds of a step."""

    score: float
    update: float
    move: float  # idle state to the host and back
    publish: float
    terms: Terms  # of score and update
    generation: Generation | None  # None where nobody samples
    is_async: bool

    @property
    def training(self) -> float:
        return self.score + self.update + self.move + self.publish

    @property
    def bounds(self) -> Terms:
        """What a step must wait for; in async mode the longest of it is the step."""
        if self.generation is None:
            return {"training": self.training}
        return {
            "training": self.training,
            "servers' work": self.generation.work + self.publish,
            "longest dialogue": self.generation.longest + self.publish,
        }

    @property
    def seconds(self) -> float:
        if self.is_async or self.generation is None:
            return max(self.bounds.values())
        return self.training + self.generation.seconds

    @property
    def stopped_by(self) -> str:
        """The largest term of what bounds the step."""
        if self.generation and self.is_async:
            bound = max(self.bounds, key=self.bounds.__getitem__)
            if bound != "training":
                return bound
        parts = self.terms | {"move": self.move, "publish": self.publish}
        if self.generation and not self.is_async:
            by_work = self.generation.work >= self.generation.longest
            parts["servers' work" if by_work else "longest dialogue"] = self.generation.seconds
        return max(parts, key=parts.__getitem__)


@dataclass(frozen=True)
class Job:
    """What of a recipe its plan depends on."""

    shape: LlamaShape
    parallel: ParallelConfig
    critic_parallel: ParallelConfig | None
    recompute: str
    offloads: bool
    reference: bool
    weight_bytes: int
    microbatch_tokens: int
    batch: int
    updates: int
    steps: int
    dialogues: Dialogues
    engine: str
    server_gpus: int
    memory_fraction: float
    publish_by: str
    max_staleness: int
    on_cpu: bool = False

    @classmethod
    def of(cls, config: TrainConfig, shape: LlamaShape, *, on_cpu: bool = False) -> "Job":
        rollout, servers = config.rollout, config.rollout.servers
        return cls(
            shape=shape,
            parallel=config.parallel,
            critic_parallel=config.critic_parallel,
            recompute=config.model.recompute,
            offloads=config.learner.offload == "idle",
            reference=config.ppo.beta > 0,
            weight_bytes=2 if config.model.dtype == "bfloat16" else 4,
            microbatch_tokens=config.learner.microbatch_tokens,
            batch=rollout.episodes_per_batch,
            updates=config.ppo.updates_per_batch,
            steps=config.run.steps,
            dialogues=Dialogues(tuple(draw_dialogues(rollout))),
            engine=rollout.engine,
            server_gpus=servers.tensor_parallel_size,
            memory_fraction=servers.memory_fraction,
            publish_by=servers.publish,
            max_staleness=rollout.staleness,
            on_cpu=on_cpu,
        )

    @property
    def is_async(self) -> bool:
        return self.max_staleness > 0

    @property
    def training_gpus(self) -> int:
        critic = self.critic_parallel.world_size if self.critic_parallel else 0
        return self.parallel.world_size + critic

    @cached_property
    def policy(self) -> Network:
        return self.network(self.parallel, "fused")

    @cached_property
    def critic(self) -> Network:
        return self.network(self.critic_parallel or self.parallel, "value")

    def network(self, layout: ParallelConfig, head: Head) -> Network:
        return Network(self.shape, layout, head, self.weight_bytes, self.recompute, self.on_cpu)

    # ------------------------------------------------------------------ memory

    def memory(self) -> list[RankMemory]:
        """Of each pipeline rank, with micro-batches as full as they may be."""
        own = self.critic_parallel is not None
        found = [
            self.rank_memory(f"PP {rank}", rank, self.policy, None if own else self.critic)
            for rank in range(self.policy.pipeline)
        ]
        if own:
            found += [
                self.rank_memory(f"critic PP {rank}", rank, None, self.critic)
                for rank in range(self.critic.pipeline)
            ]
        return found

    def rank_memory(
        self, name: str, rank: int, policy: Network | None, critic: Network | None
    ) -> RankMemory:
        trained = {
            name: network for name, network in (("policy", policy), ("critic", critic)) if network
        }
        state = {
            "weights": {n: net.weights(rank) for n, net in trained.items()},
            "gradients": {n: net.gradients(rank) for n, net in trained.items()},
            "optimizer": {n: net.optimizer(rank) for n, net in trained.items()},
        }
        reference = policy.weights(rank) if policy and self.reference else 0.0
        resident = {part: sum(of.values()) for part, of in state.items()}
        everything = sum(resident.values()) + reference + self.embedded_engine
        moments = []
        for updated, network in trained.items():
            load = self.load(network, TRAINING)
            tokens = self.microbatch_tokens
            work = {
                "activations": network.activations(rank, tokens, load.microbatches),
                "scratch": network.scratch(rank, tokens, self.read_at_most),
            }
            here = resident | {"reference": reference}
            if self.offloads:
                here = {part: of[updated] for part, of in state.items()}
            moments.append((f"update {updated}", here | work))
        if self.offloads:  # what a checkpoint saves of both networks
            saved = {part: resident[part] for part in ("weights", "optimizer")}
            moments.append(("checkpoint", saved))
        phase, parts = max(moments, key=lambda moment: sum(moment[1].values()))
        parts = {
            part: parts.get(part, 0.0)
            for part in (
                "weights",
                "gradients",
                "optimizer",
                "reference",
                "activations",
                "scratch",
            )
        }
        if self.embedded_engine:
            parts["engine"] = self.embedded_engine
        held = sum(parts[p] for p in ("weights", "gradients", "optimizer", "reference"))
        parked = everything - self.embedded_engine - held - self.gradients_freed(state, phase)
        return RankMemory(name, parts, phase, parked if self.offloads else 0.0)

    def gradients_freed(self, state: dict[str, dict[str, float]], phase: str) -> float:
        """Offloading drops gradients, which are made anew, in place of moving them."""
        return sum(
            size for network, size in state["gradients"].items() if not phase.endswith(network)
        )

    @property
    def embedded_engine(self) -> float:
        """transformers' model, whole on every rank, where the trainer's processes sample."""
        return self.weight_bytes * self.shape.parameters if self.engine == "local" else 0.0

    @property
    def read_at_most(self) -> int:
        """Tokens of a micro-batch that the head reads, as their share is on average."""
        return round(self.microbatch_tokens * self.dialogues.sampled / self.dialogues.tokens)

    def activations_by_mode(self) -> dict[str, float]:
        """Bytes that backward keeps on the fullest rank, by recomputation."""
        found = {}
        for mode in RECOMPUTE:
            network = replace(self.policy, recompute=mode)
            load = self.load(network, TRAINING)
            found[mode] = max(
                network.activations(rank, self.microbatch_tokens, load.microbatches)
                for rank in range(network.pipeline)
            )
        return found

    # ------------------------------------------------------------------ time

    def load(self, network: Network, passes: str) -> Load:
        """Of an update, or of scoring the batch."""
        size = self.batch // self.updates if passes == TRAINING else self.batch
        # micro-batches are a multiple of the stages (`Ranks.microbatch_multiple`)
        return divided(
            self.shape,
            self.dialogues,
            size,
            self.microbatch_tokens,
            network.data,
            network.pipeline,
        )

    def step(self, device: Device, sampling_gpus: int) -> Step:
        """`sampling_gpus` are those of the servers; the embedded engine has the trainer's own."""
        policy, critic = self.policy, self.critic

        def of(network: Network, passes: str, times: int = 1) -> Terms:
            terms = seconds(network, device, self.load(network, passes), passes)
            return {name: times * value for name, value in terms.items()}

        score_policy = of(policy, FORWARD, 1 + self.reference)
        score_critic = of(critic, FORWARD)
        update_policy = of(policy, TRAINING, self.updates)
        update_critic = of(critic, TRAINING, self.updates)
        if self.critic_parallel:  # at the same time
            score = max(score_policy, score_critic, key=total)
            update = max(update_policy, update_critic, key=total)
        else:
            score = plus(score_policy, score_critic)
            update = plus(update_policy, update_critic)
        return Step(
            score=total(score),
            update=total(update),
            move=self.move_s(device),
            publish=self.publish_s(device),
            terms=plus(score, update),
            generation=self.generation(device, sampling_gpus),
            is_async=self.is_async,
        )

    def generation(self, device: Device, gpus: int) -> Generation | None:
        server = self.server(device)
        if self.engine == "local":
            gpus = self.training_gpus
        if gpus < server.gpus:
            return None
        return generation(
            self.dialogues, server, gpus // server.gpus, self.batch, self.max_staleness
        )

    def server(self, device: Device) -> Server:
        gpus = 1 if self.engine == "local" else self.server_gpus
        return Server(self.shape, device, gpus, self.memory_fraction)

    def move_s(self, device: Device) -> float:
        """Weights go and come for scores and for the update, optimizer states for the update."""
        if not self.offloads:
            return 0.0
        moved = 0.0
        for network in (self.policy, self.critic):
            ranks = range(network.pipeline)
            moved += max(4 * network.weights(r) + 2 * network.optimizer(r) for r in ranks)
        if self.reference:
            moved += max(2 * self.policy.weights(rank) for rank in range(self.policy.pipeline))
        return moved / (device.host_link * HOST_LINK)

    def publish_s(self, device: Device) -> float:
        """Weights are gathered on the trainer's ranks, then sent or written and read."""
        if self.engine == "local":
            return 0.0
        size = self.weight_bytes * self.shape.parameters
        rate = DISK if self.publish_by == "disk" else device.network * NETWORK
        return size / (device.network * NETWORK) + size / rate * (
            2 if self.publish_by == "disk" else 1
        )

    def gpu_hours(self, step: Step, sampling_gpus: int) -> float:
        return self.steps * step.seconds * (self.training_gpus + sampling_gpus) / 3600


def total(terms: Terms) -> float:
    return sum(terms.values())


def refuse_without_room(job: Job, device: Device) -> None:
    """ConfigError where a rank, or a server, has not the memory; it says how much is missing."""
    fullest = max(job.memory(), key=lambda rank: rank.total)
    if fullest.total > device.usable:
        largest = sorted(fullest.parts, key=fullest.parts.__getitem__)[-2:][::-1]
        raise ConfigError(
            f"it does not fit {device.name}: rank {fullest.name} needs {gib(fullest.total)} in "
            f"'{fullest.phase}', and {gib(device.usable)} of {device.memory_gib:.0f} GiB are for "
            f"tensors: {gib(fullest.total - device.usable)} too much. Most are "
            + " and ".join(f"{part} ({gib(fullest.parts[part])})" for part in largest)
        )
    if job.engine == "sglang":
        refuse_small_servers(job, device)


def refuse_small_servers(job: Job, device: Device) -> None:
    server, longest = job.server(device), max(d.tokens for d in job.dialogues.drawn)
    missing = longest * server.token_bytes / server.gpus - server.cache
    if missing > 0:
        raise ConfigError(
            f"rollout.servers.tensor_parallel_size = {server.gpus}: a server's weights take "
            f"{gib(server.weights)} of each {device.name}, and rollout.servers.memory_fraction = "
            f"{server.memory_fraction} leaves {gib(missing)} too little for one dialogue of "
            f"{longest:,} tokens"
        )


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def shape_of(config: TrainConfig) -> LlamaShape | None:
    """The model's, from its config.json or the recipe's [model.shape]; None where neither is
    there, or the recipe states no `hidden`."""
    path = Path(config.model.path) / "config.json"
    if path.is_file():
        found = json.loads(path.read_text())
        heads, hidden = found["num_attention_heads"], found["hidden_size"]
        return LlamaShape(
            layers=found["num_hidden_layers"],
            hidden=hidden,
            ffn=found["intermediate_size"],
            heads=heads,
            key_value_heads=found.get("num_key_value_heads", heads),
            head_dim=found.get("head_dim") or hidden // heads,
            vocabulary=found["vocab_size"],
            tied=found.get("tie_word_embeddings", False),
        )
    stated = config.model.shape
    if stated is None or stated.hidden is None:
        return None
    return LlamaShape(
        layers=stated.layers,
        hidden=stated.hidden,
        ffn=stated.ffn,
        heads=stated.heads,
        key_value_heads=stated.key_value_heads,
        head_dim=stated.head_dim or stated.hidden // stated.heads,
        vocabulary=stated.vocab_size,
    )
