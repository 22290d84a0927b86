"""The planner against what others published, Megatron's own counts and schedule, a real learner's
bytes, and simulated servers.

What this cannot catch: whether a recipe's plan for GPUs is right, because no GPU was available.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches
from typer.testing import CliRunner

from rlef_mega.bench.random_model import write_model
from rlef_mega.bench.slice import on_policy_targets
from rlef_mega.bench.workload import fill_microbatches, random_episodes
from rlef_mega.cli import app
from rlef_mega.config import (
    ConfigError,
    ParallelConfig,
    TrainConfig,
    check_placement,
    find_recipe,
    load_config,
)
from rlef_mega.flops import LLAMA_31_8B, LLAMA_31_70B, LlamaShape
from rlef_mega.packing import pack
from rlef_mega.parts import make_learner
from rlef_mega.plan import search
from rlef_mega.plan.command import write_recipe
from rlef_mega.plan.hardware import ALL_REDUCE_S, DECODE_MEMORY, DEVICES, GIB, PREFILL_PRODUCTS
from rlef_mega.plan.memory import Network
from rlef_mega.plan.planned_run import (
    PlannedRun,
    refuse_small_servers,
    refuse_without_room,
    total,
)
from rlef_mega.plan.rollouts import (
    DialogueLengths,
    DialogueSample,
    SamplingServer,
    generation,
)
from rlef_mega.plan.step_time import FORWARD, TRAINING, Load, seconds
from rlef_mega.preflight import model_shape, plan_train
from tests.rlef_mega.megatron.network.test_meta_shapes import LAYOUTS, NETWORKS, build, standing_at
from tests.rlef_mega.plan import published
from tests.rlef_mega.plan.published import even_load

H100 = DEVICES["h100-80gb"]
RESULTS = Path(__file__).parents[3] / "benchmarks/results"
SMALL = LlamaShape(
    layers=3, hidden=128, ffn=352, heads=8, key_value_heads=4, head_dim=16, vocabulary=512
)


TWO_NODES = ("--set", "parallel.data_parallel_size=8")
EIGHT_ABOUT_EACH = ("ppo.advantage=rloo", "rollout.samples_per_problem=8")


def run_of(recipe: str, *overrides: str) -> PlannedRun:
    config = load_config(find_recipe(recipe), list(overrides), TrainConfig)
    return PlannedRun.of(config, model_shape(config))


# ---------------------------------------------------------------------- against published figures


def test_memory_is_that_of_published_slices():
    for row in published.memory():
        assert abs(row.error) < 0.007, row


def test_training_takes_as_long_as_nvidia_publishes():
    """Llama 3 8B, 70B and 405B on 8 to 2,304 H100s. One row is fitted."""
    rows = published.training_seconds()
    assert [abs(row.error) < 0.005 for row in rows if row.fitted] == [True]
    for row in rows:
        assert abs(row.error) < 0.12, row


def test_slices_on_b200_take_as_long_as_published_except_the_smallest_shards():
    """SimuMax's, with one row fitted. The plan leaves out latencies: it is a quarter too short for
    TP 8 of the 70B's layers with 4,096 tokens; three quarters of the rows are within 12%."""
    rows = published.slice_seconds()
    assert sum(row.fitted for row in rows) == 1
    errors = sorted(abs(row.error) for row in rows)
    assert errors[-1] < 0.28 and errors[len(errors) * 3 // 4] < 0.12, errors


# ---------------------------------------------------------------------- against the trainer


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("case", ["8B", "70B", "70B-virtual"])
def test_parameters_of_every_stage_are_megatrons(case, network):
    parallel = LAYOUTS[case]
    shape = LLAMA_31_8B if case == "8B" else LLAMA_31_70B
    planned = Network(shape, parallel, "value" if network == "critic" else "fused")
    for stage in range(parallel.pipeline_model_parallel_size):
        with standing_at(stage * parallel.tensor_model_parallel_size, parallel) as ranks:
            chunks = build(network, case, ranks)
        found = sum(p.numel() for chunk in chunks for p in chunk.parameters())
        assert found == planned.parameters(stage)


def test_a_tied_head_is_stored_once_on_one_stage_and_twice_on_two():
    tied = replace(SMALL, tied=True)
    assert Network(tied, ParallelConfig()).parameters(0) == tied.parameters
    two = Network(tied, ParallelConfig(pipeline_model_parallel_size=2))
    copy = tied.table_parameters
    assert two.parameters(0) + two.parameters(1) == tied.parameters + copy


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8, 64])
@pytest.mark.parametrize(("pipeline", "chunks"), [(1, 1), (2, 1), (4, 1), (4, 5), (8, 2)])
def test_micro_batches_in_flight_are_those_of_megatrons_schedule(pipeline, chunks, microbatches):
    """After its warm-up a rank has one more micro-batch in flight, while any remain."""
    layout = ParallelConfig(
        pipeline_model_parallel_size=pipeline, virtual_pipeline_model_parallel_size=chunks
    )
    network = Network(LLAMA_31_70B, layout)
    for rank in range(pipeline):
        group = SimpleNamespace(size=lambda: pipeline, rank=lambda rank=rank: rank)
        virtual = chunks if chunks > 1 else None
        at = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
        _, _, warmup, remaining = get_pp_rank_microbatches(
            microbatches, chunks, pipeline, p2p_communicator=at
        )
        in_flight = warmup + (remaining > 0)
        assert network.in_flight(rank, microbatches) == pytest.approx(in_flight / chunks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_learners_state_has_the_planned_bytes(ranks, tmp_path, dtype):
    """Weights, gradients and optimizer state match, except Adam's step counters. Only a rehearsal
    shows the rest: a CPU keeps other activations than a GPU."""
    write_model(tmp_path / "model", SMALL, torch.float32, torch.device("cpu"))
    overrides = (
        f'model.path="{tmp_path / "model"}"',
        f"model.dtype={dtype}",
        "parallel.tensor_model_parallel_size=1",
        "learner.microbatch_tokens=512",
        "rollout.episodes_per_batch=4",
    )
    config = load_config(find_recipe("demo"), list(overrides), TrainConfig)
    learner = make_learner(config, Path(config.model.path), ranks)
    episodes = random_episodes(config.rollout, SMALL.vocabulary, seed=0)
    batch = pack(fill_microbatches(episodes, 512, 2))
    batch, targets = on_policy_targets(learner, config, batch)
    run = PlannedRun.of(config, SMALL)
    for trained, planned, update in (
        (learner.policy, run.policy, learner.update_policy),
        (learner.critic, run.critic, learner.update_critic),
    ):
        update(batch, targets, range(batch.num_sequences))  # makes the optimizer's state
        weights = sum(bytes_of(p) for chunk in trained.chunks for p in chunk.parameters())
        head = 2 * (SMALL.hidden + 1) if planned.head == "value" and dtype == "bfloat16" else 0
        assert weights == planned.weights(0) + head  # a value head is fp32
        buffers = [buffer for wrapped in trained.wrapped for buffer in wrapped.buffers]
        assert sum(bytes_of(buffer.grad_data) for buffer in buffers) == pytest.approx(
            planned.gradients(0), rel=1e-3
        )  # padded
        state = sum(map(bytes_of, trained.optimizer_tensors()))
        assert state == pytest.approx(planned.optimizer(0), rel=1e-3)


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def test_activations_worked_by_hand():
    """h = 128, a = 128, k = 64, f = 352, bfloat16."""
    whole = Network(SMALL, ParallelConfig())
    halved = Network(SMALL, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True))
    without = Network(SMALL, ParallelConfig(tensor_model_parallel_size=2))
    assert whole.layer_bytes("none") == 2 * (4 * 128 + 2 * 128 + 2 * 64 + 3 * 352)
    assert whole.layer_bytes("selective") == 2 * (4 * 128 + 2 * 128 + 2 * 64)
    assert whole.layer_bytes("full") == 2 * 128
    for mode in ("none", "selective", "full"):
        assert halved.layer_bytes(mode) == whole.layer_bytes(mode) / 2
    assert without.layer_bytes("none") == 2 * 4 * 128 + 2 * (2 * 128 + 2 * 64 + 3 * 352) / 2
    assert without.layer_bytes("full") == 2 * 128
    # three layers and the final norm's input and output, of 10 tokens
    assert whole.activations(0, 10, 3) == 10 * (3 * whole.layer_bytes("none") + 2 * 2 * 128)


