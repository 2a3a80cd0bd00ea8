"""Opened inputs: one text, or a table of batches; and a pipe that both can be read from."""

import io
import select
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa

from longnet_cli.basics.errors import DataError, MemoryLimitError, first_line, is_of_system

from .local_files import LocalIds, Part, read_error, reading_row

TOKEN_COLUMNS = ("input_ids", "tokens", "token_ids", "ids")
CHAT_COLUMN = "messages"
JSON_LINES = "JSON Lines"  # the format of a table of lines
MOMENT = 0.02  # seconds in which the writer of a full pipe writes again
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Text:
    """A document as text. `where` is "file" or "file, row 3", and `row` is its first row; rows count from 0.

    For a long document, `text` is its start, and `rest` the parts that follow, which can be read once, before the next
    document. `kept` holds the values of the columns that are carried along. For a chat, `text` is the output of the
    template. Then `ids` returns the chat's ids, (tokens,) int64, as a part: they differ from the ids of `text`.
    """

    doc_id: str
    text: str
    where: str
    kept: Mapping[str, pa.Scalar] = field(default_factory=dict)
    rest: Iterable[str] = ()
    ids: Callable[[], Part] | None = None
    row: int = 0

    @property
    def parts(self) -> Iterator[str]:
        """The whole text, in parts."""
        return chain((self.text,), self.rest)

    def named(self, doc_id: str) -> "Text":
        """Return the text under another name."""
        return replace(self, doc_id=doc_id)


def numbers_in_memory(array: pa.Array) -> np.ndarray:
    """Return the numbers of an array, a view of Arrow's memory."""
    return cast(np.ndarray, array.to_numpy(zero_copy_only=True))


@dataclass(frozen=True)
class Table:
    """An opened Arrow, Parquet, HDF5 or JSON Lines input.

    `batches` takes the names of columns, the documents' column first, and yields batches that hold at least these (see
    `pick`). If ids lie unchanged in a file, it leaves them there: `numbers` is a view of an array of the last batch, in
    the file or in memory. In messages, rows count from 0, and lines of JSON_LINES from 1. `bad` gives
    the reason for rows whose values are null because they could not be read, `blank` the rows before which a blank line
    was skipped. With `rows_alone`, each row is a document. `joined` counts the documents of several rows that have no
    numbers, and these rows. `document` is the name of the one document that the table is, if its file says so.
    `fraction` returns which part of the file the batches so far take, from 0 to 1, when they have so many rows; 0 if it
    is not known. `ready` says of stdin whether more of it, or its end, has come (`Pipe`); it is None of other inputs.
    """

    name: str
    where: str
    schema: pa.Schema
    batches: Callable[[list[str]], Iterator[pa.RecordBatch]]
    format: str = "Arrow"
    numbers: Callable[[pa.Array], LocalIds | np.ndarray] = numbers_in_memory
    bad: dict[int, str] = field(default_factory=dict)
    blank: list[int] = field(default_factory=list)
    rows_alone: bool = False
    joined: Counter[str] = field(default_factory=Counter)
    document: str | None = None
    fraction: Callable[[int], float] = lambda rows: 0.0
    ready: Callable[[], bool] | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the schema, as text."""
        texts = {}
        for key, value in (self.schema.metadata or {}).items():
            texts[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        return texts

    def read(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the `batches`. An error names the batch that cannot be read, or the first row that a file has lost."""
        batches = self.batches(columns)
        rows = 0
        for index in count():
            with reading(f"{self.where}, batch {index}"), reading_row(rows):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            rows += batch.num_rows

    def place(self, row: int) -> str:
        """Return the file and the row, for a message. `row` counts from 0."""
        if self.format != JSON_LINES:
            return f"{self.where}, row {row}"
        return f"{self.where}, line {row + 1 + bisect_right(self.blank, row)}"


class ColumnPlace(NamedTuple):
    """The place of a column: the table's column `root`, the struct fields that lead to it from there, and its type."""

    root: str
    fields: list[str]
    type: pa.DataType


def find_column(schema: pa.Schema, name: str) -> ColumnPlace | None:
    """Return the place of a column, which may be inside others (`doc.body`), or None for an unknown name."""
    kinds = dict(zip(schema.names, schema.types, strict=True))
    steps = name.split(".")
    for cut in range(len(steps), 0, -1):  # a name may have dots of its own
        root = ".".join(steps[:cut])
        fields = steps[cut:]
        with suppress(KeyError, TypeError, AttributeError):  # no such column, or no struct
            kind = kinds[root]
            for step in fields:
                kind = kind.field(step).type
            return ColumnPlace(root, fields, kind)
    return None


def pick(batch: pa.RecordBatch, name: str) -> pa.Array:
    """Return a column of a batch, which may be inside others. It is null where a column around it is null.

    Raises ValueError for a missing or damaged column.
    """
    place = find_column(batch.schema, name)
    if place is None:
        raise ValueError(f"column {name!r} is missing in a batch")
    column = batch.column(place.root)
    # List offsets that point outside the data would crash, not raise. This reads no token.
    column.validate(full=True)
    if not place.fields:
        return column
    import pyarrow.compute as pc  # imported late: 20 ms that text does not need

    return pc.struct_field(column, place.fields)


