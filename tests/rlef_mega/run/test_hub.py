"""Models by their hub names: what is taken from the cache, what is fetched, and what each of the
hub's refusals says to do. No test reaches the network: the hub is a function that raises its errors
or fills the cache."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants, errors
from typer.testing import CliRunner

from rlef_mega.cli import app
from rlef_mega.config import ConfigError, SFTConfig, TrainConfig, find_recipe, load_config
from rlef_mega.demo.base_model import make_initial_model
from rlef_mega.engines.sglang.serve import servers_for
from rlef_mega.evaluation.command import find_source
from rlef_mega.megatron.convert.checkpoint_folder import find_checkpoint
from rlef_mega.megatron.convert.from_hf import import_folder
from rlef_mega.preflight import check_train, digests_of, model_shape
from rlef_mega.run import hub
from rlef_mega.run.hub import CONFIG, DESCRIPTION, find_model

NAME = "someone/Tiny-Model"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Return a folder with config, tokenizer and weights."""
    folder = tmp_path_factory.mktemp("model")
    sizes = ("hidden_size=32", "num_layers=2", "ffn_hidden_size=64")
    base = load_config(find_recipe("demo_base"), [f'dir="{folder}"', *sizes], SFTConfig)
    make_initial_model(base)
    return folder / "init"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Return the snapshot's folder of a hub cache without the model. The hub is out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0123abc")
    return repository / "snapshots/0123abc"


class Hub:
    """Answers `snapshot_download` from the network: fills the cache, or raises `error`."""

    def __init__(self, monkeypatch, model: Path, cache: Path, error: Exception | None = None):
        self.cached, self.fetched = hub.snapshot_download, []
        self.model, self.cache, self.error = model, cache, error
        monkeypatch.setattr(hub, "snapshot_download", self)

    def __call__(self, name: str, *, local_files_only: bool = False, **patterns) -> str:
        if local_files_only:
            return self.cached(name, local_files_only=True, **patterns)
        self.fetched.append(patterns["allow_patterns"])
        if self.error:
            raise self.error
        self.cache.mkdir(parents=True, exist_ok=True)
        for pattern in patterns["allow_patterns"]:
            for path in self.model.glob(pattern):
                shutil.copy(path, self.cache)
        return str(self.cache)


def refused(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    request = errors.Response(status).__class__  # httpx's or its successor's
    module = __import__(request.__module__.partition(".")[0])
    answer = module.Response(status, request=module.Request("GET", "https://hub"))
    return kind("refused", response=answer)


def recipe(*overrides: str) -> TrainConfig:
    sets = [f"model.path={NAME}", "rollout.max_context=320", *overrides]
    return load_config(find_recipe("demo"), sets, TrainConfig)


def test_a_folder_is_taken_as_it_is_and_only_a_hub_name_is_looked_up(tmp_path, cache):
    (tmp_path / NAME).mkdir(parents=True)
    assert find_model(NAME) == Path(NAME)
    for name in ("models/a/b", "/no/folder", "gpt2", "./a/b"):
        assert find_model(name) == Path(name)  # the caller says what is missing


def test_a_cached_model_needs_no_network_and_serves_every_command(cache, model, tmp_path):
    shutil.copytree(model, cache)
    assert find_model(NAME) == find_model(NAME, files=CONFIG, fetch=False) == cache
    config = recipe()
    check_train(config)
    assert digests_of(config, check_train(config))["weights of model.path"]
    assert model_shape(config).layers == 2
    served = recipe("rollout.engine=sglang", "rollout.max_context=300")
    assert str(cache) in servers_for(served).servers[0].command
    import_folder(Path(NAME), tmp_path / "imported")
    assert find_checkpoint(tmp_path / "imported", None, Path(NAME)).model == cache
    run = CliRunner().invoke(app, ["data", "inspect", "curriculum:test", "--tokenizer", NAME])
    assert run.exit_code == 0 and "prompt in tokens" in run.output


def test_an_evaluation_has_the_models_name_not_the_snapshots(cache, model):
    from types import SimpleNamespace

    shutil.copytree(model, cache)
    source = find_source(SimpleNamespace(model=Path(NAME), step=None))
    assert (source.name, source.folder) == ("Tiny-Model", cache)


def test_only_what_is_needed_is_fetched_and_only_once(cache, model, monkeypatch, capsys):
    online = Hub(monkeypatch, model, cache)
    assert model_shape(recipe()).layers == 2
    assert online.fetched == [["config.json"]]
    assert not list(cache.glob("*.safetensors")), "a plan needs no weights"
    assert find_model(NAME, fetch=False) == Path(NAME)
    assert find_model(NAME) == find_model(NAME) == cache
    assert online.fetched == [["config.json"], [*DESCRIPTION, "*.safetensors"]]
    assert f"fetching {NAME}" in capsys.readouterr().out
    shape = "{hidden = 32, heads = 4, key_value_heads = 2, layers = 2, vocab_size = 704, ffn = 64}"
    shutil.rmtree(cache)
    run = CliRunner().invoke(
        app, ["plan", "demo", "--set", f"model.path={NAME}", "--set", f"model.shape={shape}"]
    )
    assert run.exit_code == 0 and len(online.fetched) == 2, "a shape is enough for a plan"


def test_a_shard_that_the_index_names_and_the_cache_lacks_is_fetched(cache, model, monkeypatch):
    shutil.copytree(model, cache)
    weights = cache / "model.safetensors"
    weights.rename(cache / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = cache / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    online = Hub(monkeypatch, model, cache)
    with pytest.raises(ConfigError, match=r"lacks the config, .* interrupted; repeat it: `hf down"):
        find_model(NAME)
    assert len(online.fetched) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            refused(errors.GatedRepoError, 403),
            r"is gated: accept its licence at https://\S+/someone/Tiny-Model, then log in by `hf "
            r"auth login`, or set HF_TOKEN",
        ),
        (
            refused(errors.RepositoryNotFoundError, 404),
            r"the hub shows no model of this name; correct model.path or, if .* private, log in",
        ),
        (
            errors.LocalEntryNotFoundError("offline"),
            r"cache \S+hub lacks files .*\(HF_HUB_OFFLINE is set\); run `hf download MODEL",
        ),
        (refused(errors.HfHubHTTPError, 500), r"failed \(HfHubHTTPError: .*refused.*\); try again"),
        (errors.HTTPError("connection reset"), r"failed \(HTTPError: connection reset"),
        (OSError(28, "No space left on device"), r"failed \(OSError: .*No space left"),
    ],
)
def test_each_refusal_of_the_hub_says_what_to_do(error, message, cache, model, monkeypatch):
    Hub(monkeypatch, model, cache, error)
    with pytest.raises(ConfigError, match=f"there is no folder {NAME}, and .*{message}"):
        find_model(NAME)


def test_a_machine_without_a_network_says_so_before_anything_starts(cache):
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        check_train(recipe())
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        servers_for(recipe("rollout.engine=sglang"))
