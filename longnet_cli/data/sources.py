"""Documents in: the rows of tables and the texts of files, as text or as token ids.

    inputs --find_sources--> Source --open_source--> Text | Table --> Text (read_texts) | Document (read_documents)

Token columns stay in their file and are sliced, never joined by Arrow: its 32-bit list offsets overflow at 2^31 tokens.
"""

import warnings
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from longnet_cli.data.columns import INTEGERS, TokenTypes, choose_column, is_text
from longnet_cli.data.documents import Document, Part, collect
from longnet_cli.data.files import StoredIds
from longnet_cli.data.folders import sniff
from longnet_cli.data.formats import open_source
from longnet_cli.data.inputs import find_sources
from longnet_cli.data.manifest import is_manifest
from longnet_cli.data.tables import Table, Text, reading
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.errors import ConfigError, DataError, InputWarning

FLAT_BLOCK = 1 << 22  # ids of a flat column in which the end of a document is looked for at a time


def read_texts(inputs: Sequence[str | Path], column: str | None = None) -> Iterator[Text]:
    """Yield the documents of text files and of text columns, in order; one file is held in memory at a time.

    Raises ConfigError for a table without a text column, DataError for missing, empty or damaged data.
    """
    for source in find_sources(inputs):
        opened = open_source(source, column)
        if isinstance(opened, Text):
            refuse_column(opened, column)
            yield opened
        else:
            yield from _table_texts(opened, choose_column(opened, column, text_only=True))


def read_documents(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer | None,
    *,
    column: str | None = None,
    vocab_size: int | None = None,
    eos_id: int | None = None,
) -> Iterator[Document]:
    """Yield the documents of every input, in order, as token ids.

    Text needs the tokenizer. A row is a document, and neighbouring rows of a file with one `doc_id` are one: a `part`
    column beside it must then count 0, 1, 2, .... A flat integer column is cut at `eos_id` (without it, the
    tokenizer's, else the one in the file's metadata). `Document.read` checks ids against `vocab_size` (without it, the
    tokenizer's, else the file's metadata).

    Raises ConfigError for a missing tokenizer or column or for another tokenizer than the one that made the tokens,
    DataError for missing, empty or damaged data and for inputs with different types of token.
    """
    types = TokenTypes()
    check_eos("", eos_id, vocab_size or (tokenizer.vocab_size if tokenizer else None))
    for source in find_sources(inputs):
        opened = open_source(source, column)
        if isinstance(opened, Table):
            types.check(opened, choose_column(opened, column))
        yield from documents_of(opened, tokenizer, column=column, vocab_size=vocab_size, eos_id=eos_id)


def stored_documents(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer | None,
    *,
    column: str | None = None,
    vocab_size: int | None = None,
    eos_id: int | None = None,
) -> Iterator[Document]:
    """Yield those documents of `read_documents` whose lengths are known at once, and which can be read again after it.

    They are the token ids in Arrow and Parquet files on this machine: no text, no JSON, no pipe, no URI.
    """
    with warnings.catch_warnings():  # `read_documents` will say it
        warnings.simplefilter("ignore", InputWarning)
        sources = find_sources(inputs)
    for source in sources:
        if source.path is None or source.filesystem is not None or not source.path.is_file():
            continue
        with reading(source.where), open(source.path, "rb") as file:
            if sniff(file.read(8)) == "text":
                continue
        opened = open_source(source, column)
        if isinstance(opened, Table) and not is_text(opened.schema.field(choose_column(opened, column)).type):
            yield from documents_of(opened, tokenizer, column=column, vocab_size=vocab_size, eos_id=eos_id)


def documents_of(
    opened: Text | Table,
    tokenizer: Tokenizer | None,
    *,
    column: str | None = None,
    vocab_size: int | None = None,
    eos_id: int | None = None,
) -> Iterator[Document]:
    """Yield the documents of one opened input, as `read_documents` does."""
    if isinstance(opened, Text):
        refuse_column(opened, column)
        yield _encode(opened, tokenizer, vocab_size)
        return
    name = choose_column(opened, column)
    kind = opened.schema.field(name).type
    if is_text(kind):
        for text in _table_texts(opened, name):
            yield _encode(text, tokenizer, vocab_size)
        return
    _check_tokenizer(opened, tokenizer)
    if vocab_size is None:
        vocab_size = tokenizer.vocab_size if tokenizer else _metadata_int(opened, "longnet.vocab_size")
    check_eos(f"{opened.where}: ", eos_id, vocab_size)
    if kind in INTEGERS:
        if eos_id is None:
            eos_id = tokenizer.eos_id if tokenizer else _metadata_int(opened, "longnet.eos_id")
        groups = _flat_documents(opened, name, eos_id)
    else:
        groups = _list_documents(opened, name)
    for doc_id, row, parts in groups:
        yield Document(doc_id, parts, tokenizer, opened.place(row), limit=vocab_size, place=opened.place)


