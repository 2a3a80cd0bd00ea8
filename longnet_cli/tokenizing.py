"""The `tokenize` job: text documents in, shards of token ids out, with the tokenizer that made them.

    read_texts --in_two_threads--> Tokenizer.encode_parts -> _BatchBuilder -> ShardFolder or ShardWriter

Memory is that of the largest row of text and of one record batch, however large a file of text or the corpus is.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from longnet_cli.data.compressed import compression
from longnet_cli.data.feed import in_two_threads
from longnet_cli.data.folders import sniff
from longnet_cli.data.formats import Text
from longnet_cli.data.inputs import find_sources, inputs_fingerprint
from longnet_cli.data.shards import ShardFolder, ShardFormat, run_to_resume
from longnet_cli.data.sinks import OUTPUT_SUFFIXES, ShardWriter, is_folder, token_batch, token_schema
from longnet_cli.data.sources import read_texts
from longnet_cli.data.tokenizer import Tokenizer, end_of_text
from longnet_cli.errors import ConfigError, DataError

SHARD_TOKENS = 1 << 27
BATCH_BYTES = 64 << 20  # of token ids in a record batch of a file
SMALL_BATCH_BYTES = 4 << 20  # on stdout, where somebody waits for it, and as JSON, which takes much memory
BATCH_ROWS = 1 << 16
TEXT_CHARS = 4 << 20  # of text encoded together

# (documents, tokens, bytes) so far, those of an earlier run included
OnProgress = Callable[[int, int, int], None]
OnSkip = Callable[[Text, DataError], None]  # with what is left out, and why


@dataclass(frozen=True)
class TokenizeResult:
    """The counts of what was written, by this run and the ones it resumed.

    `bytes` counts the texts' UTF-8 bytes, of a chat those of what its template makes of it; `shards` is empty when the
    output is stdout or a pipe.
    """

    documents: int
    tokens: int
    bytes: int
    shards: list[Path]
    tokenizer: Tokenizer


def tokenize(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path | Tokenizer = "bytes",
    train_vocab: int | None = None,
    column: str | None = None,
    id_column: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
    shard_format: ShardFormat = "arrow",
    eos: str | int | bool = False,
    resume: bool = False,
    on_skip: OnSkip | None = None,
    on_progress: OnProgress | None = None,
) -> TokenizeResult:
    """Write the inputs' texts as token ids: a row per document, or several with `part` 0, 1, ... past 64 MB.

    `output` is a folder (see `data.shards`; its manifest keeps the tokenizer), one .arrow, .feather, .parquet or .jsonl
    file (with `NAME.tokenizer.json` beside it), or `-`: a stream on stdout, of small batches that do not wait for a
    slow input. A shard ends with the document that brings it to `shard_tokens`. `eos` appends a token to every
    document: one that it names, one with this id, or the tokenizer's own end of text (True). Chats need the template
    in the tokenizer's folder. `train_vocab` first trains
    a byte-level BPE of that size on the same inputs. `resume` goes on with a folder that an earlier run with the same
    inputs and options left unfinished: byte for byte as if it had never stopped, and without tokenizing again what is
    in finished shards. A file or a row that cannot be read ends the run, or with `on_skip` is handed to it and left
    out: also by a resumed run, once more, and the manifest has their number.

    Raises ConfigError for options that do not fit together and for a folder that is in use, DataError for bad input and
    where all is left out, LongNetError when a write fails. Then a file is not left behind, a folder has its finished
    shards.
    """
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens must be 1 or more, not {shard_tokens}")
    in_folder = is_folder(output)
    if resume and not in_folder:
        raise ConfigError(f"{output}: only a folder of shards can be resumed: a single file or stream has no parts")
    earlier = run_to_resume(output, resume=resume) if in_folder else None  # also said before training a tokenizer
    skip_bad = on_skip is not None
    folder: ShardFolder | None = None
    words = _tokenizer(inputs, tokenizer, train_vocab, column, earlier.tokenizer if earlier else None, skip_bad)
    appended = end_of_text(eos, words)
    own, eos_id = words.eos_id, words.eos_id if appended is None else appended
    words = words.with_eos(eos_id)
    schema = token_schema(vocab_size=words.vocab_size, eos_id=eos_id, tokenizer_sha256=words.sha256)

    def skip(text: Text, error: DataError) -> None:
        if folder:
            folder.skip()
        if on_skip:
            on_skip(text, error)

    texts = _apart(_readable(read_texts(inputs, column, id_column=id_column, tokenizer=words, skip_bad=skip_bad), skip))
    if not in_folder:
        to_stdout = str(output) == "-"
        with ShardWriter(output, schema) as writer:
            small = to_stdout or str(output).endswith(".jsonl")
            rows = _BatchBuilder(
                schema, SMALL_BATCH_BYTES if small else BATCH_BYTES, lambda batch, **counts: writer.write(batch)
            )
            _run(texts, words, rows, eos_id=appended, prompt=to_stdout, on_progress=on_progress)
        totals, shards = rows.totals, []
        if beside := tokenizer_beside(output):
            words.save(beside)
            shards = [Path(output)]
    else:
        settings = {
            "inputs": inputs_fingerprint(inputs),
            "column": column,
            **({"id_column": id_column} if id_column else {}),
            "tokenizer": words.sha256,
            "train_vocab": train_vocab,
            "eos": appended is not None if appended in (None, own) else str(appended),  # 1 would equal True
            "shard_tokens": shard_tokens,
        }
        kept = words.description
        with ShardFolder(
            output, schema, settings=settings, format=shard_format, tokenizer=kept, resume=resume
        ) as folder:
            if not folder.finished:
                rows = _BatchBuilder(schema, BATCH_BYTES, folder.write, folder.totals, folder.end_shard, shard_tokens)
                _run(islice(texts, folder.documents, None), words, rows, eos_id=appended, on_progress=on_progress)
        totals, shards = folder.totals, folder.paths
    return TokenizeResult(totals["documents"], totals["tokens"], totals["bytes"], shards, words)


def tokenizer_beside(output: str | Path) -> Path | None:
    """Return where the tokenizer of one file is written; None beside a stream, a device or a named pipe."""
    return Path(output).with_suffix(".tokenizer.json") if str(output).endswith(OUTPUT_SUFFIXES) else None


def text_bytes(inputs: Sequence[str | Path]) -> int | None:
    """The size of the inputs, where all are plain files of text: how many bytes `on_progress` gets to; else None."""
    total = 0
    for source in find_sources(inputs, []):  # reading will say what is missing
        if source.path is None or not source.path.is_file():
            return None
        with suppress(OSError), open(source.path, "rb") as file:  # reading it will say what is wrong with it
            head = file.read(8)
            if sniff(head) != "text" or compression(head):
                return None
            total += source.path.stat().st_size
    return total


def _tokenizer(
    inputs: Sequence[str | Path],
    tokenizer: str | Path | Tokenizer,
    train_vocab: int | None,
    column: str | None,
    earlier: dict[str, str] | None,
    skip_bad: bool,
) -> Tokenizer:
    """The tokenizer given, or the one that an `earlier` run has trained (`Tokenizer.description`), or a trained one."""
    if train_vocab is None:
        return tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    if tokenizer != "bytes":
        raise ConfigError("give a tokenizer or train one, not both")
    if earlier is not None:
        return Tokenizer.from_description(earlier)
    if any(str(item) == "-" for item in inputs):
        raise ConfigError("training a tokenizer reads the inputs twice, and stdin can be read once: save it to a file")
    texts = read_texts(inputs, column, skip_bad=skip_bad)
    return Tokenizer.train((part for text in texts for part in text.parts), train_vocab)


def _readable(texts: Iterator[Text], on_skip: OnSkip) -> Iterator[Text]:
    """Yield the texts without an error, and hand `on_skip` the others. Raises DataError where there are only those."""
    found = skipped = False
    for text in texts:
        if text.error:
            skipped = True
            on_skip(text, text.error)
        else:
            found = True
            yield text
    if skipped and not found:
        raise DataError("there is nothing to tokenize: every document is left out")


def _apart(texts: Iterator[Text]) -> Iterator[Text]:
    """Number neighbours of one doc_id, which would be read back as one document."""
    last, repeats = None, 0
    for text in texts:
        repeats = repeats + 1 if text.doc_id == last else 0
        last = text.doc_id
        yield replace(text, doc_id=f"{text.doc_id}#{repeats}") if repeats else text


class _Piece(NamedTuple):
    """A piece of a document's text, or its end, None; a chat is one piece, which gives its `ids`."""

    doc_id: str
    text: str | None
    ids: Callable[[], np.ndarray] | None = None


