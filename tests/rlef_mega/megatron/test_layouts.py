"""The same batch in every layout: two, three and four processes against one, in tensor, sequence,
pipeline, virtual pipeline and data parallelism, with the critic on the policy's ranks or on its
own, with idle state on the host or not. Faults that all layouts share are tested by
network/test_packed_llama.py.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from rlef_mega.config import ConfigError, ParallelConfig
from rlef_mega.flops import LlamaShape
from rlef_mega.megatron.convert.from_hf import import_folder
from rlef_mega.megatron.convert.to_hf import export_checkpoint
from rlef_mega.megatron.network.stages import check_layout, split_layers
from tests.rlef_mega.distributed import launch
from tests.rlef_mega.megatron.megatron_worker import LLAMA31_ROPE, layout, make_model

WORKER = "tests.rlef_mega.megatron.megatron_worker"
TWO = ("tp2", "tp2_sp", "pp2_uneven", "pp2_vpp2", "dp2", "dp2_without_overlap")
TWO_WITH_OFFLOAD = ("dp2_offload",)
THREE = ("split",)
FOUR = ("tp2_pp2_sp", "pp2_vpp2_dp2", "split_wide")
SPLIT = TWO + TWO_WITH_OFFLOAD + THREE + FOUR
# checkpoints: the layout that saved, the layout that resumes
SAME = [("tp2", "tp2"), ("dp2", "dp2"), ("pp2_vpp2", "pp2_vpp2")]
OTHER = [("tp2", "pp2_vpp2"), ("split", "tp2_sp"), ("pp2_uneven", "dp2_offload")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train all layouts, and resume in new processes from checkpoints of the same and of other
    layouts.
    """
    path = tmp_path_factory.mktemp("layouts")
    make_model(path / "model", rope_parameters=LLAMA31_ROPE, tie_word_embeddings=True)

    make_model(path / "other", seed=1, rope_parameters=LLAMA31_ROPE, tie_word_embeddings=True)
    import_folder(path / "other", path / "imported")

    def run(processes: int, *jobs: str) -> None:
        launch(WORKER, str(path), *jobs, processes=processes)

    run(1, "model:one")
    run(2, *(f"model:{layout}" for layout in TWO + TWO_WITH_OFFLOAD))
    run(3, *(f"model:{layout}" for layout in THREE))
    run(4, *(f"model:{layout}" for layout in FOUR))
    run(2, *(f"{a}:{b}" for a, b in SAME + OTHER))
    return path


