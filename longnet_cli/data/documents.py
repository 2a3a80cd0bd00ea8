"""A document as token ids that stay where they are, in their file if they can, read and checked slice by slice."""

import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from longnet_cli.data.files import FileChangedError, StoredIds, no_place
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.errors import ConfigError, DataError, LongNetError

BLOCK = 1 << 18  # tokens looked at together by a pass over a document: 2 MB of int64 stay in the cache
SPOOL_BYTES = 256 << 20  # ids of one document kept in memory; more of them go to a file in $TMPDIR


class Part(NamedTuple):
    """Ids that lie together: a row, or a stretch of a flat column.

    `ids` is (tokens,) of any integer type, a view of memory or of a file; `valid` (tokens,) is false at nulls, None
    when there are none. `row` is the file's row that holds the ids, or where `flat` the row of the first: there, every
    id is a row.
    """

    ids: np.ndarray | StoredIds
    valid: pa.BooleanArray | None = None
    row: int | None = None
    flat: bool = False


class Document:
    """A document as (tokens,) token ids, which are checked when they are read, not before.

    `doc_id` names it, `where` says its file and first row. Nothing is copied until `read`, and opening a row of 1e9
    tokens in a file reads none of them.
    """

    block = BLOCK

    def __init__(
        self,
        doc_id: str,
        tokens: np.ndarray | Sequence[Part],
        n_bytes: int | Tokenizer | None,
        where: str,
        *,
        limit: int | None = None,
        place: Callable[[int], str] | None = None,
        kept: Mapping[str, pa.Scalar] | None = None,
    ) -> None:
        """`tokens` is an integer array, or the parts whose rows `place` can name.

        `n_bytes` is the size of its UTF-8 text, or a tokenizer that can tell. Ids must be less than `limit`. `kept` are
        the values of columns that are carried along.
        """
        self.doc_id, self.kept = doc_id, kept or {}
        self.where = where
        self._n_bytes = n_bytes
        self._limit = limit
        self._place = place
        self.parts = [Part(tokens)] if isinstance(tokens, np.ndarray) else tokens
        self._starts = [0]  # of each part, and the end
        for part in self.parts:
            self._starts.append(self._starts[-1] + len(part.ids))
        self._length = self._starts.pop()
        dtype = self.parts[0].ids.dtype
        # Seen as unsigned a negative id is a huge one, so that one maximum tells both kinds of bad ids.
        self._unsigned = np.dtype(f"u{dtype.itemsize}")
        ceiling = min(np.iinfo(dtype).max, np.iinfo(np.int64).max)
        self._highest = ceiling if limit is None else min(limit - 1, int(ceiling))

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"Document({self.doc_id!r}, {len(self)} tokens, {self.where})"

    @property
    def tokens(self) -> np.ndarray:
        """All ids at once, `read()`: (tokens,) int64, 8 bytes each. Only for documents that are known to be small."""
        return self.read()

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The ids [start, stop), bounds as in a Python slice, as an (stop - start,) int64 copy.

        Raises DataError, naming file, row and offset in the row, for an id that is null, negative or too large, and,
        naming file and row, for a file that has changed since it was opened.
        """
        start, stop, _ = slice(start, stop).indices(self._length)
        out = np.empty(max(0, stop - start), np.int64)
        index = bisect_right(self._starts, start) - 1
        done = 0
        while done < len(out):
            part = self.parts[index]
            first = start + done - self._starts[index]
            stored = part.ids[first : first + min(len(out) - done, BLOCK)]
            if not len(stored):
                index += 1
                continue
            try:
                ids = np.asarray(stored)
            except FileChangedError as error:
                raise error.at((part.row or 0) + (first if part.flat else 0)) from None
            bad = part.valid is not None and part.valid.slice(first, len(ids)).false_count
            if bad or int(np.maximum.reduce(ids.view(self._unsigned))) > self._highest:
                raise self._refuse(part, first, ids)
            out[done : done + len(ids)] = ids
            done += len(ids)
        return out

    @cached_property
    def n_bytes(self) -> int | None:
        """The UTF-8 bytes of the document's text, None where they are unknown. May need a pass over the tokens."""
        if not isinstance(self._n_bytes, Tokenizer):
            return self._n_bytes
        total = 0
        for start in range(0, len(self), BLOCK):
            size = self._n_bytes.n_bytes(self.read(start, start + BLOCK))
            if size is None:
                return None
            total += size
        return total

    def _refuse(self, part: Part, first: int, ids: np.ndarray) -> DataError:
        """The error for the first bad id of `ids`, which begin at `first` in `part`."""
        bad = ids.view(self._unsigned) > self._highest
        null = np.zeros(len(ids), bool)
        if part.valid is not None:
            null = ~part.valid.slice(first, len(ids)).to_numpy(zero_copy_only=False)
        index = int(np.flatnonzero(bad | null)[0])
        offset = first + index
        if part.row is None or self._place is None:
            where = f"{self.where}, offset {offset}"
        elif part.flat:
            where = f"{self._place(part.row + offset)}, offset 0"
        else:
            where = f"{self._place(part.row)}, offset {offset}"
        if null[index]:
            return DataError(f"{where}: the token id is null")
        if ids[index] < 0:
            return DataError(f"{where}: token id {ids[index]} is negative")
        return DataError(f"{where}: token id {ids[index]} does not fit a vocabulary of {self._limit or 1 << 63}")


