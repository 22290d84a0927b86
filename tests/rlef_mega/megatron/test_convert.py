"""Checkpoints to Hugging Face folders and back: the same bytes, whatever the sizes of chunks and
files, killed or not. test_layouts.py exports trained networks of every layout.
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
from typer.testing import CliRunner

from rlef_mega.cli import app
from rlef_mega.config import ConfigError
from rlef_mega.megatron.convert import from_hf, resumable_folder
from rlef_mega.megatron.convert.checkpoint_folder import find_checkpoint
from rlef_mega.megatron.convert.from_hf import import_folder
from rlef_mega.megatron.convert.stored_network import OWN_NAMES
from rlef_mega.megatron.convert.to_hf import export_checkpoint
from rlef_mega.megatron.convert.verify import compare_weights
from rlef_mega.megatron.hf_names import name_map
from rlef_mega.megatron.network.families import read_config
from rlef_mega.run.model_folder import SafetensorsFolder
from tests.rlef_mega.distributed import ROOT
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
    import_folder(folder, path)
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
    import_folder(tmp_path / "hf", tmp_path / "checkpoint", verify=True)
    export_checkpoint(
        tmp_path / "checkpoint", tmp_path / "again", max_shard_size="20KB", verify=True
    )
    first, again = contents(tmp_path / "hf"), contents(tmp_path / "again")
    assert len(first) > 5 and "model.safetensors.index.json" in first
    configs = [json.loads(each.pop("config.json")) for each in (first, again)]
    assert configs[0] == configs[1]
    assert first == again


def test_chunks_and_files_of_any_size_hold_the_same(
    folder: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 128 and 192 bytes: chunks that end within a head or within gate and up, and files
    that end within a layer."""
    monkeypatch.setattr(from_hf, "CHUNK_BYTES", 7 * 192)
    monkeypatch.setattr(from_hf, "FILE_BYTES", 20_000)
    import_folder(folder, tmp_path / "checkpoint", verify=True)
    assert len(list((tmp_path / "checkpoint").rglob("*.distcp"))) > 5
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "small")
    export_checkpoint(imported, tmp_path / "large")
    assert same_bytes(tmp_path / "small", tmp_path / "large")


def test_a_policys_other_files_are_copied(imported: Path, tmp_path: Path) -> None:
    export_checkpoint(imported, tmp_path / "hf", dtype="bfloat16")
    for name in COMPANIONS:
        assert (tmp_path / "hf" / name).read_text() == f"{name} of the source"
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and (tmp_path / "hf/generation_config.json").is_file()
    assert not any(report.values())


def test_a_critic_is_a_token_classifier(folder: Path, tmp_path: Path) -> None:
    weight, bias = torch.randn(1, 32), torch.randn(1)
    value_head = {"output_layer.weight": weight, "output_layer.bias": bias}
    write_megatron(tmp_path / "checkpoint", packed(folder) | value_head)
    options: dict[str, Any] = {"role": "critic", "model": folder, "verify": True}
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "critic", **options)
    critic, report = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "critic", output_loading_info=True
    )
    assert not any(report.values())
    assert torch.equal(critic.score.weight, weight) and torch.equal(critic.score.bias, bias)
    token_ids = torch.arange(20)[None]
    trunk = AutoModelForCausalLM.from_pretrained(folder).model
    with torch.no_grad():
        values = critic(token_ids).logits[..., 0]
        hidden = trunk(token_ids).last_hidden_state
    torch.testing.assert_close(values, (hidden @ weight.T + bias)[..., 0], rtol=0, atol=1e-6)
    # its head is fp32 in any dtype
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "half", dtype="bfloat16", **options)
    stored = load_file(tmp_path / "half/model.safetensors")
    assert stored["score.weight"].dtype == torch.float32
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"lacks 1 tensor\(s\): lm_head\.weight"):
        import_folder(tmp_path / "half", tmp_path / "back", dtype="bfloat16")


def in_another_process(work: Callable[[], None]) -> int | None:
    child: Any = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    return child.exitcode


