"""Models by name: those that ship with `longnet`, with the names of a model folder's files, and those on a hub.

    ORG/NAME                  the branch main; an old model may have no ORG (gpt2)
    ORG/NAME@REVISION         a branch, a tag or a commit
    ORG/NAME:FILE.gguf        a file of the repository
    PATH/models--ORG--NAME    the folder of a repository in a cache

`_on_hub` takes such a name apart. A path that exists is none, and neither is what ships. A model of a hub is taken from
the cache of huggingface_hub (the extra `hf`), without the network, or downloaded into it; `refresh` asks the hub. Only
files that `longnet` reads are downloaded. The variables of huggingface_hub (HF_HUB_OFFLINE, HF_HOME, ...) hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from longnet_cli.basics.configuration import nearest, parse, read_text
from longnet_cli.basics.errors import CheckpointError, ConfigError, refuse_web_address
from longnet_cli.basics.model_files import CONFIG
from longnet_cli.hub.repository import (
    COMMIT,
    Located,
    Repository,
    check_blobs,
    snapshot_in,
    unknown_files,
)


def preset_dir() -> Path:
    """Return the repository's `models/`, which a wheel holds inside the package under the name `shipped`."""
    package = Path(__file__).parents[1]
    shipped = package / "shipped"
    return shipped if shipped.is_dir() else package.parent / "models"


def list_models() -> list[str]:
    """Return the names of the shipped models with weights, sorted; recipes (`*.toml`) are not included."""
    return sorted(path.parent.name for path in preset_dir().glob(f"*/{CONFIG}"))


def model_path(name_or_path: str) -> Path:
    """Return the path that `--model` names. A name is looked up among the shipped models, never in the current folder.

    Raises ConfigError for a name that is not shipped. A path may lead to nothing.
    """
    refuse_web_address(name_or_path)
    if "/" in name_or_path or os.sep in name_or_path or name_or_path.endswith(".toml"):
        return Path(name_or_path)
    if name_or_path not in list_models():
        raise ConfigError(_unknown(name_or_path))
    return preset_dir() / name_or_path


def _on_hub(name: str, tokenizer: bool = False, *, embeds: bool = False) -> Repository | None:
    """Return the repository that a name stands for; None for a path that exists, for what ships or looks like it."""
    own = (*list_models(), *(path.stem for path in preset_dir().glob("*.toml")))
    local = nearest(name, own) or (
        tokenizer and "@" not in name
    )  # a tokenizer may be a folder here, without a slash
    return None if "/" not in name and local else Repository.of(name, tokenizer, embeds=embeds)


def _unknown(name: str) -> str:
    shipped = list_models()
    match = nearest(name, shipped)
    hint = f": did you mean '{match}'?" if match else "."
    if (preset_dir() / f"{name}.toml").is_file():
        hint = ": it is shipped as a recipe, without weights; `longnet train` makes them."
    return (
        f"unknown model '{name}'{hint} Shipped models: {', '.join(shipped) or 'none'}; "
        f"a path needs a slash, e.g. ./{name or 'my-run'}"
    )


def find_model(name: str, embeds: bool = False) -> Located:
    """Return the folder, or the GGUF file, of a model: a shipped one's name, a path with a slash, or a name on a hub.

    If it `embeds`, it is to make vectors: the cache must then have the files of sentence-transformers, or know that
    there are none. The path may lead to nothing. Raises ConfigError for a name that is not shipped, CheckpointError for
    a model that is neither here nor can be downloaded, and for weights in a cache that are not what they were.
    """
    if repository := _on_hub(name, embeds=embeds):
        located = repository.find()
    else:
        path = model_path(name)
        snapshot = snapshot_in(path)
        located = snapshot or Located(path, name)
        if embeds and snapshot and (unknown := unknown_files(snapshot.path)):
            what = f"does not know whether the model has {unknown}"
            raise CheckpointError(f"{snapshot.path}: the cache {what}: name it as ORG/NAME")
    check_blobs(located.path)
    return located


def find_tokenizer(name: str) -> Located | None:
    """Return the folder of a tokenizer that is on a hub, or in the folder of a repository in a cache; otherwise None.

    Raises CheckpointError for a tokenizer that is neither here nor can be downloaded.
    """
    repository = _on_hub(name, tokenizer=True)
    return repository.find() if repository else snapshot_in(Path(name))


def find_file(repository: str, file: str) -> Located:
    """Return a file of a repository on a hub, ORG/NAME or ORG/NAME@REVISION, from the cache or downloaded into it.

    Raises CheckpointError for a file that is neither here nor can be downloaded, ConfigError for another name.
    """
    remote = Repository.of(repository)
    if remote is None or remote.file:
        raise ConfigError(
            f"{repository}: not the name of a repository on a hub, as ORG/NAME or ORG/NAME@REVISION"
        )
    return replace(remote, name=f"{repository}:{file}", file=file).find()


def refresh(model: str | None, tokenizer: str | None) -> None:
    """Ask the hub what the revisions in these names are now, and download what is new. Raises as `find_model` does.

    Also raises ConfigError if there is no name on a hub among them.
    """
    named = [_on_hub(name, of) for name, of in ((model, False), (tokenizer, True)) if name]
    if not any(named):
        raise ConfigError(
            "--update is for a model on a hub, as ORG/NAME, and none is named: leave it out"
        )
    for repository in filter(None, named):
        repository.find(update=True)


def as_stored(name: str, stored: Iterable[Any]) -> str:
    """Return the stored name of the same file or repository, for a run that continues; `name` where there is none.

    A commit in `name` is kept.
    """
    given = _on_hub(name)
    if given is None or COMMIT.fullmatch(given.revision):
        return name
    repositories = ((known, Repository.of(known)) for known in stored if isinstance(known, str))
    same = (
        known
        for known, other in repositories
        if other and (other.repo, other.file) == (given.repo, given.file)
    )
    return next(same, name)


def name_origin(folder: Path, name: str) -> None:
    """Write the name of a model on a hub, with its commit, into the config.json of a folder made from it."""
    if _on_hub(name):
        settings = {**parse(read_text(folder / CONFIG)), "_name_or_path": name}
        (folder / CONFIG).write_text(
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def list_cached() -> list[str]:
    """Return the names of the models in the cache, sorted; none without huggingface_hub."""
    with suppress(ImportError, OSError):
        from huggingface_hub import constants

        return sorted(
            name.removeprefix("models--").replace("--", "/")
            for name in os.listdir(constants.HF_HUB_CACHE)
            if name.startswith("models--")
        )
    return []
