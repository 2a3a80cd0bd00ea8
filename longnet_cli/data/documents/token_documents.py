"""Documents as token ids, which stay in their file if possible and are read and checked slice by slice."""

import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cache, cached_property, partial

import numpy as np
import pyarrow as pa

from longnet_cli.basics.errors import DataError
from longnet_cli.data.files.local_files import Part, reading_row, spooling

from .tokenizer import Tokenizer

# tokens per step of a pass over a document: 2 MB of int64, which stay in the CPU cache
STEP = 1 << 18
NO_LIMIT = 1 << 63  # more than any id
SPOOL_BYTES = 256 << 20  # bytes of one document's ids in memory; more go to a file in $TMPDIR
NOTHING: Mapping[str, pa.Scalar] = {}  # is carried along


def same_place(where: str, row: int) -> str:
    """Return `where`, for any row. A function of the module, so that a document can be pickled."""
    return where


class Document:
    """A document as (tokens,) token ids, which are checked only when they are read.

    `doc_id` is its name, `where` its file and first row. Nothing is copied until `read`, and opening a row of 1e9
    tokens in a file reads none of them.
    """

    step = STEP  # tokens per step of a pass
    width = 1  # numbers per token
    has_vectors = False  # in place of ids

    def __init__(
        self,
        doc_id: str,
        tokens: np.ndarray | Sequence[Part],
        n_bytes: int | Tokenizer | None,
        where: str,
        *,
        limit: int | None = None,
        place: Callable[[int], str] | None = None,
        kept: Mapping[str, pa.Scalar] = NOTHING,
        tokenizer: Tokenizer | None = None,
        places: np.ndarray | None = None,
        ends: Sequence[int] | None = None,
    ) -> None:
        """Make a document of `tokens`: an integer array, or parts whose rows `place` can name.

        `n_bytes` is the size of its UTF-8 text, or a tokenizer that can compute it. Ids must be less than `limit`.
        `kept` holds the values of columns that are carried along. `tokenizer` made the ids from a text; it is None if
        there was none. `places` are those of its tokens in the text, if they are kept (see `TextPlaces`). `ends` are
        the characters after the units of the text, if it was cut into some.
        """
        self.doc_id = doc_id
        self.where = where
        self.kept = kept
        self.tokenizer = tokenizer
        self.places = places
        self.ends = ends
        self._n_bytes = n_bytes
        self._limit = NO_LIMIT if limit is None else limit
        self._place = place or partial(same_place, where)
        self.parts = [Part(tokens)] if isinstance(tokens, np.ndarray) else tokens
        self._starts = [0]  # of each part, and the end
        for part in self.parts:
            self._starts.append(self._starts[-1] + len(part.ids) // max(1, self.width))
        self._length = self._starts.pop()

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"Document({self.doc_id!r}, {len(self)} tokens, {self.where})"

    def head(self, tokens: int) -> "Document":
        """Return the document up to so many tokens."""
        document = copy(self)
        document._length = min(tokens, len(self))
        return document

    def named(self, doc_id: str) -> "Document":
        """Return the document under another name."""
        document = copy(self)
        document.doc_id = doc_id
        return document

    @property
    def tokens(self) -> np.ndarray:
        """All ids at once, `read()`: (tokens,) int64, 8 bytes each. Only for documents that are known to be small."""
        return self.read()

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the ids [start, stop), bounds as in a Python slice, as an (stop - start,) int64 copy.

        Raises DataError for an id that is null, negative or too large, naming file, row and offset in the row, and
        for a file that has changed since it was opened, naming file and row.
        """
        start, stop, _ = slice(start, stop).indices(self._length)
        out = np.empty(max(0, stop - start), np.int64)
        for done, part, offset, ids in self._stretches(start, stop):
            count = len(ids)
            unsigned, highest = id_bounds(ids.dtype, self._limit)
            is_too_large = int(np.maximum.reduce(ids.view(unsigned))) > highest
            if is_too_large or (part.valid is not None and part.is_null(offset, count).any()):
                raise self._refuse(part, offset, ids)
            out[done : done + count] = ids
        return out

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[int, Part, int, np.ndarray]]:
        """Yield the tokens [start, stop), a step in a part at a time.

        A tuple has the number of tokens before, the part, the step's offset in it in tokens, and its numbers.
        """
        index = bisect_right(self._starts, start) - 1
        place = start
        while place < stop:
            part = self.parts[index]
            offset = place - self._starts[index]
            end = offset + min(stop - place, self.step)
            stored = part.ids[offset * self.width : end * self.width]
            if not len(stored):
                index += 1
                continue
            with reading_row(part.row_of(offset)):
                numbers = np.asarray(stored)
            yield place - start, part, offset, numbers
            place += len(numbers) // self.width

    @cached_property
    def n_bytes(self) -> int | None:
        """The size of the document's text in UTF-8 bytes, None if unknown. May need a pass over the tokens."""
        if not isinstance(self._n_bytes, Tokenizer):
            return self._n_bytes
        return self.bytes_with(self._n_bytes)

    def bytes_with(self, tokenizer: Tokenizer) -> int | None:
        """Return the UTF-8 bytes that the ids are with a tokenizer, None if it does not tell. It reads all ids."""
        total = 0
        for start in range(0, len(self), STEP):
            size = tokenizer.n_bytes(self.read(start, start + STEP))
            if size is None:
                return None
            total += size
        return total

    def _refuse(self, part: Part, start: int, ids: np.ndarray) -> DataError:
        """Return the error for the first bad id of `ids`, which start at `start` in `part`."""
        unsigned, highest = id_bounds(ids.dtype, self._limit)
        bad = ids.view(unsigned) > highest
        null = part.is_null(start, len(ids))
        index = int(np.flatnonzero(bad | null)[0])
        offset = start + index
        row = part.row
        if part.flat:  # each id is a row
            row += offset
            offset = 0
        where = f"{self._place(row)}, offset {offset}"
        if null[index]:
            return DataError(f"{where}: the token id is null")
        if ids[index] < 0:
            return DataError(f"{where}: token id {ids[index]} is negative")
        return DataError(
            f"{where}: token id {ids[index]} does not fit a vocabulary of {self._limit}"
        )


@cache
def id_bounds(dtype: np.dtype, limit: int) -> tuple[np.dtype, int]:
    """Return the type of ids without its sign, and the highest id below `limit` in it.

    Without its sign, a negative id is a huge one, so one maximum finds bad ids.
    """
    ceiling = int(min(np.iinfo(dtype).max, np.iinfo(np.int64).max))
    return np.dtype(f"u{dtype.itemsize}"), min(limit - 1, ceiling)


class Unread(Document):
    """A stand-in, without tokens, for a row, or a `file`, that could not be read: `error` says why."""

    def __init__(self, error: DataError, *, file: bool = False) -> None:
        super().__init__("", np.empty(0, np.int64), 0, str(error))
        self.error = error
        self.file = file


class Apart:
    """Names of documents, one after the other: a name that repeats the one before would be read back with it as one."""

    last: str | None = None
    written: str | None = None
    repeats = 0

    def name(self, doc_id: str) -> str:
        """Return the name of the next document: `doc_id`, or `doc_id#1`, `doc_id#2` where it repeats."""
        name = doc_id
        if doc_id == self.last:
            self.repeats += 1
            name = f"{doc_id}#{self.repeats}"
        else:
            self.repeats = 0
        if name == self.written:
            name = f"{name}#1"
        self.last = doc_id
        self.written = name
        return name


def collect(parts: Iterable[Part]) -> list[Part]:
    """Return the parts of one document.

    Whenever the parts in memory exceed SPOOL_BYTES and another part follows, they are moved to an unnamed temporary
    file. So a document that comes through a pipe in pieces takes disk, not memory.
    """
    collected: list[Part] = []
    in_memory: list[int] = []  # indices
    size = 0  # bytes of these
    for part in parts:
        if size > SPOOL_BYTES:
            spooled = _spool([np.asarray(collected[index].ids) for index in in_memory])
            for index, ids in zip(in_memory, spooled, strict=True):
                collected[index] = collected[index]._replace(ids=ids)
            in_memory = []
            size = 0
        if isinstance(part.ids, np.ndarray):
            in_memory.append(len(collected))
            size += part.ids.nbytes
        collected.append(part)
    return collected


def _spool(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Return the same (tokens,) arrays, of one dtype, as read-only views of one memory-mapped, unnamed file."""
    with spooling(), tempfile.TemporaryFile() as file:
        for array in arrays:
            file.write(array.data)
        file.flush()
        joined = np.memmap(file, arrays[0].dtype, mode="r")
    return np.split(joined, np.cumsum([*map(len, arrays)])[:-1])


class TextPlaces:
    """The places of spans in the text of one document, in characters; spans come in order.

    A byte-level tokenizer that `spells` texts has places by counting: spans then tile the text, and a leading space
    belongs to the token after it. Counting needs nothing but the ids, so it is done when places are asked for. All
    other tokenizers (words, SentencePiece, a normalizer that may change the text) have the places that the library
    gives, which are kept beside the ids if the tokenizer `tells_places`.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self._position = 0  # tokens so far
        self._begun = 0  # characters that begin in these
        self._known = document.places is not None
        tokenizer = document.tokenizer
        if tokenizer is not None and not self._known and tokenizer.spells:
            # otherwise the tokenizer dropped some of the text
            self._known = document.bytes_with(tokenizer) == document.n_bytes
            self._begin, self._inside = tokenizer.characters

    def of(self, start: int, end: int) -> tuple[int | None, int | None]:
        """Return the first character of the tokens [start, end), and the one after their last; None if not known."""
        if not self._known:
            return None, None
        begin, _ = self._bounds(start, start + 1)
        _, after = self._bounds(end - 1, end)
        return int(begin[0]), int(after[0])

    def of_tokens(self, start: int, stop: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Return the same of each of the tokens [start, stop), two of (n,); None if not known."""
        return self._bounds(start, stop) if self._known else (None, None)

    def _bounds(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the known first characters of tokens, and the characters after them, two of (n,)."""
        if self.document.places is not None:
            begin, after = self.document.places[start:stop].T
            return begin, after
        self._count(start)
        ids = self.document.read(start, stop)
        after = self._begun + np.cumsum(self._begin[ids])
        return after - self._begin[ids] - self._inside[ids], after

    def tokens_before(self, characters: Sequence[int]) -> np.ndarray | None:
        """Return how many tokens end before each of the characters, in order, or at it; None if not known."""
        if not self._known:
            return None
        counts = np.zeros(len(characters), np.int64)
        for start in range(0, len(self.document), STEP):
            _, after = self._bounds(start, min(start + STEP, len(self.document)))
            counts += np.searchsorted(after, characters, "right")
        return counts

    def _count(self, stop: int) -> None:
        """Count the characters that begin before token `stop`."""
        while self._position < stop:
            ids = self.document.read(self._position, min(stop, self._position + STEP))
            self._begun += int(self._begin[ids].sum())
            self._position += len(ids)
