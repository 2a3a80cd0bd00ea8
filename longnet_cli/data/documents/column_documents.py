"""The documents of columns: token ids, text, chats.

A column of ids holds lists, a document each, or it is flat, and an end-of-text id ends a document. Neighbouring rows
with one name are one document.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, groupby, repeat
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from longnet_cli.basics.errors import ConfigError, DataError, RefusedError
from longnet_cli.data.files.column_choice import Columns, is_chat
from longnet_cli.data.files.local_files import LocalIds, Part, reading_row
from longnet_cli.data.files.opened_inputs import Table, Text, pick, plain, reading

from .token_documents import Apart, Unread, collect
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .chat import ChatTemplate

T = TypeVar("T")


Batch = Mapping[str, pa.Array]  # the columns of a batch, by their names


class BadRowError(DataError):
    """An error of one row, which leaves out its whole document, and no other.

    `read_documents` makes an Unread of it, in place of the document. Without --skip-bad, `DocumentPass` raises it
    again; with it, `RowJob.take` counts it. A null in a flat column, whose rows are single ids, leaves out the rest of
    the file.
    """


class DocumentRows(NamedTuple):
    """A row of a table; or the rows of one document, with the number, the part and the kept values of the first one.

    `part` is None where the table does not say, and `error` is why the row cannot be read. A row that is not `named`
    has its number for a name. Taking the `values` of a document raises BadRowError for a row that cannot be read, or
    is not the next one.
    """

    row: int
    doc_id: str
    values: Iterable[Any]
    kept: Mapping[str, pa.Scalar]
    part: int | None = None
    error: BadRowError | None = None
    named: bool = True


def read_batches(
    table: Table,
    columns: Columns,
    *,
    may_be_empty: bool = False,
) -> Iterator[tuple[int, Batch, dict[int, BadRowError]]]:
    """Yield the number of the first row, the columns, checked for damage, and the errors of the rows of each batch.

    An error is of a row that has no document because a value is null, by its index in the batch. Raises DataError for a
    table of 0 rows unless it `may_be_empty`.
    """
    start = 0
    for index, batch in enumerate(table.read(columns.names)):
        with reading(f"{table.where}, batch {index}"):
            arrays = {name: pick(batch, name) for name in columns.names}
        yield start, arrays, _errors(table, columns, start, arrays)
        start += batch.num_rows
    if start == 0 and not may_be_empty:
        raise DataError(f"{table.where}: the table has 0 rows")


def _errors(table: Table, columns: Columns, start: int, arrays: Batch) -> dict[int, BadRowError]:
    """Return the errors of the rows of a batch whose document, name or part is null."""
    errors: dict[int, BadRowError] = {}
    for name in columns.needed:
        what = "" if name == columns.documents else f", {name}"
        for index in _nulls(arrays[name]):
            place = table.place(start + index)
            # a row that could not be read is null in all columns, of which the documents' is the first
            problem = table.bad.pop(start + index, "the value is null")
            errors.setdefault(index, BadRowError(f"{place}{what}: {problem}"))
    return errors


def _nulls(column: pa.Array) -> list[int]:
    """Return the indices of the nulls of a column. A null may be in the column or in its dictionary."""
    if pa.types.is_dictionary(column.type) and column.dictionary.null_count:
        column = plain(column)
    if not column.null_count:
        return []
    return np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist()


def _read_rows(
    table: Table,
    columns: Columns,
    values_of: Callable[[int, Batch], Iterable[Any]],
    whole: str | None,
) -> Iterator[DocumentRows]:
    """Yield each row, whose only value is the one of `values_of`."""
    for start, arrays, errors in read_batches(table, columns, may_be_empty=whole is not None):
        with reading(table.where):
            names = _values_or(whole, arrays, columns.doc_id)
            parts = _values_or(None, arrays, columns.part)
            kept = {name: plain(arrays[name]) for name in columns.keep}
        rows = zip(values_of(start, arrays), names, parts, strict=False)
        for index, (value, name, part) in enumerate(rows):
            row = start + index
            yield DocumentRows(
                row,
                f"{table.name}:{row}" if name is None else str(name),
                (value,),
                {name: column[index] for name, column in kept.items()},
                part,
                errors.get(index),
                named=name is not None,
            )


def _values_or(default: Any, arrays: Batch, name: str | None) -> Iterable[Any]:
    """Return the values of a column, or the default for each row where the table has no such column."""
    return arrays[name].to_pylist() if name else repeat(default)


def group_rows(
    table: Table,
    columns: Columns,
    values_of: Callable[[int, Batch], Iterable[Any]],
    whole: str | None = None,
    apart: Apart | None = None,
) -> Iterator[DocumentRows]:
    """Group the rows of a table by document.

    `values_of` returns a value for each row of a batch, from the number of its first row and its columns. Neighbours
    that share a doc_id are one document. Its parts, where known, must be 0, 1, 2, ... A row whose name cannot be read
    belongs to a document that has rows both before and after it. With `whole`, all rows are one document of this name,
    which may be empty. With `apart`, which names them, and in a table of `rows_alone`, every row is a document. Such a
    row, and a row of stdin without a name, does not wait for the next one.
    """
    rows = _read_rows(table, columns, values_of, whole)
    if apart or table.rows_alone or (table.ready and not columns.doc_id and not whole):
        for row in rows:
            doc_id = apart.name(row.doc_id) if apart else row.doc_id
            yield row._replace(doc_id=doc_id, values=_values(table, doc_id, iter((row,))))
        return
    if whole:
        first = next(rows, DocumentRows(0, whole, (), {}))
        rows = chain((first,), rows)
    for _, members in groupby(_numbered(rows), key=itemgetter(0)):
        first = next(members)[1]
        following = (row for _, row in members)  # noqa: B031 (used once, before the next group)
        values = _values(table, first.doc_id, chain((first,), following))
        yield DocumentRows(
            first.row, first.doc_id, values, first.kept, first.part, first.error, first.named
        )


def _numbered(rows: Iterator[DocumentRows]) -> Iterator[tuple[int, DocumentRows]]:
    """Yield each row with the number of its document."""
    number = 0
    name: str | None = None  # of the row before
    waiting: list[DocumentRows] = []
    for row in rows:
        waiting.append(row)
        if row.error and not row.named and name is not None:
            continue
        for member in waiting:
            if row.doc_id != name:
                number += 1
            yield number, member
        name = row.doc_id if row.named else None
        waiting = []
    # no row after them tells the document of bad rows at the end, so each counts as a document
    yield from enumerate(waiting, number + 1)


def _values(table: Table, doc_id: str, rows: Iterator[DocumentRows]) -> Iterator[Any]:
    """Yield the value of each row of a document. Raises BadRowError for a row that is bad, or not the next part."""
    for expected, row in enumerate(rows):
        if row.error:
            raise row.error
        if row.part is None:
            if expected == 1:
                table.joined.update(documents=1, rows=2)
            elif expected:
                table.joined.update(rows=1)
        elif row.part != expected:
            raise part_error(table, row.row, row.part, doc_id, expected)
        yield from row.values


def part_error(table: Table, row: int, part: int, doc_id: str, expected: int) -> BadRowError:
    """Return the error for a row of a document that is not its next part."""
    missing = "rows are missing, repeated or out of order"
    why = "in batches a row is a document" if table.rows_alone else missing
    return BadRowError(
        f"{table.place(row)}: part {part} of document {doc_id!r} stands where part {expected} should: {why}"
    )


def read_documents(
    groups: Iterable[DocumentRows], read: Callable[[DocumentRows], T]
) -> Iterator[T | Unread]:
    """Yield what `read` returns for each document, Unread for one that raises BadRowError."""
    for group in groups:
        try:
            document: T | Unread = read(group)
        except BadRowError as error:
            document = Unread(error)
        yield document


def list_bounds(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return where each list of a column starts and stops in its `values`, (lists,) int64 each.

    `values` ignores that a column may be a slice; the bounds are positions in all of it.
    """
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        starts = (np.arange(len(column), dtype=np.int64) + column.offset) * kind.list_size
        return starts, starts + kind.list_size
    starts = column.offsets.to_numpy().astype(np.int64)
    if isinstance(column, (pa.ListViewArray, pa.LargeListViewArray)):
        return starts, starts + column.sizes.to_numpy()
    return starts[:-1], starts[1:]


