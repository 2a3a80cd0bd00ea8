"""Folders of transformers models with a pattern: the Auto classes open them, other tools cannot open them by mistake.

A tool that does not know dilated attention would run such a model dense, without a warning. So its config.json has a
`model_type` and `architectures` that no library knows. The type is the import line to add, because the error message of
transformers shows nothing else of a folder:

    The checkpoint you are trying to load has model type `import longnet_cli.integrations.transformers` but ...

A model class of transformers (LlamaForCausalLM) does not look at the type. It fails because config.json names the
attention "dilated", which is not registered without the import.

After that import, AutoConfig returns the model's own configuration, and AutoModel, AutoModelForCausalLM and
AutoModelForMaskedLM return models on which `use_dilated_attention` was called. In memory, a configuration has
the model's own type. Its class is a subclass that writes the file as above.

`write_folder` writes such a folder: files get their names when all of them are complete.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import transformers as hf
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.basics.atomic import whole_folder
from longnet_cli.basics.configuration import parse, read_text
from longnet_cli.basics.digests import json_sha256
from longnet_cli.basics.errors import ConfigError, LongNetError, is_out_of_memory, one_line
from longnet_cli.basics.model_files import BESIDE_TOKENIZER, CONFIG, GENERATION, TOKENIZER
from longnet_cli.nets.config import MOST_LAYERS

DILATED_TYPE = "import longnet_cli.integrations.transformers"
ATTENTION_NAME = "dilated"  # the name of the attention
_OWN_TYPE = "dilated_model_type"  # key of the model's own type in such a file
_PREFIX = "Dilated"  # of the names in `architectures`
_PATTERN = "dilated_attention"
_ATTENTION = "attn_implementation"
_OWN_CLASS = "_own_class"  # attribute of a marked configuration class: the original class

Prepare = Callable[[hf.PreTrainedModel], Any]


def to_file(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a model with these settings. With a pattern, its type is DILATED_TYPE.

    Any tool can run a dense pattern: such settings stay as they are, and so do settings without a pattern.
    """
    pattern = settings.get(_PATTERN)
    if (
        not pattern
        or Pattern(**pattern) == Pattern.dense()
        or settings.get("model_type") == DILATED_TYPE
    ):
        return dict(settings)
    names = [_PREFIX + name for name in settings.get("architectures") or []]
    changed = {
        "model_type": DILATED_TYPE,
        _OWN_TYPE: settings["model_type"],
        "architectures": names or None,
    }
    return {**settings, **changed, _ATTENTION: ATTENTION_NAME}


def from_file(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `to_file`; other configurations stay as they are."""
    restored = dict(settings)
    if restored.get("model_type") == DILATED_TYPE:
        restored.pop(_ATTENTION, None)
        restored["model_type"] = restored.pop(_OWN_TYPE, None)
        restored["architectures"] = [
            name.removeprefix(_PREFIX) for name in restored.get("architectures") or []
        ] or None
    return restored


def with_infinities(data: Any) -> Any:
    """Return settings with the floats that transformers writes as {"__float__": "Infinity"}, as JSON has none."""
    if isinstance(data, Mapping):
        if [*data] == ["__float__"] and data["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(data["__float__"])
        return {name: with_infinities(x) for name, x in data.items()}
    return [with_infinities(x) for x in data] if isinstance(data, list) else data


def read_architecture(
    folder: Path, settings: Mapping[str, Any], embeds: bool = False
) -> tuple[Any, Any]:
    """Return (configuration, class) of a folder's model, whose config.json has these keys.

    If it `embeds`, the class is that of AutoModel. Code of the folder's own (auto_map) is never run. Raises ConfigError
    where transformers has no class.
    """
    _check_settings(folder / CONFIG, settings)
    if (generation := folder / GENERATION).is_file() and not isinstance(_json(generation), dict):
        raise ConfigError(f"{generation}: not a JSON object: remove it, or write one again")
    data = {
        key: x for key, x in from_file(_without_attention(settings)).items() if key not in _OF_CALLS
    }
    kind = data.get("model_type")
    name = (data.get("architectures") or [None])[0]
    code = data.pop("auto_map", None)
    settings_class = hf.CONFIG_MAPPING[kind] if kind in hf.CONFIG_MAPPING else None  # noqa: SIM401 (`get` loads no class)
    architecture: Any = getattr(hf, str(name), None)
    if embeds:
        architecture = settings_class and hf.MODEL_MAPPING.get(settings_class, None)
    is_model = isinstance(architecture, type) and issubclass(architecture, hf.PreTrainedModel)
    if (
        not settings_class
        or not is_model
        or not (
            architecture.config_class is settings_class
            or embeds
            or hf.MODEL_FOR_CAUSAL_LM_MAPPING.get(settings_class, None) is architecture
        )
    ):
        what = f"does not know the architecture {name} (model_type {kind})"
        instead = ", and code of the folder's own (auto_map) is never run" if code else ""
        raise ConfigError(f"{folder}: transformers {hf.__version__} {what}{instead}")
    with refusing_settings(folder / CONFIG):
        config = hf.CONFIG_MAPPING[kind].from_dict(with_infinities(data))
        config.get_text_config().to_dict()  # as others will ask it
        return config, architecture


@contextmanager
def refusing_settings(where: Path) -> Iterator[None]:
    """Turn what transformers raises for the settings of a folder into one line: its classes check as they like."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or (
            isinstance(error, LongNetError) and not isinstance(error, ConfigError)
        ):
            raise
        says_little = type(error).__module__ == "builtins" and not isinstance(error, ValueError)
        kind = f"{type(error).__name__}: " if says_little else ""
        raise ConfigError(f"{where}: {kind}{one_line(error)}") from None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# keys of config.json that are read by us, or that many classes read without a look: a test, and what it asks for
