"""Input documents: the rows of tables and the texts of files, as text, as token ids or as vectors.

    names --InputFiles--> InputFile --open_input--> Text | Table --DocumentPass--> Text | Document | Vectors

Token columns stay in their file and are sliced, never joined: Arrow's 32-bit list offsets overflow at 2^31 tokens. A
resumed run knows its inputs again by digests of their contents.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa

from longnet_cli.basics.errors import (
    ConfigError,
    DataError,
    InputWarning,
    RefusedError,
)
from longnet_cli.basics.sizes import count_of
from longnet_cli.data.files.column_choice import (
    INTEGERS,
    VECTOR_COLUMNS,
    Columns,
    Form,
    TokenTypes,
    Wanted,
    choose_columns,
    is_chat,
)
from longnet_cli.data.files.file_kinds import ARROW_KINDS, sniff
from longnet_cli.data.files.input_files import InputFile, InputFiles
from longnet_cli.data.files.local_files import FileChangedError, spooling
from longnet_cli.data.files.machine_shares import Share
from longnet_cli.data.files.manifest import KEY
from longnet_cli.data.files.opened_inputs import Stdin, Table, Text, reading
from longnet_cli.data.files.opening import open_input

from .column_documents import (
    DocumentRows,
    flat_documents,
    list_documents,
    read_documents,
    table_texts,
)
from .text_pieces import Unit, note_ends
from .token_documents import Apart, Document, Unread, collect
from .tokenizer import Tokenizer, fitting
from .vectors import vector_documents

END = 1 << 20  # bytes at each end of a file, by which a resumed run knows it again


def content_digest(input_file: InputFile) -> str | None:
    """Return a digest of a file's size and of its first and last END bytes, which a table's footer is among.

    Of a file in a store, it is of the ETag, or of size and time. It is None for a pipe, and for what cannot be read,
    which its reader reports.
    """
    if input_file.filesystem is not None:
        from longnet_cli.data.files.remote import version  # imported late: 20 ms for stores alone

        state = version(input_file.filesystem, str(input_file.path))
        return state and hashlib.sha256(state.encode()).hexdigest()[:16]
    path = input_file.local_path
    if path is None:
        return None
    with suppress(OSError), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(b"%d" % size)
        digest.update(file.read(END))
        file.seek(max(END, size - END))
        digest.update(file.read(END))
        return digest.hexdigest()[:16]
    return None


SPOOLED_PART = 1 << 24  # characters per read of a text in a temporary file


@dataclass(frozen=True)
class Inputs:
    """The documents in the files that `names` stand for: files, folders, globs, @lists, URIs and `-` for stdin.

    A row is a document; but neighbouring rows of a file with one `doc_id` or `id` are one document, and a `part` column
    must then count 0, 1, 2, .... For `column`, `id_column` and `keep`, see `Wanted`.

    Text needs the `tokenizer`, and chats (`messages`) its chat template. A flat integer column is cut at `eos_id`
    (without it, the tokenizer's, otherwise the one in the file's metadata). `Document.read` checks ids against
    `vocab_size` (without it, the tokenizer's, otherwise the one in the file's metadata).

    With `vectors`, documents are read as vectors. Either a row is a vector: neighbouring rows with one `slide_id` or
    `doc_id` are a document, and a table without such a column is one. Or a row is a document, a list of vectors.
    Coordinates are in a column `coords` of pairs, or in `x` and `y`; without `coords` they are not read.

    With a `unit`, each document of a text knows where its sentences, paragraphs or passages end. With a `share`, only
    the documents of that share are read. With `answers`, all documents are chats, whose parts say which ids an
    assistant is to write.

    Reading raises ConfigError for a missing tokenizer or column, for no input, for stdin given twice, for a tokenizer
    other than the one that made the tokens, and for an `eos_id` that no token can have; DataError for missing, empty
    or damaged data and for inputs with different types of token. With `skip_bad`, each file and row that would raise
    DataError becomes an `Unread` document.
    """

    names: Sequence[str | Path] | InputFiles
    tokenizer: Tokenizer | None = None
    column: str | None = None
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    vocab_size: int | None = None
    eos_id: int | None = None
    skip_bad: bool = False
    vectors: bool = False
    coords: bool = True
    unit: Unit | None = None
    share: Share | None = None
    answers: bool = False

    @cached_property
    def all_files(self) -> InputFiles:
        """The files that the names stand for, those of other shares too."""
        if isinstance(self.names, InputFiles):
            return self.names
        return InputFiles(self.names, skip_bad=self.skip_bad)

    @cached_property
    def files(self) -> list[InputFile]:
        """The files that are read: those of the share, but all files if they are fewer than the shares."""
        files = [*self.all_files]
        if self.share is None:
            return files
        if not self.shares_documents:
            sizes = [(input_file.where, input_file.size or 0) for input_file in files]
            return [files[index] for index in self.share.of_files(sizes)]
        which = f"documents {self.share.number}, {self.share.number + self.share.count}, ..."
        warnings.warn(
            f"share {self.share} has the {which}, and its process reads all of the input: there are fewer files "
            f"({len(files)}) than shares",
            InputWarning,
            stacklevel=2,
        )
        return files

    @property
    def shares_documents(self) -> bool:
        """True where a share is one of documents, since there are fewer files than shares."""
        return self.share is not None and len(self.all_files.found) < self.share.count

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.column, self.id_column, self.keep)

    def fingerprint(self) -> str:
        """Return a digest of the names, order and sizes (not of pipes) of all files, also of those of other shares.

        A resumed run must find it again.
        """
        digest = hashlib.sha256()
        files = self.all_files.found
        for input_file in files:
            digest.update(
                f"{input_file.name}\0{input_file.size}\0".encode("utf-8", "surrogateescape")
            )
        return f"{len(files)} file{'s' * (len(files) != 1)}, {digest.hexdigest()[:16]}"

    def settings(self, tokenizer: Tokenizer | None, kept: Sequence[pa.Field]) -> dict[str, object]:
        """Return the settings of a folder that decide its documents, which a resumed run must share.

        `tokenizer` is the tokenizer of texts, `kept` are the columns that documents carry along.
        """
        from .chat import chat_settings  # loads Jinja; files and streams need none

        settings: dict[str, object] = {
            "inputs": self.fingerprint(),
            "share": self.share and str(self.share),
            "column": self.column,
            "id_column": self.id_column,
            **chat_settings(tokenizer),
            "keep": [f"{field.name}: {field.type}" for field in kept],
        }
        # manifests name the column also where it is the usual one
        return {name: value for name, value in settings.items() if value or name == "column"}

    def num_bytes(self) -> int | None:
        """Return the bytes of the files that are read if all are plain text on this machine, otherwise None."""
        total = 0
        for input_file in self.files:
            path = input_file.local_path
            if path is None or self.shares_documents:
                return None
            with suppress(OSError), open(path, "rb") as file:  # its reader reports it
                if sniff(file.read(8)) != "text":
                    return None
                total += os.fstat(file.fileno()).st_size
        return total

    def documents(
        self,
        *,
        digests: bool = False,
        names_apart: bool = False,
        note: Callable[[str], None] = lambda line: None,
    ) -> DocumentPass:
        """Return the documents of every file, in order: each a Document of token ids, or Vectors.

        For `digests`, `names_apart` and `note`, see `DocumentPass`.
        """
        return DocumentPass(self, self.items, digests, names_apart, self.document, note)

    def texts(
        self,
        tokenizer: Tokenizer | None = None,
        *,
        digests: bool = False,
        note: Callable[[str], None] = lambda line: None,
    ) -> DocumentPass:
        """Return the Text of text files and of text columns, in order. A long file is read part by part.

        Chats are read only with a `tokenizer`. With `skip_bad`, a long file is read to its end before its Text is
        yielded, and waits in a file in $TMPDIR.
        """
        read = partial(
            replace(self, tokenizer=tokenizer).items, form="chats" if tokenizer else "text"
        )
        return DocumentPass(self, read, digests, names_apart=self.id_column is None, note=note)

    def stored(self) -> Iterator[Any]:
        """Yield the documents of `documents` whose lengths are known at once and which can be read a second time.

        They are the token ids or vectors in Arrow and Parquet files on this machine: no text, no JSON, no pipe, no URI.
        """
        for input_file in self.files:
            path = input_file.local_path
            if path is None:
                continue
            with reading(input_file.where), open(path, "rb") as file:
                if sniff(file.read(8)) not in ARROW_KINDS:
                    continue
            opened = open_input(input_file, self.wanted)
            if isinstance(opened, Table) and not self.columns_of(opened).of_texts:
                yield from self.documents_of(opened)

    @cached_property
    def _by_name(self) -> dict[str, InputFile]:
        return {input_file.where: input_file for input_file in self.files}

    def opened_again(self, table: Table) -> Table | None:
        """Return a table anew, from its first row on; None if it does not come from a file on this machine."""
        input_file = self._by_name[table.where]
        if input_file.local_path is None or KEY.decode() in table.metadata:
            return None
        return cast(Table, open_input(input_file, self.wanted))

    def columns_of(self, table: Table, form: Form = "tokens") -> Columns:
        """Choose the columns of a table that `documents` reads or, with the form `text` or `chats`, `texts`."""
        if self.vectors:
            return choose_columns(table, self.wanted, "vectors", coords=self.coords)
        return choose_columns(table, self.wanted, form)

    def documents_of(self, opened: Text | Table) -> Iterator[Any]:
        """Return the documents of one opened file, as `documents` does."""
        return map(self.document, self.items(opened, TokenTypes()))

    def items(
        self,
        opened: Text | Table,
        types: TokenTypes,
        form: Form = "tokens",
        ids: Callable[[Table, Columns], Iterable[Any]] | None = None,
    ) -> Iterable[Any]:
        """Return the items of one opened file, as `document` takes them or, with another `form`, `texts`.

        The items of a table of token ids are what `ids` returns; without it, they are documents.
        """
        if isinstance(opened, Text):
            self._check_text(opened)
            return (_spooled(opened) if form != "tokens" and self.skip_bad else opened,)
        columns = self.columns_of(opened, form)
        if self.answers and not is_chat(columns.type):
            raise ConfigError(
                f"{opened.where}: column {columns.documents!r} holds no chats, and answers of chats are asked for"
            )
        if KEY.decode() in opened.metadata:  # a manifest
            return ()
        if self.vectors:
            return vector_documents(opened, columns)
        if columns.of_texts:
            return table_texts(opened, columns, self.tokenizer, answers=self.answers)
        types.check(opened, columns)
        return (ids or self._ids)(opened, columns)

    def _check_text(self, text: Text) -> None:
        """Raise DataError where vectors are read, ConfigError where a column is asked for."""
        if self.vectors:
            raise DataError(
                f"{text.where}: this is text, and the model reads vectors: give Arrow, Parquet or HDF5 files "
                f"with a column {', '.join(VECTOR_COLUMNS)}"
            )
        if self.answers:
            raise ConfigError(
                f"{text.where}: this is plain text, and answers of chats are asked for"
            )
        if asked := self.wanted.names:
            raise ConfigError(
                f"{text.where}: column {asked[0]!r} is asked for, and this is plain text, which has no columns"
            )

    def document(self, item: Text | Document) -> Document:
        """Return an item, a Text or a document, as `documents` does."""
        if isinstance(item, Text):
            return encode_text(item, self.tokenizer, self.vocab_size, self.unit)
        return item

    def number_of(self, table: Table, name: Literal["vocab_size", "eos_id"]) -> int | None:
        """Return the number that these inputs give or, without it, the tokenizer's, otherwise the table's own."""
        option = getattr(self, name)
        if option is not None:
            return cast(int, option)
        if self.tokenizer:
            return getattr(self.tokenizer, name)
        return _metadata_int(table, f"longnet.{name}")

    def vocab_size_of(self, table: Table) -> int | None:
        """Return the number of ids that a table may have. Raises ConfigError for a tokenizer that did not make them."""
        _check_tokenizer(table, self.tokenizer)
        vocab_size = self.number_of(table, "vocab_size")
        if self.eos_id is not None:
            fitting("--eos", self.eos_id, vocab_size, f"{table.where}: ")
        return vocab_size

    def _ids(self, table: Table, columns: Columns) -> Iterator[Document]:
        vocab_size = self.vocab_size_of(table)
        groups = list_documents(table, columns)
        if columns.type in INTEGERS:
            groups = flat_documents(table, columns, self.number_of(table, "eos_id"))

        def read(group: DocumentRows) -> Document:
            return Document(
                group.doc_id,
                collect(group.values),
                self.tokenizer,  # it counts the bytes of the text for which the ids stand
                table.place(group.row),
                limit=vocab_size,
                place=table.place,
                kept=group.kept,
            )

        return read_documents(groups, read)


class DocumentPass:
    """One pass over the documents of some inputs, or of a share of them.

    `opened` has the name of each file so far and, with `digests`, its `content_digest` before its first document was
    read. With `names_apart`, neighbours of one name get names of their own, the same in all shares of documents. Raises
    as `Inputs` says.
    """

    def __init__(
        self,
        inputs: Inputs,
        read: Callable[[Text | Table, TokenTypes], Iterable[Any]],
        digests: bool = False,
        names_apart: bool = False,
        finish: Callable[[Any], Any] = lambda item: item,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Yield what `finish` makes of the items that `read` returns for each file.

        With `skip_bad`, yield errors instead of raising them. `note` gets a line at the end if rows were joined.
        """
        self._inputs = inputs
        self._read = read
        self._finish = finish
        self._note = note
        self._joined = Counter[str]()  # rows and documents
        self._digests = digests
        self._apart = Apart() if names_apart else None
        self._index = 0  # of the next item, if a share is one of documents
        self.opened: list[tuple[str, str | None]] = []
        self._total: int | None = None
        self._ready: Callable[[], bool] | None = None  # of stdin, which is read now or next
        self._begin = self._end = 0.0  # bytes of all files before and after the batch that is read
        self._rows = self._given = 0  # of the batch, and documents given of it

    def __iter__(self) -> Iterator[Any]:
        """Yield the documents of the share, and errors in place of what cannot be read."""
        inputs = self._inputs
        types = TokenTypes()
        files = inputs.files
        sizes = [input_file.size for input_file in files]
        self._total = None if None in sizes else sum(filter(None, sizes))
        before = 0.0  # bytes of the files before
        if inputs.share is None or inputs.shares_documents or inputs.share.number == 1:
            for error in inputs.all_files.missing:
                yield from self._of_share(Unread(error, file=True))
        for input_file, size, following in zip(files, sizes, [*files[1:], None], strict=False):
            self._ready = Stdin().ready if following and following.path is None else None
            digest = content_digest(input_file) if self._digests else None
            self.opened.append((input_file.where, digest))
            self._batch(before, before, 0)
            after = before + (size or 0)
            try:
                opened = self._watched(open_input(input_file, inputs.wanted), before, after)
                for item in self._read(opened, types):
                    self._given += 1
                    yield from self._of_share(item)
            except DataError as error:
                yield from self._of_share(Unread(error, file=True))
            before = after
        if self._joined and not inputs.vectors:
            counts = f"{self._joined['rows']:,} rows became {count_of(self._joined['documents'], 'document')}"
            self._note(f"{counts}: neighbouring rows of one name are joined (--id-column)")

    def _raise_unless_skipped(self, error: DataError) -> None:
        """Raise an error unless what it is about may be skipped."""
        if not self._inputs.skip_bad or isinstance(error, FileChangedError):
            raise error

    def _of_share(self, item: Any) -> Iterator[Any]:
        """Yield the document of an item if the share has it. Items are counted and named as in a run without shares."""
        if isinstance(item, Unread):
            self._raise_unless_skipped(item.error)
        elif self._apart:
            item = item.named(self._apart.name(item.doc_id))
        share = self._inputs.share
        if share is None or not self._inputs.shares_documents or share.has_document(self._index):
            yield self._finished(item)
        self._index += 1

    def _finished(self, item: Any) -> Any:
        """Return the document of an item. A text, which is read to its end here, may turn out to be damaged."""
        try:
            return self._finish(item)
        except DataError as error:
            self._raise_unless_skipped(error)
            return Unread(error, file=True)

    def ready(self) -> bool:
        """Return whether the next document is likely to come without waiting for stdin."""
        return self._ready is None or self._given + 1 < self._rows or self._ready()

    @property
    def fraction(self) -> float | None:
        """The fraction of the inputs that was given so far, from 0 to 1; None if the size of a file is not known.

        Within a batch of a table, each document counts alike; a batch counts by its bytes, or in Parquet by its rows.
        """
        if not self._total:
            return None
        inside = min(1.0, self._given / max(1, self._rows))
        return (self._begin + (self._end - self._begin) * inside) / self._total

    def _watched(self, opened: Text | Table, before: float, after: float) -> Text | Table:
        """Return the opened file, whose batches are counted when they are read. A text is one document.

        `before` and `after` are the bytes of all files up to this one, without and with it.
        """
        if isinstance(opened, Text):
            self._batch(before, after, 1)
            return opened
        self._ready = opened.ready or self._ready

        def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
            rows = 0
            for batch in opened.batches(columns):
                rows += batch.num_rows
                end = before + (after - before) * min(1.0, opened.fraction(rows))
                self._batch(self._end, max(self._end, end), batch.num_rows)
                yield batch
            self._batch(after, after, 0)

        return replace(opened, batches=batches, joined=self._joined)

    def _batch(self, begin: float, end: float, rows: int) -> None:
        self._begin = begin
        self._end = end
        self._rows = rows
        self._given = 0