def numbers(table: Table, values: pa.Array) -> Part:
    """Return the numbers of an array of the last batch, as a view of their file or of Arrow's memory."""
    valid = None
    if values.null_count:
        bitmap, data = values.buffers()
        size = len(values)
        offset = values.offset
        valid = pa.Array.from_buffers(pa.bool_(), size, [None, bitmap], offset=offset)
        values = pa.Array.from_buffers(values.type, size, [None, data], offset=offset)
    return Part(table.numbers(values), valid)


FLAT_STEP = 1 << 22  # ids of a flat column searched for document ends in one go


def list_documents(table: Table, columns: Columns) -> Iterator[DocumentRows]:
    """Return the documents of a list column, with their parts as values."""

    def parts(first_row: int, arrays: Batch) -> Iterator[Part]:
        lists = arrays[columns.documents]
        all_ids = numbers(table, lists.values)
        starts, stops = list_bounds(lists)
        rows = range(first_row, first_row + len(lists))
        return map(all_ids.cut, starts.tolist(), stops.tolist(), rows)

    return group_rows(table, columns, parts)


def flat_batches(
    table: Table, columns: Columns, eos_id: int | None
) -> Iterator[tuple[int, np.ndarray | LocalIds, np.ndarray]]:
    """Yield the first row of each batch of a flat column, its ids, and where EOS ids are among them, (n,) int64."""
    name = columns.documents
    if eos_id is None:
        raise ConfigError(
            f"{table.where}: column {name!r} is one stream of ids, which only an end-of-text id can cut into "
            "documents: give a tokenizer that has one, or the token or id itself (--eos)"
        )
    for start, arrays, errors in read_batches(table, columns):
        if errors:
            raise errors[min(errors)]
        all_ids = numbers(table, arrays[name]).ids
        ends = [np.empty(0, np.int64)]
        for step in range(0, len(all_ids), FLAT_STEP):
            with reading(table.where), reading_row(start + step):
                ids = np.asarray(all_ids[step : step + FLAT_STEP])
            ends.append(np.flatnonzero(ids == eos_id) + step)
        yield start, all_ids, np.concatenate(ends)