def results(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("layout", SPLIT)
def test_a_layout_scores_as_one_process_does(folder: Path, layout: str) -> None:
    """With the sampled KL, where policy and reference are run one after the other, and with the
    exact one, where they are run together."""
    one, split = (results(folder, f"model_{name}") for name in ("one", layout))
    exact = one["first"]["scores"]
    assert exact.keys() - one["sampled"].keys() == {"kl_A"}
    for name, expected in exact.items():
        torch.testing.assert_close(split["first"]["scores"][name], expected, rtol=1e-5, atol=1e-5)
        if name != "kl_A":
            torch.testing.assert_close(one["sampled"][name], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(split["sampled"][name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", SPLIT)
def test_a_layout_has_the_losses_and_gradient_norms_of_one_process(
    folder: Path, layout: str
) -> None:
    for batch in ("first", "second"):
        one = results(folder, "model_one")[batch]["stats"]
        split = results(folder, f"model_{layout}")[batch]["stats"]
        assert split == pytest.approx(one, rel=2e-4, abs=1e-5)
        assert one["policy_grad_norm"] > 0.01 and one["critic_grad_norm"] > 0.01


@pytest.mark.parametrize("layout", SPLIT)
def test_a_layout_ends_with_the_weights_of_one_process(folder: Path, layout: str) -> None:
    one = results(folder, "model_one")
    split = results(folder, f"model_{layout}")["second"]["weights"]
    assert list(split) == list(one["second"]["weights"])
    for name, expected in one["second"]["weights"].items():
        # Adam divides by the gradient's size: noise of 1e-7 in a gradient near zero moves a weight
        # by a part of lr = 3e-3
        torch.testing.assert_close(split[name], expected, rtol=0, atol=2e-4)
        assert not torch.equal(expected, one["loaded"][name]), f"{name} was not trained"


@pytest.mark.parametrize("layout", ("one", *SPLIT))
def test_gathered_weights_equal_loaded_ones(folder: Path, layout: str) -> None:
    stored = load_file(folder / "model" / "model.safetensors")
    loaded = results(folder, f"model_{layout}")["loaded"]
    assert set(loaded) == set(stored)
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


@pytest.mark.parametrize("layout", ("one", *FOUR))
def test_an_imported_checkpoint_starts_any_layout(folder: Path, layout: str) -> None:
    """Its vocabulary is padded; its critic has its own value head."""
    stored = load_file(folder / "other" / "model.safetensors")
    imported = results(folder, f"model_{layout}")["imported"]
    assert set(imported["weights"]) == set(stored)
    assert all(torch.equal(imported["weights"][name], stored[name]) for name in stored)
    one = results(folder, "model_one")
    torch.testing.assert_close(imported["values"], one["imported"]["values"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one["imported"]["values"], one["first"]["scores"]["values_M"])


@pytest.mark.parametrize("layout", [layout for layout, _ in SAME])
def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(folder: Path, layout: str) -> None:
    resumed = results(folder, f"{layout}_{layout}")
    undisturbed = results(folder, f"model_{layout}")["second"]
    assert resumed["loaded"] == (1, {"note": layout})
    assert resumed["second"]["stats"] == undisturbed["stats"]
    for part in ("scores", "weights"):
        for name, expected in undisturbed[part].items():
            assert torch.equal(resumed["second"][part][name], expected), name


@pytest.mark.parametrize("source, layout", OTHER)
def test_a_run_resumes_in_another_layout(folder: Path, source: str, layout: str) -> None:
    resumed = results(folder, f"{source}_{layout}")["second"]
    undisturbed = results(folder, "model_one")["second"]
    assert resumed["stats"] == pytest.approx(undisturbed["stats"], rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("layout", ("one", *SPLIT))
def test_a_checkpoint_exports_to_what_was_trained(
    folder: Path, tmp_path: Path, layout: str
) -> None:
    """The policy is bit for bit what the live ranks gathered; the critic, which they do not gather,
    is that of one process to within rounding."""
    step = "step_000001"
    export_checkpoint(folder / layout / step, tmp_path / "policy", model=folder / "model")
    exported = load_file(tmp_path / "policy/model.safetensors")
    trained = results(folder, f"model_{layout}")["first"]["weights"]
    assert set(exported) == set(trained)
    assert all(torch.equal(exported[name], value) for name, value in trained.items())
    for name in {"one", layout}:
        export_checkpoint(
            folder / name / step, tmp_path / name, model=folder / "model", role="critic"
        )
    one, split = (load_file(tmp_path / name / "model.safetensors") for name in ("one", layout))
    assert set(one) == set(split) and "score.bias" in one
    for name, expected in one.items():
        torch.testing.assert_close(split[name], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("source, layout", SAME + OTHER)
def test_a_checkpoint_saved_again_from_another_layout_holds_the_same_bits(
    folder: Path, source: str, layout: str
) -> None:
    """Weights and moments of both networks; each tensor under the same name and shape."""
    before = stored_tensors(folder / source)
    after = stored_tensors(folder / f"{source}_{layout}")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    for name in ("policy.decoder.layers.mlp.linear_fc1.weight", "critic.output_layer.weight"):
        network, key = name.split(".", 1)
        assert before[f"{network}.optimizer.state.exp_avg_sq.{key}"].count_nonzero()
        assert before[name].count_nonzero()


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of the newest checkpoint, using only torch."""
    networks = folder / "step_000001" / "networks"
    stored = FileSystemReader(networks).read_metadata().state_dict_metadata
    tensors: dict = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
    }
    torch.distributed.checkpoint.load(tensors, checkpoint_id=networks, no_dist=True)
    return tensors


@pytest.mark.parametrize(
    "parallel, message",
    [
        (ParallelConfig(tensor_model_parallel_size=3), "attention heads"),
        (ParallelConfig(tensor_model_parallel_size=4), "key-value heads"),
        (ParallelConfig(pipeline_model_parallel_size=5), "4 layers cannot be split into 5"),
        (layout(pp=2, pipeline_layers=(2, 1)), "add up to 4"),
        (layout(pp=2, pipeline_layers=(4, 0)), "at least 1"),
        (layout(vpp=2), "needs pipeline_model_parallel_size"),
        (ParallelConfig(sequence_parallel=True), "sequence_parallel needs"),
    ],
)
def test_impossible_layouts_are_refused(parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(LlamaShape(4, 64, 48, 8, 2, 8, vocabulary=64), parallel)


@pytest.mark.parametrize(
    ("layers", "head_cost", "parallel", "expected"),
    [
        (80, 1.23, layout(pp=4), (20, 20, 21, 19)),  # Llama 3.1 70B with its head
        (80, 0.0, layout(pp=4), (20, 20, 20, 20)),  # and as a critic
        (80, 1.23, layout(pp=4, vpp=2), (10, 10, 10, 10, 10, 10, 11, 9)),
        (4, 1.6, layout(pp=2), (3, 1)),
        (4, 0.4, layout(pp=2), (2, 2)),
        (5, 0.0, layout(pp=2), (2, 3)),  # ties go to later stages
        (7, 9.0, layout(pp=3), (3, 3, 1)),
    ],
)
def test_layers_are_assigned_by_work(layers, head_cost, parallel, expected) -> None:
    # a layer's matrices have 100 parameters; a critic's vocabulary does not count
    shape = LlamaShape(layers, 1, 32, 1, 1, 1, vocabulary=round(100 * (head_cost or 2)))
    stages = split_layers(shape, parallel, with_head=head_cost > 0)
    assert stages.layers == expected
    holders = [stages.of_layer(layer) for layer in range(layers)]
    assert holders == [stage for stage, count in enumerate(expected) for _ in range(count)]
