"""Checkpoints to Hugging Face folders and back: the same bytes, whatever the sizes of blocks and
files, killed or not, by one process or two. What trained networks export to, in every layout, is in
test_layouts.py.
"""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as torch_checkpoint
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from rlef_mega.config import ConfigError
from rlef_mega.megatron.convert import from_hf, resumable_folder, weights
from rlef_mega.megatron.convert.checkpoint_folder import find_checkpoint
from rlef_mega.megatron.convert.command import export_checkpoint, import_folder
from rlef_mega.megatron.convert.from_hf import plan_import
from rlef_mega.megatron.convert.safetensors_files import SafetensorsFolder
from rlef_mega.megatron.convert.stored_network import OWN_NAMES
from rlef_mega.megatron.convert.to_hf import plan_export
from rlef_mega.megatron.network.families import read_config
from tests.rlef_mega.distributed import ROOT, address, keep_store
from tests.rlef_mega.megatron.families_worker import CASES, make_family
from tests.rlef_mega.megatron.megatron_worker import make_model

COMPANIONS = ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    make_model(path)
    for name in COMPANIONS:
        (path / name).write_text(f"{name} of the source")
    return path


@pytest.fixture(scope="module")
def imported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imported") / "checkpoint"
    import_folder(folder, path, role="both", seed=3)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def same_bytes(one: Path, other: Path) -> bool:
    return contents(one) == contents(other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_gives_the_bytes_that_transformers_wrote(
    tmp_path: Path, case: str, dtype: str
) -> None:
    model = make_family(tmp_path / "float32", case).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    import_folder(tmp_path / "hf", tmp_path / "checkpoint", role="both", verify=True)
    export_checkpoint(
        tmp_path / "checkpoint", tmp_path / "again", max_shard_size="20KB", verify=True
    )
    first, again = contents(tmp_path / "hf"), contents(tmp_path / "again")
    assert len(first) > 5 and "model.safetensors.index.json" in first
    configs = [json.loads(each.pop("config.json")) for each in (first, again)]
    assert configs[0] == configs[1]
    assert first == again

    export_checkpoint(tmp_path / "checkpoint", tmp_path / "critic", role="critic")
    critic, report = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "critic", output_loading_info=True
    )
    assert not any(report.values())
    trunk = model.model.state_dict()
    assert trunk.keys() == critic.model.state_dict().keys()
    assert all(torch.equal(trunk[k], v) for k, v in critic.model.state_dict().items())


