"""The `tokenize` job: text documents in, shards of token ids out, with the tokenizer that made them.

    Inputs.texts --in_two_threads--> Tokenizer.encode_parts -> TokenBatches -> ShardFolder or ShardWriter
                    or `deal`

One thread reads, another one tokenizes, a group of texts at a time. Ids are collected document by document into record
batches of a given size. Memory holds the largest row of text and one such batch, however large a file of text or the
corpus is.
"""

from __future__ import annotations

import math
import time
from _thread import start_new_thread
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from operator import attrgetter
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import pyarrow as pa

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.documents import Unread
from longnet_cli.data.formats import Text
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.manifest import LeftOut, OnSkip
from longnet_cli.data.names import Apart
from longnet_cli.data.outputs import OUTPUT_SUFFIXES, ShardWriter, is_folder, token_batch, token_schema
from longnet_cli.data.shards import ShardFolder, ShardFormat, run_to_resume
from longnet_cli.data.tables import numpy_dtype
from longnet_cli.data.tokenizer import Tokenizer, end_of_text
from longnet_cli.running.ranks.portions import portions

if TYPE_CHECKING:
    from longnet_cli.running.ranks.ranks import Ranks


SHARD_TOKENS = 1 << 27
BATCH_BYTES = 64 << 20  # of token ids in a record batch of a file
SMALL_BATCH_BYTES = 4 << 20  # on stdout, where a reader waits, and as JSON, which takes much memory
TEXT_CHARS = 4 << 20  # characters of text encoded together

# Called with (documents, tokens, bytes) so far, including an earlier run
OnProgress = Callable[[int, int, int], None]


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
    tokenizer: str | Path | Tokenizer = "bytes",
    train_vocab: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    shard_format: ShardFormat = "arrow",
    eos: str | int | bool = False,
    resume: bool = False,
    left_out: LeftOut | None = None,
    ranks: Ranks | None = None,
    on_progress: OnProgress | None = None,
) -> TokenizeResult | None:
    """Write the inputs' texts as token ids: a row per document, or several with `part` 0, 1, ... past 64 MB.

    `output` is a folder (see `data.shards`; its manifest keeps the tokenizer), one .arrow, .feather, .parquet or .jsonl
    file (with `NAME.tokenizer.json` beside it), or `-`, a stream on stdout of small batches that do not wait for a slow
    input. A shard ends with the document that brings it to `shard_tokens`. `eos` appends a token to every document: the
    token with this name or this id, or the tokenizer's own end of text (True). Chats need the template in the
    tokenizer's folder. `train_vocab` first trains a byte-level BPE of that size on the same inputs.

    `resume` continues a folder that an earlier run with the same inputs and options left unfinished. The result is byte
    for byte as if the run had never stopped, and finished shards are not tokenized again. A file or a row that cannot
    be read ends the run, unless `left_out` counts it. A resumed run counts again what the earlier run left out, and the
    manifest has the number. Several `ranks` share the work: rank 0 writes the same bytes, and the others get None.

    Raises ConfigError for options that do not fit together and for a folder that is in use, DataError for bad input or
    if everything is left out, LongNetError when a write fails. After an error there is no output file, and a folder
    keeps its finished shards.
    """
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens must be 1 or more, not {shard_tokens}")
    in_folder = is_folder(output, resume=resume)
    left_out, writes = left_out or LeftOut(), ranks is None or ranks.writes
    if train_vocab is not None and ranks is not None and ranks.world > 1:
        raise ConfigError("a tokenizer is trained by one process: train it first, without --dp")
    # a folder that cannot be resumed is refused here, before a tokenizer is trained
    earlier = run_to_resume(output, resume=resume) if in_folder and writes else None
    loaded = _tokenizer(inputs, tokenizer, train_vocab, earlier.tokenizer if earlier else None)
    appended = end_of_text(eos, loaded)
    own, eos_id = loaded.eos_id, loaded.eos_id if appended is None else appended
    loaded = loaded.with_eos(eos_id)
    schema = token_schema(vocab_size=loaded.vocab_size, eos_id=eos_id, tokenizer_sha256=loaded.sha256)

    given = inputs.texts(loaded, digests=in_folder and writes)
    texts = _readable(given, left_out.skip, Apart() if inputs.id_column is None else None)
    folder: ShardFolder | None = None
    if in_folder and writes:
        said = appended is not None if appended in (None, own) else str(appended)  # 1 would equal True
        settings = _settings(inputs, loaded, train_vocab, said, shard_tokens)
        about: dict[str, Any] = {"settings": settings, "format": shard_format, "tokenizer": loaded.description}
        folder = ShardFolder(output, schema, **about, resume=resume, left_out=left_out, opened=given.opened)
    with folder or ShardWriter(output, schema) if writes else nullcontext() as opened:
        rows = TokenBatches(opened, shard_tokens) if opened else None
        finished, done = bool(folder and folder.finished), folder.totals["documents"] if folder else 0
        if ranks:
            finished, done = ranks.any(finished), ranks.from_first(done)
        if not finished:
            remaining = folder.unread(texts) if folder else islice(texts, done, None)
            _Work(loaded, appended, str(output) == "-", on_progress).run(remaining, rows, ranks)
    if rows is None:
        return None
    shards = folder.paths if folder else []
    if beside := tokenizer_beside(output):
        loaded.save(beside)
        shards = [Path(output)]
    return TokenizeResult(rows.totals["documents"], rows.totals["tokens"], rows.totals["bytes"], shards, loaded)


