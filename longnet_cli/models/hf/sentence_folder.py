"""A folder of sentence-transformers: the files that say how its model makes the vector of a text.

    modules.json --> Transformer, Pooling, then Dense, LayerNorm and Normalize, in this order
    sentence_bert_config.json, tokenizer_config.json --> the window, lower case
    config_sentence_transformers.json --> prompts, the numbers of a vector that are kept

Older folders and those of version 6 differ in the names of classes and keys; both are read. What the library would
compute and `longnet` does not is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import normalizers
from torch import Tensor, nn

from longnet_cli.basics.configuration import parse, read_text
from longnet_cli.basics.errors import CheckpointError, ConfigError, one_line
from longnet_cli.basics.model_files import (
    CONFIG,
    MODULES,
    PROMPTS,
    TOKENIZER,
    TRANSFORMER_CONFIGS,
    WEIGHTS,
    is_within,
)
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.nets.weights import check_finite

# the names of poolings: the library's, in the order in which it joins them, and its older keys
POOLINGS = {
    "cls": ("cls", "pooling_mode_cls_token"),
    "max": ("max", "pooling_mode_max_tokens"),
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "sqrt": ("mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens"),
    "weighted": ("weightedmean", "pooling_mode_weightedmean_tokens"),
    "last": ("lasttoken", "pooling_mode_lasttoken"),
}
_ACTIVATIONS = {
    module.__name__: module
    for module in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)
}
_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
# keys of the Transformer that change no vector, whatever their value
_FREE_KEYS = {
    "backend",
    "max_seq_length",
    "modality_config",
    "module_output_name",
    "query_length",
    "unpad_inputs",
}
_FREE_KEYS |= {
    "do_lower_case",
    "document_length",
    "query_expansion",
    "transformer_task",
    "__version__",
}
_FREE_ARGUMENTS = {"attn_implementation", "model_max_length", "padding_side", "trust_remote_code"}
_TOKENIZER_ARGUMENTS = ("processor_kwargs", "tokenizer_args")  # the names that this key has had


class Normalize(nn.Module):
    """Scales vectors to length 1."""

    def forward(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1)

    def __repr__(self) -> str:
        return "Normalize"


class Dense(nn.Module):
    """A linear layer and an activation, with `residual` beside the input."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, activation: nn.Module, residual: bool
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.activation = activation
        self.adds = residual
        self.residual = (
            nn.Linear(inputs, outputs, bias=False)
            if residual and inputs != outputs
            else nn.Identity()
        )

    def forward(self, vectors: Tensor) -> Tensor:
        output = self.activation(self.linear(vectors))
        return output + self.residual(vectors) if self.adds else output

    def __repr__(self) -> str:
        kind = "Residual" if self.adds else "Dense"
        return f"{kind}({self.linear.in_features}, {self.linear.out_features}, {type(self.activation).__name__})"


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
    encode_document reads `document_prompt`; `unread_prompt` is one that the folder has for documents, or for all texts,
    which it does not read.
    """

    pool: str = "mean"
    pools_prompt: bool = True
    window: int | None = None
    lowercase: bool = False
    steps: tuple[nn.Module, ...] = ()
    normalized: bool = True
    document_prompt: str = ""
    query_prompt: str | None = None
    unread_prompt: str = ""
    of_folder: bool = True  # whether the folder says all this

    @property
    def modules(self) -> str:
        """The pooling and what follows it, for settings and metadata: `Pooling Dense(384, 64, Tanh) LayerNorm`."""
        return " ".join(
            [
                "Pooling",
                *("LayerNorm" if isinstance(x, nn.LayerNorm) else repr(x) for x in self.steps),
            ]
        )


def read_sentence_model(folder: Path) -> SentenceModel | None:
    """Return what the files of a folder say; None for a folder without modules.json, or with one of `longnet`'s.

    Raises ConfigError for what `longnet` does not compute, CheckpointError for a damaged or missing file.
    """
    with _odd_values(folder):
        modules = _json(folder / MODULES, None)
        if modules is None:
            return None
        kinds = [_kind(folder, module) for module in modules] if isinstance(modules, list) else []
        if kinds == ["longnet"]:
            return None
        if kinds[:2] != ["Transformer", "Pooling"]:
            raise ConfigError(
                f"{folder / MODULES}: a Transformer and a Pooling must come first, not {kinds or modules!r}"
            )
        names = [str(module.get("path", "")) for module in modules]
        if outside := [name for name in names if not is_within(name)]:
            raise ConfigError(
                f"{folder / MODULES}: the module in {outside[0]} is outside of the folder"
            )
        places = [folder / name for name in names]
        pool, pools_prompt = _pooling(places[1] / CONFIG)
        steps = [_MODULES[kind](place) for kind, place in zip(kinds[2:], places[2:], strict=True)]
        window, lowercase = _transformer(places[0])
        settings = _json(folder / PROMPTS, {})
        _refuse_value(folder / PROMPTS, settings, "model_type", "SentenceTransformer")
        prompts = _prompts(folder, settings)
        # the library always has a prompt `document`, an empty one at least, so its encode_document never takes another
        fallbacks = (
            ()
            if prompts.get("document")
            else ("passage", "corpus", settings.get("default_prompt_name"))
        )
        # the library cuts a vector after it has scaled it
        if settings.get("truncate_dim") is not None:
            steps.append(FirstNumbers(_whole(folder / PROMPTS, settings, "truncate_dim")))
        normalized = bool(steps) and isinstance(steps[-1], Normalize)
        return SentenceModel(
            pool=pool,
            pools_prompt=pools_prompt,
            window=window,
            lowercase=lowercase,
            steps=tuple(steps[:-1] if normalized else steps),
            normalized=normalized,
            document_prompt=prompts.get("document", ""),
            query_prompt=prompts.get("query") or None,
            unread_prompt=next((prompts[name] for name in fallbacks if prompts.get(name)), ""),
        )


@contextmanager
def _odd_values(folder: Path) -> Iterator[None]:
    """Raise CheckpointError for values of other types than the library writes, where reading trips over them."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = one_line(error)[:200]
        raise CheckpointError(
            f"{folder}: what it says for sentence-transformers cannot be read: {reason}"
        ) from None


