"""Documents in: the rows of tables and the texts of files, as text or as checked token ids.

    inputs --find_sources--> Source --open_source--> Text | Table --> Text (read_texts) | Document (read_documents)

Token columns are memory-mapped and sliced, never joined by Arrow: its 32-bit list offsets overflow at 2^31 tokens.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longnet_cli.data.formats import Table, Text, open_source, reading
from longnet_cli.data.inputs import find_sources
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.errors import ConfigError, DataError

TOKEN_COLUMNS = ("input_ids", "tokens", "token_ids", "ids")

BLOCK = 1 << 22  # tokens looked at together where a pass needs memory of its own
SPOOL_BYTES = 256 << 20  # a document that must be copied and is larger than this goes to a file in $TMPDIR

_INTEGERS = (pa.uint8(), pa.uint16(), pa.uint32(), pa.int8(), pa.int16(), pa.int32(), pa.int64())
_TEXTS = (pa.string(), pa.large_string())

Value = TypeVar("Value")


@dataclass(frozen=True)
class Document:
    """A document as token ids.

    `tokens` is (tokens,) int32 or int64. Where possible it is a read-only view of a memory-mapped file: copy what
    you cut from it (`.astype(np.int64)`) before torch sees it, as torch would write into the map and crash.
    `n_bytes` counts the UTF-8 bytes of its text, None where they are unknown.
    """

    doc_id: str
    tokens: np.ndarray
    n_bytes: int | None
    where: str

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The ids [start, stop) as a (stop - start,) int64 copy of one's own."""
        return self.tokens[start:stop].astype(np.int64)


def read_texts(inputs: Sequence[str | Path], column: str | None = None) -> Iterator[Text]:
    """Yield the documents of text files and of text columns, in order; one file is held in memory at a time.

    Raises ConfigError for a table without a text column, DataError for missing, empty or damaged data.
    """
    for source in find_sources(inputs):
        opened = open_source(source)
        if isinstance(opened, Text):
            yield opened
        else:
            yield from _table_texts(opened, _choose_column(opened, column, text_only=True))


def read_documents(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer | None,
    *,
    column: str | None = None,
    vocab_size: int | None = None,
) -> Iterator[Document]:
    """Yield the documents of every input, in order, as token ids.

    Token columns are checked against `vocab_size` (without it, the tokenizer's); text needs the tokenizer. A row is a
    document, and neighbouring rows of a file with one `doc_id` are one; a flat integer column is cut at the EOS id.
    Raises ConfigError for a missing tokenizer or column, DataError for missing, empty, damaged or out-of-range data.
    """
    limit = vocab_size if vocab_size is not None or tokenizer is None else tokenizer.vocab_size
    for source in find_sources(inputs):
        opened = open_source(source)
        if isinstance(opened, Text):
            yield _encode(opened, tokenizer, limit)
            continue
        name = _choose_column(opened, column, text_only=False)
        kind = opened.schema.field(name).type
        if kind in _TEXTS:
            for text in _table_texts(opened, name):
                yield _encode(text, tokenizer, limit)
        else:
            rows = _stream_rows if kind in _INTEGERS else _list_rows
            for doc_id, where, parts in rows(opened, name, limit, tokenizer):
                tokens = _join(parts)
                yield Document(doc_id, tokens, tokenizer.n_bytes(tokens) if tokenizer else None, where)