def plain(column: pa.Array) -> pa.Array:
    """Return the same values in a plain type: no dictionary, extension type or view, which pyarrow does not take."""
    if pa.types.is_dictionary(column.type):
        return plain(column.dictionary).take(column.indices)
    if isinstance(column, pa.ExtensionArray):
        return column.storage
    kind = _without_views(column.type)
    return column if kind == column.type else column.cast(kind)


def _without_views(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_without_views(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_without_views(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_views(field.type)) for field in kind])
    return {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}.get(
        kind, kind
    )


# that `Pipe.ready` reads at a time: each read copies all that waits in the pipe
FEW_BYTES = 1 << 12


class Stdin(io.RawIOBase):
    """Stdin as a raw file below a larger buffer.

    `count` is the number of bytes that were taken from it, `whole` of those up to the end of its last whole line that
    is not blank.
    """

    count = whole = 0
    _begun = False  # whether a line that is not blank has begun, and not ended

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        size = cast(io.BufferedReader, sys.stdin.buffer).readinto1(buffer)
        data = bytes(buffer[:size])
        end = data.rfind(b"\n")
        if end < 0:
            self._begun |= bool(data.strip())
        else:
            lines = data[:end].rstrip()
            if lines or self._begun:
                self.whole = self.count + data.index(b"\n", len(lines)) + 1
            self._begun = bool(data[end + 1 :].strip())
        self.count += size
        return size

    def ready(self) -> bool:
        """Return whether more, or the end, comes within MOMENT."""
        try:
            return bool(select.select([sys.stdin.buffer], [], [], MOMENT)[0])
        except (OSError, ValueError):  # it is no file of the system
            return True


class Pipe:
    """A pipe as a file object whose reads are whole: pyarrow takes a short read for the end of the data."""

    closed = False
    by_lines = False  # whether its lines are read, of which blank ones say nothing

    def __init__(self, raw: Any) -> None:
        """Read from `raw`, a buffered binary file: its `readline` must be fast."""
        self._raw = raw
        # what was put back, or came before it was asked for: it grows and shrinks without a copy of all of it
        self._head = bytearray()
        self._position = 0

    def ready(self) -> bool:
        """Return True: nobody waits for a pipe other than stdin."""
        return True

    def peek(self, size: int) -> bytes:
        """Return the next bytes, fewer only at the end. They stay in the pipe."""
        head = self.read(size)
        self._head[:0] = head
        self._position -= len(head)
        return head

    def read(self, size: int) -> bytes:
        parts = [bytes(self._head[:size])] if self._head else []
        del self._head[:size]
        missing = size - sum(map(len, parts))
        while missing and (part := self._raw.read(min(missing, 1 << 30))):
            parts.append(part)
            missing -= len(part)
        self._position += size - missing
        return b"".join(parts)

    def readline(self) -> bytes:
        """Return the bytes up to and with the next newline, which only the last line may lack; b"" at the end."""
        end = self._head.find(b"\n") + 1 or len(self._head)
        line = bytes(self._head[:end])
        del self._head[:end]
        if not line.endswith(b"\n"):
            line += self._raw.readline()
        self._position += len(line)
        return line

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Do nothing: whoever opened the file below closes it."""


class StdinPipe(Pipe):
    """Stdin as a Pipe. It says whether more has come."""

    def __init__(self, buffer_size: int) -> None:
        self._stdin = Stdin()
        super().__init__(io.BufferedReader(self._stdin, buffer_size))

    def ready(self) -> bool:
        """Return whether more, or the end, has come: bytes, or a line that is whole and not blank."""
        if not self.by_lines:
            return self._stdin.count > self._position or self._stdin.ready()
        while self._stdin.whole <= self._position:
            if not self._stdin.ready():
                return False
            part = self._raw.read1(FEW_BYTES)
            if not part:
                return True
            self._head += part
        return True


def numpy_dtype(kind: pa.DataType) -> np.dtype:
    """Return the dtype for numbers of an Arrow type. `to_pandas_dtype` of older pyarrow needs pandas."""
    return cast(np.dtype, pa.array([], kind).to_numpy().dtype)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn an error of pyarrow or of the system about an input into one line that names the input."""
    try:
        yield
    except MemoryError as error:  # also pyarrow's own; a damaged size may ask for any amount
        reason = "it needs more memory than there is, or its data is damaged"
        raise MemoryLimitError(f"{what}: {reason} ({first_line(error)})") from error
    except pa.ArrowNotImplementedError as error:
        raise DataError(f"{what}: pyarrow does not read this ({first_line(error)})") from error
    # pyarrow also raises ValueError for a name that is not UTF-8, and OverflowError for a size past 2^63
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        if is_of_system(error):
            raise read_error(what, error) from error
        reason = "the data is damaged or truncated"
        if "decrypt" in str(error):
            reason = "encrypted Parquet is not read: write it without encryption"
        elif "://" in what:
            reason = f"the store failed, or {reason}"
        raise DataError(f"{what}: {reason} ({first_line(error)})") from error