def _settings(
    inputs: Inputs, tokenizer: Tokenizer, train_vocab: int | None, eos: bool | str, shard_tokens: int
) -> dict[str, Any]:
    """Return what decides the bytes of a folder, which a resumed run must share."""
    from longnet_cli.data.chat import chat_settings  # loads Jinja, which files and streams do not need

    return {
        "inputs": inputs.fingerprint(),
        "column": inputs.column,
        **({"id_column": inputs.id_column} if inputs.id_column else {}),
        "tokenizer": tokenizer.sha256,
        "train_vocab": train_vocab,
        "eos": eos,
        "shard_tokens": shard_tokens,
        **chat_settings(tokenizer),
    }


def tokenizer_beside(output: str | Path) -> Path | None:
    """Return the path of the tokenizer beside an output file; None for a folder, a stream, a device or a named pipe."""
    return Path(f"{output}.tokenizer.json") if str(output).endswith(OUTPUT_SUFFIXES) else None


def _tokenizer(
    inputs: Inputs, tokenizer: str | Path | Tokenizer, train_vocab: int | None, earlier: dict[str, str] | None
) -> Tokenizer:
    """Return the given tokenizer, or the one that an `earlier` run trained (`Tokenizer.description`), or train one."""
    if train_vocab is None:
        return tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    if tokenizer != "bytes":
        raise ConfigError("give a tokenizer or train one, not both")
    if earlier is not None:
        return Tokenizer.from_description(earlier)
    if any(str(item) == "-" for item in inputs.sources.names):
        raise ConfigError("training a tokenizer reads the inputs twice, and stdin can be read once: save it to a file")
    texts = (text for text in inputs.texts() if isinstance(text, Text))
    return Tokenizer.train((text.parts for text in texts), train_vocab)


def _readable(texts: Iterable[Text | Unread], on_skip: OnSkip | None, apart: Apart | None) -> Iterator[Text]:
    """Yield the texts that could be read, named by `apart`, and pass the others to `on_skip`.

    Raises DataError if all are left out.
    """
    readable = skipped = False
    for text in texts:
        if isinstance(text, Text):
            readable = True
            yield replace(text, doc_id=apart.name(text.doc_id)) if apart else text
        elif on_skip:
            skipped = True
            on_skip(text, text.error)
        else:
            raise text.error
    if skipped and not readable:
        raise DataError("there is nothing to tokenize: every document is left out")


class _TextPart(NamedTuple):
    """A piece of a document's text; None is its end. A chat is one piece, which returns its `ids`."""

    doc_id: str
    text: str | None
    ids: Callable[[], np.ndarray] | None = None

    @property
    def length(self) -> int:
        return len(self.text or "")


