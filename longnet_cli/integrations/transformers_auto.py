"""Folders of transformers models with a pattern: what others cannot open by mistake, and the Auto classes can.

Loaded by what does not know dilated attention, such a folder would run dense, and say nothing. So its config.json has a
`model_type` and `architectures` that are nobody's, and the type is the line to add, since the error that transformers
gives shows nothing else of a folder:

    The checkpoint you are trying to load has model type `import longnet_cli.integrations.transformers` but ...

A class of transformers itself (LlamaForCausalLM) does not look at the type; it fails at the attention of that file,
which without the import has no function.

After that import, AutoConfig gives the model's own configuration, and AutoModel, AutoModelForCausalLM and
AutoModelForMaskedLM give models that `use_dilated_attention` was called on. A configuration in memory is the model's
own, with a class that writes the above into its file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import transformers as hf

from longnet_cli.attention import Pattern
from longnet_cli.errors import ConfigError

MODEL_TYPE = "import longnet_cli.integrations.transformers"
NAME = "dilated"  # of the attention
_OWN_TYPE = "dilated_model_type"  # in such a file: the model's own
_PREFIX = "Dilated"  # of architectures
_PATTERN, _ATTENTION = "dilated_attention", "attn_implementation"
_OWN_CLASS = "_own_class"  # of a class of configurations that are marked: the one it was made of

Prepare = Callable[[hf.PreTrainedModel], Any]


def to_file(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json says of a model: with a pattern, a type that is nobody's.

    A dense pattern is what any tool runs: such a configuration stays as it is, as do those without a pattern.
    """
    found = settings.get(_PATTERN)
    if not found or Pattern(**found) == Pattern.dense() or settings.get("model_type") == MODEL_TYPE:
        return dict(settings)
    names = [_PREFIX + name for name in settings.get("architectures") or []]
    changed = {"model_type": MODEL_TYPE, _OWN_TYPE: settings["model_type"], "architectures": names or None}
    return {**settings, **changed, _ATTENTION: NAME}


def from_file(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `to_file`; other configurations stay as they are."""
    found = dict(settings)
    if found.get("model_type") == MODEL_TYPE:
        found.pop(_ATTENTION, None)
        found["model_type"] = found.pop(_OWN_TYPE, None)
        found["architectures"] = [name.removeprefix(_PREFIX) for name in found.get("architectures") or []] or None
    return found


def mark(config: Any) -> None:
    """Let a configuration write itself as `to_file` has it, in place: it gets a class of its own, by the same name."""
    if isinstance(config, hf.PretrainedConfig) and not hasattr(type(config), _OWN_CLASS):
        own: Any = type(config)
        config.__class__ = _marked(own)


def unmark(config: Any) -> None:
    """Undo `mark`, in place."""
    config.__class__ = getattr(type(config), _OWN_CLASS, type(config))


@cache
def _marked(own: type) -> type:
    """A class of configurations like `own`, whose files are those of `to_file`."""

    def to_json_file(self: Any, json_file_path: str | Path, use_diff: bool = True) -> None:
        data = to_file(json.loads(self.to_json_string(use_diff=use_diff)))
        Path(json_file_path).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def reduce(self: Any) -> tuple[Any, ...]:  # for pickle and deepcopy, which would look for the class by its name
        return _restored, (own, self.__dict__)

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (own,), {**names, _OWN_CLASS: own, "to_json_file": to_json_file, "__reduce__": reduce})


def _restored(own: Any, attributes: dict[str, Any]) -> Any:
    config: Any = object.__new__(_marked(own))
    config.__dict__.update(attributes)
    return config


def register(prepare: Prepare) -> None:
    """Let the Auto classes open such folders with the attention NAME, and `prepare` each model."""

    class DilatedConfig(hf.PretrainedConfig):
        """A way in: it becomes the configuration of the model's own type."""

        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
            """Return a marked configuration of the model's own class. Raises ConfigError for an unknown one."""
            data = from_file(config_dict)
            kind = data.get("model_type")
            if kind not in hf.CONFIG_MAPPING:
                raise ConfigError(f"transformers {hf.__version__} does not know the model type {kind!r}")
            found = hf.CONFIG_MAPPING[kind].from_dict({**data, _ATTENTION: NAME}, **options)
            config = found[0] if isinstance(found, tuple) else found
            own: Any = type(config)
            mark(config)
            marked: Any = type(config)
            _register_models(own, marked, prepare)
            return found

    hf.AutoConfig.register(MODEL_TYPE, DilatedConfig)


@cache
def _register_models(own: type, marked: type, prepare: Prepare) -> None:
    """Let the Auto classes make models of `marked` configurations like those of `own`, and `prepare` them."""
    for auto, models in (
        (hf.AutoModel, hf.MODEL_MAPPING),
        (hf.AutoModelForCausalLM, hf.MODEL_FOR_CAUSAL_LM_MAPPING),
        (hf.AutoModelForMaskedLM, hf.MODEL_FOR_MASKED_LM_MAPPING),
    ):
        if own in models and isinstance(models[own], type):
            auto.register(marked, _prepared(models[own], prepare), exist_ok=True)


def _prepared(own: type, prepare: Prepare) -> type:
    """A class like `own` whose `from_pretrained` calls `prepare` of a model with the attention NAME."""

    def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
        found = own.from_pretrained(*args, **options)  # type: ignore[attr-defined]
        model = found[0] if isinstance(found, tuple) else found
        if model.config._attn_implementation == NAME:
            prepare(model)
        return found

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (own,), {**names, "from_pretrained": classmethod(from_pretrained)})