# ---------------------------------------------------------------------- time


def test_a_pass_worked_by_hand():
    """One layer of one head, one token, no head: only products have a closed form."""
    shape = LlamaShape(1, 2, 3, 1, 1, 2, vocabulary=8)
    network = Network(shape, ParallelConfig(), "value")
    device = replace(H100, flops=100.0, products=0.5, bandwidth=1e30)
    terms = seconds(network, device, Load(1, 1, 0, 1), FORWARD)
    flops = 2 * (2 * (2 * 2 + 2 * 2 + 3 * 3) + 1 * 2)  # weights h (2 a + 2 k + 3 f), and a s^2
    assert terms["products"] == pytest.approx(flops / 50)
    assert terms["head"] == terms["tensor"] == terms["bubble"] == 0
    training = seconds(network, device, Load(1, 1, 0, 1), TRAINING)
    assert training["products"] == pytest.approx(3 * flops / 50)


def test_a_pipelines_bubble_shrinks_with_chunks_and_micro_batches():
    def bubble(chunks: int, microbatches: int) -> float:
        layout = ParallelConfig(
            pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=chunks
        )
        network = Network(LLAMA_31_70B, layout, "value")
        terms = seconds(network, H100, even_load(microbatches, 4096, microbatches), TRAINING)
        work = sum(terms[name] for name in ("products", "head", "memory", "tensor"))
        return terms["bubble"] / work

    assert bubble(5, 4) == pytest.approx(3 / (5 * 4))
    assert bubble(5, 8) == pytest.approx(3 / (5 * 8))
    # without chunks, the exchanges between stages are not overlapped
    assert 3 / 4 < bubble(1, 4) < 0.8


