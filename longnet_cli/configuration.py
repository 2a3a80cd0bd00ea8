"""Turns what a person wrote (JSON, TOML, flags) into a pydantic model, or into one line that says what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from longnet_cli.errors import ConfigError

ModelT = TypeVar("ModelT", bound=BaseModel)


def validate(cls: type[ModelT], data: Mapping[str, Any], where: str) -> ModelT:
    """Check `data` against `cls`, whose nested models are addressed by dotted names (`optimizer.lr`).

    Raises ConfigError of one line that begins with `where` (a file, a flag), names every wrong key, and for an
    unknown one the nearest that exists. `cls` must forbid extra keys for that.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected keys and values, got {_short(data)}")
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(f"{where}: {'; '.join(_lines(cls, error))}") from None


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` most likely stands for, None where nothing is close."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)), None)


def _lines(cls: type[BaseModel], error: ValidationError) -> list[str]:
    """One phrase a mistake, unknown keys first; a key missing only because it was misspelt is not told twice."""
    unknown, others, meant = [], [], set()
    for item in error.errors(include_url=False):
        *parents, name = item["loc"] or ("",)
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            match = nearest(str(name), _field_names(cls, parents))
            full = ".".join([*map(str, parents), match]) if match else None
            unknown.append(f"unknown key '{path}'" + (f": did you mean '{full}'?" if full else ""))
            meant.add(full)
        elif item["type"] == "missing":
            others.append((path, f"missing key '{path}'"))
        else:
            # a validator's own ValueError is already a sentence; pydantic's messages need the value beside them
            message = " ".join(item["msg"].removeprefix("Value error, ").split())
            shown = message if item["type"] == "value_error" else f"{message} (got {_short(item['input'])})"
            others.append((path, f"{path}: {shown}" if path else shown))
    return unknown + [line for path, line in others if path not in meant]


def _field_names(cls: type[BaseModel], parents: Sequence[int | str]) -> list[str]:
    """The keys that exist at a path of an error: list indices and the tags of unions in it name no field."""
    models: list[type[BaseModel]] = [cls]
    for part in parents:
        fields = [model.model_fields[part] for model in models if isinstance(part, str) and part in model.model_fields]
        if fields:
            models = [model for field in fields for model in _models_in(field.annotation)]
    return [field.alias or name for model in models for name, field in model.model_fields.items()]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every pydantic model in an annotation such as `Inner | None` or `dict[str, Inner]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