_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_type": (lambda x: isinstance(x, str), "a text"),
    "architectures": (
        lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x),
        "a list of names",
    ),
    "text_config": (lambda x: isinstance(x, dict), "an object"),
    "num_hidden_layers": (
        lambda x: _is_whole(x) and x <= MOST_LAYERS,
        f"a whole number, and {MOST_LAYERS:,} are the most",
    ),
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
        ),
        (lambda x: not _is_whole(x) or x > 0, "positive"),
    ),
    "max_position_embeddings": (lambda x: not _is_whole(x) or x < 1 << 63, "less than 2^63"),
}
_OF_CALLS = (
    "return_dict",
    "torchscript",
    "output_attentions",
    "output_hidden_states",
)  # what a call returns


def _json(path: Path) -> Any:
    try:
        return parse(read_text(path))
    except (OSError, ValueError):
        return None


def _check_settings(where: Path, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first key of a config.json, or of its text_config, that has an impossible value."""
    for key, (test, needed) in _KEYS.items():
        if settings.get(key) is not None and not test(settings[key]):
            shown = json.dumps(settings[key])
            raise ConfigError(f"{where}: {key} is {shown:.60}: it must be {needed}")
    if settings.get("text_config"):
        _check_settings(where, settings["text_config"])


def _without_attention(data: Any) -> Any:
    """Drop the attention that a file names: it would replace the requested one, and may be code from a hub."""
    if isinstance(data, Mapping):
        names = [name for name in data if not name.startswith(("attn_impl", "_attn_impl"))]
        return {name: _without_attention(data[name]) for name in names}
    return [_without_attention(item) for item in data] if isinstance(data, list) else data


def mark(config: Any) -> None:
    """Make a configuration save itself through `to_file`, in place: its class becomes a subclass of the same name."""
    if isinstance(config, hf.PretrainedConfig) and not hasattr(type(config), _OWN_CLASS):
        own: Any = type(config)
        config.__class__ = _marked(own)


def unmark(config: Any) -> None:
    """Undo `mark`, in place."""
    config.__class__ = getattr(type(config), _OWN_CLASS, type(config))


@cache
def _marked(own: type) -> type:
    """Return a subclass of the configuration class `own` that saves itself through `to_file`."""

    def to_json_file(self: Any, json_file_path: str | Path, use_diff: bool = True) -> None:
        data = to_file(json.loads(self.to_json_string(use_diff=use_diff)))
        Path(json_file_path).write_text(
            json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )

    def reduce(
        self: Any,
    ) -> tuple[Any, ...]:  # for pickle and deepcopy, which would look for the class by its name
        return _restored, (own, self.__dict__)

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(
        own.__name__,
        (own,),
        {**names, _OWN_CLASS: own, "to_json_file": to_json_file, "__reduce__": reduce},
    )


def _restored(own: Any, attributes: dict[str, Any]) -> Any:
    config: Any = object.__new__(_marked(own))
    config.__dict__.update(attributes)
    return config


def register(prepare: Prepare) -> None:
    """Let the Auto classes open such folders with the attention `dilated`, and call `prepare` on each model."""

    class DilatedConfig(hf.PretrainedConfig):
        """An entry point for AutoConfig: `from_dict` returns a configuration of the model's own type."""

        model_type = DILATED_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
            """Return a marked configuration of the model's own class. Raises ConfigError for an unknown type."""
            data = from_file(config_dict)
            kind = data.get("model_type")
            if kind not in hf.CONFIG_MAPPING:
                raise ConfigError(
                    f"transformers {hf.__version__} does not know the model type {kind!r}"
                )
            returned = hf.CONFIG_MAPPING[kind].from_dict(
                {**data, _ATTENTION: ATTENTION_NAME}, **options
            )
            config = returned[0] if isinstance(returned, tuple) else returned
            own: Any = type(config)
            mark(config)
            marked: Any = type(config)
            _register_models(own, marked, prepare)
            return returned

    hf.AutoConfig.register(DILATED_TYPE, DilatedConfig)


@cache
def _register_models(own: type, marked: type, prepare: Prepare) -> None:
    """Let the Auto classes build the models of `own` for `marked` configurations too, and call `prepare` on them."""
    for auto, models in (
        (hf.AutoModel, hf.MODEL_MAPPING),
        (hf.AutoModelForCausalLM, hf.MODEL_FOR_CAUSAL_LM_MAPPING),
        (hf.AutoModelForMaskedLM, hf.MODEL_FOR_MASKED_LM_MAPPING),
    ):
        if own in models and isinstance(models[own], type):
            auto.register(marked, _prepared(models[own], prepare), exist_ok=True)


def _prepared(own: type, prepare: Prepare) -> type:
    """Return a subclass of `own` whose `from_pretrained` calls `prepare` on models with our attention."""

    def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
        returned = own.from_pretrained(*args, **options)  # type: ignore[attr-defined]
        model = returned[0] if isinstance(returned, tuple) else returned
        asked = model.config._attn_implementation
        if asked == ATTENTION_NAME:
            prepare(model)
        else:
            warnings.warn(
                f"{model.name_or_path}: attn_implementation={asked!r} runs it dense, without its pattern; leave it out",
                stacklevel=2,
            )
        return returned

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (own,), {**names, "from_pretrained": classmethod(from_pretrained)})


