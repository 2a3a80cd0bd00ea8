"""The `tokenize` job: text documents in, shards of token ids out, with the tokenizer that made them.

    Inputs.texts --overlapped--> Tokenizer.encode_pieces -> TokenBatches -> ShardFolder or ShardWriter

One thread reads and writes, another one tokenizes, a group of texts at a time. Ids are collected document by document
into record batches of a given size. Memory holds the largest row of text and one such batch, however large a file of
text or the corpus is.
"""

from __future__ import annotations

import math
from _thread import start_new_thread
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import pyarrow as pa

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.basics.events import Events, OnSkip
from longnet_cli.basics.sizes import format_count
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.token_documents import Unread
from longnet_cli.data.documents.tokenizer import Tokenizer, end_of_text
from longnet_cli.data.files.local_files import Part
from longnet_cli.data.files.manifest import Manifest
from longnet_cli.data.files.opened_inputs import numpy_dtype
from longnet_cli.data.files.opening import Text
from longnet_cli.data.outputs.output_paths import OUTPUT_SUFFIXES, is_folder
from longnet_cli.data.outputs.row_writer import (
    ShardWriter,
    first_kept,
    kept_columns,
    token_batch,
    token_schema,
)
from longnet_cli.data.outputs.shards import ShardFolder, ShardFormat, run_to_resume
from longnet_cli.running.ranks.dealing import Portion, portions

SHARD_TOKENS = 1 << 27
BATCH_BYTES = 64 << 20  # of token ids in a record batch of a file
SMALL_BATCH_BYTES = 4 << 20  # on stdout, where a reader waits, and as JSON, which takes much memory
TEXT_CHARS = 4 << 20  # characters of text encoded together


@dataclass(frozen=True)
class TokenizeResult:
    """The totals of the output, written by this run and the runs that it resumed.

    `bytes` counts the UTF-8 bytes of the texts; for a chat, of the text after its template. `shards` is empty if the
    output is stdout or a pipe.
    """

    documents: int
    tokens: int
    bytes: int
    shards: list[Path]
    tokenizer: Tokenizer


def tokenize(
    inputs: Inputs,
    output: str | Path,
    *,
    tokenizer: str | Path | Tokenizer | None = None,
    train_vocab: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    shard_format: ShardFormat = "arrow",
    eos: str | int | bool = False,
    resume: bool = False,
    events: Events | None = None,
) -> TokenizeResult:
    """Write the inputs' texts as token ids: a row per document, or several with `part` 0, 1, ... past 64 MB.

    `output` is a folder (see `data.outputs.shards`; its manifest keeps the tokenizer), one .arrow, .feather, .parquet
    or .jsonl file (with `NAME.tokenizer.json` beside it), or `-`, a stream on stdout of small batches that do not wait
    for a slow input. A shard ends with the document that brings it to `shard_tokens`. `eos` appends a token to every
    document: the token with this name or this id, or the tokenizer's own end of text (True). Chats need the template in
    the tokenizer's folder. Each row has the columns that the inputs carry along (`keep`). Without a `tokenizer`, ids
    are bytes; `train_vocab` first trains a byte-level BPE of that size on the same inputs.

    `resume` continues a folder that an earlier run with the same inputs and options left unfinished. The result is byte
    for byte as if the run had never stopped, and finished shards are not tokenized again. A file or a row that cannot
    be read ends the run, unless `events.left_out` counts it. A resumed run counts again what the earlier run left out,
    and the manifest has the number.

    Raises ConfigError for options that do not fit together and for a folder that is in use, DataError for bad input or
    if everything is left out, LongNetError when a write fails. After an error there is no output file, and a folder
    keeps its finished shards.
    """
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens must be 1 or more, not {shard_tokens}")
    in_folder = is_folder(output, resume=resume)
    events = events or Events()
    # a folder that cannot be resumed is refused here, before a tokenizer is trained
    earlier = run_to_resume(output, resume=resume) if in_folder else None
    tokenizer = _tokenizer(inputs, tokenizer, train_vocab, output, earlier)
    tokenizer, appended, of_settings = _with_end(tokenizer, eos)
    documents = inputs.texts(tokenizer, digests=in_folder, note=events.note)
    texts: Iterator[Any] = _readable(documents, events.left_out.skip)
    kept: list[pa.Field] = []
    if inputs.keep:  # first_kept waits for the first document
        kept, texts = first_kept(texts)
    schema = token_schema(
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.sha256,
        kept=kept,
    )
    opened: ShardFolder | _OneFile = _OneFile(output, schema)
    most = math.inf  # tokens of a shard
    if in_folder:
        most = shard_tokens
        settings = {
            "tokenizer": tokenizer.sha256,
            "train_vocab": train_vocab,
            "eos": of_settings,
            "shard_tokens": shard_tokens,
        }
        opened = ShardFolder(
            output,
            schema,
            settings=inputs.settings(tokenizer, kept) | settings,
            format=shard_format,
            tokenizer=tokenizer.description,
            resume=resume,
            left_out=events.left_out,
            opened=documents.opened,
        )
    is_stream = str(output) == "-"
    small = is_stream or str(output).endswith(".jsonl")
    work = _Work(tokenizer, appended, is_stream, documents.ready, events.progress)
    with opened:
        rows = TokenBatches(opened, SMALL_BATCH_BYTES if small else BATCH_BYTES, most, kept)
        work.run(iter(()) if opened.finished else opened.unread(texts), rows)
    return _result(rows.totals, tokenizer, output, opened.paths)


