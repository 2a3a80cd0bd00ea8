"""The start of a run: its recipe, its folder, its checkpoint, and the parts that are built by the recipe.

Checks of a recipe go beyond its own fields: the memory, the tokenizer, and the ranks that share the work. The parts are
the data, the model and the optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from longnet_cli.attention.notation import PATTERN_FIELDS
from longnet_cli.basics.configuration import parse, read_text
from longnet_cli.basics.errors import CheckpointError, ConfigError, DataError, MemoryLimitError
from longnet_cli.basics.model_files import CONFIG, TOKENIZER, WEIGHTS
from longnet_cli.data.documents import Document
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.names import Sources
from longnet_cli.data.outputs import refuse_overwriting
from longnet_cli.data.tokenizer import NO_END, Tokenizer
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Net
from longnet_cli.running.device import free_memory
from longnet_cli.running.ranks.fsdp import is_sharded
from longnet_cli.running.ranks.ranks import Ranks

from .checkpoint import STATE, checkpoints_in, find_damage, newest_whole
from .recipe import OptimizerRecipe, Recipe, TrainRecipe, load_recipe, naming
from .windows import TokenStream, TokenWindows


def check_memory(recipe: Recipe) -> None:
    """Raise MemoryLimitError for a net whose weights alone exceed the free memory, before the net is built."""
    needed, free = (
        4 * recipe.model.trained + recipe.model.frozen_bytes,
        free_memory(torch.device("cpu")),
    )
    if free is not None and needed > free:
        change = (
            "take a smaller model" if recipe.pretrained else "lower model.dim or model.num_layers"
        )
        raise MemoryLimitError(
            f"the weights take {needed / 2**30:,.1f} GiB and {free / 2**30:,.1f} GiB of memory are free: {change}"
        )


def check_vocabulary(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Raise ConfigError where the net has no id for a token, or for the mask."""
    masked = recipe.train.objective == "masked"
    needed = tokenizer.vocab_size + masked
    if recipe.model.vocab_size < needed:
        what = "the tokens and the mask need" if masked else "the tokenizer needs"
        raise ConfigError(
            f"model.vocab_size = {recipe.model.vocab_size} is less than {what}, {needed}: set {needed}, or remove it"
        )


def check_ranks(recipe: Recipe, ranks: Ranks) -> None:
    """Raise ConfigError for windows that the ranks cannot share or that a bidirectional net cannot see as a whole."""
    train = recipe.train
    for stage in train.stages:
        check_windows(ranks, stage.seq_len, train.windows(stage))
    if recipe.model.causal:
        return
    longest = max(stage.seq_len for stage in train.stages)
    if longest > train.chunk * ranks.sp:
        raise ConfigError(
            f"a bidirectional net sees a window as a whole: train.chunk = {train.chunk} on {ranks.sp} ranks is less "
            f"than the longest seq_len, {longest}"
        )
    if ranks.sp > 1 and not train.across_documents:
        raise ConfigError(
            "a bidirectional net over several ranks cannot keep the documents of a window apart: set "
            "train.across_documents = true, or give each rank its own windows (--dp)"
        )


def check_windows(ranks: Ranks, seq_len: int, windows: int) -> None:
    """Raise ConfigError where a step's `windows` of `seq_len` tokens cannot be shared, and say what would fit."""
    if windows % ranks.dp:
        fits = ", ".join(
            str(dp)
            for dp in range(1, ranks.world + 1)
            if windows % dp == 0 and ranks.world % dp == 0
        )
        raise ConfigError(
            f"a step has {windows} windows of {seq_len} tokens, which {ranks.dp} groups of ranks cannot share equally: "
            f"--dp {fits} would fit, or other train.batch_tokens"
        )
    if seq_len < ranks.sp:
        raise ConfigError(
            f"{ranks.sp} ranks cannot share a window of {seq_len} tokens: --sp {seq_len} or less would fit, or longer "
            "windows"
        )


CHECKPOINTS, BEST = "checkpoints", "best"  # folders of a run
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
    return key in ("init", "model") or (key.startswith("model.") and key != "model.pattern")


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
    if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise ConfigError(f"{file} is a file, and -o names the folder of a run: name another")
    earlier = _recipe_of_run(folder, resume)
    named = earlier if recipe is None else recipe
    if named is None and not isinstance(resume, bool):
        raise ConfigError(f"--resume {resume}: neither a run nor a checkpoint{_LAST}")
    if named is None and not overrides:
        raise ConfigError(
            f"nothing to train: there is no run in {output}; name a recipe (`longnet train my-recipe.toml`) or --set "
            "its values"
        )
    if named is None and not any(map(_names_a_model, overrides)):
        raise ConfigError(
            "there is no model: give a RECIPE (longnet-1m, or a file such as examples/small.toml) or --init MODEL"
        )
    loaded = load_recipe(
        named, overrides, [_stored(earlier, *keys) for keys in _NAMES] if earlier else ()
    )
    # then the recipe names it: the order of `running.reader.chunk_of`
    chunk = _stored(earlier, "train", "chunk") if earlier else None
    if not loaded.names_chunk and isinstance(chunk, int) and chunk > 0:
        loaded = loaded.with_chunk(chunk)
    if writes:
        _refuse_others(folder)
        _refuse_overwriting(folder, loaded, recipe)
    return loaded