def _run(
    texts: Iterator[Text],
    tokenizer: Tokenizer,
    rows: "_BatchBuilder",
    *,
    eos_id: int | None,
    prompt: bool = False,
    on_progress: OnProgress | None,
) -> None:
    """Tokenize all texts into `rows`; `prompt` writes out each group when it is done."""
    ending = np.array([] if eos_id is None else [eos_id], np.int32)

    def report() -> None:
        if on_progress:
            on_progress(rows.totals["documents"], rows.totals["tokens"], rows.totals["bytes"])

    def pieces() -> Iterator[_Piece]:
        for text in texts:
            for piece in [text.text] if text.ids else tokenizer.pieces(text.parts):
                yield _Piece(text.doc_id, piece, text.ids)
            yield _Piece(text.doc_id, None)

    def work(group: Sequence[_Piece], check: Callable[[], None]) -> None:
        current, reported = 0, rows.totals["bytes"]

        def end_documents(stop: int) -> None:
            nonlocal current
            for piece in group[current:stop]:
                if piece.ids:
                    rows.add(piece.doc_id, piece.ids(), len((piece.text or "").encode()))
                if piece.text is None:
                    rows.add(piece.doc_id, ending, 0)
                    rows.end_document(piece.doc_id)
            current = stop

        for index, ids, size in tokenizer.encode_parts(["" if piece.ids else piece.text or "" for piece in group]):
            check()
            end_documents(index)
            rows.add(group[index].doc_id, ids, size)
            if rows.totals["bytes"] - reported >= TEXT_CHARS:  # a long text is many parts
                report()
                reported = rows.totals["bytes"]
        end_documents(len(group))
        if prompt:
            rows.flush()
        report()

    in_two_threads(pieces(), lambda piece: len(piece.text or ""), TEXT_CHARS, work, abandon=prompt)
    rows.flush()