def test_scoring_takes_a_forward_pass_of_policy_reference_and_critic():
    run, without = run_of("llama31_8b"), run_of("llama31_8b", "ppo.beta=0")

    def forward(network: Network) -> float:
        return sum(seconds(network, H100, run.load(network, FORWARD), FORWARD).values())

    policy, critic = forward(run.policy), forward(run.critic)
    assert total(run.step(H100, 0).score) == pytest.approx(2 * policy + critic)
    assert total(without.step(H100, 0).score) == pytest.approx(policy + critic)


def test_without_a_critic_there_are_no_phases_bytes_and_seconds_of_one():
    with_critic = run_of("llama31_8b")
    run = run_of("llama31_8b", *EIGHT_ABOUT_EACH)
    (rank,), (both,) = run.memory(), with_critic.memory()
    assert [name for name in both.phases if name not in rank.phases] == [
        "score critic",
        "update critic",
    ]
    net = with_critic.critic
    kept = net.weights(0) + net.gradients(0) + net.optimizer(0)
    name = "update policy"
    assert both.phases[name] - rank.phases[name] == pytest.approx(kept)
    policy = sum(seconds(run.policy, H100, run.load(run.policy, TRAINING), TRAINING).values())
    assert total(run.step(H100, 0).update) == pytest.approx(run.updates * policy)


