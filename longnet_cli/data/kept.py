"""The part of documents that an output has: columns they carry along (`--keep`), and the count of those left out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import pyarrow as pa

from longnet_cli.basics.errors import ConfigError, DataError, LongNetError
from longnet_cli.data.documents import Document, Unread


class Carrier(Protocol):
    """A document, or a result for one: `where` is its file and row, `kept` the values that it carries along."""

    @property
    def where(self) -> str: ...
    @property
    def kept(self) -> Mapping[str, pa.Scalar]: ...


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


OnSkip = Callable[[Any, LongNetError], None]  # called with a document or a text that is left out, and the reason


class LeftOut:
    """The number of documents that have no row: `skipped` ones, which cannot be read, and `empty` ones.

    `skipped_files` of the skipped ones are files, whose documents nobody has counted.

    A job calls `skip` with each document, row or file that it cannot read, and this calls `on_skip`. Without `on_skip`,
    `skip` is None: such a document ends the run.
    """

    def __init__(self, on_skip: OnSkip | None = None) -> None:
        self.skipped = self.skipped_files = self.empty = 0
        self._on_skip = on_skip
        self.skip: OnSkip | None = self._skip if on_skip else None

    def pass_over(self, document: Any) -> None:
        """Count an empty document."""
        self.empty += 1

    def take(self, totals: Mapping[str, int]) -> None:
        """Take the counts from the totals of a manifest instead."""
        self.skipped, self.empty = totals.get("skipped", 0), totals.get("empty", 0)
        self.skipped_files = totals.get("skipped_files", 0)

    def __str__(self) -> str:
        """Return what was skipped, such as `2 documents and 1 file left out`."""
        counts = {"document": self.skipped - self.skipped_files, "file": self.skipped_files}
        counted = [f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items() if count]
        return f"{' and '.join(counted)} left out"

    def _skip(self, document: Any, error: LongNetError) -> None:
        self.skipped += 1
        self.skipped_files += getattr(document, "file", False)  # an Unread has it
        if self._on_skip:
            self._on_skip(document, error)
