"""Columns of the input that documents carry along to the rows of an output (`--keep`)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.documents import Document, Unread


class Carrier(Protocol):
    """A document, or a result for one: `where` is its file and row, `kept` the values that it carries along."""

    @property
    def where(self) -> str: ...
    @property
    def kept(self) -> Mapping[str, pa.Scalar]: ...


class Sent(NamedTuple):
    """A value that another process sent as JSON. It stands for the original scalar."""

    value: Any

    def as_py(self) -> Any:
        return self.value


def first_kept(
    documents: Iterable[Document], of_text: Sequence[pa.Field] = ()
) -> tuple[list[pa.Field], Iterator[Document]]:
    """Return the columns that the first readable document carries along, and all documents.

    If that document was made from text, the columns `of_text` come first.
    """
    taken: list[Document] = []
    remaining = iter(documents)
    for document in remaining:
        taken.append(document)
        if not isinstance(document, Unread):
            break
    kept = taken[-1].kept if taken else {}
    fields = list(of_text) if taken and getattr(taken[-1], "tokenizer", None) else []
    return fields + [pa.field(name, value.type) for name, value in kept.items()], chain(taken, remaining)


def row_schema(fields: Sequence[pa.Field], kept: Sequence[pa.Field], known: Mapping[str, str | None]) -> pa.Schema:
    """Return the schema of an output: `fields`, then `kept`, and the metadata `known` without unknown values.

    Raises ConfigError for a name that two of them have.
    """
    names = [field.name for field in (*fields, *kept)]
    if taken := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--keep {min(taken)}: the output has a column of this name")
    metadata = {key: value for key, value in known.items() if value is not None}
    return pa.schema([*fields, *kept], metadata=metadata)


def kept_settings(kept: Sequence[pa.Field]) -> dict[str, list[str]]:
    """Return the settings that record `kept` in a shard folder, for a resumed run to match; empty without columns."""
    return {"keep": [f"{field.name}: {field.type}" for field in kept]} if kept else {}


def kept_columns(carriers: Sequence[Carrier], fields: Sequence[pa.Field]) -> list[pa.Array]:
    """Return the columns `fields` of rows. Raises DataError for a value of another type."""
    # `pa.array` would refuse null lists
    return [
        pa.concat_arrays([pa.nulls(0, field.type), *(pa.repeat(_value(carrier, field), 1) for carrier in carriers)])
        for field in fields
    ]


def _value(carrier: Carrier, field: pa.Field) -> pa.Scalar:
    value = carrier.kept[field.name]
    try:
        return value if value.type == field.type else value.cast(field.type)
    except pa.ArrowException as error:
        raise DataError(
            f"{carrier.where}: {field.name!r} is {value.type}, and {field.type} in the first document"
        ) from error