def nothing_but_ends(table: Table, columns: Columns) -> DataError:
    """Return the error for a flat column without a document."""
    return DataError(
        f"{table.where}: column {columns.documents!r} holds nothing but end-of-text ids"
    )


def flat_documents(table: Table, columns: Columns, eos_id: int | None) -> Iterator[DocumentRows]:
    """Yield the documents of a flat column. EOS ids separate them, and adjacent EOS ids have none in between."""

    def stretches() -> Iterator[tuple[int, Part]]:
        """Yield (number of EOS ids so far, a stretch of ids without EOS)."""
        count = 0
        for start, ids, ends in flat_batches(table, columns, eos_id):
            begin = 0
            for end in [*ends.tolist(), len(ids)]:
                if end > begin:
                    yield count, Part(ids[begin:end], None, start + begin, flat=True)
                count += end < len(ids)
                begin = end + 1

    index = -1
    for index, (_, members) in enumerate(groupby(stretches(), key=lambda stretch: stretch[0])):
        parts = collect(part for _, part in members)
        yield DocumentRows(parts[0].row, f"{table.name}:{index}", parts, {})
    if index < 0:
        raise nothing_but_ends(table, columns)


def table_texts(
    table: Table,
    columns: Columns,
    tokenizer: Tokenizer | None,
    *,
    answers: bool = False,
) -> Iterator[Text | Unread]:
    """Return the documents of a column of text, or of chats as the tokenizer's template writes them.

    With `answers`, the ids of chats say which of them an assistant is to write. A row that cannot be read is Unread.
    Raises ConfigError for chats without a tokenizer that has a template.
    """
    read = partial(_read_text, table)
    if is_chat(columns.type):
        template = _chat_template(table, columns, tokenizer)
        read = partial(_read_chat, table, partial(template.read_chat, answers=answers))
    apart = Apart() if table.ready and columns.part is None else None

    def texts(first_row: int, arrays: Batch) -> Iterator[Any]:
        return (value.as_py() for value in arrays[columns.documents])

    return read_documents(group_rows(table, columns, texts, apart=apart), read)


def _read_text(table: Table, group: DocumentRows) -> Text:
    text = "".join(group.values)
    return Text(group.doc_id, text, table.place(group.row), group.kept, row=group.row)


def _read_chat(
    table: Table,
    read: Callable[[list[dict[str, str]]], tuple[str, Callable[[], Part]]],
    group: DocumentRows,
) -> Text:
    place = table.place(group.row)
    try:
        text, ids = read(_messages(group.values))
    except RefusedError as refusal:
        raise BadRowError(f"{place}: {refusal}") from None
    return Text(group.doc_id, text, place, group.kept, ids=ids, row=group.row)


def _chat_template(table: Table, columns: Columns, tokenizer: Tokenizer | None) -> "ChatTemplate":
    """Return the chat template of a tokenizer. Raises ConfigError without one."""
    if tokenizer is None or tokenizer.folder is None:
        raise ConfigError(
            f"{table.where}: {columns.documents!r} holds chats, which need the chat template of a tokenizer: give a "
            "folder with a tokenizer.json and its template (--tokenizer, or --model)"
        )
    # imported late: it loads Jinja, which other data do not need
    from .chat import ChatTemplate

    return ChatTemplate(tokenizer.folder, tokenizer)


def _messages(rows: Iterable[Any]) -> list[dict[str, str]]:
    """Return the messages of a chat, in one row or several. What is no text is left out of them."""
    messages = []
    for message in chain.from_iterable(rows):
        fields = dict(message).items()
        messages.append({name: text for name, text in fields if isinstance(text, str)})
    return messages