def _check_tokenizer(table: Table, tokenizer: Tokenizer | None) -> None:
    written = table.metadata.get("longnet.tokenizer_sha256")
    if tokenizer and written and written != tokenizer.sha256:
        raise ConfigError(
            f"{table.where}: its tokens were made by tokenizer {written[:12]}, and the one "
            f"in use is {tokenizer.sha256[:12]}: give the tokenizer.json that the data was made with, or tokenize again"
        )


def _metadata_int(table: Table, key: str) -> int | None:
    written = table.metadata.get(key)
    if written is None:
        return None
    if not re.fullmatch(r"\d{1,18}", written):  # int64 holds any number of 18 digits
        shown = written if len(written) <= 40 else f"{written[:37]}..."
        raise DataError(
            f"{table.where}: the data is damaged: {key} in its metadata is {shown!r}, not a number of ids"
        )
    return int(written)


def _spooled(text: Text) -> Text:
    """Return the same text, read to its end so that errors are raised here. All after its first part is in a file."""
    rest = iter(text.rest)
    following = next(rest, None)
    if following is None:
        return text

    def parts() -> Iterator[str]:
        with spooling(), tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as file:
            file.writelines(chain((following,), rest))
            file.seek(0)
            yield ""  # all has been read by now
            while part := file.read(SPOOLED_PART):
                yield part

    waiting = parts()
    next(waiting)
    return replace(text, rest=waiting)


def encode_text(
    text: Text,
    tokenizer: Tokenizer | None,
    limit: int | None,
    unit: Unit | None = None,
) -> Document:
    """Return a text as ids, with the ends of its units if it is cut; `Unread` for one that the tokenizer refuses.

    Raises ConfigError without a tokenizer.
    """
    if tokenizer is None:
        raise ConfigError(
            f"{text.where}: this is text: give a tokenizer (bytes, or a tokenizer.json)"
        )
    if text.ids:
        return Document(
            text.doc_id, [text.ids()], tokenizer, text.where, limit=limit, kept=text.kept
        )
    parts = text.parts
    ends = None
    if unit:
        ends = array("q")
        parts = note_ends(parts, unit, ends)
    try:
        encoded = collect(tokenizer.encode_long(parts))
    except RefusedError as error:
        return Unread(DataError(f"{text.where}: {error}"))
    places = [part.places for part in encoded if part.places is not None]
    return Document(
        text.doc_id,
        encoded,
        sum(part.n_bytes for part in encoded),
        text.where,
        limit=limit,
        kept=text.kept,
        tokenizer=tokenizer,
        places=np.concatenate(places) if places else None,
        ends=ends,
    )
