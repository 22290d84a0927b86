"""Find models by their names on the Hugging Face hub: in the hub's local cache, or by a download.

`rlef` downloads a run's model while it checks the recipe. Ranks and servers start later, and find
it in the cache. Processes that download the same file at the same time wait for one another: the
hub's cache locks its files.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from rlef_mega.config import ConfigError, read_json
from rlef_mega.run.model_folder import INDEX, ONE_FILE

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # OWNER/MODEL
WEIGHTS = ("*.safetensors",)
CONFIG = ("config.json",)
DESCRIPTION = ("*.json", "*.jinja", "*.txt", "*.model")  # config, tokenizer, chat template
SUBFOLDERS = "*/*"  # the same weights in other formats
FROM_ANOTHER = f"`hf download MODEL --exclude '{SUBFOLDERS}'` where there is a network"


def find_model(
    path: str | Path, *, files: Sequence[str] = (*DESCRIPTION, *WEIGHTS), fetch: bool = True
) -> Path:
    """Return a model's folder: `path` itself, or the hub's cached copy of the model of this name.

    Of the model's files only `files` are fetched, and only if one of them is missing. Without
    `fetch`, returns `path` if one is missing. Raises ConfigError with the remedy if the hub
    cannot be reached, has no such model, or asks for a licence or a login.
    """
    name = str(path)
    if Path(path).exists() or not HUB_NAME.fullmatch(name):
        return Path(path)
    wanted = list(files)

    def download(*, cached: bool) -> Path:
        return Path(
            snapshot_download(
                name, allow_patterns=wanted, ignore_patterns=[SUBFOLDERS], local_files_only=cached
            )
        )

    with suppress(LocalEntryNotFoundError, HFValidationError):
        found = download(cached=True)
        if is_whole(found, files):
            return found
    if not fetch:
        return Path(path)
    print(f"fetching {name} from the Hugging Face hub into {constants.HF_HUB_CACHE}", flush=True)
    try:
        found = download(cached=False)
    except (HTTPError, HFValidationError, OSError) as error:
        raise ConfigError(f"there is no folder {name}, and {why_missing(name, error)}") from None
    if not is_whole(found, files):
        raise ConfigError(
            f"{found} lacks the config, the tokenizer or weights in safetensors: either {name} has "
            f"none on the hub, or a download was interrupted; repeat it: {FROM_ANOTHER}"
        )
    return found


def is_whole(folder: Path, files: Sequence[str]) -> bool:
    """Return whether the folder has all files that the patterns `files` require. huggingface_hub
    also returns a cached folder into which another program downloaded only some of the files."""
    names = {"config.json"}
    if set(DESCRIPTION) <= set(files):
        names.add("tokenizer_config.json")
    if set(WEIGHTS) <= set(files):
        index = folder / INDEX
        names |= set(read_json(index)["weight_map"].values()) if index.is_file() else {ONE_FILE}
    return all((folder / name).is_file() for name in names)


def why_missing(name: str, error: Exception) -> str:
    """Return why the model could not be downloaded, and what to do."""
    login = "log in by `hf auth login`, or set HF_TOKEN"
    match error:
        case GatedRepoError():
            return (
                f"the hub's model of this name is gated: accept its licence at "
                f"{constants.ENDPOINT}/{name}, then {login}"
            )
        case RepositoryNotFoundError() | HFValidationError():
            return (
                f"the hub shows no model of this name; correct model.path or, if the model is "
                f"private, {login}"
            )
        case LocalEntryNotFoundError():
            reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no network"
            return (
                f"the hub's cache {constants.HF_HUB_CACHE} lacks files of this model, and the hub "
                f"cannot be reached ({reason}); run {FROM_ANOTHER}, and share or copy that cache "
                "(HF_HOME), or name a folder"
            )
    reason = " ".join(str(error).split())[:300]
    return f"fetching it from the hub failed ({type(error).__name__}: {reason}); try again"
