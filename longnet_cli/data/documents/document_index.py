"""An index of documents as arrays: 24 bytes a document, and no object. Training draws its documents from it.

    rows         begins, lengths     where the ids of a row begin among all ids, and how many there are
    documents    firsts              the number of a document's first row
    ids          stretches           where ids lie in a file: those of an Arrow file stay there, and all others are
                                     written, once, to an unnamed file in $TMPDIR

Tables of ids are read by whole columns. A row of a flat column is a document here. Where a document is in its input is
counted from its number and from the numbers of the first row and document of its file.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from operator import attrgetter
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa

from longnet_cli.basics.sizes import count_of, format_bytes
from longnet_cli.data.files.column_choice import INTEGERS, Columns, TokenTypes
from longnet_cli.data.files.local_files import LocalFile, LocalIds, Part, spooling
from longnet_cli.data.files.opened_inputs import Table, Text, plain
from longnet_cli.data.files.opening import open_input

from .column_documents import (
    Batch,
    flat_batches,
    list_bounds,
    nothing_but_ends,
    numbers,
    part_error,
    read_batches,
)
from .input_documents import Inputs
from .token_documents import Document, Unread, same_place
from .tokenizer import Tokenizer


class _StoredIds(NamedTuple):
    """Ids that lie together in a file, from number `start` of all ids on. `valid` is as in a Part."""

    start: int
    ids: LocalIds
    valid: pa.BooleanArray | None


class _IndexedFile(NamedTuple):
    """A file: what tells where a row is, the limit of its ids, and the numbers of its first id, row and document.

    In a `flat` file each id is a row to its reader. `n_bytes` has the UTF-8 bytes of each text, or -1 where only its
    ids tell.
    """

    place: Callable[[int], str]
    limit: int | None
    flat: bool
    first_id: int
    first_row: int
    first_document: int
    n_bytes: array[int]


class DocumentIndex(Sequence[Document]):
    """The documents of some inputs, each of which is made into an object when it is asked for, and not kept."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Make an empty index, which `index_documents` fills."""
        self.tokenizer = tokenizer
        self.begins = array("q")  # of rows
        self.row_lengths = array("q")
        self.firsts = array("q")  # rows of documents
        self.answer_edges = array(
            "q"
        )  # where answers of chats begin and end, in turn, among all ids
        self.stretches = list[_StoredIds]()
        self.files = list[_IndexedFile]()
        self.n_ids = 0
        self.spooled_bytes = 0

    def __len__(self) -> int:
        return len(self.firsts)

    @cached_property
    def lengths(self) -> np.ndarray:
        """The tokens of each document, (documents,) int64."""
        return np.add.reduceat(np.asarray(self.row_lengths), np.asarray(self.firsts))

    def __str__(self) -> str:
        """Return what the index holds, and what it takes."""
        memory = 8 * (len(self.begins) + len(self.row_lengths) + len(self.firsts))
        counts = f"{count_of(len(self), 'document')} of {count_of(self.n_ids, 'token')}"
        line = f"{counts}, indexed in {format_bytes(memory)} of memory"
        if self.spooled_bytes:
            line += f"; {format_bytes(self.spooled_bytes)} of ids are in {tempfile.gettempdir()}"
        return line

    def __getitem__(self, number: int) -> Document:  # type: ignore[override] # no slices
        """Return a document, which is named by its place."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        file_number = bisect_right(self.files, number, key=attrgetter("first_document")) - 1
        file = self.files[file_number]
        rows = range(
            self.firsts[number],
            self.firsts[number + 1] if number + 1 < len(self) else len(self.begins),
        )
        parts = [part for row in rows for part in self._parts(file, row)]
        n_bytes: int | Tokenizer | None = self.tokenizer
        if file.n_bytes and (known := file.n_bytes[number - file.first_document]) >= 0:
            n_bytes = known
        where = file.place(self._row_in(file, rows[0]))
        ids = parts or np.empty(0, np.int64)
        return Document(where, ids, n_bytes, where, limit=file.limit, place=file.place)

    def _row_in(self, file: _IndexedFile, row: int) -> int:
        """Return the number that a row has in its file."""
        return self.begins[row] - file.first_id if file.flat else row - file.first_row

    def _parts(self, file: _IndexedFile, row: int) -> Iterator[Part]:
        """Yield the ids of a row: a part of each stretch in which it lies."""
        begin = self.begins[row]
        end = begin + self.row_lengths[row]
        index = bisect_right(self.stretches, begin, key=attrgetter("start")) - 1
        row_in_file = self._row_in(file, row)
        place = begin
        while place < end:
            stretch = self.stretches[index]
            stop = min(end, stretch.start + len(stretch.ids))
            whole = Part(stretch.ids, stretch.valid)
            row_of_part = row_in_file + file.flat * (place - begin)
            yield whole.cut(
                place - stretch.start, stop - stretch.start, row_of_part, flat=file.flat
            )
            place = stop
            index += 1


def index_documents(inputs: Inputs) -> DocumentIndex:
    """Return an index of the documents of all files, equal to those of `Inputs.documents`, whatever their names are.

    Raises as `Inputs` says, LongNetError where the disk has no place for ids that cannot be read from their file.
    """
    index = DocumentIndex(inputs.tokenizer)
    types = TokenTypes()
    with spooling(), tempfile.TemporaryFile() as spool:
        filling = _Filling(index, inputs, spool)
        for input_file in inputs.files:
            opened = open_input(input_file, inputs.wanted)
            for item in inputs.items(opened, types, ids=filling.add_table):
                filling.add_text(opened, item)
        filling.end()
    return index


class _Filling:
    """The work of filling an index, file by file."""

    def __init__(self, index: DocumentIndex, inputs: Inputs, spool: IO[bytes]) -> None:
        """Write to `spool` what cannot be read from its own file."""
        self._index = index
        self._inputs = inputs
        self._spool = spool
        self._spooled = LocalFile(os.dup(spool.fileno()), tempfile.gettempdir())
        self._opened: Text | Table | None = None  # of the texts that are added

    def end(self) -> None:
        """End the index: its ids can be read from now on."""
        self._spool.flush()
        self._spooled.take_state()
        self._index.spooled_bytes = self._spooled.size

    def add_table(self, table: Table, columns: Columns) -> tuple[()]:
        """Add the documents of a table of ids. Return nothing that is left to add."""
        flat = columns.type in INTEGERS
        self._begin_file(table, self._inputs.vocab_size_of(table), flat=flat)
        if flat:
            self._add_flat(table, columns)
        else:
            self._add_lists(table, columns)
        return ()

    def add_text(self, opened: Text | Table, item: Text | Unread) -> None:
        """Add a text of an opened file."""
        if isinstance(item, Unread):
            raise item.error
        document = self._inputs.document(item)
        if isinstance(document, Unread):
            raise document.error
        index = self._index
        if opened is not self._opened:
            self._begin_file(opened, self._inputs.vocab_size, flat=False)
            self._opened = opened
        file = index.files[-1]
        # the rows between belong to the document before
        between = file.first_row + item.row - len(index.begins)
        _extend(index.begins, np.full(between, index.n_ids))
        _extend(index.row_lengths, np.zeros(between, np.int64))
        index.firsts.append(len(index.begins))
        index.begins.append(index.n_ids)
        index.row_lengths.append(len(document))
        for part in document.parts:
            first_id = self._add_ids(part)
            if part.is_answer is not None:
                changes = np.diff(part.is_answer, prepend=False, append=False)
                _extend(index.answer_edges, first_id + np.flatnonzero(changes))
        file.n_bytes.append(-1 if item.ids else sum(part.n_bytes for part in document.parts))

    def _begin_file(self, opened: Text | Table, limit: int | None, *, flat: bool) -> None:
        place: Callable[[int], str] = partial(same_place, opened.where)
        if isinstance(opened, Table):
            # without what reads the table, which would keep its file open
            place = Table(
                opened.name,
                opened.where,
                opened.schema,
                lambda _: iter(()),
                opened.format,
                blank=opened.blank,
            ).place
        index = self._index
        file = _IndexedFile(
            place, limit, flat, index.n_ids, len(index.begins), len(index.firsts), array("q")
        )
        index.files.append(file)

    def _add_lists(self, table: Table, columns: Columns) -> None:
        """Add the documents of a column of lists: neighbouring rows of one name are one."""
        index = self._index
        name: object = None  # of the open document
        first_row = 0  # of the open document, in the table
        for start, arrays, errors in read_batches(table, columns):
            if errors:
                raise errors[min(errors)]
            lists = arrays[columns.documents]
            if not len(lists):
                continue
            is_first, name = _first_rows(arrays, columns, name)
            rows = np.arange(start, start + len(lists))
            firsts = np.maximum.accumulate(np.where(is_first, rows, first_row))
            first_row = int(firsts[-1])
            _check_parts(table, columns, arrays, rows, firsts)
            begins, ends = list_bounds(lists)
            # the array may be longer than the batch, which is then a slice of it
            low = int(begins.min())
            all_ids = numbers(table, lists.values)
            first_id = self._add_ids(all_ids.cut(low, int(ends.max()), 0))
            _extend(index.firsts, len(index.begins) + np.flatnonzero(is_first))
            _extend(index.begins, begins + (first_id - low))
            _extend(index.row_lengths, ends - begins)

    def _add_flat(self, table: Table, columns: Columns) -> None:
        """Add the documents between the EOS ids of a flat column. Each is one row here, and none is empty."""
        index = self._index
        first_row = len(index.begins)
        begin = index.n_ids  # of the open document
        for _, ids, ends in flat_batches(table, columns, self._inputs.number_of(table, "eos_id")):
            ends = ends + self._add_ids(Part(ids))
            begins = np.concatenate(([begin], ends + 1))
            self._add_stretches_of_flat(begins[:-1], ends)
            begin = int(begins[-1])
        self._add_stretches_of_flat(np.array([begin]), np.array([index.n_ids]))
        if len(index.begins) == first_row:
            raise nothing_but_ends(table, columns)

    def _add_stretches_of_flat(self, begins: np.ndarray, ends: np.ndarray) -> None:
        index = self._index
        is_document = ends > begins
        _extend(index.firsts, len(index.begins) + np.arange(np.count_nonzero(is_document)))
        _extend(index.begins, begins[is_document])
        _extend(index.row_lengths, (ends - begins)[is_document])

    def _add_ids(self, part: Part) -> int:
        """Add ids, and return the number of the first one. Those in memory are written to the spool."""
        index = self._index
        start = index.n_ids
        index.n_ids += len(part.ids)
        ids = part.ids
        if isinstance(ids, np.ndarray):
            ids = self._written(ids)
            if (
                index.stretches
                and part.valid is None
                and self._ends_spool(index.stretches[-1], ids)
            ):
                index.stretches[-1].ids.length += ids.length
                return start
        index.stretches.append(_StoredIds(start, ids, part.valid))
        return start

    def _ends_spool(self, last: _StoredIds, ids: LocalIds) -> bool:
        """Return whether `ids`, which were written to the spool, go on where the stretch before them ends."""
        in_spool = last.ids.file is self._spooled
        return in_spool and last.valid is None and last.ids.dtype == ids.dtype

    def _written(self, ids: np.ndarray) -> LocalIds:
        offset = self._spool.tell()
        self._spool.write(np.ascontiguousarray(ids).data)
        return LocalIds(self._spooled, offset, ids.dtype, len(ids))


def _extend(numbers: array[int], more: np.ndarray) -> None:
    numbers.frombytes(more.astype(np.int64).view(np.uint8).data)


def _first_rows(arrays: Batch, columns: Columns, name: object) -> tuple[np.ndarray, object]:
    """Return which rows of a batch begin a document, (rows,) bool, and the name of the last row.

    `name` is that of the row before the batch. Rows without a name are documents of their own.
    """
    is_first = np.ones(len(arrays[columns.documents]), bool)
    if columns.doc_id is None:
        return is_first, None
    import pyarrow.compute as pc  # imported late: 20 ms that text does not need

    names = plain(arrays[columns.doc_id])
    is_first[0] = names[0].as_py() != name
    is_first[1:] = pc.not_equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)
    return is_first, names[-1].as_py()


def _check_parts(
    table: Table, columns: Columns, arrays: Batch, rows: np.ndarray, firsts: np.ndarray
) -> None:
    """Raise BadRowError for a row that is not the next part. `firsts` has the first row of each row's document."""
    if columns.part is None or columns.doc_id is None:
        return
    parts = plain(arrays[columns.part]).to_numpy()
    for index in np.flatnonzero(parts != rows - firsts)[:1].tolist():
        name = str(arrays[columns.doc_id][index])
        expected = int(rows[index] - firsts[index])
        raise part_error(table, int(rows[index]), int(parts[index]), name, expected)