def plain_model(folder: Path) -> SentenceModel:
    """Return how texts are read from a folder without modules.json: the mean over all tokens, special ones included."""
    with _odd_values(folder):
        window, _ = _transformer(folder)
    return SentenceModel(window=window, of_folder=False)


def read_words(folder: Path, lowercase: bool) -> Tokenizer:
    """Return the tokenizer of a folder as transformers builds it: with the template of its settings, and its specials.

    Raises CheckpointError for a folder whose tokenizer the library cannot build.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (folder / TOKENIZER).is_file() and not (folder / "tokenizer_config.json").is_file():
            # without settings, the library would make a tokenizer of the architecture's kind, whatever the file holds
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER))
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        inner = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # the library raises exceptions of many kinds
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be read: {one_line(error)[:300]}"
        ) from None
    if "token_type_ids" in tokenizer.model_input_names and any(inner.encode("a").type_ids):
        raise ConfigError(
            f"{folder}: its tokenizer gives a text several types of token (token_type_ids): one is read"
        )
    words = lowercased(Tokenizer(inner)) if lowercase else Tokenizer(inner)
    words.splits_special = bool(tokenizer.split_special_tokens)
    words.special_ids = frozenset(tokenizer.all_special_ids)
    return words


def lowercased(words: Tokenizer) -> Tokenizer:
    """Return the same tokenizer after a step that lowercases, unless it has one."""
    inner = tokenizers.Tokenizer.from_str(words.to_json())
    if "Lowercase" not in str(inner.normalizer) and "lowercase=True" not in str(inner.normalizer):
        steps = [] if inner.normalizer is None else [inner.normalizer]
        inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])
    return Tokenizer(inner)


def _kind(folder: Path, module: Any) -> str:
    """Return the kind of a module by the last word of its type. Raises ConfigError for one that is not computed."""
    name = str(module.get("type")) if isinstance(module, Mapping) else repr(module)
    if name.startswith("longnet_cli."):
        return "longnet"
    kind = name.rpartition(".")[2]
    if not name.startswith("sentence_transformers.") or kind not in {
        "Transformer",
        "Pooling",
        *_MODULES,
    }:
        computed = ", ".join(["Transformer", "Pooling", *_MODULES])
        raise ConfigError(
            f"{folder / MODULES}: longnet does not compute the module {name}: it knows {computed}"
        )
    return kind


def _pooling(path: Path) -> tuple[str, bool]:
    """Return the poolings that a configuration names, and whether prompts are pooled."""
    settings = _json(path)
    modes = settings.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, key in POOLINGS.values() if settings.get(key)] or ["mean"]
    names = {mode: name for name, (mode, _) in POOLINGS.items()}
    modes = modes if isinstance(modes, list) else [modes]
    if not modes or (unknown := [mode for mode in modes if mode not in names]):
        raise ConfigError(
            f"{path}: longnet does not know the pooling {unknown[0] if modes else modes!r}"
        )
    return "+".join(names[mode] for mode in modes), settings.get(
        "include_prompt", True
    ) is not False


def _dense(folder: Path) -> nn.Module:
    path = folder / CONFIG
    settings = _json(path)
    _check_names(path, settings)
    name = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = _ACTIVATIONS.get(name.rpartition(".")[2])
    if activation is None or not name.startswith("torch.nn.modules."):
        raise ConfigError(f"{path}: longnet does not know the activation {name}")
    sizes = [_whole(path, settings, key) for key in ("in_features", "out_features")]
    bias = settings.get("bias", True) is not False
    residual = bool(settings.get("use_residual"))
    return _loaded(Dense(*sizes, bias=bias, activation=activation(), residual=residual), folder)


def _layer_norm(folder: Path) -> nn.Module:
    size = _whole(folder / CONFIG, _json(folder / CONFIG), "dimension")
    return _loaded(nn.LayerNorm(size), folder, "norm.")


def _normalize(folder: Path) -> nn.Module:
    _check_names(folder / CONFIG, _json(folder / CONFIG, {}))
    return Normalize()


_MODULES = {"Dense": _dense, "LayerNorm": _layer_norm, "Normalize": _normalize}


def _loaded(module: nn.Module, folder: Path, prefix: str = "") -> nn.Module:
    """Return a module with the weights in a folder. Raises CheckpointError for missing, surplus or other ones."""
    path = folder / WEIGHTS
    try:
        weights = {
            name.removeprefix(prefix): tensor.float() for name, tensor in load_file(path).items()
        }
        module.load_state_dict(weights)
    except FileNotFoundError:
        pickled = (
            "; pickled weights are never read, since a pickle can run code"
            if any(folder.glob("*.bin"))
            else ""
        )
        raise CheckpointError(f"{path} is missing: its module needs it{pickled}") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be loaded: {one_line(error)}") from None
    check_finite(weights, str(path))
    return module.eval().requires_grad_(False)


def _transformer(folder: Path) -> tuple[int | None, bool]:
    """Return the window of the Transformer, and whether it lowercases. Raises ConfigError for other ways to read."""
    path = next(
        (folder / name for name in TRANSFORMER_CONFIGS if (folder / name).is_file()),
        folder / CONFIG,
    )
    settings = {} if path.name == CONFIG else _json(path)
    _refuse_value(path, settings, "transformer_task", "feature-extraction")
    _refuse_value(path, settings, "module_output_name", "token_embeddings")
    if (modalities := settings.get("modality_config")) is not None and (
        "message" in modalities or {**_TEXT, **modalities.get("text", {"method": None})} != _TEXT
    ):
        raise ConfigError(
            f"{path}: longnet reads texts by forward and last_hidden_state, not by {modalities}"
        )
    window = _whole(path, settings, "max_seq_length", None)
    for key, value in settings.items():
        if key in _TOKENIZER_ARGUMENTS and isinstance(value, Mapping):
            window = _whole(path, value, "model_max_length", window)
        if key.endswith(("_args", "_kwargs")) and isinstance(value, Mapping):
            value = {
                name: setting for name, setting in value.items() if name not in _FREE_ARGUMENTS
            }
        if value and key not in _FREE_KEYS:
            raise ConfigError(f"{path}: longnet does not know what {key} does: {value}")
    if window is None:
        window = _json(folder / "tokenizer_config.json", {}).get("model_max_length")
    # the library's rule: it replaces the other
    window = _whole(path, settings, "document_length", window)
    return window if isinstance(window, int) and window < 1 << 40 else None, bool(
        settings.get("do_lower_case")
    )


def _whole(path: Path, settings: Mapping[str, Any], key: str, default: Any = ...) -> Any:
    """Return a number of 1 or more, and at most 2^24 unless it has a default. Raises ConfigError for other values."""
    number = settings.get(key)
    if number is None and default is not ...:
        return default
    if (
        not isinstance(number, int)
        or isinstance(number, bool)
        or number < 1
        or (default is ... and number > 1 << 24)
    ):
        raise ConfigError(f"{path}: {key} must be a whole number from 1 on, not {number!r}")
    return number


def _prompts(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the prompts of a folder by name; a null is an empty one. Raises ConfigError for one that is no text."""
    prompts = settings.get("prompts") or {}
    for name, prompt in prompts.items():
        if not isinstance(prompt, str | None):
            raise ConfigError(f"{folder / PROMPTS}: the prompt {name!r} is no text: {prompt!r}")
    return {name: prompt or "" for name, prompt in prompts.items()}


def _check_names(path: Path, settings: Mapping[str, Any]) -> None:
    for key in ("module_input_name", "module_output_name"):
        _refuse_value(path, settings, key, "sentence_embedding")


def _refuse_value(path: Path, settings: Mapping[str, Any], key: str, only: str) -> None:
    if settings.get(key) not in (None, only):
        raise ConfigError(f"{path}: longnet computes {only} for {key}, not {settings[key]!r}")


def _json(path: Path, default: Any = ...) -> Any:
    """Return the data in a JSON file; `default` for a missing one. Raises CheckpointError."""
    try:
        data = parse(read_text(path))
    except FileNotFoundError:
        if default is not ...:
            return default
        raise CheckpointError(f"{path} is missing, and {MODULES} names it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from None
    if path.name != MODULES and not isinstance(data, dict):
        raise CheckpointError(f"{path}: a table of settings is needed")
    return data