def find_checkpoint(
    output: Path, resume: Resume, ranks: Ranks, note: Callable[[str], None]
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
    for newest in checkpoints_in(output / CHECKPOINTS)[:1]:
        if checkpoint is None or checkpoint.resolve() != newest.resolve():
            raise ConfigError(
                f"{output} already holds a run: name another folder with -o, or remove it"
            )
        return newest
    return checkpoint


def _recipe_of_run(folder: Path, resume: Resume) -> str | None:
    """Return the path of the recipe that the resumed run has written, None without one. Raises ConfigError."""
    if resume is False:
        return None
    runs = (
        [folder] if resume is True else [Path(resume), Path(resume).parent.parent]
    )  # a run, or its checkpoint
    try:
        return next((str(run / RECIPE) for run in runs if (run / RECIPE).exists()), None)
    except OSError as error:  # the name is too long
        raise ConfigError(f"{runs[0]}: {error.strerror}") from None


def _refuse_others(folder: Path) -> None:
    """Raise ConfigError for a folder with files that a run would replace, unless a run has written them.

    A run writes its recipe first, and its recipe is in each checkpoint.
    """
    runs = [partial(_stored, folder / RECIPE)]
    runs += [
        partial(_stored, path / STATE, "recipe") for path in checkpoints_in(folder / CHECKPOINTS)
    ]
    if (folder / WEIGHTS).exists() and not (folder / CHECKPOINTS).exists():
        raise ConfigError(
            f"{folder} already holds a model: name another folder with -o, or remove it"
        )
    if any(
        all(isinstance(run(table), dict) for table in ("model", "data", "train")) for run in runs
    ):
        return
    if other := next(
        (name for name in (*MODEL_FILES, *RUN_FILES) if (folder / name).exists()), None
    ):
        raise ConfigError(
            f"{folder} holds {other}, which no run has written: name another folder with -o"
        )


def _stored(recipe: str | Path, *keys: str) -> object:
    """Return a value in a run's recipe.json, None without it; it is not checked: files that it names may have moved."""
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
    data, again = recipe.data, (output / "metrics.jsonl").exists()
    files = [
        *(output / name for name in MODEL_FILES),
        *(output / BEST / name for name in MODEL_FILES),
    ]
    files += [output / RECIPE, output / "metrics.jsonl", output / CHECKPOINTS]
    also: list[Path | None] = []
    if not again:
        also += [ModelFolder.find(recipe.init).path if recipe.init else None]
        also += [Path(path) if path else None, Tokenizer.find(data.tokenizer)]
    for inputs in (*(source.files for source in data.sources), data.held_out_files):
        refuse_overwriting("-o", files, inputs, also)


class TrainingData(NamedTuple):
    """The documents that a run reads, as ids of its tokenizer."""

    tokenizer: Tokenizer
    eos_id: int  # the first token of each document
    windows: list[TokenWindows]  # of each stage
    held_out: list[Document]


def build_data(
    recipe: Recipe, ranks: Ranks, initial: str | None = None, tokenizer_differs: bool = False
) -> TrainingData:
    """Open the data of a recipe, and cut them into windows. The model `initial` must have their tokenizer.

    Raises ConfigError where there are no data, or where their tokens are not the model's, DataError for too few.
    """
    data, train = recipe.data, recipe.train
    with naming("data.tokenizer"):
        tokenizer = Tokenizer.load(data.tokenizer)
    with naming("data.eos"):
        tokenizer = tokenizer.with_eos(data.eos)
    eos_id = _before_documents(recipe, tokenizer)
    check_vocabulary(recipe, tokenizer)
    if initial:
        ModelFolder.find(initial).tokenizer(data.tokenizer, differs=tokenizer_differs)

    def documents(sources: Sources) -> list[Document]:
        return list(
            Inputs(sources, tokenizer, data.column, vocab_size=recipe.model.vocab_size).documents()
        )

    if not data.sources:
        raise ConfigError(
            "no training data: give --data INPUT, or set data.train or [[data.mix]] in the recipe"
        )
    streams = [TokenStream(documents(source.files), eos_id) for source in data.sources]
    mix = [source.weight for source in data.sources]
    shared: dict[str, Any] = {"weights": mix, "rank": ranks.dp_rank, "world": ranks.dp}
    windows = [
        TokenWindows(
            streams, stage.seq_len, train.windows(stage) // ranks.dp, train.seed + index, **shared
        )
        for index, stage in enumerate(train.stages)
    ]
    held_out = documents(data.held_out_files) if data.held_out_files else []
    if data.held_out_files and not any(map(len, held_out)):
        raise DataError(
            f"data.held_out, {', '.join(map(str, data.held_out_files.names))}: every document is empty"
        )
    longest, most = max(map(len, held_out), default=0), recipe.model.max_tokens
    if (
        most and min(longest, train.held_out_context or longest) > most
    ):  # rather than at the first evaluation
        why = (
            f"data.held_out: a document has {longest:,} tokens, and the model reads {most} at most"
        )
        raise ConfigError(f"{why}: set train.held_out_context={most}")
    return TrainingData(tokenizer, eos_id, windows, held_out)


def _before_documents(recipe: Recipe, tokenizer: Tokenizer) -> int:
    """Return the id with which each document starts: end-of-text, or what a Hugging Face model was trained with."""
    if recipe.pretrained is None or recipe.data.eos is not None:
        token_id: int | tuple[int, ...] | None = tokenizer.eos_id
    else:
        token_id = ModelFolder.find(recipe.pretrained.init).bos(tokenizer)
    if token_id is None:
        raise ConfigError(
            f"{NO_END}; training puts it between documents: name a token or an id (--eos, data.eos)"
        )
    if not isinstance(token_id, int):
        raise ConfigError(
            f"{recipe.init} starts a document with {len(token_id)} tokens, and training puts one there"
        )
    return token_id


def build_model(recipe: Recipe, initial: str | None, note: Callable[[str], None]) -> Net:
    """Return the net, with the weights of the model `initial`, or with random ones.

    `note` gets lines for the user. Raises ConfigError where `initial` is another net than the recipe's; its
    pattern and positions, which have no weights, may differ.
    """
    torch.manual_seed(recipe.train.seed)
    if pretrained := recipe.pretrained:
        return ModelFolder.find(pretrained.init).trainable(
            pretrained.model, pretrained.adapter, note
        )
    if initial is None:
        return LongNet(recipe.model)
    folder = ModelFolder.find(initial)
    own = folder.native().from_pretrained(folder.path)
    without_weights = {*PATTERN_FIELDS, "position"}
    fields = type(recipe.model).model_fields.keys() - without_weights
    if changed := sorted(
        name for name in fields if getattr(own.config, name) != getattr(recipe.model, name)
    ):
        raise ConfigError(f"{initial} differs from the recipe in model.{', model.'.join(changed)}")
    with torch.device("meta"):
        model = type(own)(recipe.model)
    model.load_state_dict(own.state_dict(), assign=True)
    return model


def change_layers(model: Net, train: TrainRecipe) -> None:
    """Compile the layers, and let them compute their activations again, as the recipe says."""
    for layer in model.layer_modules:
        if train.compile:
            layer.forward = torch.compile(layer.forward)
        if train.activation_checkpointing:
            layer.forward = partial(activation_checkpoint, layer.forward, use_reentrant=False)


def build_optimizers(model: Net, recipe: OptimizerRecipe) -> list[torch.optim.Optimizer]:
    """Return fused AdamW and, if the recipe asks for it, Muon for the matrices of the layers. Only matrices decay.

    If weights are to be sharded over ranks (`running.ranks.fsdp`), shard them first. Raises ConfigError for Muon on
    sharded weights.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    of_layers = {id(p) for layer in model.layer_modules for p in layer.parameters()}
    tables = [p for p in trained if p.dim() >= 2 and id(p) not in of_layers]
    matrices = [p for p in trained if p.dim() >= 2 and id(p) in of_layers]
    vectors = [p for p in trained if p.dim() < 2]
    muon = recipe.name == "muon"
    groups = [
        {"params": tables if muon else tables + matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if muon and is_sharded(model):
        raise ConfigError(
            'optimizer.name = "muon" works on whole matrices: give --shard none, or take "adamw"'
        )
    adamw = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)
    if not muon:
        return [adamw]
    of_matrices = _Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return [of_matrices, adamw]


class _Muon(torch.optim.Muon):
    """Muon with torch's settings and state, but in fp32 on a CPU: most CPUs have no instructions for torch's bf16."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                mean = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = _orthogonal(p.grad.lerp(mean, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # of the size of AdamW's updates, so one learning rate serves both
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def _orthogonal(x: Tensor) -> Tensor:
    """Return a matrix with the singular vectors of `x`, and singular values near 1, by Newton-Schulz (Jordan 2024)."""
    wide = (x if len(x) <= x.shape[1] else x.T).to(torch.float32 if x.is_cpu else torch.bfloat16)
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        square = wide @ wide.T
        wide = torch.addmm(
            wide, torch.addmm(square, square, square, beta=-4.775, alpha=2.0315), wide, beta=3.4445
        )
    return wide if len(x) <= x.shape[1] else wide.T
