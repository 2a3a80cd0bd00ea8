"""Input documents: the rows of tables and the texts of files, as text or as token ids.

    inputs --find_sources--> Source --open_source--> Text | Table --> Text (read_texts) | Document (read_documents)

Token columns stay in their file and are sliced, never joined: Arrow's 32-bit list offsets overflow at 2^31 tokens.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np

from longnet_cli.data.columns import (
    INTEGERS,
    USUAL,
    TokenTypes,
    Wanted,
    choose_columns,
    is_chat,
    is_text,
    token_type,
)
from longnet_cli.data.documents import Document, Part, Unread, collect
from longnet_cli.data.files import FileChangedError, no_place
from longnet_cli.data.folders import ARROW_KINDS, sniff
from longnet_cli.data.formats import open_source
from longnet_cli.data.id_columns import flat_documents, list_documents
from longnet_cli.data.inputs import Source, find_sources
from longnet_cli.data.tables import Table, Text, reading
from longnet_cli.data.text_columns import table_texts
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.errors import ConfigError, DataError, InputWarning

SPOOLED_PART = 1 << 24  # characters per read of a text in a temporary file


def read_texts(
    inputs: Sequence[str | Path],
    column: str | None = None,
    *,
    id_column: str | None = None,
    tokenizer: Tokenizer | None = None,
    skip_bad: bool = False,
) -> Iterator[Text]:
    """Yield the documents of text files and of text columns, in order. A long file is read part by part.

    Chats (`messages`) are read only with a `tokenizer`, whose chat template they need. For columns, see `Wanted`.

    Raises ConfigError for a table without such a column and for chats without a template, DataError for missing,
    empty or damaged data. With `skip_bad`, each file and row that cannot be read becomes a Text with that `error`. A
    long file is then read to its end before its Text is yielded, and waits in a file in $TMPDIR.
    """
    wanted = Wanted(column, id_column)

    def texts(source: Source) -> Iterator[Text]:
        opened = open_source(source, wanted)
        if isinstance(opened, Text):
            refuse_columns(opened, wanted)
            yield _spooled(opened) if skip_bad else opened
        else:
            columns = choose_columns(opened, wanted, ids=False, chats=tokenizer is not None)
            yield from table_texts(opened, columns, tokenizer, skip_bad)

    for found in _each(inputs, texts, skip_bad):
        yield Text("", "", str(found), error=found) if isinstance(found, DataError) else found


def read_documents(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer | None,
    *,
    column: str | None = None,
    id_column: str | None = None,
    keep: Sequence[str] = (),
    vocab_size: int | None = None,
    eos_id: int | None = None,
    skip_bad: bool = False,
) -> Iterator[Document]:
    """Yield the documents of every input, in order, as token ids.

    Text needs the tokenizer, and chats (`messages`) its chat template. A row is a document. Neighbouring rows of a
    file with one `doc_id` or `id` are one document: a `part` column must then count 0, 1, 2, .... A flat integer
    column is cut at `eos_id` (without it, the tokenizer's, otherwise the one in the file's metadata). `Document.read`
    checks ids against `vocab_size` (without it, the tokenizer's, otherwise the one in the file's metadata). For
    columns, see `Wanted`.

    Raises ConfigError for a missing tokenizer or column and for a tokenizer other than the one that made the tokens,
    DataError for missing, empty or damaged data and for inputs with different types of token. With `skip_bad`, each
    file and row that would raise DataError becomes an `Unread` document.
    """
    wanted = Wanted(column, id_column, tuple(keep))
    yield from _read(documents_of, inputs, tokenizer, wanted, vocab_size, eos_id, skip_bad)


def read_untokenized(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer | None,
    *,
    column: str | None = None,
    id_column: str | None = None,
    keep: Sequence[str] = (),
    vocab_size: int | None = None,
    eos_id: int | None = None,
    skip_bad: bool = False,
) -> Iterator[Document | Text]:
    """Yield the documents of `read_documents`, but leave texts untokenized.

    Even with `skip_bad`, a text that cannot be read to its end raises DataError while it is read.
    """
    wanted = Wanted(column, id_column, tuple(keep))
    yield from _read(_untokenized, inputs, tokenizer, wanted, vocab_size, eos_id, skip_bad)


Item = TypeVar("Item")


def _read(
    read: Callable[..., Iterator[Item]],
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer | None,
    wanted: Wanted,
    vocab_size: int | None,
    eos_id: int | None,
    skip_bad: bool,
) -> Iterator[Item | Unread]:
    """Yield the items that `read` (`documents_of` or `_untokenized`) returns for each input."""
    types = TokenTypes()
    check_eos("", eos_id, vocab_size or (tokenizer.vocab_size if tokenizer else None))

    def items(source: Source) -> Iterator[Item]:
        opened = open_source(source, wanted)
        if isinstance(opened, Table):
            types.check(opened, choose_columns(opened, wanted))
        yield from read(opened, tokenizer, wanted, vocab_size=vocab_size, eos_id=eos_id, skip_bad=skip_bad)

    for found in _each(inputs, items, skip_bad):
        yield Unread(found) if isinstance(found, DataError) else found


def _each(
    inputs: Sequence[str | Path], read: Callable[[Source], Iterator[Item]], skip_bad: bool
) -> Iterator[Item | DataError]:
    """Yield the items that `read` returns for each source. With `skip_bad`, yield errors instead of raising them."""
    missing: list[DataError] = []
    sources = find_sources(inputs, missing if skip_bad else None)
    yield from missing
    for source in sources:
        try:
            yield from read(source)
        except DataError as error:
            if not skip_bad or isinstance(error, FileChangedError):
                raise
            yield error


def stored_documents(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer | None,
    *,
    column: str | None = None,
    id_column: str | None = None,
    keep: Sequence[str] = (),
    vocab_size: int | None = None,
    eos_id: int | None = None,
) -> Iterator[Document]:
    """Yield the documents of `read_documents` whose lengths are known at once and which can be read a second time.

    They are the token ids in Arrow and Parquet files on this machine: no text, no JSON, no pipe, no URI.
    """
    wanted = Wanted(column, id_column, tuple(keep))
    with warnings.catch_warnings():  # `read_documents` gives the same warnings
        warnings.simplefilter("ignore", InputWarning)
        sources = find_sources(inputs)
    for source in sources:
        if source.path is None or source.filesystem is not None or not source.path.is_file():
            continue
        with reading(source.where), open(source.path, "rb") as file:
            if sniff(file.read(8)) not in ARROW_KINDS:
                continue
        opened = open_source(source, wanted)
        if isinstance(opened, Table) and token_type(choose_columns(opened, wanted).type) is not None:
            yield from documents_of(opened, tokenizer, wanted, vocab_size=vocab_size, eos_id=eos_id)


def documents_of(
    opened: Text | Table,
    tokenizer: Tokenizer | None,
    wanted: Wanted = USUAL,
    *,
    vocab_size: int | None = None,
    eos_id: int | None = None,
    skip_bad: bool = False,
) -> Iterator[Document]:
    """Yield the documents of one opened input, as `read_documents` does."""
    for found in _untokenized(opened, tokenizer, wanted, vocab_size=vocab_size, eos_id=eos_id, skip_bad=skip_bad):
        yield _encode(found, tokenizer, vocab_size) if isinstance(found, Text) else found


def _untokenized(
    opened: Text | Table,
    tokenizer: Tokenizer | None,
    wanted: Wanted,
    *,
    vocab_size: int | None,
    eos_id: int | None,
    skip_bad: bool,
) -> Iterator[Document | Text]:
    if isinstance(opened, Text):
        refuse_columns(opened, wanted)
        yield opened
        return
    columns = choose_columns(opened, wanted)
    if is_text(columns.type) or is_chat(columns.type):
        yield from table_texts(opened, columns, tokenizer, skip_bad)
        return
    _check_tokenizer(opened, tokenizer)
    if vocab_size is None:
        vocab_size = tokenizer.vocab_size if tokenizer else _metadata_int(opened, "longnet.vocab_size")
    check_eos(f"{opened.where}: ", eos_id, vocab_size)
    if columns.type in INTEGERS:
        if eos_id is None:
            eos_id = tokenizer.eos_id if tokenizer else _metadata_int(opened, "longnet.eos_id")
        groups = flat_documents(opened, columns, eos_id)
    else:
        groups = list_documents(opened, columns, skip_bad)
    for group in groups:
        if group.error is not None:
            yield Unread(group.error)
            continue
        yield Document(
            group.doc_id,
            collect(group.values),
            tokenizer,
            opened.place(group.row),
            limit=vocab_size,
            place=opened.place,
            kept=group.kept,
        )


def refuse_columns(opened: Text, wanted: Wanted) -> None:
    """Raise ConfigError for a column that is asked for where there is only text."""
    if wanted.names:
        raise ConfigError(
            f"{opened.where}: column {wanted.names[0]!r} is asked for, and this is plain text, which has no columns"
        )


def check_eos(where: str, eos_id: int | None, vocab_size: int | None) -> None:
    """Raise ConfigError for an end-of-text id that no token can have."""
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
    if not written.isdigit() or len(written) > 18:  # int64 holds any number of 18 digits
        shown = written.decode("utf-8", "replace")
        shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
        raise DataError(f"{table.where}: the data is damaged: {key} in its metadata is {shown!r}, not a number of ids")
    return int(written)


def _spooled(text: Text) -> Text:
    """Return the same text, read to its end so that errors are raised here. All after its first part is in a file."""
    rest = iter(text.rest)
    following = next(rest, None)
    if following is None:
        return text

    def parts(read: Iterable[str]) -> Iterator[str]:
        try:
            with tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as file:
                file.writelines(read)
                file.seek(0)
                yield ""  # all has been read by now
                while part := file.read(SPOOLED_PART):
                    yield part
        except OSError as error:
            raise no_place(error) from error

    waiting = parts(chain((following,), rest))
    next(waiting)
    return replace(text, rest=waiting)


def _encode(text: Text, tokenizer: Tokenizer | None, limit: int | None) -> Document:
    if text.error is not None:
        return Unread(text.error)
    if tokenizer is None:
        raise ConfigError(f"{text.where}: this is text: give a tokenizer (bytes, or a tokenizer.json)")
    if text.ids:
        return Document(text.doc_id, text.ids(), tokenizer, text.where, limit=limit, kept=text.kept)
    n_bytes = 0

    def parts() -> Iterator[Part]:
        nonlocal n_bytes
        for ids, size in tokenizer.encode_long(text.parts):
            n_bytes += size
            yield Part(ids)

    found = collect(parts()) or [Part(np.empty(0, np.int32))]
    return Document(text.doc_id, found, n_bytes, text.where, limit=limit, kept=text.kept)