def test_less_memory_costs_time():
    run = run_of("llama31_8b")
    kept, time = [], []
    for mode in ("none", "selective", "full"):
        tried = replace(run, recompute=mode)
        kept.append(max(rank.total for rank in tried.memory()))
        time.append(tried.step(H100, 0).training)
    assert kept == sorted(kept, reverse=True) and time == sorted(time)
    offloaded = replace(run, offloads=True)
    (here,), (there,) = run.memory(), offloaded.memory()
    assert there.total < here.total
    assert offloaded.step(H100, 0).training > run.step(H100, 0).training
    # the host has a buffer for a checkpoint, and with offloading one for each network's state
    policy, critic = run.policy, run.critic
    saved = sum(of.weights(0) / of.data + of.optimizer(0) for of in (policy, critic))
    assert here.pinned == pytest.approx(saved)
    moved = sum(of.weights(0) + of.optimizer(0) for of in (policy, critic)) + policy.weights(0)
    assert there.pinned == pytest.approx(saved + moved)


# ---------------------------------------------------------------------- rollouts


def test_a_server_worked_by_hand():
    """One layer of width 2, so 2 weights per matrix row; a GPU that reads 10 bytes/s."""
    shape = LlamaShape(1, 2, 3, 1, 1, 2, vocabulary=8)
    device = replace(H100, bandwidth=10 / DECODE_MEMORY, flops=20 / PREFILL_PRODUCTS)
    server = SamplingServer(shape, device, gpus=1)
    weights = 2 * shape.parameters
    assert server.step_s == pytest.approx(weights / 10)
    # keys and values of a token: 2 x 2 numbers of 2 bytes
    assert server.pace(3, 5) == pytest.approx((weights + 3 * 5 * 8) / 10)
    assert server.prefill_token_s == pytest.approx(weights / 20)
    both = replace(server, gpus=2)
    assert both.step_s == pytest.approx(weights / 20 + 2 * ALL_REDUCE_S)


def test_steps_take_as_long_as_simulated_ones():
    """The simulation ran the same dialogues request by request: each row is within 30%, the mean
    error within 10%."""
    errors = []
    for row in published.rows("simulated"):
        run = run_of(f"llama31_{row['model'].lower()}")
        staleness = 2 if row["mode"] == "async" else 0
        servers = row["sampling"] // run.server_gpus
        made = generation(run.dialogues, run.server(H100), servers, 1024, staleness).seconds
        train_s = row["training_s"]
        step_s = max(made, train_s) if staleness else made + train_s
        step_s += published.TABLES["simulated"]["publish_s"]
        errors.append(step_s * row["steps_per_hour"] / 3600 - 1)
    assert max(map(abs, errors)) < 0.3 and sum(map(abs, errors)) / len(errors) < 0.1, errors


def test_staleness_hides_the_longest_dialogue_and_more_servers_do_not():
    run = run_of("llama31_70b")
    server = run.server(H100)
    few, many = (generation(run.dialogues, server, count, 1024, 2) for count in (80, 640))
    assert many.longest > 0.9 * few.longest
    later = generation(run.dialogues, server, 80, 1024, 5)
    assert later.longest < 0.7 * few.longest


def test_longest_of_equal_dialogues():
    dialogues = DialogueSample((DialogueLengths(10, 4),) * 8)
    assert (dialogues.tokens, dialogues.sampled, dialogues.longest(3)) == (10, 4, 4)


# ---------------------------------------------------------------------- searching and refusing


def test_what_does_not_fit_is_refused_with_what_is_missing():
    run = run_of("llama31_70b", "parallel.data_parallel_size=1")
    flat = replace(run, parallel=ParallelConfig(tensor_model_parallel_size=8))
    needed = max(rank.total for rank in flat.memory())
    missing = (needed - H100.usable) / GIB
    with pytest.raises(ConfigError, match=rf"{missing:.1f} GiB too much.*optimizer"):
        refuse_without_room(flat, H100)
    with pytest.raises(ConfigError, match="tensor_parallel_size = 1: a server's weights take"):
        refuse_small_servers(replace(run, server_gpus=1), H100)
    with pytest.raises(ConfigError, match=r"no layout fits.*needs least memory has TP 8 x PP 1"):
        search.splits(run, H100, 8)