ADAPTER = "adapter"  # a subfolder: beside the model's files, transformers would take the model for an adapter


def write_folder(
    model: hf.PreTrainedModel,
    folder: Path,
    state: Mapping[str, Tensor],
    tokenizer_json: str,
    source: Path | None,
    *,
    dense: bool = False,
) -> None:
    """Write config.json, model.safetensors with the float32 weights `state`, and the tokenizer, to `folder`.

    `source` is the folder that the model came from. If its tokenizer is the same, the files beside it are copied too.
    `dense` leaves the pattern out of config.json. Raises LongNetError if the folder cannot be written.
    """
    try:
        with whole_folder(folder, CONFIG) as place:
            model.save_pretrained(place, state_dict=dict(state), max_shard_size=1 << 62)
            settings = json.loads((place / CONFIG).read_text(encoding="utf-8"))
            settings["dtype"] = "float32"
            if dense:
                settings = from_file(settings)
                settings.pop(_PATTERN, None)
            (place / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            (place / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
            if source and _same_tokenizer(source / TOKENIZER, tokenizer_json):
                for name in (*BESIDE_TOKENIZER, TOKENIZER):
                    if (source / name).is_file():
                        shutil.copyfile(source / name, place / name)
    except LongNetError as error:
        cause = getattr(error.__cause__, "strerror", None) or error.__cause__ or error
        raise LongNetError(f"{folder}: cannot write the model: {cause}") from None


def _same_tokenizer(path: Path, text: str) -> bool:
    try:
        return json_sha256(parse(read_text(path))) == json_sha256(json.loads(text))
    except (OSError, ValueError):
        return False
