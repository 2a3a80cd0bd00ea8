"""The folder of a run: the recipe and the checkpoint with which it goes on, and what a run must not overwrite."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import reduce
from operator import getitem
from pathlib import Path

from longnet_cli.basics.configuration import parse, read_text
from longnet_cli.basics.errors import CheckpointError, ConfigError
from longnet_cli.basics.model_files import CONFIG, TOKENIZER, WEIGHTS
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.data.outputs.output_paths import refuse_overwriting
from longnet_cli.models.folder import ModelFolder
from longnet_cli.running.ranks.ranks import Ranks

from .checkpoint import STATE, checkpoints_in, find_damage, newest_whole
from .recipe import Recipe, load_recipe

# folders of a run
CHECKPOINTS = "checkpoints"
BEST = "best"
RECIPE = "recipe.json"
MODEL_FILES = (WEIGHTS, TOKENIZER, CONFIG)
RUN_FILES = (BEST, CHECKPOINTS, RECIPE, "metrics.jsonl")
_NAMES = (("init",), ("data", "tokenizer"))  # keys of a recipe whose values may be on a hub
# True continues the run in the output folder, if there is one; False refuses a folder that holds a run; a path
# continues from that checkpoint, or from the newest checkpoint of that run.
Resume = bool | str | Path
_LAST = "; to continue the run in the output folder, put --resume at the end"


def _names_a_model(key: str) -> bool:
    """Return whether a key of a recipe gives a model, or sizes of one: a pattern alone does not."""
    table, _, name = key.partition(".")
    return table in ("init", "model") and name != "pattern"


def prepare_run(
    recipe: str | None,
    overrides: Mapping[str, object],
    output: str | Path,
    *,
    resume: Resume = True,
    writes: bool = True,
) -> Recipe:
    """Return the recipe of a run in the folder `output`, with `overrides`. Without `recipe`, take the resumed run's.

    A resumed run keeps its chunk, unless another is named, and the commits of a model and a tokenizer on a hub.

    Raises ConfigError where there is no recipe and where `output` or a parent is a file. If the run `writes`, also for
    a folder that holds a model but no run, or files of a run's names that no run has written, and where the run would
    overwrite its data, recipe, tokenizer or initial model.
    """
    folder = Path(output)
    for path in (folder, *folder.parents):
        if path.is_file():
            raise ConfigError(f"{path} is a file, and -o names the folder of a run: name another")
    earlier = _recipe_of_run(folder, resume)
    named = earlier if recipe is None else recipe
    if named is None:
        if not isinstance(resume, bool):
            raise ConfigError(f"--resume {resume}: neither a run nor a checkpoint{_LAST}")
        if not any(map(_names_a_model, overrides)):
            raise ConfigError(
                f"there is no run in {output}, and there is no model: give a RECIPE (longnet-1m, or a file such as "
                "examples/small.toml) or --init MODEL"
            )
    loaded = load_recipe(named, overrides, [_stored(earlier, *keys) for keys in _NAMES])
    # then the recipe names it: the order of `running.reader.chunk_of`
    chunk = _stored(earlier, "train", "chunk")
    if not loaded.names_chunk and isinstance(chunk, int) and chunk > 0:
        loaded = loaded.with_chunk(chunk)
    if writes:
        _refuse_others(folder)
        _refuse_overwriting(folder, loaded, recipe)
    return loaded


def find_checkpoint(
    output: Path,
    resume: Resume,
    ranks: Ranks,
    note: Callable[[str], None],
) -> Path | None:
    """Return the checkpoint from which a run in `output` continues; None for a run that starts from nothing.

    `note` gets a line about each damaged checkpoint that is skipped. Raises ConfigError for a folder that holds
    another run, CheckpointError where the path holds no checkpoint or all are damaged.
    """
    if not isinstance(resume, bool) and Path(resume).resolve() == output.resolve():
        resume = True
    if resume is True:
        return newest_whole(output / CHECKPOINTS, ranks, note)
    checkpoint = None if resume is False else _checkpoint_at(Path(resume), ranks, note)
    newest = next(iter(checkpoints_in(output / CHECKPOINTS)), checkpoint)
    if newest and (checkpoint is None or checkpoint.resolve() != newest.resolve()):
        raise ConfigError(
            f"{output} already holds a run: name another folder with -o, or remove it"
        )
    return newest


def _recipe_of_run(folder: Path, resume: Resume) -> str | None:
    """Return the path of the recipe that the resumed run has written, None without one. Raises ConfigError."""
    if resume is False:
        return None
    # a run, or its checkpoint
    runs = [folder] if resume is True else [Path(resume), Path(resume).parent.parent]
    try:
        return next((str(run / RECIPE) for run in runs if (run / RECIPE).exists()), None)
    except OSError as error:  # the name is too long
        raise ConfigError(f"{runs[0]}: {error.strerror}") from None


def _refuse_others(folder: Path) -> None:
    """Raise ConfigError for a folder with files that a run would replace, unless a run has written them.

    A run writes its recipe first.
    """
    if (folder / WEIGHTS).exists() and not (folder / CHECKPOINTS).exists():
        raise ConfigError(
            f"{folder} already holds a model: name another folder with -o, or remove it"
        )
    recipe = _stored(folder / RECIPE)
    if isinstance(recipe, dict) and {"model", "data", "train"} <= recipe.keys():
        return
    for name in (*MODEL_FILES, *RUN_FILES):
        if (folder / name).exists():
            raise ConfigError(
                f"{folder} holds {name}, which no run has written: name another folder with -o"
            )


def _stored(recipe: str | Path | None, *keys: str) -> object:
    """Return a value in a run's recipe.json, None without it; it is not checked: files that it names may have moved."""
    if recipe is None:
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        return reduce(getitem, keys, parse(read_text(recipe)))
    return None


def _checkpoint_at(path: Path, ranks: Ranks, note: Callable[[str], None]) -> Path:
    """Return the checkpoint at a path: itself, or the newest of a run. Raises CheckpointError."""
    if (path / STATE).exists():
        if damage := find_damage(path):
            raise CheckpointError(f"{path} is damaged: {damage}")
        return path
    checkpoint = newest_whole(path / CHECKPOINTS, ranks, note)
    if checkpoint is None:
        raise CheckpointError(
            f"--resume {path}: neither a checkpoint ({STATE} is missing) nor a run with {CHECKPOINTS}/{_LAST}"
        )
    return checkpoint


def _refuse_overwriting(output: Path, recipe: Recipe, path: str | None) -> None:
    """Raise ConfigError where a run in `output` would overwrite its data, recipe (`path`), tokenizer or initial model.

    A recipe.json and a tokenizer.json beside metrics.jsonl belong to the run itself, which continues with them.
    """
    data = recipe.data
    again = (output / "metrics.jsonl").exists()
    files = [output / RECIPE, output / "metrics.jsonl", output / CHECKPOINTS]
    for name in MODEL_FILES:
        files += [output / name, output / BEST / name]
    also: list[str | Path | None] = []
    if not again:
        also += (path, Tokenizer.find(data.tokenizer))
        if recipe.init:
            also.append(ModelFolder.find(recipe.init).path)
    for inputs in (*(source.files for source in data.sources), data.held_out_files):
        refuse_overwriting("-o", files, inputs, also)