def test_in_async_mode_the_ranks_of_every_layout_divide_a_batchs_problems():
    """1,024 dialogues, eight about each problem: 128 problems."""
    run = run_of("llama31_8b", *EIGHT_ABOUT_EACH)
    sizes = {layout.world_size for layout in search.layouts(run, H100, 512)}
    assert max(sizes) == 128 and not [size for size in sizes if 128 % size]
    synchronous = search.layouts(replace(run, mode="sync"), H100, 512)
    assert max(layout.world_size for layout in synchronous) == 512


@pytest.fixture(scope="module")
def candidates() -> list[search.Split]:
    return search.candidates(run_of("llama31_8b"), H100, 512)


def test_every_layout_found_fits_and_the_recipes_is_no_better_than_the_best(candidates):
    run = run_of("llama31_8b")
    own = run.step(H100, 0).training
    as_many = [each for each in candidates if each.gpus == run.training_gpus]
    assert 0 < min(each.step.training for each in as_many) <= own
    for each in candidates[::50]:
        refuse_without_room(each.run, H100)


def test_splits_use_no_more_gpus_than_given_and_more_gpus_are_never_slower(candidates):
    run = run_of("llama31_8b")
    best = []
    for gpus in (16, 64, 288, 512):
        found = search.splits(run, H100, gpus, candidates)
        assert all(each.gpus <= gpus and each.sampling for each in found)
        best.append(min(each.step.seconds for each in found))
        assert found[0].step.seconds <= search.EQUAL * best[-1]
    assert best == sorted(best, reverse=True)


def test_colocated_servers_may_take_what_the_ranks_leave():
    run = run_of("llama31_8b_node")
    (rank,) = run.memory()
    # while servers sample, the ranks keep the policy's weights, half of them with TP 2
    assert rank.kept == run.policy.weights(0)
    most = run.largest_memory_fraction(H100)
    assert rank.kept + run.sampling_bytes(H100) <= H100.usable and most >= run.memory_fraction
    refuse_without_room(replace(run, memory_fraction=most), H100)
    with pytest.raises(ConfigError, match=rf"does not fit.*memory_fraction to at most {most:g}"):
        refuse_without_room(replace(run, memory_fraction=most + 0.05), H100)
    (whole,) = replace(run, offloads=False).memory()
    assert whole.kept == pytest.approx(sum(whole.parts[p] for p in ("weights", "gradients",
        "optimizer", "reference")))  # fmt: skip


def test_the_embedded_engines_contexts_must_fit_beside_it():
    gpu = DEVICES["rtx4090"]
    refuse_without_room(run_of("gpu1"), gpu)
    # 128 dialogues of 16,384 tokens, with 2 x 24 layers x 2 heads x 64 numbers of 2 bytes for each
    run = run_of("gpu1", "rollout.max_context=16384", "learner.microbatch_tokens=16384")
    assert run.sampling_bytes(gpu) == 128 * 16384 * 2 * 24 * 2 * 64 * 2
    with pytest.raises(ConfigError, match=r"sampling does not fit rtx4090.*lower rollout.max_cont"):
        refuse_without_room(replace(run, recompute="full"), gpu)


def test_on_one_node_taking_turns_beats_a_split_and_the_recipe_has_that_layout():
    """Training bounds the 8B on 8 GPUs, so GPUs that only sample would be missed."""
    run = run_of("llama31_8b_node")
    apart, together = (
        min(search.splits(run, H100, 8, search.candidates(placed, H100, 8)), key=seconds_of)
        for placed in search.placements(run)
    )
    assert (apart.run.colocated, apart.run.mode) == (False, "async")
    assert (together.run.colocated, together.run.mode) == (True, "sync")
    assert apart.gpus <= 8 and together.gpus == 8
    assert together.step.seconds < 0.8 * apart.step.seconds
    assert search.settings(together, H100) == {}, "the recipe is the fastest layout"


def seconds_of(split: search.Split) -> float:
    return split.step.seconds