class Unread(Document):
    """Stands, without tokens, for a file or a row that could not be read: `error` says why."""

    def __init__(self, error: DataError) -> None:
        super().__init__("", np.empty(0, np.int64), 0, str(error))
        self.error = error


def checked(
    documents: Iterable[Document],
    check: Callable[[Document], None],
    on_skip: Callable[[Document, LongNetError], None] | None = None,
    *,
    reads: bool = True,
) -> Iterator[Document]:
    """Yield the documents that `check` takes, and raise what it raises.

    With `on_skip`, all ids of a document are read here too, unless it `reads` none, and one that cannot be taken or
    read is handed to it instead, with the ConfigError or DataError. A file that changes while it is read ends
    everything all the same.
    """
    for document in documents:
        try:
            if isinstance(document, Unread):
                raise document.error
            check(document)
            for start in range(0, len(document) if on_skip and reads else 0, document.block):
                document.read(start, start + document.block)
        except (ConfigError, DataError) as error:
            if on_skip is None or isinstance(error, FileChangedError):
                raise
            on_skip(document, error)
        else:
            yield document


def collect(parts: Iterable[Part]) -> list[Part]:
    """The parts of one document.

    Those in memory are moved to an unnamed temporary file whenever more than SPOOL_BYTES of them are followed by
    another, so that a document that comes through a pipe in pieces takes disk, not memory.
    """
    kept: list[Part] = []
    in_memory: list[int] = []
    size = 0
    for part in parts:
        if size > SPOOL_BYTES:
            spooled = _spool([np.asarray(kept[index].ids) for index in in_memory])
            for index, ids in zip(in_memory, spooled, strict=True):
                kept[index] = kept[index]._replace(ids=ids)
            in_memory, size = [], 0
        if isinstance(part.ids, np.ndarray):
            in_memory.append(len(kept))
            size += part.ids.nbytes
        kept.append(part)
    return kept


def _spool(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The same (tokens,) arrays, of one dtype, as read-only views of one mapped file that has no name."""
    try:
        with tempfile.TemporaryFile() as file:
            for array in arrays:
                file.write(array.data)
            file.flush()
            joined = np.memmap(file, arrays[0].dtype, mode="r")
    except OSError as error:
        raise no_place(error) from error
    return np.split(joined, np.cumsum([len(array) for array in arrays])[:-1])
