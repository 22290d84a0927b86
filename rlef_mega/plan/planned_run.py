"""A planned run: its networks on their ranks, the parts of a step, and its cost.

A step scores the batch (policy, reference, critic), updates critic and policy (one after the other
if they share ranks, else at the same time), and publishes the policy's weights. In sync mode it
samples the batch first. In async mode it takes as long as the longest of training, the servers'
work, and the longest dialogue's time / (max_staleness + 1), the last two plus publication. Not
included: evaluations, checkpoints, grading, start-up. Only `ppo.advantage = "critic"` has a critic.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from rlef_mega.config import ConfigError, ParallelConfig, TrainConfig
from rlef_mega.flops import LlamaShape
from rlef_mega.plan.hardware import (
    DISK,
    EMBEDDED_BATCH,
    GIB,
    HASH,
    HOST_LINK,
    NETWORK,
    SERVER_GIB,
    Device,
)
from rlef_mega.plan.memory import Head, Network
from rlef_mega.plan.rollouts import (
    DialogueSample,
    Generation,
    SamplingServer,
    draw_dialogues,
    generation,
)
from rlef_mega.plan.step_time import FORWARD, TRAINING, Load, Terms, fullest_load, plus, seconds

RECOMPUTE = ("none", "selective", "full")
STATE = ("weights", "gradients", "optimizer", "reference")


@dataclass(frozen=True)
class RankMemory:
    """Bytes on a rank of one pipeline stage; its tensor- and data-parallel ranks have the same."""

    name: str
    parts: dict[str, float]  # allocated in the fullest phase
    phase: str  # the one with the most memory
    pinned: float  # in the host's memory, kept from phase to phase
    phases: dict[str, float]  # bytes in each of the learner's phases
    kept: float  # bytes that stay while the rank's GPU samples

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    score: Terms
    update: Terms
    move: float  # idle state to the host and back
    publish: float
    generation: Generation | None  # None if the servers have no GPU
    is_async: bool

    @property
    def training(self) -> float:
        return total(self.score) + total(self.update) + self.move + self.publish

    @property
    def bounds(self) -> Terms:
        """Return what a step waits for; in async mode it takes as long as the longest of these."""
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
    def bound_by(self) -> str:
        """Return what limits the step: the longest of `bounds`, or the largest term of training."""
        parts = plus(self.score, self.update) | {"move": self.move, "publish": self.publish}
        if self.generation and self.is_async:
            bound = max(self.bounds, key=self.bounds.__getitem__)
            if bound != "training":
                return bound
        elif self.generation:
            by_work = self.generation.work >= self.generation.longest
            parts["servers' work" if by_work else "longest dialogue"] = self.generation.seconds
        return max(parts, key=parts.__getitem__)


@dataclass(frozen=True)
class PlannedRun:
    """A recipe, and the settings of it that the search may change."""

    config: TrainConfig
    shape: LlamaShape
    dialogues: DialogueSample
    parallel: ParallelConfig
    critic_parallel: ParallelConfig | None
    recompute: str
    offloads: bool
    server_gpus: int
    memory_fraction: float  # of a server
    colocated: bool  # servers share the trainer's GPUs and release their memory while it trains
    mode: str  # rollout.mode
    publish: str  # rollout.servers.publish

    @classmethod
    def of(cls, config: TrainConfig, shape: LlamaShape) -> "PlannedRun":
        return cls(
            config,
            shape,
            DialogueSample(tuple(draw_dialogues(config.rollout))),
            config.parallel,
            config.critic_parallel,
            config.model.recompute,
            config.learner.offload == "idle",
            config.rollout.servers.tensor_parallel_size,
            config.rollout.servers.memory_fraction,
            config.rollout.servers.release_memory,
            config.rollout.mode,
            config.rollout.servers.publish,
        )

    @property
    def weight_bytes(self) -> int:
        return 2 if self.config.model.dtype == "bfloat16" else 4

    @property
    def batch(self) -> int:
        return self.config.rollout.episodes_per_batch

    @property
    def updates(self) -> int:
        return self.config.ppo.updates_per_batch

    @property
    def has_servers(self) -> bool:
        return self.config.rollout.engine == "sglang"

    @property
    def staleness(self) -> int:
        return self.config.rollout.max_staleness if self.mode == "async" else 0

    @property
    def has_reference(self) -> bool:
        return self.config.ppo.beta > 0

    @property
    def has_critic(self) -> bool:
        return self.config.ppo.advantage == "critic"

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
        return Network(self.shape, layout, head, self.weight_bytes, self.recompute)

    # ------------------------------------------------------------------ memory

    def memory(self) -> list[RankMemory]:
        """Compute the memory of each pipeline rank, with micro-batches as full as allowed."""
        policy, critic = {"policy": self.policy}, {"critic": self.critic} if self.has_critic else {}
        if self.critic_parallel is None:
            both = policy | critic
            return [self.rank_memory(f"PP {r}", r, both) for r in range(self.policy.pipeline)]
        return [
            *(self.rank_memory(f"PP {r}", r, policy) for r in range(self.policy.pipeline)),
            *(self.rank_memory(f"critic PP {r}", r, critic) for r in range(self.critic.pipeline)),
        ]

    def rank_memory(self, name: str, rank: int, trained: dict[str, Network]) -> RankMemory:
        """Compute the memory of one rank in its fullest phase, given the networks it trains."""
        state = {
            network: {
                "weights": net.weights(rank),
                "gradients": net.gradients(rank),
                "optimizer": net.optimizer(rank),
            }
            for network, net in trained.items()
        }
        if self.has_reference and "policy" in trained:
            state["reference"] = {"reference": self.policy.weights(rank)}
        phases = self.phases(rank, trained, state)
        phase, parts = max(phases.items(), key=lambda item: total(item[1]))
        # the copy from which a checkpoint is written; one data-parallel rank owns each weight
        pinned = sum(net.weights(rank) / net.data + net.optimizer(rank) for net in trained.values())
        if self.offloads:  # gradients are not moved to the host but freed, and allocated again
            everything = plus(*state.values())
            pinned += total(everything) - everything["gradients"]
        if self.embedded_engine:
            parts = parts | {"engine": self.embedded_engine}
        if self.colocated:
            parts = parts | {"server": SERVER_GIB * GIB}
        policy_weights = state["policy"]["weights"] if "policy" in trained else 0.0
        kept = policy_weights if self.offloads else total(plus(*state.values()))
        totals = {of: total(phases[of]) for of in phases}
        return RankMemory(name, parts, phase, pinned, totals, kept + self.embedded_engine)

    def phases(
        self, rank: int, trained: dict[str, Network], state: dict[str, dict[str, float]]
    ) -> dict[str, dict[str, float]]:
        """Compute the bytes of each part in each of the learner's phases on one rank."""
        tokens, everything = self.config.learner.microbatch_tokens, plus(*state.values())
        standing = next(iter(trained.values())).standing(tokens)
        found = {"build": self.building(rank, trained, state)}

        def add(name: str, here: dict[str, float], *, activations: float, scratch: float) -> None:
            on_device = here if self.offloads else everything
            temporary = {"activations": activations, "scratch": scratch + standing}
            found[name] = dict.fromkeys(STATE, 0.0) | on_device | temporary

        together = ["policy", "reference"]
        exact = self.config.ppo.kl == "exact" and "reference" in state
        scored = [[network] for network in state if not (exact and network in together)]
        for names in [together, *scored] if exact else scored:
            held = plus(*(state[network] for network in names))
            weights = {part: held[part] for part in held if part in ("weights", "reference")}
            net = trained.get(names[0], self.policy)
            scratch = net.scoring_scratch(rank, tokens, self.head_tokens, models=len(names))
            add(f"score {' and '.join(names)}", weights, activations=0.0, scratch=scratch)
        for network, net in trained.items():
            add(
                f"update {network}",
                state[network],
                activations=self.activations(net, rank),
                scratch=net.scratch(rank, tokens, self.head_tokens),
            )
        saved = plus(*(state[network] for network in trained)) | {"gradients": 0.0}
        add("checkpoint", saved, activations=0.0, scratch=0.0)
        if "policy" in trained:
            weights = {"weights": state["policy"]["weights"]}
            add("gather", weights, activations=0.0, scratch=self.policy.gather_scratch())
        else:  # whole tensors, from the policy's first rank
            table = self.weight_bytes * self.shape.table_parameters
            add("gather", {}, activations=0.0, scratch=table)
        return found

    def building(
        self, rank: int, trained: dict[str, Network], state: dict[str, dict[str, float]]
    ) -> dict[str, float]:
        """Compute the bytes of each part at the fullest moment while the networks are built: first
        the weights of all, then gradients and main copy of one network after the other. Megatron
        copies a chunk's weights to a buffer, and holds both during the copy."""
        held = dict.fromkeys((*STATE, "activations", "scratch"), 0.0)
        held["weights"] = sum(net.weights(rank) for net in trained.values())
        if not self.offloads:
            held["reference"] = state.get("reference", held)["reference"]
        moments = []
        for net in trained.values():
            held = plus(held, {"gradients": net.gradients(rank)})
            moments.append(held | {"scratch": net.weights(rank) / net.stages.chunks})
            held = plus(held, {"optimizer": net.main_copy(rank)})
            moments.append(held | {"scratch": net.copying_scratch(rank)})
            if self.offloads:
                held |= {"weights": held["weights"] - net.weights(rank)}
                held |= {"gradients": 0.0, "optimizer": 0.0}
        return max(moments, key=total)

    @property
    def embedded_engine(self) -> float:
        """Return the bytes of the engine's model, which is whole on every rank; 0 with servers."""
        return 0.0 if self.has_servers else self.weight_bytes * self.shape.parameters

    @property
    def head_tokens(self) -> int:
        """Return how many tokens of a full micro-batch the head reads, on average."""
        return round(
            self.config.learner.microbatch_tokens * self.dialogues.sampled / self.dialogues.tokens
        )

    def activations(self, network: Network, rank: int) -> float:
        microbatches = self.load(network, TRAINING).microbatches
        return network.activations(rank, self.config.learner.microbatch_tokens, microbatches)

    def activations_by_mode(self) -> dict[str, float]:
        """Compute the bytes that backward keeps on the fullest rank, by recomputation mode."""
        networks = {mode: replace(self.policy, recompute=mode) for mode in RECOMPUTE}
        return {
            mode: max(self.activations(network, rank) for rank in range(network.pipeline))
            for mode, network in networks.items()
        }

    # ------------------------------------------------------------------ time

    def load(self, network: Network, passes: str) -> Load:
        """Return the load of an update (TRAINING), or of scoring the batch (FORWARD)."""
        size = self.batch // self.updates if passes == TRAINING else self.batch
        # the number of micro-batches is a multiple of the stages (`Cutting`)
        return fullest_load(
            self.shape,
            self.dialogues,
            size,
            self.config.learner.microbatch_tokens,
            network.data,
            network.pipeline,
        )

    def step(self, device: Device, sampling_gpus: int) -> StepTime:
        """Compute a step's time. `sampling_gpus` counts the servers' GPUs; 0 without servers."""

        def of(network: Network, passes: str, times: int = 1) -> Terms:
            terms = seconds(network, device, self.load(network, passes), passes)
            return {name: times * value for name, value in terms.items()}

        score = (
            of(self.policy, FORWARD, 1 + self.has_reference),
            of(self.critic, FORWARD, self.has_critic),
        )
        update = (
            of(self.policy, TRAINING, self.updates),
            of(self.critic, TRAINING, self.updates * self.has_critic),
        )
        if self.critic_parallel:  # at the same time
            score_terms, update_terms = max(score, key=total), max(update, key=total)
        else:
            score_terms, update_terms = plus(*score), plus(*update)
        return StepTime(
            score=score_terms,
            update=update_terms,
            move=self.move_s(device),
            publish=self.publish_s(device),
            generation=self.generation(device, sampling_gpus),
            is_async=self.staleness > 0,
        )

    def generation(self, device: Device, gpus: int) -> Generation | None:
        server = self.server(device)
        servers = (gpus if self.has_servers else self.training_gpus) // server.gpus
        if not servers:
            return None
        return generation(self.dialogues, server, servers, self.batch, self.staleness)

    def server(self, device: Device) -> SamplingServer:
        gpus = self.server_gpus if self.has_servers else 1
        return SamplingServer(self.shape, device, gpus, self.memory_fraction)

    def sampling_bytes(self, device: Device) -> float:
        """Return the bytes that sampling takes on each of the trainer's GPUs, beside what the ranks
        keep there: a colocated server's, or the longest contexts of the embedded engine."""
        if self.colocated:
            return self.memory_fraction * device.server_share + SERVER_GIB * GIB
        if self.has_servers:
            return 0.0
        dialogues = min(EMBEDDED_BATCH, -(-self.batch // self.training_gpus))
        token_bytes = self.server(device).token_bytes * self.weight_bytes / 2
        return dialogues * self.config.rollout.max_context * token_bytes

    def sampling_fits(self, device: Device) -> bool:
        beside = self.sampling_bytes(device)
        return not beside or beside + max(rank.kept for rank in self.memory()) <= device.usable

    def largest_memory_fraction(self, device: Device) -> float:
        """Return the largest `rollout.servers.memory_fraction`, in steps of 0.05, with which a
        colocated server fits."""
        kept = max(rank.kept for rank in self.memory())
        room = device.usable - kept - SERVER_GIB * GIB
        return max(0, int(20 * room / device.server_share)) / 20

    def move_s(self, device: Device) -> float:
        """Return the time of offloading: weights move back and forth for scores and for the
        update, optimizer states for the update."""
        if not self.offloads:
            return 0.0
        moved = 0.0
        for network in (self.policy, self.critic)[: 1 + self.has_critic]:
            ranks = range(network.pipeline)
            moved += max(4 * network.weights(r) + 2 * network.optimizer(r) for r in ranks)
        if self.has_reference:
            moved += max(2 * self.policy.weights(rank) for rank in range(self.policy.pipeline))
        return moved / (device.host_link * HOST_LINK)

    def publish_s(self, device: Device) -> float:
        """Return the time of gathering the weights on the trainer's ranks, sending them (or writing
        and reading them), and hashing them: each rank its share, each GPU of a server its shard."""
        if not self.has_servers:
            return 0.0
        size, network = self.weight_bytes * self.shape.parameters, device.network * NETWORK
        hashed = size / self.training_gpus + size / self.server_gpus
        return (
            size / network
            + (2 * size / DISK if self.publish == "disk" else size / network)
            + hashed / (device.bandwidth * HASH)
        )


def total(terms: Terms) -> float:
    return sum(terms.values())


def refuse_without_room(run: PlannedRun, device: Device) -> None:
    """Raise ConfigError, which says how much is missing, if a rank or a server lacks memory."""
    fullest = max(run.memory(), key=lambda rank: rank.total)
    if fullest.total > device.usable:
        largest = sorted(fullest.parts, key=fullest.parts.__getitem__)[-2:][::-1]
        raise ConfigError(
            f"the run does not fit {device.name}: rank {fullest.name} needs {gib(fullest.total)} "
            f"in '{fullest.phase}', and {gib(device.usable)} of {device.memory_gib:.0f} GiB are "
            f"usable: {gib(fullest.total - device.usable)} too much. The largest parts are "
            + " and ".join(f"{part} ({gib(fullest.parts[part])})" for part in largest)
        )
    kept, beside = max(rank.kept for rank in run.memory()), run.sampling_bytes(device)
    if not run.sampling_fits(device):
        most = run.largest_memory_fraction(device)
        remedy = (
            f"lower rollout.servers.memory_fraction to at most {most:g}"
            if run.colocated
            else "lower rollout.max_context, or use servers"
        )
        raise ConfigError(
            f"sampling does not fit {device.name}: it takes {gib(beside)} of a GPU, the trainer "
            f"keeps {gib(kept)} there meanwhile, and {gib(device.usable)} are usable; {remedy}"
            + ("" if run.offloads else ", or set learner.offload = idle")
        )
    if run.has_servers:
        refuse_small_servers(run, device)


def refuse_small_servers(run: PlannedRun, device: Device) -> None:
    """Raise ConfigError if a server has no room for the longest dialogue."""
    server, longest = run.server(device), max(d.tokens for d in run.dialogues.drawn)
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
