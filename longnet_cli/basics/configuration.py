"""Validation of what a person wrote (JSON, TOML, flags): a pydantic model, or one line that says what is wrong."""

import difflib
import json
import re
import stat
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from .errors import ConfigError
from .sizes import MAX_SIZE

ModelT = TypeVar("ModelT", bound=BaseModel)
KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")
# NUL, and lone surrogates, which JSON can spell. Those of bytes that are not UTF-8 may be in the name of a file.
_NOT_TEXT = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")


class StrictModel(BaseModel):
    """A table of keys and values that a person wrote. It cannot be changed once it is checked.

    These are errors: unknown keys; inf and nan, which JSON does not have; `true` in place of a number, which Python
    would take for 1; numbers that an int64 cannot hold; strings with NUL or lone surrogates; empty strings, which often
    come from an unset variable in a script.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _mean_what_they_say(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        switch = field.annotation is bool
        for item in _items(value):
            if isinstance(item, bool) and not switch:
                raise ValueError(f"{str(item).lower()} is not a number or a name")
            if item == "" != field.default:
                raise ValueError("it is empty")
            if isinstance(item, str) and _NOT_TEXT.search(item):
                raise ValueError("it has a character that no file name or text has")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _fit(cls, value: Any) -> Any:
        if any(isinstance(item, int) and abs(item) > MAX_SIZE for item in _items(value)):
            raise ValueError("a number is out of range: it must be less than 2^63")
        return value


def validate(cls: type[ModelT], data: Mapping[str, Any], where: str) -> ModelT:
    """Return `data` as an instance of `cls`. Errors name keys of nested models with dots (`optimizer.lr`).

    Raises ConfigError of one line that starts with `where` (a file, a flag), names every wrong key, and suggests the
    nearest existing key for an unknown one. For that, `cls` must forbid extra keys.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected keys and values, got {_short(data)}")
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(f"{where}: {'; '.join(_lines(cls, error))}") from None


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file.

    Raises OSError for a file that cannot be read, and for a pipe or a device, which might never end or even open;
    ValueError for bytes that are not UTF-8.
    """
    path = Path(path)
    # `path.read_text` reports a folder
    if stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        raise OSError(0, "a pipe or a device, not a file: save it to a file", str(path))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None


def parse(text: str, parser: Callable[..., Any] = json.loads, **options: Any) -> Any:
    """Parse JSON, or TOML with `parser=tomllib.loads`. Raises ValueError for invalid or too deeply nested text."""
    try:
        return parser(text, **options)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def only_keys(table: Mapping[str, Any], keys: Container[str]) -> dict[str, Any]:
    """Return the entries of a table that have one of these keys."""
    return {key: value for key, value in table.items() if key in keys}


def without_keys(table: Mapping[str, Any], keys: Container[str]) -> dict[str, Any]:
    """Return the entries of a table that have none of these keys."""
    return {key: value for key, value in table.items() if key not in keys}


def without_none(table: Mapping[KeyT, ValueT | None]) -> dict[KeyT, ValueT]:
    """Return the entries of a table whose value is not None."""
    return {key: value for key, value in table.items() if value is not None}


def as_list(value: Any) -> list[Any]:
    """Return a list or a tuple as a list, and any other value as a list of one."""
    return [*value] if isinstance(value, list | tuple) else [value]


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the item of `names` that is most similar to `name`, None if nothing is close."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)), None)


def _items(value: Any) -> Iterator[Any]:
    """Yield the items of a list, nested or not, or the value itself. Skip tables: their own classes check them."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _items(item)
    elif not isinstance(value, Mapping):
        yield value


def _lines(cls: type[BaseModel], error: ValidationError) -> list[str]:
    """Return one phrase per mistake, unknown keys first. A misspelt key is not reported again as a missing key."""
    unknown: list[str] = []
    mistakes: list[tuple[str, str]] = []
    meant: set[str] = set()
    for item in error.errors(include_url=False):
        *parents, name = item["loc"] or ("",)
        path = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            line = f"unknown key '{path}'"
            if match := nearest(str(name), _field_names(cls, parents)):
                key = ".".join(map(str, [*parents, match]))
                line += f": did you mean '{key}'?"
                meant.add(key)
            unknown.append(line)
        elif item["type"] == "default_factory_not_called":
            continue  # a default that follows from keys of which one has a mistake, which has its own line
        elif item["type"] == "missing":
            mistakes.append((path, f"missing key '{path}'"))
        else:
            # a validator's own ValueError is already a sentence; pydantic's messages need the value beside them
            line = " ".join(item["msg"].removeprefix("Value error, ").split())
            if item["type"] != "value_error":
                line += f" (got {_short(item['input'])})"
            mistakes.append((path, f"{path}: {line}" if path else line))
    return unknown + [line for path, line in mistakes if path not in meant]


def _field_names(cls: type[BaseModel], parents: Sequence[int | str]) -> list[str]:
    """Return the keys that exist at the path of an error. List indices and union tags in the path name no field."""
    models: list[type[BaseModel]] = [cls]
    for part in parents:
        inner = []
        for model in models:
            field = model.model_fields.get(str(part))
            inner += _models_in(field.annotation) if field else []
        models = inner or models
    names = []
    for model in models:
        names += [field.alias or name for name, field in model.model_fields.items()]
    return names


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return every pydantic model in an annotation such as `Inner | None` or `dict[str, Inner]`."""
    if isinstance(annotation, type(BaseModel)):  # the metaclass of models
        return [annotation]
    return [*chain.from_iterable(map(_models_in, get_args(annotation)))]


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
