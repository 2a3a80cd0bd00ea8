"""A folder of sentence-transformers: the files that say how its model makes the vector of a text.

    modules.json --> Transformer, Pooling, then Dense, LayerNorm and Normalize, in this order
    sentence_bert_config.json, tokenizer_config.json --> the window, lower case
    config_sentence_transformers.json --> prompts, the numbers of a vector that are kept

Older folders and those of version 6 differ in the names of classes and keys; both are read. What the library would
compute and `longnet` does not is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tokenizers
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import normalizers
from torch import Tensor, nn

from longnet_cli.basics.configuration import (
    ModelT,
    parse,
    read_text,
    validate,
    without_none,
)
from longnet_cli.basics.errors import CheckpointError, ConfigError, one_line
from longnet_cli.basics.model_files import (
    CONFIG,
    MODULES,
    PROMPTS,
    TOKENIZER,
    TRANSFORMER_CONFIGS,
    WEIGHTS,
    is_within,
    read_or_empty,
)
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.nets.weights import check_finite

# The library's names of poolings, in the order in which it joins them: ours, and its older keys.
POOLINGS = {
    "cls": ("cls", "pooling_mode_cls_token"),
    "max": ("max", "pooling_mode_max_tokens"),
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "mean_sqrt_len_tokens": ("sqrt", "pooling_mode_mean_sqrt_len_tokens"),
    "weightedmean": ("weighted", "pooling_mode_weightedmean_tokens"),
    "lasttoken": ("last", "pooling_mode_lasttoken"),
}
_ACTIVATIONS = {
    f"{kind.__module__}.{kind.__name__}": kind
    for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)
}
# keys of the Transformer that change no vector, whatever their value
_FREE_KEYS = {"__version__", "backend", "query_expansion", "query_length", "unpad_inputs"}
_Window = Annotated[int, Field(gt=0)] | None
_Size = Annotated[int, Field(gt=0, le=1 << 24)]  # of a layer
_Vectors = Literal["sentence_embedding"]


class _FileKeys(BaseModel):
    """The keys of a file that decide what a vector is, and the values that they may have here."""

    model_config = ConfigDict(strict=True, protected_namespaces=())


class _Module(_FileKeys):
    type: str
    path: str = ""


class _ModuleList(_FileKeys):
    modules: list[_Module]


class _NullableKeys(_FileKeys):
    """Keys whose value may be null, which is as if they were left out."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: dict[str, Any]) -> dict[str, Any]:
        return without_none(data)


class _ModelSettings(_NullableKeys):
    model_type: Literal["SentenceTransformer"] = "SentenceTransformer"
    prompts: dict[str, str | None] = {}
    default_prompt_name: str = ""
    truncate_dim: _Size | None = None


class _TextModality(_FileKeys, extra="forbid"):
    method: Literal["forward"] = "forward"
    method_output_name: Literal["last_hidden_state"] = "last_hidden_state"


class _Modalities(_FileKeys):
    text: _TextModality
    message: None = None


class _Arguments(_FileKeys, extra="forbid"):
    """Arguments of a tokenizer, a model or its configuration: the window, and those that change no vector."""

    model_max_length: _Window = None
    attn_implementation: Any = None
    padding_side: Any = None
    trust_remote_code: Any = None


class _TransformerSettings(_FileKeys, extra="forbid"):
    transformer_task: Literal["feature-extraction"] | None = None
    module_output_name: Literal["token_embeddings"] | None = None
    modality_config: _Modalities | None = None
    max_seq_length: _Window = None
    document_length: _Window = None
    do_lower_case: bool = False
    model_args: _Arguments | None = None
    model_kwargs: _Arguments | None = None
    config_args: _Arguments | None = None
    config_kwargs: _Arguments | None = None
    tokenizer_args: _Arguments = _Arguments()
    processor_kwargs: _Arguments = _Arguments()  # the newer name

    @model_validator(mode="before")
    @classmethod
    def _without_empty_ones(cls, data: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in data.items() if value and key not in _FREE_KEYS}


