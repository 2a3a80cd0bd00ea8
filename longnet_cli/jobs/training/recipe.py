"""The definition of a training run: a TOML file, checked as a whole. Precedence: default < file < `--set`, flags."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from longnet_cli.attention.notation import PATTERN_FIELDS, format_pattern, read_pattern
from longnet_cli.basics.configuration import StrictModel, parse, read_text, validate
from longnet_cli.basics.errors import ConfigError, LongNetError, refuse_web_address
from longnet_cli.basics.model_files import TOKENIZER
from longnet_cli.basics.sizes import DTYPES_OF_TORCH, parse_size
from longnet_cli.data.documents.tokenizer import MOST_IDS, Tokenizer
from longnet_cli.data.files.input_files import InputFiles
from longnet_cli.hub.model_names import as_stored, find_tokenizer, preset_dir
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.config import LongNetConfig, NetConfig, TransformersConfig
from longnet_cli.running.reader import TRAINING_CHUNK

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


Beta = Annotated[float, Field(ge=0, lt=1)]
Names = Annotated[
    list[str], BeforeValidator(lambda names: [names] if isinstance(names, str) else names)
]
Size = Annotated[
    int,
    BeforeValidator(lambda size: parse_size(size) if isinstance(size, str) else size),
    Field(gt=0),
]


class MixedInputs(StrictModel):
    """One source of a mix: inputs as on any command line, and the share of the training windows that is cut from it."""

    inputs: Names = Field(min_length=1)
    weight: float = Field(gt=0)

    @cached_property
    def files(self) -> InputFiles:
        return InputFiles(self.inputs)


class DataRecipe(StrictModel):
    """The source of tokens: either `train` or `mix`, or neither, as in most shipped recipes, which need `--data`."""

    train: Names | None = Field(default=None, min_length=1, examples=['["tokens"]'])
    """The inputs to train on: files, folders and globs of text or tokens."""
    mix: list[MixedInputs] | None = Field(
        default=None,
        min_length=1,
        examples=['[{ inputs = ["code"], weight = 7 }, { inputs = ["books"], weight = 3 }]'],
    )
    """Several sources in place of `train`, each with its share of the training windows. A source that runs out starts
    again."""
    tokenizer: str = "bytes"
    """`bytes`, a tokenizer.json, or a folder that holds one. The default is that of `init`, if there is one."""
    eos: str | int | None = Field(default=None, examples=['"<|endoftext|>"'])
    """The token between documents, or its id. The default is the tokenizer's. A flat column is cut at it."""
    column: str | None = Field(default=None, examples=['"text"'])
    """The column to read. By default, its name decides."""
    held_out: Names | None = Field(default=None, examples=['["held-out"]'])
    """Inputs to evaluate on, which are never trained on. Their loss counts all tokens."""
    loss: Literal["all", "answers"] = "all"
    """The tokens to learn: `all`, or of chats what the assistant says (`answers`)."""

    @model_validator(mode="after")
    def _one_of_train_and_mix(self) -> DataRecipe:
        if self.train is not None and self.mix is not None:
            raise ValueError("set one of data.train = [...] and [[data.mix]] tables, not both")
        return self

    @cached_property
    def sources(self) -> list[MixedInputs]:
        """The sources in `train` or `mix`, as a mix of one or several; empty where neither is set."""
        if self.train:
            return [MixedInputs(inputs=self.train, weight=1)]
        return self.mix or []

    @cached_property
    def held_out_files(self) -> InputFiles | None:
        return InputFiles(self.held_out) if self.held_out else None


class OptimizerRecipe(StrictModel):
    """The optimizer, AdamW. Defaults are those of the paper's Table 3, but for a run with `init` (`TUNING_RATES`)."""

    lr: float = Field(default=6e-4, gt=0)
    """The highest learning rate. The default is 2e-5 with `init`, and 2e-4 with `[lora]`."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """The decay of the mean of gradients, and that of their squares."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean square."""
    weight_decay: float = Field(default=0.01, ge=0)
    """For weights. Biases and norms do not decay."""
    clip: float = Field(default=2.0, gt=0)
    """The largest norm of the gradient."""