def _is_list(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and kind.value_type in _INTEGERS


def _choose_column(table: Table, column: str | None, *, text_only: bool) -> str:
    """The column of documents: the one asked for, else the one list of ids, else the one flat or text column."""

    def refuse(problem: str) -> ConfigError:
        columns = ", ".join(f"{field.name}: {field.type}" for field in table.schema)
        return ConfigError(f"{table.where}: {problem}; its columns are {columns}")

    kinds = {field.name: field.type for field in table.schema}
    if column is not None:
        if column not in kinds:
            raise refuse(f"there is no column {column!r}")
        kind = kinds[column]
        if kind in _TEXTS or (not text_only and (kind in _INTEGERS or _is_list(kind))):
            return column
        raise refuse(f"column {column!r} does not hold {'text' if text_only else 'token ids or text'}")
    flat = ["text"] if kinds.get("text") in _TEXTS else []
    lists: list[str] = []
    if not text_only:
        lists = [name for name in TOKEN_COLUMNS if name in kinds and _is_list(kinds[name])]
        flat += [name for name in TOKEN_COLUMNS if kinds.get(name) in _INTEGERS]
    found = lists or flat
    if len(found) > 1:
        raise refuse(f"several columns may hold the documents ({', '.join(found)}): choose one (--column)")
    if not found:
        names = "text" if text_only else f"{', '.join(TOKEN_COLUMNS)} or text"
        raise refuse(f"no column named {names} of a fitting type: choose one (--column)")
    return found[0]


def _columns(table: Table, name: str) -> Iterator[tuple[int, pa.Array, list[str] | None]]:
    """Yield (first row, the column, the doc_ids) of each batch, all checked for damage and nulls."""
    ids_kind = table.schema.field("doc_id").type if "doc_id" in table.schema.names and name != "doc_id" else None
    has_ids = ids_kind in _TEXTS or (ids_kind is not None and pa.types.is_integer(ids_kind))
    row = 0
    for index, batch in enumerate(table.read([name, "doc_id"] if has_ids else [name])):
        column = batch.column(name)
        with reading(f"{table.where}, batch {index}"):
            column.validate(full=True)  # list offsets that point outside the data would crash, not raise
        _refuse_nulls(column, table.where, row)
        doc_ids = None
        if has_ids:
            _refuse_nulls(batch.column("doc_id"), f"{table.where}, doc_id", row)
            doc_ids = [str(doc_id) for doc_id in batch.column("doc_id").to_pylist()]
        yield row, column, doc_ids
        row += batch.num_rows
    if row == 0:
        raise DataError(f"{table.where}: the table has 0 rows")


def _refuse_nulls(column: pa.Array, where: str, first_row: int) -> None:
    if column.null_count:
        row = first_row + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{where}, row {row}: the value is null")


def _group(table: Table, rows: Iterator[tuple[int, str | None, Value]]) -> Iterator[tuple[str, str, list[Value]]]:
    """Collect (row, doc_id, value) into (doc_id, where, values): neighbours that share a doc_id are one document."""
    for doc_id, members in groupby(rows, key=lambda row: row[1] if row[1] is not None else row[0]):
        document = list(members)
        first = document[0][0]
        name = doc_id if isinstance(doc_id, str) else f"{table.name}:{first}"
        yield name, f"{table.where}, row {first}", [value for _, _, value in document]


def _table_texts(table: Table, name: str) -> Iterator[Text]:
    def rows() -> Iterator[tuple[int, str | None, str]]:
        for first, column, doc_ids in _columns(table, name):
            for index, value in enumerate(column):
                yield first + index, doc_ids[index] if doc_ids else None, value.as_py()

    for doc_id, where, texts in _group(table, rows()):
        yield Text(doc_id, "".join(texts), where)


def _list_rows(
    table: Table, name: str, limit: int | None, tokenizer: Tokenizer | None
) -> Iterator[tuple[str, str, list[np.ndarray]]]:
    """Yield (doc_id, where, parts) of a list column, parts being (tokens,) views of its memory."""

    def rows() -> Iterator[tuple[int, str | None, np.ndarray]]:
        for first, column, doc_ids in _columns(table, name):
            if pa.types.is_fixed_size_list(column.type):
                size = column.type.list_size
                offsets = (np.arange(len(column) + 1, dtype=np.int64) + column.offset) * size
            else:
                offsets = column.offsets.to_numpy()
            # `values` ignores the column's own slice; the offsets are into all of it.
            start, end = int(offsets[0]), int(offsets[-1])
            bounds = offsets.astype(np.int64) - start
            ids = _checked_ids(column.values.slice(start, end - start), table.where, first, bounds, limit)
            for index in range(len(column)):
                yield first + index, doc_ids[index] if doc_ids else None, ids[bounds[index] : bounds[index + 1]]

    yield from _group(table, rows())


def _stream_rows(
    table: Table, name: str, limit: int | None, tokenizer: Tokenizer | None
) -> Iterator[tuple[str, str, list[np.ndarray]]]:
    """Yield (doc_id, where, parts) of a flat column: what lies between its EOS ids, nothing where two are adjacent."""
    written = (table.schema.metadata or {}).get(b"longnet.eos_id")
    eos_id = tokenizer.eos_id if tokenizer else int(written) if written else None
    if eos_id is None:
        raise ConfigError(
            f"{table.where}: column {name!r} is one stream of ids, which only an end-of-text id can cut into "
            "documents: give a tokenizer that has one"
        )
    parts: list[np.ndarray] = []
    start = count = 0

    def document() -> tuple[str, str, list[np.ndarray]]:
        return f"{table.name}:{count}", f"{table.where}, row {start}", parts

    for first, column, _ in _columns(table, name):
        all_ids = _checked_ids(column, table.where, first, None, limit)
        for block in range(0, len(all_ids), BLOCK):
            ids = all_ids[block : block + BLOCK]
            begin = 0
            for end in [*np.flatnonzero(ids == eos_id).tolist(), len(ids)]:
                if end > begin:
                    if not parts:
                        start = first + block + begin
                    parts.append(ids[begin:end])
                if end < len(ids) and parts:
                    yield document()
                    parts, count = [], count + 1
                begin = end + 1
    if parts:
        yield document()
    elif count == 0:
        raise DataError(f"{table.where}: column {name!r} holds nothing but end-of-text ids")


def _checked_ids(ids: pa.Array, where: str, first_row: int, bounds: np.ndarray | None, limit: int | None) -> np.ndarray:
    """The (tokens,) ids as a view of Arrow's memory, when none is null, negative, or `limit` or more.

    `bounds` (rows + 1,) says where each row begins, None when every id is a row; both count from `first_row`.
    """

    def refuse(bad: np.ndarray, problem: str) -> DataError:
        position = int(np.flatnonzero(bad)[0])
        row, offset = position, 0
        if bounds is not None:
            row = int(np.searchsorted(bounds, position, side="right")) - 1
            offset = position - int(bounds[row])
        return DataError(f"{where}, row {first_row + row}, offset {offset}: {problem.format(ids[position])}")

    if ids.null_count:
        raise refuse(ids.is_null().to_numpy(zero_copy_only=False), "the token id is null")
    array: np.ndarray = ids.to_numpy(zero_copy_only=True)
    if len(ids):
        low, high = (pc.min_max(ids)[key].as_py() for key in ("min", "max"))
        if low < 0:
            raise refuse(array < 0, "token id {} is negative")
        if limit is not None and high >= limit:
            raise refuse(array >= limit, f"token id {{}} does not fit a vocabulary of {limit}")
    return array


def _encode(text: Text, tokenizer: Tokenizer | None, limit: int | None) -> Document:
    if tokenizer is None:
        raise ConfigError(f"{text.where}: this is text: give a tokenizer (bytes, or a tokenizer.json)")
    tokens = tokenizer.encode(text.text)
    if limit is not None and limit < tokenizer.vocab_size:
        offsets = np.array([0, len(tokens)])
        _checked_ids(pa.array(tokens), text.where, 0, offsets, limit)
    return Document(text.doc_id, tokens, len(text.text.encode()), text.where)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """One (tokens,) int32 or int64 array: the part itself if it is that already, else a copy.

    A large copy is made in an unnamed temporary file and mapped read-only, so 1e9 tokens take disk, not memory.
    """
    if len(parts) == 1 and parts[0].dtype in (np.int32, np.int64):
        return parts[0]
    wide = any(part.dtype in (np.uint32, np.int64) for part in parts)
    dtype = np.dtype(np.int64 if wide else np.int32)
    total = sum(len(part) for part in parts)
    if total * dtype.itemsize <= SPOOL_BYTES:
        return np.concatenate(parts, dtype=dtype)
    with tempfile.TemporaryFile() as file:
        for part in parts:
            for start in range(0, len(part), BLOCK):
                file.write(part[start : start + BLOCK].astype(dtype).tobytes())
        file.flush()
        return np.memmap(file, dtype, mode="r", shape=(total,))