class _PoolingSettings(_NullableKeys, extra="allow"):
    pooling_mode: list[str] = Field(default=[], min_length=1)
    include_prompt: bool = True

    @field_validator("pooling_mode", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class _NormalizeSettings(_FileKeys):
    module_input_name: _Vectors | None = None
    module_output_name: _Vectors | None = None


class _DenseSettings(_NormalizeSettings):
    in_features: _Size
    out_features: _Size
    bias: bool = True
    use_residual: bool = False
    activation_function: str = "torch.nn.modules.activation.Tanh"


class _LayerNormSettings(_FileKeys):
    dimension: _Size


class Normalize(nn.Module):
    """Scales vectors to length 1."""

    def forward(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1)

    def __repr__(self) -> str:
        return "Normalize"


class Dense(nn.Module):
    """A linear layer and an activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        activation: nn.Module,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.activation = activation

    def forward(self, vectors: Tensor) -> Tensor:
        return self.activation(self.linear(vectors))

    def __repr__(self) -> str:
        sizes = f"{self.linear.in_features}, {self.linear.out_features}"
        return f"{type(self).__name__}({sizes}, {type(self.activation).__name__})"


class Residual(Dense):
    """A linear layer and an activation, beside the input."""

    def __init__(self, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__(inputs, outputs, **options)
        same = inputs == outputs
        self.residual = nn.Identity() if same else nn.Linear(inputs, outputs, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        return super().forward(vectors) + self.residual(vectors)


class LayerNorm(nn.LayerNorm):
    """torch's, shown by its name alone."""

    def __repr__(self) -> str:
        return "LayerNorm"


class FirstNumbers(nn.Module):
    """Keeps the first numbers of vectors."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors[..., : self.size]

    def __repr__(self) -> str:
        return f"FirstNumbers({self.size})"


@dataclass(frozen=True)
class SentenceModel:
    """The way in which a model makes vectors of texts, as sentence-transformers does.

    `pool` names one or several of POOLINGS, joined by `+`. Without `pools_prompt`, the prompt is not pooled. A text has
    `window` tokens or fewer, special ones included; None if the folder does not say. `steps` follow the pooling,
    then vectors have length 1 if they are `normalized`. The prompts are texts, which may be empty. The library's
    encode_document reads `document_prompt`. `note` is a sentence on the way in which texts are read, for users.
    """

    pool: str = "mean"
    pools_prompt: bool = True
    window: int | None = None
    lowercase: bool = False
    steps: tuple[nn.Module, ...] = ()
    normalized: bool = True
    document_prompt: str = ""
    query_prompt: str | None = None
    note: str = ""
    of_folder: bool = True  # whether the folder says all this

    @property
    def modules(self) -> str:
        """The pooling and what follows it, for settings and metadata: `Pooling Dense(384, 64, Tanh) LayerNorm`."""
        return " ".join(["Pooling", *map(repr, self.steps)])


def read_sentence_model(folder: Path) -> SentenceModel:
    """Return what modules.json and the other files of a folder say.

    Raises ConfigError for what `longnet` does not compute, CheckpointError for a damaged or missing file.
    """
    where = folder / MODULES
    modules = validate(_ModuleList, {"modules": _data(where)}, str(where)).modules
    kinds = [_kind(where, module.type) for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise ConfigError(f"{where}: a Transformer and a Pooling must come first, not {kinds}")
    if outside := [module.path for module in modules if not is_within(module.path)]:
        raise ConfigError(f"{where}: the module in {outside[0]} is outside of the folder")
    transformer, pooling, *others = modules
    pool, pools_prompt = _pooling(folder / pooling.path / CONFIG)
    steps = [
        _MODULES[kind](folder / module.path) for kind, module in zip(kinds[2:], others, strict=True)
    ]
    window, lowercase = _transformer(folder / transformer.path)
    settings = _read(_ModelSettings, folder / PROMPTS, {})
    prompts = {name: text for name, text in settings.prompts.items() if text}
    # the library always has a prompt `document`, an empty one at least, so its encode_document never takes another
    for_documents = ("document", "passage", "corpus", settings.default_prompt_name)
    first = next((name for name in for_documents if name in prompts), "document")
    note = ""
    if first != "document":
        note = (
            f"the prompt {prompts[first]!r} is not read, as in encode_document of sentence-transformers: --prefix "
            "reads it"
        )
    normalized = False
    # the library cuts a vector after it has scaled it
    if settings.truncate_dim:
        steps.append(FirstNumbers(settings.truncate_dim))
    elif kinds[-1] == "Normalize":
        steps.pop()
        normalized = True
    return SentenceModel(
        pool=pool,
        pools_prompt=pools_prompt,
        window=window,
        lowercase=lowercase,
        steps=tuple(steps),
        normalized=normalized,
        document_prompt=prompts.get("document", ""),
        query_prompt=prompts.get("query"),
        note=note,
    )


def plain_model(folder: Path) -> SentenceModel:
    """Return how texts are read from a folder without modules.json: the mean over all tokens, special ones included."""
    window, _ = _transformer(folder)
    note = f"there is no {MODULES}: the vector is the mean over all tokens of a text, special ones included"
    return SentenceModel(window=window, note=note, of_folder=False)


def read_tokenizer(folder: Path, lowercase: bool) -> Tokenizer:
    """Return the tokenizer of a folder as transformers builds it: with the template of its settings, and its specials.

    Raises CheckpointError for a folder whose tokenizer the library cannot build.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (folder / TOKENIZER).is_file() and not (folder / "tokenizer_config.json").is_file():
            # without settings, the library would make a tokenizer of the architecture's kind, whatever the file holds
            library: Any = PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER))
        else:
            library = AutoTokenizer.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
            )
        inner = library.backend_tokenizer
    except Exception as error:  # the library raises exceptions of many kinds
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be read: {one_line(error)[:300]}"
        ) from None
    if "token_type_ids" in library.model_input_names and any(inner.encode("a").type_ids):
        raise ConfigError(
            f"{folder}: its tokenizer gives a text several types of token (token_type_ids): one is read"
        )
    tokenizer = lowercased(Tokenizer(inner)) if lowercase else Tokenizer(inner)
    tokenizer.splits_special = bool(library.split_special_tokens)
    tokenizer.special_ids = frozenset(library.all_special_ids)
    return tokenizer


