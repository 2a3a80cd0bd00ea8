"""Models by name: those that ship with `longnet`, and those on a hub.

    ORG/NAME                  the branch main; an old model may have no ORG (gpt2)
    ORG/NAME@REVISION         a branch, a tag or a commit
    ORG/NAME:FILE.gguf        a file of the repository

What ships is no such name, and neither is a path that exists, with a slash or without one. A model of a hub is taken
from the cache of huggingface_hub (the extra `hf`), without the network, or downloaded into it; `refresh` asks the hub.
Only files that `longnet` reads are downloaded. The variables of huggingface_hub (HF_HUB_OFFLINE, HF_HOME, ...) hold.
"""

import json
import re
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from longnet_cli.basics.configuration import nearest, parse, read_text
from longnet_cli.basics.errors import ConfigError, InputWarning, refuse_web_address
from longnet_cli.basics.model_files import CONFIG, MODULES, TOKENIZER

from .repository import COMMIT, Located, Repository


def preset_dir() -> Path:
    """Return the repository's `models/`, which a wheel holds inside the package under the name `shipped`."""
    package = Path(__file__).parents[1]
    shipped = package / "shipped"
    return shipped if shipped.is_dir() else package.parent / "models"


def list_models() -> list[str]:
    """Return the names of the shipped models with weights, sorted; recipes (`*.toml`) are not included."""
    return sorted(path.parent.name for path in preset_dir().glob(f"*/{CONFIG}"))


def model_path(name: str) -> Path:
    """Return the path that `--model` names: that of the shipped model of this name, otherwise a path from here.

    Warns, with InputWarning, of another folder of a shipped model's name. Raises ConfigError for a name without a slash
    that is neither shipped nor a folder. A path with a slash may lead to nothing.
    """
    refuse_web_address(name)
    path = Path(name)
    shipped = list_models()
    if name in shipped:
        model = preset_dir() / name
        if path.exists() and not path.samefile(model):
            taken = f"{name} is the model that comes with longnet, not the folder here"
            warnings.warn(f"{taken}: for that, write ./{name}", InputWarning, stacklevel=2)
        return model
    if "/" in name or name.endswith(".toml") or path.is_dir():
        return path
    with_weights = ", ".join(shipped) or "none"
    raise ConfigError(
        f"unknown model '{name}': no folder here has this name; shipped with weights: {with_weights}"
    )


def _on_hub(name: str, *needed: str) -> Repository | None:
    """Return the repository that a name stands for; None for a path that exists, for what ships or looks like it.

    The files `needed` are those of a model, or TOKENIZER alone.
    """
    if "/" not in name:
        shipped = [path.stem for path in preset_dir().iterdir()]
        if nearest(name, shipped) or (needed == (TOKENIZER,) and "@" not in name):
            return None
    return Repository.of(name, *needed)


def find_model(name: str, embeds: bool = False) -> Located:
    """Return the folder, or the file, of a model: a shipped one's name, a path, or a name on a hub.

    If it `embeds`, it is to make vectors: the cache must know whether it has modules of sentence-transformers. The path
    may lead to nothing. Raises ConfigError as `model_path` does, CheckpointError for a model that is neither here nor
    can be downloaded.
    """
    repository = _on_hub(name, CONFIG, TOKENIZER, *[MODULES] * embeds)
    return repository.find() if repository else Located(model_path(name), name)


def find_tokenizer(name: str) -> Located | None:
    """Return the folder of a tokenizer that is on a hub; otherwise None.

    Raises CheckpointError for a tokenizer that is neither here nor can be downloaded.
    """
    repository = _on_hub(name, TOKENIZER)
    return repository.find() if repository else None


def refresh(model: str | None, tokenizer: str | None) -> None:
    """Ask the hub what the revisions in these names are now, and download what is new. Raises as `find_model` does.

    Also raises ConfigError if there is no name on a hub among them.
    """
    named = ((model, CONFIG), (tokenizer, TOKENIZER))
    repositories = [_on_hub(name, needed) for name, needed in named if name]
    if not any(repositories):
        raise ConfigError("--update is for a model on a hub, as ORG/NAME: leave it out")
    for repository in filter(None, repositories):
        repository.update()


def as_stored(name: str, stored: Iterable[Any]) -> str:
    """Return the stored name of the same file or repository, for a run that continues; `name` where there is none.

    A commit in `name` is kept.
    """
    repository = _on_hub(name)
    if repository is None or COMMIT.fullmatch(repository.revision):
        return name
    unpinned = partial(re.sub, "@[^:]*", "")
    alike = (other for other in map(str, stored) if unpinned(other) == unpinned(name))
    return next(alike, name)


def name_origin(folder: Path, name: str) -> None:
    """Write the name of a model on a hub, with its commit, into the config.json of a folder made from it."""
    if _on_hub(name):
        settings = {**parse(read_text(folder / CONFIG)), "_name_or_path": name}
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
