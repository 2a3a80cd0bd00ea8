"""Opened inputs: one text, or a table of batches; and a pipe that both can be read from."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from longnet_cli.data.files import FileChangedError, StoredIds, read_error
from longnet_cli.errors import DataError, MemoryLimitError

TOKEN_COLUMNS = ("input_ids", "tokens", "token_ids", "ids")


@dataclass(frozen=True)
class Text:
    """A document as text; `where` is "file" or "file, row 3" (rows count from 0)."""

    doc_id: str
    text: str
    where: str


@dataclass(frozen=True)
class Table:
    """An opened Arrow, Parquet or JSON Lines input.

    `read` yields batches that hold at least the columns it is given, the documents' column first. Of a file in which
    ids lie as they are, they are not read: `stored` says where those of the batch that came last are, None for an array
    that is in memory. `numbered` is how people name a row: rows count from 0, lines from 1. JSON has no integer types:
    `typed` says whether the schema's were chosen by who wrote the file.
    """

    name: str
    where: str
    schema: pa.Schema
    read: Callable[[list[str]], Iterator[pa.RecordBatch]]
    format: str = "Arrow"
    stored: Callable[[pa.Array], StoredIds | None] = lambda array: None
    numbered: str = "row"
    typed: bool = True

    def place(self, row: int) -> str:
        """The file and the row (from 0), for a message."""
        return f"{self.where}, {self.numbered} {row + (self.numbered == 'line')}"


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