ONE_MACHINE = pytest.mark.parametrize(
    ("recipe", "gpu"),
    [
        ("llama31_8b_node", "h100-80gb"),
        ("qwen25_coder_7b_node", "h100-80gb"),
        ("gpu1", "rtx4090"),
    ],
)


@ONE_MACHINE
def test_the_recorded_rehearsal_of_a_recipe_is_as_planned_and_fits(recipe, gpu):
    recorded = json.loads((RESULTS / f"rehearse_{recipe}.json").read_text())
    (planned,), (rank,) = run_of(recipe).memory(), recorded["ranks"].values()
    assert recorded["device"] == gpu
    beside = planned.total - max(planned.phases.values())  # a resting server, the embedded engine
    for name, size in planned.phases.items():
        measured = rank["phases"][name.replace(" ", "_")]["peak_bytes"]
        assert size == pytest.approx(measured, rel=0.03), name
        assert measured + beside <= DEVICES[gpu].usable


@ONE_MACHINE
def test_the_other_placement_in_a_recipes_comments_fits_too(recipe, gpu):
    words = re.findall(r"--set (\S+)", find_recipe(recipe).read_text())
    assert words
    for sets in ([], words):
        config = load_config(find_recipe(recipe), sets, TrainConfig)
        plan_train(config, model_shape(config))
        refuse_without_room(run_of(recipe, *sets), DEVICES[gpu])
        if config.rollout.engine == "sglang":
            check_placement(config)
            servers = config.rollout.servers
            taken = servers.first_gpu + servers.count * servers.tensor_parallel_size
            assert taken <= (8 if "node" in recipe else 1)


# ---------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("words", "sampling"),
    [
        (["llama31_8b_node", "--gpus", "4"], []),
        (["llama31_8b_node", "--gpus", "8", "--gpu", "h200", "--set", "rollout.turns=2"], []),
        # two nodes, so servers on the ranks' GPUs get weights by disk, unlike the recipe's
        (["llama31_8b_node", "--gpus", "16"], []),
        (["llama31_8b", "--gpus", "24"], ["--sampling-gpus"]),
    ],
)
def test_a_written_recipe_and_the_printed_words_plan_to_the_same_figures(words, sampling, tmp_path):
    def planned(*words: str) -> tuple[str, dict]:
        out = tmp_path / "plan.json"
        run = CliRunner().invoke(app, ["plan", *words, "--json", str(out)], catch_exceptions=False)
        assert run.exit_code == 0, run.output
        content = json.loads(out.read_text())
        for key in ("recipe", "facts", "ranked"):
            content.pop(key, None)
        return run.output, content

    written = tmp_path / "mine.toml"
    said, found = planned(*words, "--write", str(written))
    gpu = words[3:5] if "--gpu" in words else []
    if sampling and not found["colocated"]:
        sampling.append(str(found["sampling_gpus"]))
    assert planned(str(written), *gpu, *(sampling if len(sampling) > 1 else []))[1] == found
    chosen = said.partition("in this layout: ")[2].splitlines()[0].split()
    again = [words[0], *words[3:], *chosen]
    again += sampling if len(sampling) > 1 else []
    assert planned(*again)[1] == found