def _with_end(tokenizer: Tokenizer, eos: str | int | bool) -> tuple[Tokenizer, int | None, object]:
    """Return the tokenizer with the end of text that is appended, its id or None, and what a folder's settings say."""
    appended = end_of_text(eos, tokenizer)
    if appended in (None, tokenizer.eos_id):
        return tokenizer, appended, appended is not None
    return tokenizer.with_eos(appended), appended, str(appended)  # as an int, 1 would equal True


class _OneFile(ShardWriter):
    """A file or a stream, as if it were a folder without an earlier run. It counts nothing, and has no shards."""

    finished = False
    totals: Mapping[str, int] = {}
    paths: Sequence[Path] = ()

    def unread(self, texts: Iterator[Text]) -> Iterator[Text]:
        """Return the texts that no earlier run has read: all."""
        return texts

    def count(self, **counts: int) -> None:
        """Do nothing: a file has no manifest."""

    def end_shard(self) -> None:
        """Do nothing: a file is one shard."""


def _result(
    totals: Mapping[str, int],
    tokenizer: Tokenizer,
    output: str | Path,
    shards: Sequence[Path],
) -> TokenizeResult:
    """Return the totals, and write the tokenizer beside an output file."""
    if beside := tokenizer_beside(output):
        tokenizer.save(beside)
        shards = [Path(output)]
    counts = (totals["documents"], totals["tokens"], totals["bytes"])
    return TokenizeResult(*counts, list(shards), tokenizer)


def tokenizer_beside(output: str | Path) -> Path | None:
    """Return the path of the tokenizer beside an output file; None for a folder, a stream, a device or a named pipe."""
    return Path(f"{output}.tokenizer.json") if str(output).endswith(OUTPUT_SUFFIXES) else None


def _tokenizer(
    inputs: Inputs,
    tokenizer: str | Path | Tokenizer | None,
    train_vocab: int | None,
    output: str | Path,
    earlier: Manifest | None,
) -> Tokenizer:
    """Return the given tokenizer, bytes for None; with `train_vocab`, a new one, or that of an `earlier` run."""
    if train_vocab is None:
        if isinstance(tokenizer, Tokenizer):
            return tokenizer
        return Tokenizer.load(tokenizer or "bytes")
    if tokenizer is not None:
        raise ConfigError("give a tokenizer or train one, not both")
    if inputs.share:
        raise ConfigError(
            "a tokenizer is trained on all of the input, and not on a share of it: train it first"
        )
    if earlier and earlier.tokenizer:
        return Tokenizer.from_description(earlier.tokenizer, output)
    if "-" in map(str, inputs.all_files.names):
        raise ConfigError(
            "training a tokenizer reads the inputs twice, and stdin can be read once: save it to a file"
        )
    texts = (text.parts for text in inputs.texts() if isinstance(text, Text))
    return Tokenizer.train(texts, train_vocab)