def refuse_column(opened: Text, column: str | None) -> None:
    """ConfigError for a column that is asked for where there is only text."""
    if column is not None:
        raise ConfigError(
            f"{opened.where}: column {column!r} is asked for, and this is plain text, which has no columns"
        )


def check_eos(where: str, eos_id: int | None, vocab_size: int | None) -> None:
    """ConfigError for an end-of-text id that no token can be."""
    if eos_id is not None and not 0 <= eos_id < (vocab_size or 1 << 63):
        limit = f"a vocabulary of {vocab_size}" if vocab_size else "64 bits"
        raise ConfigError(f"{where}the end-of-text id {eos_id} (--eos) does not fit {limit}")


def _check_tokenizer(table: Table, tokenizer: Tokenizer | None) -> None:
    written = (table.schema.metadata or {}).get(b"longnet.tokenizer_sha256")
    if tokenizer and written and written.decode("utf-8", "replace") != tokenizer.sha256:
        raise ConfigError(
            f"{table.where}: its tokens were made by tokenizer {written.decode('utf-8', 'replace')[:12]}, and the one "
            f"in use is {tokenizer.sha256[:12]}: give the tokenizer.json that the data was made with, or tokenize again"
        )


def _metadata_int(table: Table, key: str) -> int | None:
    written = (table.schema.metadata or {}).get(key.encode())
    if written is None:
        return None
    if not written.isdigit() or len(written) > 18:  # of which int64 holds all
        shown = written.decode("utf-8", "replace")
        shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
        raise DataError(f"{table.where}: the data is damaged: {key} in its metadata is {shown!r}, not a number of ids")
    return int(written)


class _Columns(NamedTuple):
    """The columns of a batch that begins at row `first`; what a table lacks is None."""

    first: int
    column: pa.Array
    doc_ids: list[str] | None
    parts: list[int] | None

    def label(self, index: int) -> "_Label":
        return _Label(
            self.first + index, self.doc_ids[index] if self.doc_ids else None, self.parts[index] if self.parts else None
        )


class _Label(NamedTuple):
    """Where a row belongs: its number, its document, and its place in that one; what a table does not say is None."""

    row: int
    doc_id: str | None
    part: int | None


def _batches(table: Table, name: str) -> Iterator[_Columns]:
    """Yield the columns of each batch, checked for damage and nulls."""
    kinds = {field.name: field.type for field in table.schema if field.name != name}
    has_ids = "doc_id" in kinds
    if has_ids and not (is_text(kinds["doc_id"]) or pa.types.is_integer(_plain(kinds["doc_id"]))):
        raise DataError(f"{table.where}: doc_id has type {kinds['doc_id']}: text or whole numbers are needed")
    has_parts = has_ids and "part" in kinds and pa.types.is_integer(kinds["part"])
    first = 0
    for index, batch in enumerate(table.read([name] + ["doc_id"] * has_ids + ["part"] * has_parts)):
        column = batch.column(name)
        with reading(f"{table.where}, batch {index}"):
            # List offsets that point outside the data would crash, not raise. This looks at no token.
            column.validate(full=True)
        _refuse_nulls(table, column, first)
        doc_ids = [str(value) for value in _values(table, batch, "doc_id", index, first)] if has_ids else None
        yield _Columns(first, column, doc_ids, _values(table, batch, "part", index, first) if has_parts else None)
        first += batch.num_rows
    if first == 0 and not is_manifest(table.schema):
        raise DataError(f"{table.where}: the table has 0 rows")


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a column, be they written out or as numbers of a dictionary."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _values(table: Table, batch: pa.RecordBatch, name: str, index: int, first: int) -> list[Any]:
    column = batch.column(name)
    with reading(f"{table.where}, batch {index}"):
        column.validate(full=True)
        values = column.to_pylist()
    _refuse_none(table, values, first, f", {name}")
    return values


def _refuse_nulls(table: Table, column: pa.Array, first: int) -> None:
    if column.null_count:
        row = first + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{table.place(row)}: the value is null")


def _refuse_none(table: Table, values: list[Any], first: int, what: str = "") -> None:
    """DataError for a null, be it in the column or in its dictionary."""
    if None in values:
        raise DataError(f"{table.place(first + values.index(None))}{what}: the value is null")