class ScheduleRecipe(StrictModel):
    """The learning rate: it rises for `warmup_steps`, then falls to `final` times its peak at the last step."""

    warmup_steps: int = Field(default=100, ge=0)
    """The steps in which the learning rate rises."""
    decay: Literal["cosine", "linear", "polynomial", "constant"] = "cosine"
    """Its fall: `cosine`, `linear`, `polynomial` (fairseq's, and the paper's) or `constant`, which is none."""
    power: float = Field(default=1.0, gt=0)
    """For `polynomial`: the learning rate follows the share of the steps that is left, to this power."""
    final: float = Field(default=0.1, ge=0, le=1)
    """The last learning rate, as a share of the highest."""

    @model_validator(mode="after")
    def _power_is_of_polynomial(self) -> ScheduleRecipe:
        if self.power != 1.0 and self.decay != "polynomial":
            raise ValueError(f'schedule.power is of decay = "polynomial", not of "{self.decay}"')
        return self

    def learning_rate(self, step: int, total: int, peak: float) -> float:
        """Return the learning rate of a step, 0 .. total - 1."""
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return peak
        falling = total - 1 - self.warmup_steps  # steps
        # the one step after the warm-up is the last; the only step of a run has the peak
        done = (step - self.warmup_steps) / falling if falling else min(1, step)
        share = (1 - done) ** self.power
        if self.decay == "cosine":
            share = (1 + math.cos(math.pi * done)) / 2
        return peak * (self.final + (1 - self.final) * share)


class Stage(StrictModel):
    """`steps` optimizer steps at one context length; a run may grow its context stage by stage."""

    seq_len: Size
    steps: int = Field(gt=0)