def lowercased(tokenizer: Tokenizer) -> Tokenizer:
    """Return the same tokenizer after a step that lowercases, unless it has one."""
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    if not re.search("Lowercase|lowercase=True", str(inner.normalizer)):
        steps = [] if inner.normalizer is None else [inner.normalizer]
        inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])
    return Tokenizer(inner)


def _kind(where: Path, name: str) -> str:
    """Return the kind of a module by the last word of its type. Raises ConfigError for one that is not computed."""
    library, _, kind = name.rpartition(".")
    computed = ["Transformer", "Pooling", *_MODULES]
    if not library.startswith("sentence_transformers") or kind not in computed:
        raise ConfigError(
            f"{where}: longnet does not compute the module {name}: it knows {', '.join(computed)}"
        )
    return kind


def _pooling(path: Path) -> tuple[str, bool]:
    """Return the poolings that a configuration names, and whether prompts are pooled."""
    settings = _read(_PoolingSettings, path)
    keys = dict(settings)
    of_older_keys = [mode for mode, (_, key) in POOLINGS.items() if keys.get(key)]
    modes = settings.pooling_mode or of_older_keys or ["mean"]
    if unknown := [mode for mode in modes if mode not in POOLINGS]:
        raise ConfigError(f"{path}: longnet does not know the pooling {unknown}")
    pool = "+".join(POOLINGS[mode][0] for mode in modes)
    return pool, settings.include_prompt


def _dense(folder: Path) -> nn.Module:
    settings = _read(_DenseSettings, folder / CONFIG)
    name = settings.activation_function
    if name not in _ACTIVATIONS:
        raise ConfigError(f"{folder / CONFIG}: longnet does not know the activation {name}")
    kind = Residual if settings.use_residual else Dense
    with torch.device("meta"):
        dense = kind(
            settings.in_features,
            settings.out_features,
            bias=settings.bias,
            activation=_ACTIVATIONS[name](),
        )
    return _loaded(dense, folder)


def _layer_norm(folder: Path) -> nn.Module:
    settings = _read(_LayerNormSettings, folder / CONFIG)
    return _loaded(LayerNorm(settings.dimension, device="meta"), folder, "norm.")


def _normalize(folder: Path) -> nn.Module:
    _read(_NormalizeSettings, folder / CONFIG, {})
    return Normalize()


_MODULES = {"Dense": _dense, "LayerNorm": _layer_norm, "Normalize": _normalize}


def _loaded(module: nn.Module, folder: Path, prefix: str = "") -> nn.Module:
    """Return a module without memory with the weights in a folder. Raises CheckpointError if these are not its own."""
    path = folder / WEIGHTS
    try:
        weights = {
            name.removeprefix(prefix): tensor.float() for name, tensor in load_file(path).items()
        }
        module.load_state_dict(weights, assign=True)
    except FileNotFoundError:
        pickled = "; pickled weights are never read, since a pickle can run code"
        more = pickled if any(folder.glob("*.bin")) else ""
        raise CheckpointError(f"{path} is missing: its module needs it{more}") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be loaded: {one_line(error)}") from None
    check_finite(weights, str(path))
    return module.eval().requires_grad_(False)


def _transformer(folder: Path) -> tuple[int | None, bool]:
    """Return the window of the Transformer, and whether it lowercases. Raises ConfigError for other ways to read."""
    there = [name for name in TRANSFORMER_CONFIGS if (folder / name).is_file()]
    path = folder / next(iter(there), TRANSFORMER_CONFIGS[0])
    settings = _read(_TransformerSettings, path, {})
    of_tokenizer = read_or_empty(folder / "tokenizer_config.json", dict).get("model_max_length")
    sizes = (
        settings.document_length,
        settings.processor_kwargs.model_max_length,
        settings.tokenizer_args.model_max_length,
        settings.max_seq_length,
        of_tokenizer,
    )
    window = next(filter(None, sizes), None)  # the first one that is there counts
    if not isinstance(window, int) or window >= 1 << 40:
        window = None
    return window, settings.do_lower_case


def _read(cls: type[ModelT], path: Path, default: Any = ...) -> ModelT:
    """Return the settings in a file, `default` for a missing one. Raises ConfigError for values of another kind."""
    return validate(cls, _data(path, default), str(path))


def _data(path: Path, default: Any = ...) -> Any:
    """Return the data in a JSON file; `default` for a missing one. Raises CheckpointError."""
    try:
        return parse(read_text(path))
    except FileNotFoundError:
        if default is not ...:
            return default
        raise CheckpointError(f"{path} is missing, and {MODULES} names it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from None