class _BatchBuilder:
    """Collects ids into batches of whole documents. A document larger than a batch gets a batch for each part.

    `totals` counts documents, tokens and bytes, from those of an earlier run on. What is written depends only on the
    documents since the last `end_shard`, which makes shards the same wherever a run resumes.
    """

    def __init__(
        self,
        schema: pa.Schema,
        batch_bytes: int,
        write: Callable[..., None],
        totals: Mapping[str, int] | None = None,
        end_shard: Callable[[], None] | None = None,
        shard_tokens: int = 0,
    ) -> None:
        self.totals = Counter(totals or {})
        self._schema = schema
        self._write = write
        self._end_shard = end_shard
        self._shard_tokens = shard_tokens
        dtype = np.dtype(schema.field("input_ids").type.value_type.to_pandas_dtype())
        self._values = np.empty(max(1, batch_bytes // dtype.itemsize), dtype)
        self._used = 0  # values, those of the open document included
        self._rows: list[tuple[str, int, int]] = []  # that have ended: doc_id, part, end of their values
        self._part = 0  # of the open document
        self._counts: Counter[str] = Counter()  # not yet written
        self._in_shard = 0  # tokens

    def add(self, doc_id: str, ids: np.ndarray, size: int) -> None:
        """Append (tokens,) ids, which stand for `size` bytes of text, to the open document."""
        self.totals.update(tokens=len(ids), bytes=size)
        self._counts.update(tokens=len(ids), bytes=size)
        self._in_shard += len(ids)
        while len(ids):
            if self._used == len(self._values):
                self._make_room(doc_id)
            fitting = ids[: len(self._values) - self._used]
            self._values[self._used : self._used + len(fitting)] = fitting
            self._used += len(fitting)
            ids = ids[len(fitting) :]

    def end_document(self, doc_id: str) -> None:
        """End the open document, which may be empty, and the shard if it is full."""
        self._end_row(doc_id)
        self._part = 0
        self.totals.update(documents=1)
        self._counts.update(documents=1)
        if self._end_shard and self._in_shard >= self._shard_tokens:
            self.flush()
            self._end_shard()
            self._in_shard = 0
        elif len(self._rows) >= BATCH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that have ended; the open one moves to the front."""
        if not self._rows:
            return
        doc_ids, parts, ends = zip(*self._rows, strict=True)
        end = ends[-1]
        self._write(token_batch(self._schema, doc_ids, parts, ends, self._values[:end]), **self._counts)
        self._values[: self._used - end] = self._values[end : self._used].copy()
        self._used -= end
        self._rows.clear()
        self._counts.clear()

    def _make_room(self, doc_id: str) -> None:
        if not self._rows:  # the open document has filled a batch
            self._end_row(doc_id)
            self._part += 1
        self.flush()

    def _end_row(self, doc_id: str) -> None:
        self._rows.append((doc_id, self._part, self._used))