class TrainRecipe(StrictModel):
    """The training itself. A step sees `batch_tokens`, with the activations of at most `chunk` of them at a time.

    Short sequences share a forward pass. A sequence longer than `chunk` goes chunk by chunk, at the price of one more
    forward pass, with the same loss and gradients.
    """

    stages: list[Stage] = Field(min_length=1, examples=["[{ seq_len = 1024, steps = 500 }]"])
    """The steps, and the tokens of a window (the context length). The context may grow from stage to stage."""
    objective: Literal["causal", "masked"] = "causal"
    """To predict the next token or, in a bidirectional model, hidden tokens (`masked`)."""
    mask_rate: float = Field(default=0.15, gt=0, lt=1)
    """The share of the tokens that `masked` predicts."""
    batch_tokens: Size = 16384
    """The tokens of a step, over all processes: at least one window."""
    chunk: Size = TRAINING_CHUNK
    """The tokens whose activations are in memory at one time. It changes no number. The default on a GPU is what fits,
    up to 128Ki."""
    across_documents: bool = False
    """Whether a token attends to earlier documents in its window."""
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"], BeforeValidator(lambda x: DTYPES_OF_TORCH.get(x, x))
    ] = "auto"
    """The type of matrix products: `fp32`, `bf16`, or `auto`: bf16 on a GPU that supports it."""
    spill: str | None = Field(default=None, examples=['"/scratch"'])
    """A folder that takes, in place of memory, the keys and values that later chunks need."""
    activation_checkpointing: bool = False
    """Whether the backward pass computes each layer again: less memory, for one more forward pass."""
    compile: bool = False
    """Whether each layer is compiled, which needs a C++ compiler or a GPU."""
    seed: int = Field(default=0, ge=0, lt=2**62)
    """Of the first weights, of the order of the windows, of dropout and of masks."""
    loss_jump: float = Field(default=5.0, gt=0)
    """A run stops if its loss rises this many nats per token above the lowest so far."""
    log_every: int = Field(default=10, gt=0)
    """The steps between two lines of metrics.jsonl."""
    evaluate_every: int = Field(default=500, gt=0)
    """The steps between two evaluations on `held_out`."""
    held_out_context: Size | None = Field(default=None, examples=["16384"])
    """The tokens of the windows in which held-out documents are read. By default a document is read as a whole or, with
    `masked`, in windows of `seq_len`."""
    save_every: int = Field(default=500, gt=0)
    """The steps between two checkpoints."""
    save_minutes: float | None = Field(default=None, gt=0, examples=["10"])
    """The longest time between two checkpoints."""
    keep: int = Field(default=2, gt=0)
    """How many of the newest checkpoints stay."""

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def longest(self) -> int:
        """The tokens of the longest windows."""
        return max(stage.seq_len for stage in self.stages)

    @property
    def predicted(self) -> float:
        """The share of the tokens that have a loss, and so logits."""
        return self.mask_rate if self.objective == "masked" else 1.0

    def windows(self, stage: Stage) -> int:
        """Return the number of windows in an optimizer step."""
        return max(1, self.batch_tokens // stage.seq_len)


class ParallelRecipe(StrictModel):
    """The division of work in a torchrun job: `sp` processes share a sequence, `dp` such groups share the sequences."""

    sp: int | None = Field(default=None, gt=0, examples=["2"])
    """The processes that share each sequence. By default, all do."""
    dp: int | None = Field(default=None, gt=0, examples=["1"])
    """The number of such groups. Each takes other sequences."""
    shard: Literal["none", "full"] = "none"
    """`full` gives each process a part of the weights, gradients and optimizer state (FSDP2); `none` gives it all."""


# Keys that may differ between a checkpoint and the run that continues it. The initial model, the tokenizer and the data
# may only be in another place: what they hold is compared as well (of the training data, the lengths of all documents
# and the first tokens: `TokenWindows`). The others change no step beyond rounding: they say how a step is computed, and
# when the run stops, saves, evaluates and logs.
FREE_TO_CHANGE = {
    "init",
    "data.train",
    "data.mix",
    "data.held_out",
    "data.column",
    "data.tokenizer",
    "parallel",
    "model.frozen_bytes",
    "train.chunk",
    "train.spill",
    "train.activation_checkpointing",
    "train.compile",
    "train.loss_jump",
    "train.log_every",
    "train.evaluate_every",
    "train.save_every",
    "train.save_minutes",
    "train.keep",
    "train.held_out_context",
}


class Recipe(StrictModel):
    """A whole training run; `init` names a model whose weights it starts from."""

    init: str | None = Field(default=None, examples=['"./smollm2"'])
    """Start from this model: its weights, its tokenizer and, if it is a LongNet, its `[model]`."""
    model: LongNetConfig
    """The sizes, the pattern and the positions. If `init` is a Hugging Face model, set `pattern` alone."""
    data: DataRecipe = DataRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    """The learning rate, step by step."""
    train: TrainRecipe
    parallel: ParallelRecipe = ParallelRecipe()
    """The division of work between the processes of torchrun."""

    @model_validator(mode="after")
    def _objective_fits_the_model(self) -> Recipe:
        if not self.model.vocab_size:
            raise ValueError(
                "model.vocab_size = 0 is a net that reads vectors: leave it out, training reads tokens"
            )
        if self.model.pattern.chosen:
            raise ValueError("chosen blocks have no gradient: train with a window (model.pattern)")
        if self.model.causal == (self.train.objective == "masked"):
            fitting = "causal" if self.model.causal else "masked"
            raise ValueError(
                f'train.objective = "{self.train.objective}" does not fit model.causal = '
                f'{str(self.model.causal).lower()}: set train.objective = "{fitting}", or the other model'
            )
        if self.data.loss == "answers" and self.train.objective == "masked":
            raise ValueError('data.loss = "answers" is for train.objective = "causal"')
        return self

    @property
    def pretrained(self) -> PretrainedRecipe | None:
        """This recipe, if it trains a Hugging Face model, which brings its weights; None for a LongNet."""
        return None

    @property
    def adapter(self) -> dict[str, Any] | None:
        """The arguments of `models.hf.training.add_lora`; None where all weights are trained."""
        return None

    @property
    def tokens(self) -> int:
        """The tokens of all steps together."""
        return sum(stage.steps * self.step_tokens(stage) for stage in self.train.stages)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, 0, 1, ..."""
        return self.schedule.learning_rate(step, self.train.steps, self.optimizer.lr)

    def notes(self) -> list[str]:
        """Return a line if all steps are warm-up, and one if sequences are longer than the pattern links."""
        steps = self.train.steps
        warmup = self.schedule.warmup_steps
        lines = list[str]()
        if steps <= warmup:
            rises = f"the learning rate rises for schedule.warmup_steps={warmup}"
            lines.append(f"all {steps} steps are warm-up: {rises}")
        longest = self.train.longest
        reach = self.model.pattern.farthest(self.model.num_layers)
        if reach is not None and reach < longest:
            pattern = format_pattern(self.model.pattern)
            links = f"pattern {pattern} links tokens at most {reach:,} apart"
            lines.append(f"{links}, and sequences have {longest:,}: what is farther is never seen")
        return lines

    @property
    def steps_in_words(self) -> str:
        """The tokens that the steps read, by stage: `3 steps of 64 x 256 tokens (train.batch_tokens)`."""
        train = self.train
        stages = (
            f"{stage.steps:,} steps of {train.windows(stage):,} x {stage.seq_len:,} tokens"
            for stage in train.stages
        )
        return f"{', then '.join(stages)} (train.batch_tokens)"

    def step_tokens(self, stage: Stage) -> int:
        """Return the tokens of a step."""
        return self.train.windows(stage) * stage.seq_len

    @property
    def names_chunk(self) -> bool:
        """Return whether `train.chunk` was given, and is not a default."""
        return "chunk" in self.train.model_fields_set

    def with_chunk(self, chunk: int) -> Recipe:
        return self.model_copy(update={"train": self.train.model_copy(update={"chunk": chunk})})

    def changed_since(self, saved: Mapping[str, Any]) -> list[str]:
        """Return the keys (`optimizer.lr`) whose change since a saved recipe keeps a run from continuing.

        More steps do not: they follow those of the saved recipe.
        """
        mine = self.model_dump(mode="json")
        extended = _extend(saved["train"]["stages"], mine["train"]["stages"])
        free = FREE_TO_CHANGE | ({"train.stages"} if extended else set())
        return [key for key in _changed(saved, mine, "") if key not in free]


class LoraRecipe(StrictModel):
    """LoRA (peft): two small matrices beside each of those named in `target_modules`."""

    rank: int = Field(default=16, gt=0)
    """The rank of the added matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """Their output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On their input, in training."""
    target_modules: list[str] | None = Field(
        default=None,
        min_length=1,
        examples=['["q_proj", "v_proj"]'],
    )
    """The names of the modules that get them. By default, all matrices of the layers do."""


class PretrainedRecipe(Recipe):
    """A recipe that trains the transformers decoder in the folder `init`. In `[model]`, you only set the pattern."""

    init: str
    model: TransformersConfig  # type: ignore[assignment] # jobs only use what `NetConfig` has
    lora: LoraRecipe | None = None
    """Train small matrices beside the weights of a Hugging Face model (`init`), which needs the extra `lora`. Without
    this table, all of its weights are trained."""

    @model_validator(mode="after")
    def _windows_fit_the_model(self) -> PretrainedRecipe:
        longest = self.train.longest
        most = self.model.max_tokens
        if most is not None and longest > most:
            choice = (
                ': set model.pattern, as "pretrained" or "dense"' if self.model.as_trained else ""
            )
            raise ValueError(
                f"{self.init} reads up to {most} tokens, and train.stages needs {longest}{choice}"
            )
        if self.train.compile:
            raise ValueError("train.compile is for a LongNet: leave it out")
        return self

    @property
    def pretrained(self) -> PretrainedRecipe:
        return self

    @property
    def adapter(self) -> dict[str, Any] | None:
        return self.lora.model_dump() if self.lora else None


def _extend(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the stages `new` begin with all steps of `old`: the last one may go on, and more may follow."""
    *first, last = old
    rest = new[len(first) :]
    return bool(
        new[: len(first)] == first
        and rest
        and rest[0]["seq_len"] == last["seq_len"]
        and rest[0]["steps"] >= last["steps"]
    )


def _changed(old: object, new: object, path: str) -> Iterator[str]:
    if path not in FREE_TO_CHANGE and isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            yield from _changed(old.get(key), new.get(key), f"{path}.{key}".removeprefix("."))
    elif old != new:
        yield path


# optimizer.lr of a run that starts from a trained model
TUNING_RATES = {"init": 2e-5, "lora": 2e-4}

# keys that say the same in another way: an override of the first removes the others from the recipe
SAID_OTHERWISE = {"model.pattern": PATTERN_FIELDS, "data.train": ("mix",), "data.mix": ("train",)}


def load_recipe(
    path: str | None,
    overrides: Mapping[str, object],
    stored: Sequence[object] = (),
) -> Recipe:
    """Read a recipe, apply `overrides` ({"optimizer.lr": 1e-3}) and check the whole.

    `path` is a TOML file, a run's recipe.json, the name of a recipe that ships in models/, or None for overrides alone.
    A model without `vocab_size` gets its tokenizer's, plus one id for the mask with the masked objective. If `init` is
    a LongNet, `[model]` has its values where the recipe gives none; if it is a Hugging Face model, that model's facts.
    The tokenizer of `init` is used unless the recipe names another, and so are the `TUNING_RATES`.
    The recipe names a model or a tokenizer on a hub with its commit: that in the names `stored` by an earlier run, if
    one is of the same repository.
    Raises ConfigError, and CheckpointError for an `init` that is no model.
    """
    data, where = _read(path) if path else ({}, "options")
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: not a recipe, which is a table of keys and values")
    for key, value in overrides.items():
        _set(data, key, value)
    tables = [data.get(name, {}) for name in ("model", "data", "train", "optimizer")]
    if {*map(type, tables)} != {dict}:
        raise ConfigError(
            f"{where}: model, data, train and optimizer are tables of keys and values"
        )
    model, source, train, optimizer = tables
    for key, rate in TUNING_RATES.items():
        if data.get(key) is not None:
            data["optimizer"] = {"lr": rate} | optimizer
    with naming("init"):
        folder = _initial_folder(data.get("init"), model, stored)
    with naming("data.tokenizer"):
        named = source.get("tokenizer")
        if isinstance(named, str) and (words := find_tokenizer(as_stored(named, stored))):
            source["tokenizer"] = words.name
    if folder:
        data["init"] = folder.origin
        if (folder.path / TOKENIZER).exists() or folder.of_transformers:
            source = data["data"] = {"tokenizer": folder.origin} | source
        if folder.of_transformers:
            data["model"] = _pretrained(model, data.get("lora"), folder, where)
            return validate(PretrainedRecipe, data, where)
        model = data["model"] = _with_values_of(folder, model)
    if "model" in data and "vocab_size" not in model:
        try:
            with naming("data.tokenizer"):
                size = Tokenizer.load(str(source.get("tokenizer", "bytes"))).vocab_size
        except LongNetError:
            # a misspelt key, of `--set modle.dim=64` or `--set data.tokeniser=bytes`, is told first
            data["model"] = model | {"vocab_size": MOST_IDS}
            validate(Recipe, data, where)
            raise
        data["model"] = model | {"vocab_size": size + (train.get("objective") == "masked")}
    if data.get("lora") is not None:
        raise ConfigError(
            f"{where}: lora is for a Hugging Face model (init): a LongNet trains all of its weights: leave it out"
        )
    return validate(Recipe, data, where)


def _set(recipe: dict[str, Any], key: str, value: object) -> None:
    """Set the value of a key such as `optimizer.lr`. Raises ConfigError for a key below a value."""
    *parents, leaf = key.split(".")
    table = recipe
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {key}: '{parent}' is a value, not a table")
    for other in SAID_OTHERWISE.get(key, ()):
        table.pop(other, None)
    table[leaf] = value


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Put the key of a recipe before an error about its value."""
    try:
        yield
    except LongNetError as error:
        raise type(error)(f"{key}: {error}") from None


def _initial_folder(
    initial: object,
    model: Mapping[str, object],
    stored: Sequence[object],
) -> ModelFolder | None:
    """Return the folder of the model that `init` names; None without one, and for a LongNet that is gone by now."""
    if not isinstance(initial, str):
        return None
    try:
        return ModelFolder.find(as_stored(initial, stored))
    except LongNetError:
        if {"dim", "segment_lengths"} <= model.keys():
            return None  # a resumed run has its weights; a new run reports the missing folder
        raise


def _with_values_of(folder: ModelFolder, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table `model` with the values of the LongNet in `folder` where it gives none."""
    values = folder.net_config().model_dump(mode="json")
    if not model.keys().isdisjoint((*PATTERN_FIELDS, "pattern")):
        for name in PATTERN_FIELDS:  # another pattern replaces all of it
            values.pop(name, None)
    return {**values, **model}


def _pretrained(model: Mapping[str, Any], lora: Any, folder: ModelFolder, where: str) -> NetConfig:
    """Return the table `model` of a recipe that trains the Hugging Face model in `folder`, with its facts."""
    written = model.get("pattern")
    if "source" not in model:  # otherwise it is a run's recipe, which has all facts
        if others := [name for name in model if name != "pattern"]:
            raise ConfigError(
                f"{where}: model.{others[0]}: {folder.path} is a Hugging Face model with sizes of its own: leave out "
                "[model], or set model.pattern alone"
            )
    elif model.get("as_trained"):
        written = None
    pattern = read_pattern(written, f"{where}: model.pattern")
    adapter = None
    if lora is not None:
        adapter = validate(LoraRecipe, lora, f"{where}: lora").model_dump()
    return folder.net_config(pattern, adapter)


def parse_overrides(settings: Sequence[str]) -> dict[str, object]:
    """Parse `["optimizer.lr=1e-3", "data.tokenizer=bytes"]`: values are TOML, or text where that fails.

    Text keeps its spaces, unless there is one before the equals sign, as in `data.tokenizer = bytes`.
    """
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--set {setting}: write key=value, for example --set optimizer.lr=1e-3"
            )
        try:
            overrides[key.strip()] = parse(f"value = {text}", tomllib.loads)["value"]
        except ValueError:
            if text[:1] + text[-1:] in ("[]", "{}"):
                raise ConfigError(
                    f"--set {setting}: texts in a list or a table have quotes: ['a', 'b']"
                ) from None
            overrides[key.strip()] = text.strip() if key.endswith(" ") else text
    return overrides


def _read(path: str) -> tuple[Any, str]:
    refuse_web_address(path)
    is_path = "/" in path or path.endswith((".toml", ".json"))
    file = Path(path) if is_path else preset_dir() / f"{path}.toml"
    form, parser = ("JSON", json.loads) if file.suffix == ".json" else ("TOML", tomllib.loads)
    try:
        return parse(read_text(file), parser), path
    except FileNotFoundError:
        shipped = ", ".join(sorted(recipe.stem for recipe in preset_dir().glob("*.toml")))
        raise ConfigError(
            f"no recipe '{path}': no such file. Shipped recipes: {shipped}; a path ends in .toml"
        ) from None
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except ValueError as error:  # of the parser, or not UTF-8
        raise ConfigError(f"{file}: not {form}: {error}") from None