@dataclass(frozen=True)
class _Work:
    """The work on texts. `eos_id` ends each document. With `prompt`, each group is written as soon as it is done."""

    tokenizer: Tokenizer
    eos_id: int | None
    prompt: bool
    on_progress: OnProgress | None

    def run(self, texts: Iterator[Text], rows: TokenBatches | None, ranks: Ranks | None) -> None:
        """Tokenize all texts into the `rows` of rank 0."""
        length, pieces = attrgetter("length"), self._pieces(texts)
        if rows and (ranks is None or ranks.world == 1):
            own = rows
            in_two_threads(
                pieces,
                length,
                TEXT_CHARS,
                lambda group, check: self._take(self._encode(group), own, check),
                abandon=self.prompt,
            )
        elif ranks:
            from longnet_cli.running.ranks.dealing import deal  # loads torch, which one process does not need

            parts = portions(pieces, TEXT_CHARS, length_of=length)
            for _, batches in deal(parts, self._encode, ranks, ahead=2 * ranks.world):
                self._take(batches, cast(TokenBatches, rows))  # on rank 0: the others get nothing
        if rows:
            rows.flush()

    def _pieces(self, texts: Iterator[Text]) -> Iterator[_TextPart]:
        for text in texts:
            cutter = self.tokenizer.cutter(() if text.ids else text.parts)
            if text.ids:
                yield _TextPart(text.doc_id, text.text, text.ids)
            while taken := cutter.take():
                yield _TextPart(text.doc_id, taken[0])
            yield _TextPart(text.doc_id, None)

    def _encode(self, group: Iterable[_TextPart]) -> list[pa.RecordBatch]:
        """Return a batch with the ids of each piece, the bytes of its text, and whether its document ends there."""
        pieces = list(group)
        if not pieces:
            return []
        encoded = iter(self.tokenizer.encode_pieces([piece.text for piece in pieces if piece.text and not piece.ids]))
        ending = np.array([] if self.eos_id is None else [self.eos_id], np.int32)
        ids = [ending if piece.text is None else piece.ids() if piece.ids else next(encoded) for piece in pieces]
        columns = {
            "doc_id": pa.array([piece.doc_id for piece in pieces], pa.string()),
            "ids": pa.LargeListArray.from_arrays(np.cumsum([0, *map(len, ids)]), np.concatenate(ids)),
            "size": pa.array([len((piece.text or "").encode()) for piece in pieces]),
            "ends": pa.array([piece.text is None for piece in pieces]),
        }
        return [pa.record_batch(columns)]

    def _take(
        self, batches: Iterable[pa.RecordBatch], rows: TokenBatches, check: Callable[[], None] = lambda: None
    ) -> None:
        reported = rows.totals["bytes"]
        for doc_ids, lists, *others in (batch.columns for batch in batches):
            values, bounds = lists.values.to_numpy(), pairwise(lists.offsets.to_numpy())
            of_pieces = zip(doc_ids.to_pylist(), bounds, *(column.to_pylist() for column in others), strict=True)
            for doc_id, (start, stop), size, ends in of_pieces:
                check()
                rows.add(doc_id, values[start:stop], size)
                if ends:
                    rows.end_document(doc_id)
                if rows.totals["bytes"] - reported >= TEXT_CHARS:  # a long text is many parts
                    self._report(rows)
                    reported = rows.totals["bytes"]
        if self.prompt:
            rows.flush()
        self._report(rows)

    def _report(self, rows: TokenBatches) -> None:
        if self.on_progress:
            self.on_progress(rows.totals["documents"], rows.totals["tokens"], rows.totals["bytes"])


PATIENCE = 0.5  # seconds that an item from a slow producer waits for others
ABANDON_SECONDS = 2.0

Item = TypeVar("Item")
Work = Callable[[Sequence[Item], Callable[[], None]], None]


class StoppedError(Exception):
    """A signal to stop work on items that are no longer needed."""


def in_two_threads(
    items: Iterator[Item], size: Callable[[Item], int], group_size: int, work: Work[Item], *, abandon: bool = False
) -> None:
    """Read `items` here while another thread calls `work(group, check)` on groups of them, in order.

    A group has the items that bring it to `group_size`, or those that came within PATIENCE seconds. Reading stays in
    the calling thread, because Ctrl-C wakes only the main thread from waiting for a pipe. If reading fails, the items
    that were read before are still worked on. If reading is interrupted, `check` raises: long work should call it now
    and then. An error of the work is raised here. With `abandon`, an interrupt waits only ABANDON_SECONDS for the
    work to end, because work may wait for ever for the reader of a pipe.
    """
    feed = _Feed(size, group_size)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            while group := feed.take():
                work(group, feed.check)
        except StoppedError:
            pass
        except BaseException as error:
            failures.append(error)
        finally:
            feed.end()

    start_new_thread(run, ())  # not Thread.start, which waits for an Event: see _Feed
    try:
        for item in items:
            if not feed.put(item):
                break
        feed.close()
        feed.wait_for_end()
    except Exception:
        feed.close()
        feed.wait_for_end()
        raise
    except BaseException:
        feed.close(stop=True)
        feed.wait_for_end(ABANDON_SECONDS if abandon else math.inf)
        raise
    if failures:
        raise failures[0]