def _readable(texts: Iterable[Text | Unread], on_skip: OnSkip | None) -> Iterator[Text]:
    """Yield the texts that could be read, and pass the others to `on_skip`. Raises DataError if all are left out."""
    readable = skipped = False
    for text in texts:
        if isinstance(text, Text):
            readable = True
            yield text
        elif on_skip:
            skipped = True
            on_skip(text, text.error)
        else:
            raise text.error
    if skipped and not readable:
        raise DataError("there is nothing to tokenize: every document is left out")


class _TextPart(NamedTuple):
    """A piece of a document's text, or the document's end.

    A chat is one piece, which returns its `ids`. So does an end, whose ids are those that are appended. `where` is the
    document's file and row, `kept` the values that it carries along.
    """

    doc_id: str
    where: str
    kept: Mapping[str, pa.Scalar]
    text: str = ""
    ids: Callable[[], Part] | None = None
    is_end: bool = False


@dataclass(frozen=True)
class _Work:
    """The work on texts. `eos_id` ends each document. With `at_once`, each group is written as soon as it is done.

    `ready` says whether the next text is there (`DocumentPass`).
    """

    tokenizer: Tokenizer
    eos_id: int | None
    at_once: bool
    ready: Callable[[], bool]
    progress: Callable[..., None]

    def run(self, texts: Iterable[Text], rows: TokenBatches) -> None:
        """Tokenize all texts into `rows`. Those before an error of reading are tokenized first."""
        failures: list[Exception] = []
        pieces = self._pieces(texts, failures)
        parts = portions(pieces, TEXT_CHARS, length_of=lambda piece: len(piece.text))
        with closing(cast(Generator, overlapped(parts, self._encode))) as groups:
            for group in groups:
                before = rows.totals["bytes"]
                for piece, ids, size in group:
                    rows.add(piece, ids, size)
                    if piece.is_end:
                        rows.end_document(piece)
                if self.at_once:
                    rows.flush()
                totals = rows.totals
                tokens = format_count(totals["tokens"])
                size = totals["bytes"] - before
                self.progress(size, documents=totals["documents"], tokens=tokens)
        rows.flush()
        for failure in failures:
            raise failure

    def _pieces(
        self,
        texts: Iterable[Text],
        failures: list[Exception],
    ) -> Iterator[_TextPart | None]:
        """Yield the pieces of all texts, and None where the next text is not there yet. Keep an error of reading."""
        ending = Part(np.array([] if self.eos_id is None else [self.eos_id], np.int32))
        try:
            for text in texts:
                part = _TextPart(text.doc_id, text.where, text.kept)
                if text.ids:
                    yield part._replace(text=text.text, ids=text.ids)
                else:
                    cutter = self.tokenizer.cutter(text.parts)
                    while taken := cutter.take():
                        yield part._replace(text=taken[0])
                yield part._replace(ids=lambda: ending, is_end=True)
                if not self.ready():
                    yield None
        except Exception as error:
            failures.append(error)

    def _encode(self, pieces: Sequence[_TextPart]) -> list[tuple[_TextPart, np.ndarray, int]]:
        """Return each piece with its ids, and the UTF-8 bytes of its text."""
        texts = [piece.text for piece in pieces if not piece.ids]
        encoded = iter(self.tokenizer.encode_pieces(texts))
        rows = []
        for piece in pieces:
            ids = np.asarray(piece.ids().ids) if piece.ids else next(encoded)
            rows.append((piece, ids, len(piece.text.encode())))
        return rows


Results = TypeVar("Results")


