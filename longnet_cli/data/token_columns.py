"""The documents of columns: token ids, text, chats.

A column of ids holds lists, a document each, or it is flat, and an end-of-text id ends a document. Neighbouring rows
with one name are one document.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, groupby
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from longnet_cli.basics.errors import ConfigError, DataError, RefusedError
from longnet_cli.data.columns import Columns, is_chat, list_bounds, numbers
from longnet_cli.data.documents import Unread, collect
from longnet_cli.data.files import Part
from longnet_cli.data.manifest import is_manifest
from longnet_cli.data.names import Apart
from longnet_cli.data.tables import Table, Text, pick, plain, reading
from longnet_cli.data.tokenizer import Tokenizer

T = TypeVar("T")


class ColumnBatch(NamedTuple):
    """The columns of a batch that starts at row `start`; None, or empty, for a column that the table lacks.

    `errors` holds the error of each row that has no document because a value is null, by its index in the batch.
    """

    start: int
    column: pa.Array
    doc_ids: list[Any] | None
    parts: list[Any] | None
    kept: dict[str, pa.Array]
    coords: list[pa.Array]
    errors: dict[int, DataError]

    def label(self, index: int) -> "Label":
        return Label(
            self.start + index,
            self.doc_ids[index] if self.doc_ids else None,
            self.parts[index] if self.parts else None,
            {name: column[index] for name, column in self.kept.items()},
            self.errors.get(index),
        )


class Label(NamedTuple):
    """The place of a row: its number, its document, and its part of the document; None if the table does not say."""

    row: int
    doc_id: Any
    part: int | None
    kept: Mapping[str, pa.Scalar]
    error: DataError | None


class BadRowError(DataError):
    """An error of one row, which leaves out its whole document, and no other."""


class DocumentRows(NamedTuple):
    """The rows of one document: the number of the first, the values that the first carries along, and all values.

    Taking the values raises BadRowError for a row that cannot be read, or is not the next one.
    """

    doc_id: str
    row: int
    values: Iterable[Any]
    kept: Mapping[str, pa.Scalar]


def read_batches(
    table: Table, columns: Columns, *, in_turn: bool = True, may_be_empty: bool = False
) -> Iterator[ColumnBatch]:
    """Yield the columns of each batch, checked for damage.

    Raises DataError for a table of 0 rows unless it `may_be_empty`, and for nulls unless the caller raises their
    `errors` `in_turn`.
    """
    start = 0
    for index, batch in enumerate(table.read(columns.names)):
        with reading(f"{table.where}, batch {index}"):
            arrays = {name: pick(batch, name) for name in columns.names}
            column, kept = (
                arrays[columns.documents],
                {name: plain(arrays[name]) for name in columns.keep},
            )
            values = {
                name: arrays[name].to_pylist()
                for name in (columns.doc_id, columns.part)
                if name is not None
            }
        errors: dict[int, DataError] = {}
        for name, rows in [
            (None, _nulls(column)),
            *((name, _none(cells)) for name, cells in values.items()),
        ]:
            for row in rows:
                place, what = table.place(start + row), f", {name}" if name else ""
                problem = table.bad.pop(start + row, None)
                said = (
                    f"{place}{what}: the value is null"
                    if problem is None
                    else f"{place}: {problem}"
                )
                errors.setdefault(row, BadRowError(said))
        if errors and not in_turn:
            raise errors[min(errors)]
        ids, parts = (values.get(name) if name else None for name in (columns.doc_id, columns.part))
        names = ids and [None if doc_id is None else str(doc_id) for doc_id in ids]
        yield ColumnBatch(
            start, column, names, parts, kept, [arrays[name] for name in columns.coords], errors
        )
        start += batch.num_rows
    if start == 0 and not may_be_empty and not is_manifest(table.schema):
        raise DataError(f"{table.where}: the table has 0 rows")


def _nulls(column: pa.Array) -> list[int]:
    """Return the rows without a document: the null may be in the column or in its dictionary."""
    if pa.types.is_dictionary(column.type):
        return (
            _none(column.to_pylist()) if column.null_count or column.dictionary.null_count else []
        )
    return (
        np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist()
        if column.null_count
        else []
    )


def _none(values: list[Any]) -> list[int]:
    return [row for row, value in enumerate(values) if value is None] if None in values else []


def group_rows(
    table: Table,
    columns: Columns,
    values_of: Callable[[ColumnBatch], Iterable[Any]],
    whole: str | None = None,
    apart: Apart | None = None,
) -> Iterator[DocumentRows]:
    """Group the rows of a table, each with a value of `values_of`, by document.

    Neighbours that share a doc_id are one document. Its parts, where known, must be 0, 1, 2, ... A row that cannot be
    read, not even its name, belongs to the document that stands on both sides of it. With `whole`, all rows are one
    document of this name. With `apart`, which names them, and in a table of `rows_alone`, every row is a document. For
    these, and for rows of stdin without names, no other row is waited.
    """

    def rows() -> Iterator[tuple[Label, Any]]:
        for batch in read_batches(table, columns, may_be_empty=whole is not None):
            for index, value in enumerate(values_of(batch)):
                label = batch.label(index)
                yield label._replace(doc_id=whole) if whole else label, value

    def name_of(label: Label) -> str:
        return f"{table.name}:{label.row}" if label.doc_id is None else str(label.doc_id)

    def numbered() -> Iterator[tuple[int, tuple[Label, Any]]]:
        number, name = 0, None
        nameless: list[tuple[Label, Any]] = []
        for label, value in rows():
            if label.error and label.doc_id is None and name is not None:
                nameless.append((label, value))
                continue
            same = name is not None and label.doc_id == name and label.row not in table.begins
            for row in (*nameless, (label, value)):
                number += not same
                yield number, row
            name, nameless = label.doc_id, []
        yield from ((number + index, row) for index, row in enumerate(nameless, 1))

    if apart or table.rows_alone or (table.ready and not (columns.doc_id or whole)):
        for label, value in rows():
            doc_id = apart.name(name_of(label)) if apart else name_of(label)
            yield DocumentRows(
                doc_id, label.row, _values(table, doc_id, iter(((label, value),))), label.kept
            )
        return
    empty = True
    for _, members in groupby(numbered(), key=itemgetter(0)):
        empty = False
        label, value = next(members)[1]
        doc_id = name_of(label)
        following = (row for _, row in members)  # noqa: B031 (used once, before the next group)
        yield DocumentRows(
            doc_id,
            label.row,
            _values(table, doc_id, chain(((label, value),), following)),
            label.kept,
        )
    if whole and empty and not is_manifest(table.schema):
        yield DocumentRows(whole, 0, (), {})


def _values(table: Table, doc_id: str, members: Iterator[tuple[Label, Any]]) -> Iterator[Any]:
    """Yield the value of each row of a document. Raises BadRowError for a row that is bad, or not the next part."""
    for expected, (label, value) in enumerate(members):
        if label.error:
            raise label.error
        if label.part is not None and label.part != expected:
            missing = "rows are missing, repeated or out of order"
            why = "in batches a row is a document" if table.rows_alone else missing
            raise BadRowError(
                f"{table.place(label.row)}: part {label.part} of document {doc_id!r} stands where part {expected} "
                f"should: {why}"
            )
        yield value


def read_documents(
    groups: Iterable[DocumentRows], read: Callable[[DocumentRows], T], skip_bad: bool
) -> Iterator[T | Unread]:
    """Yield what `read` returns for each document. With `skip_bad`, one that raises BadRowError is Unread instead."""
    for group in groups:
        try:
            document: T | Unread = read(group)
        except BadRowError as error:
            if not skip_bad:
                raise
            document = Unread(error)
        yield document


FLAT_STEP = 1 << 22  # ids of a flat column searched for document ends in one go


def list_documents(table: Table, columns: Columns) -> Iterator[DocumentRows]:
    """Return the documents of a list column, with their parts as values."""

    def parts(batch: ColumnBatch) -> Iterator[Part]:
        ids, valid = numbers(table, batch.column.values)
        bounds = zip(*(edge.tolist() for edge in list_bounds(batch.column)), strict=True)
        for row, (start, stop) in enumerate(bounds, batch.start):
            present = valid.slice(start, stop - start) if valid is not None else None
            yield Part(ids[start:stop], present, row)

    return group_rows(table, columns, parts)


def flat_documents(table: Table, columns: Columns, eos_id: int | None) -> Iterator[DocumentRows]:
    """Yield the documents of a flat column. EOS ids separate them, and adjacent EOS ids have none in between."""
    name = columns.documents
    if eos_id is None:
        raise ConfigError(
            f"{table.where}: column {name!r} is one stream of ids, which only an end-of-text id can cut into "
            "documents: give a tokenizer that has one, or the token or id itself (--eos)"
        )

    def stretches() -> Iterator[tuple[int, Part]]:
        """Yield (number of EOS ids so far, a stretch of ids without EOS)."""
        count = 0
        for batch in read_batches(table, columns, in_turn=False):
            all_ids, _ = numbers(table, batch.column)  # nulls have been refused
            for step in range(0, len(all_ids), FLAT_STEP):
                ids = all_ids[step : step + FLAT_STEP]
                begin = 0
                with reading(table.where, row=batch.start + step):
                    ends = np.flatnonzero(np.asarray(ids) == eos_id).tolist()
                for end in [*ends, len(ids)]:
                    if end > begin:
                        yield (
                            count,
                            Part(ids[begin:end], None, batch.start + step + begin, flat=True),
                        )
                    count += end < len(ids)
                    begin = end + 1

    index = -1
    for index, (_, members) in enumerate(groupby(stretches(), key=lambda stretch: stretch[0])):
        parts = collect(part for _, part in members)
        row = parts[0].row
        assert row is not None
        yield DocumentRows(f"{table.name}:{index}", row, parts, {})
    if index < 0 and not is_manifest(table.schema):
        raise DataError(f"{table.where}: column {name!r} holds nothing but end-of-text ids")


def table_texts(
    table: Table, columns: Columns, tokenizer: Tokenizer | None, skip_bad: bool
) -> Iterator[Text | Unread]:
    """Return the documents of a column of text, or of chats as the tokenizer's template writes them.

    Raises ConfigError for chats without a tokenizer that has a template, DataError for rows that cannot be read; with
    `skip_bad`, such a row is Unread.
    """
    join = _chat_reader(table, columns, tokenizer) if is_chat(columns.type) else None

    def read(group: DocumentRows) -> Text:
        place = table.place(group.row)
        try:
            text, ids = join(group.values) if join else ("".join(group.values), None)
        except RefusedError as refusal:
            raise BadRowError(f"{place}: {refusal}") from None
        return Text(group.doc_id, text, place, group.kept, ids=ids)

    apart = Apart() if table.ready and columns.part is None else None
    groups = group_rows(
        table, columns, lambda batch: (value.as_py() for value in batch.column), apart=apart
    )
    return read_documents(groups, read, skip_bad)


def _chat_reader(
    table: Table, columns: Columns, tokenizer: Tokenizer | None
) -> Callable[[Iterable[Any]], tuple[str, Callable[[], np.ndarray]]]:
    """Return a function from the rows of a chat to its text and a function that returns its ids."""
    if tokenizer is None or tokenizer.folder is None:
        raise ConfigError(
            f"{table.where}: {columns.documents!r} holds chats, which need the chat template of a tokenizer: give a "
            "folder with a tokenizer.json and its template (--tokenizer, or --model)"
        )
    from longnet_cli.data.chat import (
        ChatTemplate,
    )  # imported late: it loads Jinja, which other data do not need

    template = ChatTemplate(tokenizer.folder, tokenizer)

    def read(rows: Iterable[Any]) -> tuple[str, Callable[[], np.ndarray]]:
        messages = [dict(message) for row in rows for message in row]
        return template.read_chat(
            [{k: v for k, v in message.items() if isinstance(v, str)} for message in messages]
        )

    return read
