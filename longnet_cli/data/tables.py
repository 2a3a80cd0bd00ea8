"""Opened inputs: one text, or a table of batches; and a pipe that both can be read from."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longnet_cli.data.files import FileChangedError, StoredIds, read_error
from longnet_cli.errors import DataError, MemoryLimitError

TOKEN_COLUMNS = ("input_ids", "tokens", "token_ids", "ids")
CHAT_COLUMN = "messages"


@dataclass(frozen=True)
class Text:
    """A document as text; `where` is "file" or "file, row 3" (rows count from 0).

    Of a long one, `text` is its beginning, and `rest` what follows, which can be read once, before the next document.
    `kept` are the values of the columns that are carried along, None for null. `error` is why it could not be read.
    Of a chat, `text` is what the template makes of it, and `ids` gives its (tokens,) int64, which no text does.
    """

    doc_id: str
    text: str
    where: str
    kept: Mapping[str, pa.Scalar] = field(default_factory=dict)
    error: DataError | None = None
    rest: Iterable[str] = ()
    ids: Callable[[], np.ndarray] | None = None

    @property
    def parts(self) -> Iterator[str]:
        """All of it, in pieces."""
        return chain((self.text,), self.rest)


@dataclass(frozen=True)
class Table:
    """An opened Arrow, Parquet or JSON Lines input.

    `read` yields batches that hold at least the columns it is given, the documents' column first (see `pick`). Of a
    file in which ids lie as they are, they are not read: `stored` says where those of the batch that came last are,
    None for an array that is in memory. `numbered` is how people name a row: rows count from 0, lines from 1. JSON has
    no integer types: `typed` says whether the schema's were chosen by who wrote the file. `bad` says what is wrong with
    rows whose values are null for that.
    """

    name: str
    where: str
    schema: pa.Schema
    read: Callable[[list[str]], Iterator[pa.RecordBatch]]
    format: str = "Arrow"
    stored: Callable[[pa.Array], StoredIds | None] = lambda array: None
    numbered: str = "row"
    typed: bool = True
    bad: dict[int, str] = field(default_factory=dict)

    def place(self, row: int) -> str:
        """The file and the row (from 0), for a message."""
        return f"{self.where}, {self.numbered} {row + (self.numbered == 'line')}"


class Place(NamedTuple):
    """The place of a column: in the column `root` of its table, the fields of structs that lead to it; and its type."""

    root: str
    fields: list[str]
    type: pa.DataType


def find_column(schema: pa.Schema, name: str) -> Place | None:
    """Return where a column is, which may be inside of others: `doc.body`. None where there is none of that name."""
    kinds = {field.name: field.type for field in schema}
    steps = name.split(".")
    for cut in range(len(steps), 0, -1):  # a name may have dots of its own
        kind, rest = kinds.get(".".join(steps[:cut])), steps[cut:]
        for step in rest:
            if kind is None or not pa.types.is_struct(kind) or kind.get_field_index(step) < 0:
                kind = None
                break
            kind = kind.field(step).type
        if kind is not None:
            return Place(".".join(steps[:cut]), rest, kind)
    return None


def pick(batch: pa.RecordBatch, name: str) -> pa.Array:
    """Return a column of a batch, wherever it is; null where what it is in is null. ValueError where it is damaged."""
    place = find_column(batch.schema, name)
    if place is None:
        raise ValueError(f"column {name!r} is missing in a batch")
    column = batch.column(place.root)
    # List offsets that point outside the data would crash, not raise. This looks at no token.
    column.validate(full=True)
    return pc.struct_field(column, place.fields) if place.fields else column


class Pipe:
    """A pipe as a file object for pyarrow, which takes a short read for the end of the data: these reads are whole."""

    closed = False

    def __init__(self, raw: Any) -> None:
        """`raw` is a buffered binary file: its `readline` must be fast."""
        self._raw = raw
        self._head = b""
        self._position = 0

    def peek(self, size: int) -> bytes:
        """The first bytes, fewer only at the end; they stay in the pipe."""
        head = self.read(size)
        self.unread(head)
        return head

    def read(self, size: int = -1) -> bytes:
        wanted = sys.maxsize if size is None or size < 0 else size
        parts = [self._head[:wanted]] if self._head else []
        self._head = self._head[wanted:]
        missing = wanted - sum(map(len, parts))
        while missing and (part := self._raw.read(min(missing, 1 << 30))):
            parts.append(part)
            missing -= len(part)
        self._position += wanted - missing
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readline(self) -> bytes:
        """The bytes up to and with the next newline; without one only at the end, b"" after it."""
        end = self._head.find(b"\n") + 1
        line = self._head[:end] if end else self._head + self._raw.readline()
        self._head = self._head[end:] if end else b""
        self._position += len(line)
        return line

    def unread(self, data: bytes) -> None:
        """Put back what was read last."""
        self._head = data + self._head
        self._position -= len(data)

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """The file below is closed by who has opened it."""


def numpy_dtype(kind: pa.DataType) -> np.dtype:
    """Return the dtype of numbers of an Arrow type: `to_pandas_dtype` of older pyarrow needs pandas."""
    return cast(np.dtype, pa.array([], kind).to_numpy().dtype)


@contextmanager
def reading(what: str, row: int | None = None) -> Iterator[None]:
    """Turn what pyarrow or the system says about an input into one line that names it.

    `row` is the first one that is read here, for a file that changes under the reader.
    """
    try:
        yield
    except FileChangedError as error:
        raise error if row is None else error.at(row) from None
    except MemoryError as error:  # pyarrow's own is one too; a damaged size may ask for any amount
        reason = "it needs more memory than there is, or its data is damaged"
        raise MemoryLimitError(f"{what}: {reason} ({one_line(error)})") from error
    # pyarrow raises more than its own: a name that is not UTF-8 is a ValueError, a size past 2^63 an OverflowError
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
                raise DataError(f"{what}: {error.strerror}") from error
            raise read_error(what, error) from error
        raise DataError(f"{what}: the data is damaged or truncated ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """The first line of an error's message that says anything, otherwise its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