def overlapped(
    parts: Iterable[Portion[_TextPart]], work: Callable[[Sequence[_TextPart]], Results]
) -> Iterator[Results]:
    """Yield the results of portions, which another thread computes while the next portion is read here.

    A portion that ends early is not kept waiting for the next one. Reading stays in the calling thread, because Ctrl-C
    wakes only the main thread from waiting for a pipe. An error of the work is raised here, in its turn. When the
    generator is closed, the portion that is worked on is finished first: the process must not end in the middle.

    The threads wait for a SimpleQueue and for nothing else, because a signal's handler may raise between any two lines
    of the calling thread. Between two lines of threading.Condition or Event, that leaves a lock which nobody releases,
    or releases one which nobody holds.
    """
    todo: SimpleQueue[Sequence[_TextPart] | None] = SimpleQueue()  # None: no more come
    done: SimpleQueue[Results | BaseException | None] = SimpleQueue()  # None: the thread has ended
    waiting = 0  # portions

    def run() -> None:
        while (items := todo.get()) is not None:
            try:
                done.put(work(items))
            except BaseException as error:
                done.put(error)
        done.put(None)

    def first() -> Results:
        nonlocal waiting
        waiting -= 1
        results = done.get()
        if isinstance(results, BaseException):
            raise results
        return cast(Results, results)

    start_new_thread(run, ())  # not Thread.start, which waits for an Event
    try:
        for portion in parts:
            todo.put(list(portion))
            waiting += 1
            while waiting > (not portion.ends_early):
                yield first()
        while waiting:
            yield first()
    finally:
        with suppress(Empty):
            while True:
                todo.get_nowait()
        todo.put(None)
        while done.get() is not None:
            pass


BATCH_ROWS = 1 << 16


class TokenBatches:
    """A collector of ids into batches of whole documents. A document larger than a batch gets a batch for each part.

    A batch has up to `size` bytes of ids. The batches go to an opened `output`; a document that brings a shard to
    `shard_tokens` ends it.
    `totals` counts documents, tokens and bytes, starting from the totals of an earlier run. The batches depend only
    on the documents since the last `end_shard`, so shards are the same wherever a run resumes. `kept` are the columns
    that documents carry along.
    """

    def __init__(
        self,
        output: ShardFolder | _OneFile,
        size: int,
        shard_tokens: float,
        kept: Sequence[pa.Field],
    ) -> None:
        self._output = output
        self._shard_tokens = shard_tokens
        self._kept = kept
        self.totals = Counter(output.totals)
        dtype = numpy_dtype(output.schema.field("input_ids").type.value_type)
        self._values = np.empty(size // dtype.itemsize, dtype)
        self._used = 0  # values, the open document's included
        # ended rows, with their part and the end of their values
        self._rows: list[tuple[_TextPart, int, int]] = []
        self._part = 0  # of the open document
        self._in_shard = 0  # tokens

    def add(self, row: _TextPart, ids: np.ndarray, size: int) -> None:
        """Append (tokens,) ids, which stand for `size` bytes of text, to the open document."""
        self._count(tokens=len(ids), bytes=size)
        self._in_shard += len(ids)
        while len(ids):
            if self._used == len(self._values):
                if not self._rows:  # the open document has filled a batch
                    self._end_row(row)
                    self._part += 1
                self.flush()
            fitting = ids[: len(self._values) - self._used]
            self._values[self._used : self._used + len(fitting)] = fitting
            self._used += len(fitting)
            ids = ids[len(fitting) :]

    def end_document(self, row: _TextPart) -> None:
        """End the open document, which may be empty, and the shard if it is full."""
        self._end_row(row)
        self._part = 0
        self._count(documents=1)
        if self._in_shard >= self._shard_tokens:
            self.flush()
            self._output.end_shard()
            self._in_shard = 0
        elif len(self._rows) >= BATCH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that have ended, and move the open row to the front."""
        if not self._rows:
            return
        rows, parts, ends = zip(*self._rows, strict=True)
        end = ends[-1]
        doc_ids = [row.doc_id for row in rows]
        columns = kept_columns(rows, self._kept)
        schema = self._output.schema
        self._output.write(token_batch(schema, doc_ids, parts, ends, self._values[:end], columns))
        self._values[: self._used - end] = self._values[end : self._used].copy()
        self._used -= end
        self._rows.clear()

    def _count(self, **counts: int) -> None:
        self.totals.update(counts)
        self._output.count(**counts)

    def _end_row(self, row: _TextPart) -> None:
        self._rows.append((row, self._part, self._used))