def test_blocks_chunks_and_files_of_any_size_hold_the_same(
    folder: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 128 and 192 bytes: blocks that end within a head, chunks within gate and up, and
    files within a layer."""
    monkeypatch.setattr(weights, "BLOCK_BYTES", 5 * 128)
    monkeypatch.setattr(from_hf, "CHUNK_BYTES", 7 * 192)
    monkeypatch.setattr(from_hf, "FILE_BYTES", 20_000)
    import_folder(folder, tmp_path / "checkpoint", role="both", seed=3, verify=True)
    assert len(list((tmp_path / "checkpoint").rglob("*.distcp"))) > 10
    for role in ("policy", "critic"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "small" / role, role=role)
        monkeypatch.undo()
        export_checkpoint(imported, tmp_path / "large" / role, role=role)
    assert same_bytes(tmp_path / "small", tmp_path / "large")


def test_a_policy_keeps_what_stood_beside_the_weights(imported: Path, tmp_path: Path) -> None:
    export_checkpoint(imported, tmp_path / "hf", dtype="bfloat16")
    for name in COMPANIONS:
        assert (tmp_path / "hf" / name).read_text() == f"{name} of the source"
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and (tmp_path / "hf/generation_config.json").is_file()
    assert not any(report.values())


def test_a_new_critic_is_a_token_classifier_with_our_drawn_value_head(
    folder: Path, imported: Path, tmp_path: Path
) -> None:
    from rlef_mega.megatron.network.packed_llama import draw_value_head

    export_checkpoint(imported, tmp_path / "critic", role="critic", verify=True)
    critic, report = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "critic", output_loading_info=True
    )
    assert not any(report.values())
    weight, bias = draw_value_head(32, seed=3)
    assert torch.equal(critic.score.weight, weight) and torch.equal(critic.score.bias, bias)
    token_ids = torch.arange(20)[None]
    trunk = AutoModelForCausalLM.from_pretrained(folder).model
    with torch.no_grad():
        values = critic(token_ids).logits[..., 0]
        hidden = trunk(token_ids).last_hidden_state
    torch.testing.assert_close(values, (hidden @ weight.T + bias)[..., 0], rtol=0, atol=1e-6)
    # its head is fp32 in any dtype, and stays what it is on the way back
    export_checkpoint(imported, tmp_path / "half", role="critic", dtype="bfloat16")
    stored = load_file(tmp_path / "half/model.safetensors")
    assert stored["score.weight"].dtype == torch.float32
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    import_folder(tmp_path / "half", tmp_path / "back", role="critic")
    export_checkpoint(tmp_path / "back", tmp_path / "again", role="critic")
    assert same_bytes(tmp_path / "half", tmp_path / "again")


def silent(done: int, total: int) -> None:
    """Show no progress."""


def start_process(work: Callable[[], None]) -> Any:
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def in_another_process(work: Callable[[], None]) -> int | None:
    child = start_process(work)
    child.join(60)
    return child.exitcode


def test_two_processes_write_what_one_does(
    folder: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = keep_store()
    for name, value in address(store).items():
        monkeypatch.setenv(name, value)

    def export_as(rank: int) -> None:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        export_checkpoint(imported, tmp_path / "two", max_shard_size="20KB", verify=True)

    children = [start_process(lambda rank=rank: export_as(rank)) for rank in range(2)]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    export_checkpoint(imported, tmp_path / "one", max_shard_size="20KB")
    assert same_bytes(tmp_path / "one", tmp_path / "two")


def test_the_command_starts_processes(folder: Path, imported: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "rlef_mega.cli", "import-hf", str(folder)]
    options = ["--role", "both", "--seed", "3", "--verify", "--processes", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "checkpoint"), *options],
        cwd=ROOT,
        env=environment,
        timeout=200,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "verified: 40 tensors of the critic are equal bit by bit" in done.stdout
    assert "largest difference of a log-prob to transformers': " in done.stdout
    assert same_bytes(tmp_path / "checkpoint", imported)


def test_a_killed_conversion_resumes(
    folder: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_hf, "FILE_BYTES", 20_000)

    def die_at_half(done: int, total: int) -> None:
        if done > total / 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def plans(name: str) -> list[resumable_folder.ResumableFolder]:
        return [
            plan_export(
                find_checkpoint(imported, None), tmp_path / f"{name}-hf", max_shard_size=20_000
            ),
            plan_import(folder, tmp_path / f"{name}-checkpoint"),
        ]

    for killed, whole in zip(plans("killed"), plans("whole"), strict=True):
        exit_code = in_another_process(lambda planned=killed: planned.write(die_at_half))
        assert exit_code == -signal.SIGKILL
        assert not killed.out.exists()
        marked = [file.name for file in killed.files if killed.mark_path(file).is_file()]
        assert 0 < len(marked) < len(killed.files)
        before = {file: (killed.partial / file).stat().st_mtime_ns for file in marked}
        # a finished file that was damaged since is written again
        damaged = killed.partial / marked[0]
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
        killed.write(silent)
        whole.write(silent)
        assert same_bytes(killed.out, whole.out)
        after = {file: (killed.out / file).stat().st_mtime_ns for file in marked}
        assert [file for file in marked if after[file] != before[file]] == [marked[0]]
        assert not killed.partial.exists()


def test_a_partial_folder_of_another_request_is_not_resumed(imported: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(imported, None)
    half = plan_export(checkpoint, tmp_path / "hf", dtype=torch.bfloat16)
    (half.partial / resumable_folder.FINISHED).mkdir(parents=True)
    (half.partial / resumable_folder.FINISHED / resumable_folder.REQUEST).write_text(
        json.dumps(half.request)
    )
    (half.partial / "leftover.safetensors").write_text("of another order")
    export_checkpoint(imported, tmp_path / "hf")
    assert "leftover.safetensors" not in contents(tmp_path / "hf")


def test_a_full_disk_loses_nothing(
    folder: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [
        plan_export(find_checkpoint(imported, None), tmp_path / "hf"),
        plan_import(folder, tmp_path / "checkpoint"),
    ]

    def run_in_small_files(planned: resumable_folder.ResumableFolder) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        try:
            planned.write(silent)
        except ConfigError as error:
            os._exit(7 if "the disk is full" in str(error) else 1)
        os._exit(0)

    for planned in jobs:
        assert in_another_process(lambda each=planned: run_in_small_files(each)) == 7
        assert not planned.out.exists()
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ConfigError, match=r"needs 0.0 GB more, but 0.0 GB are free"):
            jobs[0].write(silent)
    for planned in jobs:
        planned.write(silent)  # the same command again
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "again")
    assert same_bytes(tmp_path / "hf", tmp_path / "again")


def test_an_existing_folder_is_replaced_only_if_asked_for(imported: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="exists; choose another name, or give --overwrite"):
        export_checkpoint(imported, tmp_path / "hf")
    assert (tmp_path / "hf/mine.txt").read_text() == "precious"
    export_checkpoint(imported, tmp_path / "hf", overwrite=True)
    assert "mine.txt" not in contents(tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    with pytest.raises(ConfigError, match="is the source itself"):
        export_checkpoint(imported, imported, overwrite=True)


def test_the_padding_of_a_vocabulary_is_zero_and_cut_off(folder: Path, tmp_path: Path) -> None:
    import_folder(folder, tmp_path / "padded", pad_vocabulary_to_multiple=48, verify=True)
    tensors = weights.tensors_of("policy", read_config(folder))
    network = find_checkpoint(tmp_path / "padded", None).network("policy", tensors)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        stored = network.parameters[name, None]
        assert stored.shape == (96, 32)  # 64 rows are real
        padding = torch.ones(32, 32)
        network.read_rows(stored, 64, padding)
        assert not padding.any()
    export_checkpoint(tmp_path / "padded", tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_a_checkpoint_of_megatron_alone_is_read(folder: Path, tmp_path: Path) -> None:
    """Plain names, layers numbered, norms under Transformer Engine's names, columns in two chunks,
    beside an optimizer's state; written by torch itself."""
    from torch.distributed.checkpoint import FileSystemWriter

    stored = load_file(folder / "model.safetensors")
    packed: dict[str, list[tuple[Any, torch.Tensor]]] = {}
    fused = {own: name for name, own in OWN_NAMES.items()}
    for tensor in weights.tensors_of("policy", read_config(folder)):
        name = fused.get(tensor.parameter, tensor.parameter)
        name = name.replace("decoder.layers.", f"decoder.layers.{tensor.layer}.")
        packed.setdefault(name, []).append((tensor, stored[tensor.name]))
    state = {f"optimizer.state.exp_avg.{name}": torch.zeros(3) for name in packed}
    for name, parts in packed.items():
        if "qkv.weight" in name:  # [q q k v] for each of two groups, heads of 8
            heads = [value.view(2, -1, 32) for _, value in parts]
            state[name] = torch.cat(heads, dim=1).view(-1, 32)
        else:
            state[name] = torch.cat([value for _, value in parts])
    torch_checkpoint.save(
        state, storage_writer=FileSystemWriter(tmp_path / "megatron"), no_dist=True
    )
    with pytest.raises(ConfigError, match="does not name its model; give --model"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    export_checkpoint(tmp_path / "megatron", tmp_path / "hf", model=folder, verify=True)
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def changed(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_folders_that_do_not_fit_their_config_are_refused(folder: Path, tmp_path: Path) -> None:
    norm, extra = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"
    changes: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
        "missing": (lambda t: t.pop(norm), rf"lacks 1 tensor\(s\): {norm}"),
        "unknown": (lambda t: t.update({extra: torch.ones(32)}), rf"has unknown 1 .*: {extra}"),
        "shape": (lambda t: t.update({norm: torch.ones(31)}), rf"{norm} has shape \(31,\)"),
        "dtype": (lambda t: t.update({norm: t[norm].half()}), "choose one with --dtype"),
        "codes": (
            lambda t: t.update({norm: t[norm].to(torch.float8_e4m3fn)}),
            "dtype F8_E4M3, which is not supported",
        ),
    }
    for name, (change, message) in changes.items():
        source = changed(folder, tmp_path / name, change)
        with pytest.raises(ConfigError, match=message):
            import_folder(source, tmp_path / "checkpoint")
    cut = shutil.copytree(folder, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 100_000)
    with pytest.raises(ConfigError, match=r"model.safetensors is truncated or damaged"):
        import_folder(cut, tmp_path / "checkpoint")
    (cut / "model.safetensors").write_text("Entry not found")
    with pytest.raises(ConfigError, match=r"model.safetensors is truncated or damaged"):
        import_folder(cut, tmp_path / "checkpoint")
    (cut / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no file .*model.safetensors"):
        import_folder(cut, tmp_path / "checkpoint")
    assert not list(tmp_path.glob("*checkpoint*")), "nothing is begun"


def test_checkpoints_that_do_not_fit_are_refused(
    folder: Path, imported: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hf"
    with pytest.raises(ConfigError, match="no checkpoint"):
        export_checkpoint(tmp_path / "nowhere", out)
    with pytest.raises(ConfigError, match=r"damaged at manifest\.json"):
        export_checkpoint(folder, out)
    with pytest.raises(ConfigError, match="--step chooses from a run directory"):
        export_checkpoint(imported, out, step=3)
    with pytest.raises(ConfigError, match="use one of critic, policy"):
        export_checkpoint(imported, out, role="both")
    with pytest.raises(ConfigError, match="max-shard-size"):
        export_checkpoint(imported, out, max_shard_size="many")
    import_folder(folder, tmp_path / "policy")
    with pytest.raises(ConfigError, match=r"holds no weights under 'critic\.'"):
        export_checkpoint(tmp_path / "policy", out, role="critic")
    for shape, message in [
        ({"num_hidden_layers": 3}, "holds 4 layers, config.json says 3"),
        ({"intermediate_size": 64}, r"gate_proj.weight would have shape \(48, 32\)"),
        ({"tie_word_embeddings": True}, r"does not know: output_layer.weight"),
        ({"vocab_size": 65}, r"embed_tokens.weight would have shape \(64, 32\)"),
    ]:
        other = tmp_path / f"other-{next(iter(shape))}"
        make_model(other, **shape)
        with pytest.raises(ConfigError, match=message):
            export_checkpoint(imported, out, model=other)
    damaged = shutil.copytree(imported, tmp_path / "damaged")
    file = damaged / "networks/__0_0.distcp"
    content = file.read_bytes()
    os.truncate(file, 1000)
    with pytest.raises(ConfigError, match=r"damaged at networks/__0_0\.distcp: 1000 bytes"):
        export_checkpoint(damaged, out)
    with pytest.raises(ConfigError, match=r"__0_0.distcp is truncated"):
        export_checkpoint(damaged / "networks", out, model=folder)
    file.write_bytes(b"\0" * len(content))
    with pytest.raises(ConfigError, match=r"__0_0.distcp is damaged: no tensor is stored at byte"):
        export_checkpoint(damaged, out)
    assert not out.exists()


def test_verify_finds_one_wrong_bit(imported: Path, tmp_path: Path) -> None:
    from rlef_mega.megatron.convert.verify import compare_weights

    export_checkpoint(imported, tmp_path / "hf", max_shard_size="20KB")
    checkpoint = find_checkpoint(imported, None)
    compare_weights(checkpoint, tmp_path / "hf", "policy", exported=True)
    name = "model.layers.2.self_attn.k_proj.weight"
    place = SafetensorsFolder(tmp_path / "hf").tensors[name]
    with (tmp_path / "hf" / place.file).open("r+b") as file:
        file.seek(place.offset + place.bytes - 1)
        bit = file.read(1)[0] ^ 1
        file.seek(place.offset + place.bytes - 1)
        file.write(bytes([bit]))
    with pytest.raises(ConfigError, match=f"{name} differs between"):
        compare_weights(checkpoint, tmp_path / "hf", "policy", exported=True)


@pytest.mark.slow
def test_the_benchmark_compares_a_round_trip_with_cp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlef_mega.bench.convert import benchmark
    from rlef_mega.flops import LlamaShape

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    shape = LlamaShape(1, 1024, 2048, 8, 2, 128, vocabulary=4096)
    report = benchmark(shape, repeats=1, process_counts=(1,))
    figures = {figure.name: figure.median for figure in report.figures}
    assert report.about["bytes"] > 2 * 2 * 4096 * 1024  # embedding and head alone
    for step in ("import", "export"):
        name = f"{step}, one process"
        assert figures[f"{name}, against cp"] == pytest.approx(figures[name] / figures["cp"])
        assert 0.2 < figures[f"{name}: largest resident set"] < 4
    assert not list(tmp_path.iterdir())
