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
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import transformers as hf
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.basics.atomic import whole_folder
from longnet_cli.basics.configuration import validate
from longnet_cli.basics.errors import CheckpointError, ConfigError, is_out_of_memory, one_line
from longnet_cli.basics.model_files import (
    BESIDE_TOKENIZER,
    CONFIG,
    GENERATION,
    TOKENIZER,
    copy_files,
    read_or_empty,
)
from longnet_cli.basics.sizes import MAX_SIZE
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
    if not pattern or Pattern(**pattern) == Pattern.dense():
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
    return hf.PretrainedConfig._decode_special_floats(data)  # it has no public name


def read_architecture(
    folder: Path,
    settings: Mapping[str, Any],
    embeds: bool = False,
) -> tuple[Any, Any]:
    """Return (configuration, class) of a folder's model, whose config.json has these keys.

    If it `embeds`, the class is that of AutoModel. Code of the folder's own (auto_map) is never run. Raises ConfigError
    where transformers has no class.
    """
    where = folder / CONFIG
    validate(_CheckedKeys, settings, str(where))
    generation = folder / GENERATION
    if generation.is_file() and not read_or_empty(generation, dict):
        raise ConfigError(f"{generation}: not a JSON object: remove it, or write one again")
    data = from_file(_without_calls(settings))
    code = data.pop("auto_map", None)
    kind = data.get("model_type")
    name = (data.get("architectures") or [None])[0]
    architecture = _class_of(kind, name, embeds)
    if architecture is None:
        what = f"does not know the architecture {name} (model_type {kind})"
        instead = ", and code of the folder's own (auto_map) is never run" if code else ""
        raise ConfigError(f"{folder}: transformers {hf.__version__} {what}{instead}")
    with refusing_settings(where):
        config: Any = hf.CONFIG_MAPPING[kind].from_dict(with_infinities(data))
        config.get_text_config().to_dict()  # as others will ask it
        return config, architecture


def _class_of(kind: str | None, name: str | None, embeds: bool) -> Any:
    """Return the class for a model of this type: AutoModel's, or the named one if it takes the settings; or None."""
    if kind not in hf.CONFIG_MAPPING:
        return None
    settings_class = hf.CONFIG_MAPPING[kind]
    if embeds:
        found = hf.MODEL_MAPPING.get(settings_class, None)
        return found if isinstance(found, type) else None
    named = getattr(hf, str(name), None)
    if getattr(named, "config_class", None) is settings_class:
        return named
    of_auto = hf.MODEL_FOR_CAUSAL_LM_MAPPING.get(settings_class, None)
    return of_auto if of_auto is named else None


@contextmanager
def refusing_settings(where: Path) -> Iterator[None]:
    """Turn what transformers raises for the settings of a folder into one line: its classes check as they like."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, CheckpointError):
            raise
        says_little = type(error).__module__ == "builtins" and not isinstance(error, ValueError)
        kind = f"{type(error).__name__}: " if says_little else ""
        raise ConfigError(f"{where}: {kind}{one_line(error)}") from None


_Count = Annotated[int | None, Field(gt=0)]


class _CheckedKeys(BaseModel):
    """Keys of config.json that are read here, or whose values classes of transformers take without a look."""

    model_config = ConfigDict(strict=True)

    model_type: str | None = None
    architectures: list[str] | None = None
    text_config: _CheckedKeys | None = None
    num_hidden_layers: int | None = Field(default=None, le=MOST_LAYERS)
    vocab_size: _Count = None
    hidden_size: _Count = None
    num_attention_heads: _Count = None
    num_key_value_heads: _Count = None
    max_position_embeddings: int | None = Field(default=None, le=MAX_SIZE)


# keys that begin so: of the attention, and of what a call returns
_OF_CALLS = (
    *("attn_impl", "_attn_impl"),
    *("return_dict", "torchscript", "output_attentions", "output_hidden_states"),
)


def _without_calls(data: Any) -> Any:
    """Drop what a file says of calls. Its attention would replace the requested one, and may be code from a hub."""
    if isinstance(data, Mapping):
        names = [name for name in data if not name.startswith(_OF_CALLS)]
        return {name: _without_calls(data[name]) for name in names}
    return [_without_calls(item) for item in data] if isinstance(data, list) else data


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

    # For pickle and deepcopy, which would look for the class by its name
    def reduce(self: Any) -> tuple[Any, ...]:
        return _restored, (own, self.__dict__)

    return _subclass(own, to_json_file=to_json_file, __reduce__=reduce, **{_OWN_CLASS: own})


def _subclass(own: type, **attributes: Any) -> type:
    """Return a subclass with these attributes, which has the name and the place of `own`."""
    names = ("__module__", "__qualname__", "__doc__")
    inherited = {name: getattr(own, name) for name in names}
    return type(own.__name__, (own,), inherited | attributes)


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
            config = _without_report(returned)
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
        if isinstance(models.get(own, None), type):
            auto.register(marked, _prepared(models[own], prepare), exist_ok=True)


def _prepared(own: type, prepare: Prepare) -> type:
    """Return a subclass of `own` whose `from_pretrained` calls `prepare` on models with our attention."""

    def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
        returned = own.from_pretrained(*args, **options)  # type: ignore[attr-defined]
        model = _without_report(returned)
        asked = model.config._attn_implementation
        if asked == ATTENTION_NAME:
            prepare(model)
        else:
            warnings.warn(
                f"{model.name_or_path}: attn_implementation={asked!r} runs it dense, without its pattern; leave it out",
                stacklevel=2,
            )
        return returned

    return _subclass(own, from_pretrained=classmethod(from_pretrained))


def _without_report(returned: Any) -> Any:
    """Return what was loaded, without the report that transformers may return beside it."""
    return returned[0] if isinstance(returned, tuple) else returned


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
    with whole_folder(folder, CONFIG) as place:
        model.save_pretrained(place, state_dict=dict(state), max_shard_size=1 << 62)
        settings = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        settings["dtype"] = "float32"
        if dense:
            settings.pop(_PATTERN, None)
        (place / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (place / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
        if source and read_or_empty(source / TOKENIZER, dict) == json.loads(tokenizer_json):
            copy_files(source, place, (*BESIDE_TOKENIZER, TOKENIZER))