def test_a_recipe_is_never_overwritten(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "llama31_8b"\n')
    words = ["plan", str(mine), "--gpus", "24", "--write", str(mine)]
    with pytest.raises(ConfigError, match=r"mine\.toml: the file exists; remove it"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert mine.read_text() == 'extends = "llama31_8b"\n'


def test_a_recipe_that_training_would_refuse_is_not_written(tmp_path):
    run = run_of("llama31_8b", *EIGHT_ABOUT_EACH)
    uneven = replace(run, parallel=run.parallel.model_copy(update={"data_parallel_size": 64}))
    split, mine = search.Split(uneven, 8, uneven.step(H100, 8)), tmp_path / "mine.toml"
    with pytest.raises(ConfigError, match="128 problems, not divisible by 256 processes"):
        write_recipe(mine, find_recipe("llama31_8b"), EIGHT_ABOUT_EACH, split, H100)
    assert not mine.exists()


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        (["rollout.servers.count=2"], 8),
        (["rollout.servers.count=1"], 4),
        (['rollout.servers.urls=["http://node7:30000"]'], 4),
        # on each of two nodes
        (["rollout.servers.count=1", "parallel.data_parallel_size=8"], 8),
        # of which the second is half filled
        (["parallel.data_parallel_size=6", "rollout.episodes_per_batch=960"], 12),
    ],
)
def test_colocated_sampling_gpus_are_those_of_the_recipes_servers(settings, sampling, tmp_path):
    out = tmp_path / "plan.json"
    sets = [word for setting in settings for word in ("--set", setting)]
    words = ["plan", "llama31_8b_node", *sets, "--json", str(out)]
    CliRunner().invoke(app, words, catch_exceptions=False)
    assert json.loads(out.read_text())["sampling_gpus"] == sampling


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama31_70b", "--sampling-gpus", "4"], r"a server takes 8 .*give a multiple"),
        (
            ["llama31_8b_node", "--set", "rollout.servers.tensor_parallel_size=16"],
            r"tensor_parallel_size 16 = 32 GPUs, and they share the ranks' 8",
        ),
        (
            ["llama31_8b_node", "--set", "rollout.servers.count=3"],
            r"3 servers x tensor_parallel_size 4 = 12 GPUs, and they share the ranks' 8; lower",
        ),
        (
            ["llama31_8b_node", *TWO_NODES, "--set", "rollout.servers.count=4"],
            r"4 servers x tensor_parallel_size 4 = 16 GPUs, and they share the ranks' 8 of a node",
        ),
    ],
)
def test_sampling_gpus_that_servers_do_not_fit_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["plan", *words], catch_exceptions=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama31_8b", "--write", "mine.toml"], "mine.toml: give --gpus"),
        (["llama31_8b", "--gpus", "8", "--sampling-gpus", "4"], "--gpus chooses them"),
        (["llama31_8b_node", "--sampling-gpus", "4"], "on the ranks' GPUs; leave it out"),
        (["gpu1", "--sampling-gpus", "4"], "on the ranks' GPUs; leave it out"),
    ],
)
def test_options_that_would_be_ignored_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["plan", *words], catch_exceptions=False)


def test_the_command_writes_what_it_prints(tmp_path):
    out = tmp_path / "plan.json"
    words = ["plan", "llama31_70b", "--sampling-gpus", "1280", "--json", str(out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "hours on 1,024 + 1,280 = " in result.output
    content = json.loads(out.read_text())
    assert content["training_gpus"] == 1024 and content["sampling_gpus"] == 1280
    assert [rank["rank"] for rank in content["memory"]] == ["PP 0", "PP 1", "PP 2", "PP 3"]
    hours = content["step_s"] * 2000 / 3600
    assert content["gpu_hours"] == pytest.approx(hours * 2304)
    # in async mode a step takes as long as the longest of its bounds
    assert content["step_s"] == max(content["bounds_s"].values())


def test_a_plan_of_a_recipe_for_a_cpu_names_the_gpu_that_it_is_for(tmp_path):
    write_model(tmp_path / "model", SMALL, torch.float32, torch.device("cpu"))
    words = ["plan", "demo", "--set", f'model.path="{tmp_path / "model"}"']
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "a plan for h100-80gb, not for a CPU." in " ".join(result.output.split())


def test_too_few_gpus_and_unknown_gpus_are_refused():
    result = CliRunner().invoke(app, ["plan", "llama31_70b", "--gpus", "16"])
    assert isinstance(result.exception, ConfigError) and "too much" in str(result.exception)
    result = CliRunner().invoke(app, ["plan", "llama31_8b", "--gpu", "abacus"])
    assert isinstance(result.exception, ConfigError) and "use one of" in str(result.exception)