def test_the_command_verifies(folder: Path, imported: Path, tmp_path: Path) -> None:
    """It works even if the variables of a distributed job are set, as in a pod."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    environment |= {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    command = [sys.executable, "-m", "rlef_mega.cli", "import-hf"]
    done = subprocess.run(
        [*command, str(folder), str(tmp_path / "checkpoint"), "--verify"],
        cwd=ROOT,
        env=environment,
        timeout=200,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "verified: 39 tensors of the policy are equal bit by bit" in done.stdout
    assert same_bytes(tmp_path / "checkpoint", imported)


def test_a_killed_conversion_resumes(
    folder: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_hf, "FILE_BYTES", 20_000)
    marked: list[Path] = []
    write_mark = resumable_folder.write_atomically

    def die_after_two(path: Path, content: str) -> None:
        if len(marked) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write_mark(path, content)
        marked.append(path)

    def export(out: Path) -> None:
        export_checkpoint(imported, out, max_shard_size="20KB")

    def import_again(out: Path) -> None:
        import_folder(folder, out)

    for convert in (export, import_again):
        killed, whole = (tmp_path / name / convert.__name__ for name in ("killed", "whole"))
        partial = killed.with_name(f".{killed.name}.partial")
        with monkeypatch.context() as patch:
            patch.setattr(resumable_folder, "write_atomically", die_after_two)
            exit_code = in_another_process(lambda run=convert, out=killed: run(out))
        assert exit_code == -signal.SIGKILL and not killed.exists()
        finished = sorted(
            path
            for path in partial.rglob("*")
            if (
                partial / f".done/{str(path.relative_to(partial)).replace('/', '--')}.json"
            ).is_file()
        )
        assert len(finished) == 2
        before = [path.stat().st_mtime_ns for path in finished]
        # a finished file that was changed since is written again
        finished[0].write_bytes(finished[0].read_bytes()[:-1] + b"\0")
        convert(killed)
        convert(whole)
        assert same_bytes(killed, whole)
        after = [(killed / path.relative_to(partial)).stat().st_mtime_ns for path in finished]
        assert before[0] != after[0] and before[1] == after[1]
        assert not partial.exists()


def test_a_partial_folder_of_another_request_is_not_resumed(imported: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".hf.partial"
    (partial / resumable_folder.FINISHED).mkdir(parents=True)
    (partial / resumable_folder.FINISHED / resumable_folder.REQUEST).write_text("another")
    (partial / "leftover.safetensors").write_text("of another request")
    export_checkpoint(imported, tmp_path / "hf")
    assert "leftover.safetensors" not in contents(tmp_path / "hf")


def test_a_full_disk_loses_nothing(
    folder: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_small_files(convert: Callable[..., None], source: Path, out: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        try:
            convert(source, out)
        except ConfigError as error:
            os._exit(7 if "the disk is full" in str(error) else 1)
        os._exit(0)

    hf, checkpoint = tmp_path / "hf", tmp_path / "checkpoint"
    jobs = [(export_checkpoint, imported, hf), (import_folder, folder, checkpoint)]
    for job in jobs:
        assert in_another_process(lambda each=job: in_small_files(*each)) == 7
        assert not job[-1].exists()
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ConfigError, match=r"needs 0.0 GB more, but 0.0 GB are free"):
            export_checkpoint(imported, hf)
    for convert, source, out in jobs:
        convert(source, out)  # the same command again
    export_checkpoint(checkpoint, tmp_path / "again")
    assert same_bytes(hf, tmp_path / "again")


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


def packed(folder: Path) -> dict[str, torch.Tensor]:
    """Pack the folder's weights under Megatron's names, layers numbered, norms under Transformer
    Engine's names."""
    stored = load_file(folder / "model.safetensors")
    parts: dict[str, list[torch.Tensor]] = {}
    fused = {own: name for name, own in OWN_NAMES.items()}
    for tensor in name_map(read_config(folder)):
        name = fused.get(tensor.parameter, tensor.parameter)
        name = name.replace("decoder.layers.", f"decoder.layers.{tensor.layer}.")
        parts.setdefault(name, []).append(stored[tensor.name])
    for name, values in parts.items():
        if "qkv.weight" in name:  # [q q k v] for each of two groups, heads of 8
            heads = torch.cat([value.view(2, -1, 32) for value in values], dim=1)
            parts[name] = [heads.view(-1, 32)]
    return {name: torch.cat(values) for name, values in parts.items()}


def write_megatron(path: Path, state: dict[str, torch.Tensor]) -> None:
    writer = torch_checkpoint.FileSystemWriter(path)
    torch_checkpoint.save(state, storage_writer=writer, no_dist=True)


def test_a_plain_megatron_checkpoint_is_read(folder: Path, tmp_path: Path) -> None:
    """Plain names, an optimizer's state, a padded vocabulary; written by torch."""
    state = packed(folder)
    state |= {f"optimizer.state.exp_avg.{name}": torch.zeros(3) for name in state}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        state[name] = torch.cat([state[name], torch.zeros(32, 32)])
    write_megatron(tmp_path / "megatron", state)
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
            "dtype F8_E4M3, as quantized weights",
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
    with pytest.raises(ConfigError, match="cut holds no weights"):
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
    run = CliRunner().invoke(app, ["export-hf", str(imported), str(out), "--role", "both"])
    assert run.exit_code == 2 and "'both' is not one of 'policy'" in run.output
    with pytest.raises(ConfigError, match="max-shard-size"):
        export_checkpoint(imported, out, max_shard_size="many")
    with pytest.raises(ConfigError, match=r"holds no weights under 'critic\.'"):
        export_checkpoint(imported, out, role="critic")
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
    export_checkpoint(imported, tmp_path / "hf", max_shard_size="20KB")
    checkpoint = find_checkpoint(imported, None)
    compare_weights(checkpoint, tmp_path / "hf", "policy", exported=True)
    name = "model.layers.2.self_attn.k_proj.weight"
    file = tmp_path / "hf" / SafetensorsFolder(tmp_path / "hf").tensors[name].file
    tensors = load_file(file)
    tensors[name].view(torch.int32)[-1, -1] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
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
    report = benchmark(shape, repeats=1)
    figures = {figure.name: figure.median for figure in report.figures}
    assert report.about["bytes"] > 2 * 2 * 4096 * 1024  # embedding and head alone
    for step in ("import", "export"):
        assert figures[f"{step}, against cp"] == pytest.approx(figures[step] / figures["cp"])
        assert 0.2 < figures[f"{step}: largest resident set"] < 4
    assert not list(tmp_path.iterdir())