class _Feed(Generic[Item]):
    """The items on their way from the thread that reads to the thread that works.

    Both threads wait for a SimpleQueue and for nothing else, because a signal's handler may raise between any two
    lines of the reading thread. Between two lines of threading.Condition or Event, that leaves a lock which nobody
    releases, or releases one which nobody holds.
    """

    def __init__(self, size: Callable[[Item], int], group_size: int) -> None:
        self._size_of = size
        self._group_size = group_size
        self._items: SimpleQueue[Item | None] = SimpleQueue()  # None: no more come
        self._taken: SimpleQueue[int] = SimpleQueue()  # the sizes of groups, and 0 at the end of the work
        self._in_queue = 0  # the size of the items that are put and not yet known to be taken
        self._stopped = self._ended = False

    def put(self, item: Item) -> bool:
        """Add an item once there is room. Return False when no more items are wanted."""
        while self._in_queue >= self._group_size and not self._ended:
            with suppress(Empty):
                self._in_queue -= self._taken.get(timeout=1.0)  # a signal right before the call does not end it
        self._items.put(item)
        self._in_queue += self._size_of(item)
        return not self._ended

    def take(self) -> list[Item]:
        """Return the next group, empty at the end."""
        group: list[Item] = []
        size, deadline = 0, math.inf
        with suppress(Empty):
            while size < self._group_size:
                item = self._items.get(timeout=None if deadline == math.inf else max(0, deadline - time.monotonic()))
                if item is None:
                    self._items.put(None)  # for the next call
                    break
                if not group:
                    deadline = time.monotonic() + PATIENCE
                group.append(item)
                size += self._size_of(item)
        self.check()
        self._taken.put(size)
        return group

    def close(self, *, stop: bool = False) -> None:
        """Accept no more items. With `stop`, end the work on earlier items too."""
        self._stopped = self._stopped or stop
        self._items.put(None)

    def check(self) -> None:
        """Raise StoppedError once stopped."""
        if self._stopped:
            raise StoppedError

    def end(self) -> None:
        """Say that the work has ended."""
        self._ended = True
        self._taken.put(0)

    def wait_for_end(self, seconds: float = math.inf) -> None:
        """Wait until the work has ended, or for so many seconds."""
        deadline = time.monotonic() + seconds
        while not self._ended and (left := deadline - time.monotonic()) > 0:
            with suppress(Empty):
                self._taken.get(timeout=min(left, 1.0))  # an interrupted get may have lost what it got: look again


BATCH_ROWS = 1 << 16


class TokenBatches:
    """A collector of ids into batches of whole documents. A document larger than a batch gets a batch for each part.

    The batches go to an opened `output`; in a folder, a document that brings a shard to `shard_tokens` ends it.
    `totals` counts documents, tokens and bytes, starting from the totals of an earlier run. The batches depend only
    on the documents since the last `end_shard`, so shards are the same wherever a run resumes.
    """

    def __init__(self, output: ShardFolder | ShardWriter, shard_tokens: int) -> None:
        self._output, self._shard_tokens = output, shard_tokens
        self._folder = output if isinstance(output, ShardFolder) else None
        self.totals = Counter(self._folder.totals if self._folder else {})
        name = str(output.output) if isinstance(output, ShardWriter) else ""
        size = SMALL_BATCH_BYTES if name == "-" or name.endswith(".jsonl") else BATCH_BYTES
        dtype = numpy_dtype(output.schema.field("input_ids").type.value_type)
        self._values = np.empty(size // dtype.itemsize, dtype)
        self._used = 0  # values, the open document's included
        self._rows: list[tuple[str, int, int]] = []  # ended rows: doc_id, part, end of their values
        self._part = 0  # of the open document
        self._in_shard = 0  # tokens

    def add(self, doc_id: str, ids: np.ndarray, size: int) -> None:
        """Append (tokens,) ids, which stand for `size` bytes of text, to the open document."""
        self._count(tokens=len(ids), bytes=size)
        self._in_shard += len(ids)
        while len(ids):
            if self._used == len(self._values):
                if not self._rows:  # the open document has filled a batch
                    self._end_row(doc_id)
                    self._part += 1
                self.flush()
            fitting = ids[: len(self._values) - self._used]
            self._values[self._used : self._used + len(fitting)] = fitting
            self._used += len(fitting)
            ids = ids[len(fitting) :]

    def end_document(self, doc_id: str) -> None:
        """End the open document, which may be empty, and the shard if it is full."""
        self._end_row(doc_id)
        self._part = 0
        self._count(documents=1)
        if self._folder and self._in_shard >= self._shard_tokens:
            self.flush()
            self._folder.end_shard()
            self._in_shard = 0
        elif len(self._rows) >= BATCH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that have ended, and move the open row to the front."""
        if not self._rows:
            return
        doc_ids, parts, ends = zip(*self._rows, strict=True)
        end = ends[-1]
        self._output.write(token_batch(self._output.schema, doc_ids, parts, ends, self._values[:end]))
        self._values[: self._used - end] = self._values[end : self._used].copy()
        self._used -= end
        self._rows.clear()

    def _count(self, **counts: int) -> None:
        self.totals.update(counts)
        if self._folder:
            self._folder.count(**counts)

    def _end_row(self, doc_id: str) -> None:
        self._rows.append((doc_id, self._part, self._used))