def _documents(table: Table, rows: Iterator[tuple[_Label, Any]]) -> Iterator[tuple[str, int, Iterator[Any]]]:
    """Group (label, value) into (doc_id, first row, values).

    Neighbours that share a doc_id are one document, whose parts must be 0, 1, 2, ... where they are known.
    """

    def values(doc_id: str, members: Iterator[tuple[_Label, Any]]) -> Iterator[Any]:
        for expected, (label, value) in enumerate(members):
            if label.part is not None and label.part != expected:
                raise DataError(
                    f"{table.place(label.row)}: part {label.part} of document {doc_id!r} stands where part {expected} "
                    "should: rows are missing, repeated or out of order"
                )
            yield value

    for key, members in groupby(rows, key=lambda row: row[0].row if row[0].doc_id is None else row[0].doc_id):
        head = next(members)
        first = head[0].row
        doc_id = key if isinstance(key, str) else f"{table.name}:{first}"
        yield doc_id, first, values(doc_id, chain((head,), members))  # noqa: B031 (used once, before the next group)


def _table_texts(table: Table, name: str) -> Iterator[Text]:
    def rows() -> Iterator[tuple[_Label, str]]:
        for batch in _batches(table, name):
            for index, value in enumerate(batch.column):
                text = value.as_py()
                _refuse_none(table, [text], batch.first + index)
                yield batch.label(index), text

    for doc_id, row, texts in _documents(table, rows()):
        yield Text(doc_id, "".join(texts), table.place(row))


def _list_documents(table: Table, name: str) -> Iterator[tuple[str, int, list[Part]]]:
    """Yield (doc_id, first row, parts) of a list column."""

    def rows() -> Iterator[tuple[_Label, Part]]:
        for batch in _batches(table, name):
            # `values` ignores the column's own slice; the bounds are into all of it.
            ids, valid = _views(table, batch.column.values)
            for index, (start, stop) in enumerate(_bounds(batch.column)):
                present = valid.slice(start, stop - start) if valid is not None else None
                yield batch.label(index), Part(ids[start:stop], present, batch.first + index)

    for doc_id, row, found in _documents(table, rows()):
        yield doc_id, row, collect(found)


def _bounds(column: pa.Array) -> Iterator[tuple[int, int]]:
    """Return where each list of a column starts and stops in its `values`."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        places = range(column.offset * kind.list_size, (column.offset + len(column) + 1) * kind.list_size)
        return pairwise(places[:: kind.list_size] if kind.list_size else [0] * (len(column) + 1))
    starts = column.offsets.to_numpy().tolist()
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        sizes = column.sizes.to_numpy().tolist()
        return ((start, start + size) for start, size in zip(starts, sizes, strict=True))
    return pairwise(starts)


def _flat_documents(table: Table, name: str, eos_id: int | None) -> Iterator[tuple[str, int, list[Part]]]:
    """Yield (doc_id, first row, parts) of a flat column: what lies between EOS ids, nothing where two are adjacent."""
    if eos_id is None:
        raise ConfigError(
            f"{table.where}: column {name!r} is one stream of ids, which only an end-of-text id can cut into "
            "documents: give a tokenizer that has one, or the id itself"
        )

    def stretches() -> Iterator[tuple[int, Part]]:
        """Each stretch without an EOS id, after the number of EOS ids before it."""
        count = 0
        for first, column, _, _ in _batches(table, name):
            all_ids, _ = _views(table, column)  # nulls have been refused
            for block in range(0, len(all_ids), FLAT_BLOCK):
                ids = all_ids[block : block + FLAT_BLOCK]
                begin = 0
                with reading(table.where, row=first + block):
                    ends = np.flatnonzero(np.asarray(ids) == eos_id).tolist()
                for end in [*ends, len(ids)]:
                    if end > begin:
                        yield count, Part(ids[begin:end], None, first + block + begin, flat=True)
                    count += end < len(ids)
                    begin = end + 1

    index = -1
    for index, (_, members) in enumerate(groupby(stretches(), key=lambda stretch: stretch[0])):
        parts = collect(part for _, part in members)
        row = parts[0].row
        assert row is not None
        yield f"{table.name}:{index}", row, parts
    if index < 0 and not is_manifest(table.schema):
        raise DataError(f"{table.where}: column {name!r} holds nothing but end-of-text ids")


def _views(table: Table, values: pa.Array) -> tuple[np.ndarray | StoredIds, pa.BooleanArray | None]:
    """The (tokens,) ids as a view of their file or of Arrow's memory, and where they are valid, None for everywhere."""
    valid = None
    if values.null_count:
        bitmap, data = values.buffers()
        bare, valid = (
            pa.Array.from_buffers(kind, len(values), [None, buffer], offset=values.offset)
            for kind, buffer in ((values.type, data), (pa.bool_(), bitmap))
        )
        values = bare
    stored = table.stored(values)
    return values.to_numpy(zero_copy_only=True) if stored is None else stored, valid


def _encode(text: Text, tokenizer: Tokenizer | None, limit: int | None) -> Document:
    if tokenizer is None:
        raise ConfigError(f"{text.where}: this is text: give a tokenizer (bytes, or a tokenizer.json)")
    tokens = tokenizer.encode(text.text)
    return Document(text.doc_id, tokens, len(text.text.encode()), text.where, limit=limit)
