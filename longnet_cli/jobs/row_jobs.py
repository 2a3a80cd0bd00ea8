"""The jobs that read documents, and the one writer of their rows: to a folder of shards, a file or a stream.

    documents --RowJob.sequences--> portions, dealt out to groups of ranks --RowJob.results--> rows --> a sink

Each portion of documents is read independently of the others. So a run that is resumed, or shared by many processes,
pads and sums as an uninterrupted run of one process does, and a folder has the same bytes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import ClassVar, Protocol

import pyarrow as pa

from longnet_cli.attention.notation import format_pattern, parse_pattern
from longnet_cli.basics.errors import ConfigError, DataError, LongNetError, NoTokensError
from longnet_cli.basics.events import OnSkip
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.text_pieces import Unit
from longnet_cli.data.documents.token_documents import Apart, Document, Unread
from longnet_cli.data.files.local_files import FileChangedError
from longnet_cli.data.files.manifest import read_manifest
from longnet_cli.data.outputs.output_paths import is_folder
from longnet_cli.data.outputs.row_writer import ShardWriter, first_kept
from longnet_cli.data.outputs.shards import ShardFolder, ShardFormat
from longnet_cli.models.folder import Loaded
from longnet_cli.nets.net import Bos, InputSequence, bos_ids
from longnet_cli.nets.weights import model_digest
from longnet_cli.running.device import check_kernel
from longnet_cli.running.ranks.dealing import Batches, Portion, deal, portions
from longnet_cli.running.reader import PORTION_CHUNKS, Reader

from .job_options import RowOptions


class Sink(Protocol):
    """The end of a job's rows: a file, a stream, or a printer of them."""

    def write(self, batch: pa.RecordBatch, /) -> None: ...


@dataclass(frozen=True)
class ModelFacts:
    """The facts of a model that a job needs besides its net.

    `bos` (the id of the tokenizer's end of text, or several ids) is put before each document. `model_name`,
    `tokenizer_sha256` and `pattern` (a text of `attention.notation`) go into the schema's metadata.
    """

    bos: Bos = None
    model_name: str | None = None
    tokenizer_sha256: str | None = None
    pattern: str | None = None

    @property
    def first_target(self) -> int:
        """The first token of a document that is predicted: token 0, or token 1 if nothing precedes the document."""
        return 0 if bos_ids(self.bos) else 1

    @property
    def metadata(self) -> dict[str, object]:
        """The keys of a schema's metadata."""
        return {
            "longnet.model": self.model_name,
            "longnet.tokenizer_sha256": self.tokenizer_sha256,
            "longnet.pattern": self.pattern,
        }

    @classmethod
    def of(cls, loaded: Loaded) -> ModelFacts:
        """Return those of a model."""
        return cls(
            loaded.bos,
            loaded.origin,
            loaded.tokenizer_sha256,
            format_pattern(loaded.net.config.pattern),
        )


class RowJob(ABC):
    """A job that turns documents into rows with a column `n_tokens`, in order, on the ranks of one group.

    `options` and `facts` determine the rows, together with the net and the documents: what was asked for, and what is
    known of the model. `kept_fields` are columns that documents carry to the output (`data.outputs.row_writer`): what
    runs the job sets them before it asks for the `schema`.
    """

    schema: pa.Schema
    kept_fields: Sequence[pa.Field] = ()
    no_tokens_error: str  # the text of the error for rows without any token
    doing: ClassVar[str]
    row_name: ClassVar[str]
    # The columns of a document of text, before those that it carries
    text_fields: ClassVar[Sequence[pa.Field]] = ()
    shard_name: ClassVar[str]
    shard_unit: ClassVar[str]  # what is counted to fill a shard
    shard_size: ClassVar[int]
    batch_rows: ClassVar[int] = 1  # a file or a stream has batches of this many rows or more
    unit: Unit | None = None  # of a text, that has a row
    # neighbouring documents of one name get names of their own in an output
    names_apart: ClassVar[bool] = False
    failure: LongNetError | None = None  # of a document; it is raised after the rows before it

    def __init__(
        self,
        reader: Reader,
        options: RowOptions,
        facts: ModelFacts,
    ) -> None:
        self.reader = reader
        self.options = options
        self.facts = facts
        # a document with fewer has no row
        self.fewest_tokens = options.fewest_tokens(facts.first_target)

    @abstractmethod
    def sequence(self, document: Document) -> InputSequence[Document]:
        """Return a document as the model reads it. Raises ConfigError or DataError if the job refuses it."""

    @abstractmethod
    def window_sizes(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Yield (tokens, tokens that have logits) of each window in which a document of so many tokens is read.

        The document has a row (`admit`), or is the head of one that a dry run tries.
        """

    @abstractmethod
    def results(self, sequences: Iterable[InputSequence[Document]]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of these documents, in order."""

    @abstractmethod
    def size(self, document: Document) -> int:
        """Return how many units of a shard a document fills."""

    def counted(self, tokens: int, documents: int = 1) -> int:
        """Return how many tokens `events.progress` gets of documents of so many tokens in all."""
        return tokens

    def tell_progress(self, portion: Portion[InputSequence[Document]]) -> None:
        """Report the tokens that another group of ranks has read."""
        self.reader.events.progress(self.counted(portion.length, portion.count))

    def read(self, reader: Reader, documents: Iterable[Document]) -> None:
        """Read documents with another reader, to try it; their rows are lost."""
        self.reader = reader
        deque(self.results(map(self.sequence, documents)), maxlen=0)

    @cached_property
    def digest(self) -> str:
        """The digest of the model."""
        return model_digest(self.reader.model)

    def take(self, document: Document, on_skip: OnSkip | None) -> InputSequence[Document] | None:
        """Return a document as the model reads it. Raises the error of one that cannot be read.

        With `on_skip`, such a document is passed to it, with its ConfigError or DataError, and nothing is returned. To
        find such errors, all ids of the document are read here. A file that changes while it is read raises its error
        in any case.
        """
        try:
            if isinstance(document, Unread):
                raise document.error
            sequence = self.sequence(document)
            for start in range(0, len(document) if on_skip else 0, document.step):
                document.read(start, start + document.step)
        except (ConfigError, DataError) as error:
            if on_skip is None or isinstance(error, FileChangedError):
                raise
            on_skip(document, error)
            return None
        return sequence

    def sequences(
        self,
        documents: Iterable[Document],
        name: Callable[[str], str] = str,
        fraction: Callable[[], float | None] = lambda: None,
        ready: Callable[[], bool] = lambda: True,
    ) -> Iterator[InputSequence[Document] | None]:
        """Yield the documents that have rows, as the model reads them; None where the next one is not `ready`.

        The reader's `events.document` gets each document before any of it is read, with the `fraction` of the inputs up
        to it, and its `events.left_out` counts those that are left out (see `take`), or have no row. `name` gives
        the others their names. A document or a file that cannot be read ends them, and `end` raises its error when the
        rows of those before it are written.
        """
        self.failure = None
        events = self.reader.events
        try:
            for document in documents:
                events.document(document, fraction())
                sequence = self.take(document, events.left_out.skip)
                if sequence is not None and self.admit(len(document)):
                    document.doc_id = name(document.doc_id)
                    yield sequence
                if not ready():
                    yield None
        except (ConfigError, DataError) as error:
            self.failure = error

    def admit(self, tokens: int) -> bool:
        """Return whether a document of so many tokens has a row. If not, count it among those that are left out."""
        left_out = self.reader.events.left_out
        if tokens >= self.fewest_tokens:
            return True
        if tokens:
            left_out.short += 1
        else:
            left_out.empty += 1
        return False

    def rows_by_portion(
        self,
        sequences: Iterable[InputSequence[Document] | None],
        shard: float = math.inf,
    ) -> Iterator[tuple[Portion[InputSequence[Document]], Batches]]:
        """Return each portion of documents with its rows, as `dealing.deal` deals them out. A `shard` ends with one."""
        dealt = portions(
            sequences,
            PORTION_CHUNKS * self.reader.chunk,
            length_of=lambda sequence: len(sequence.document),
            shard=shard,
            size_of=lambda sequence: self.size(sequence.document),
        )
        return deal(dealt, self.results, self.reader.all_ranks, self.tell_progress)

    def end(self, tokens: int) -> None:
        """Raise the error that ended `sequences`. If `tokens` is 0, raise NoTokensError on the ranks that get rows."""
        ranks = self.reader.all_ranks
        if self.failure:
            raise self.failure
        if not tokens and (ranks.writes or ranks.dp == 1):
            raise NoTokensError(self.no_tokens_error)

    def rows(self, documents: Iterable[Document]) -> pa.RecordBatchReader:
        """Return a reader of the rows of `documents`, lazily and in order.

        The reader raises NoTokensError at the end if no row has tokens.
        """

        def batches() -> Iterator[pa.RecordBatch]:
            tokens = 0
            for _, batches in self.rows_by_portion(self.sequences(documents)):
                for batch in batches:
                    tokens += tokens_of(batch)
                    yield batch
            self.end(tokens)

        return pa.RecordBatchReader.from_batches(self.schema, batches())


def tokens_of(batch: pa.RecordBatch) -> int:
    """Return how many tokens the rows of a batch stand for."""
    return int(batch["n_tokens"].to_numpy().sum())


@dataclass(frozen=True)
class Output:
    """The place of rows: a folder of shards, a file, or `-`, a stream on stdout.

    A shard ends with the document that brings it to `shard_size`, in the job's `shard_unit` (None: the job's own size).
    `resume` continues a folder that an earlier run left unfinished: the net does not read the documents of finished
    shards again. A `sink` gets the rows instead of a file or stream, each batch at once. A stream has `lines` of JSON,
    or else it is Arrow.
    """

    path: str | Path
    shard_size: int | None = None
    shard_format: ShardFormat = "arrow"
    resume: bool = False
    sink: AbstractContextManager[Sink] | None = None
    lines: bool = False


def write_rows(job: RowJob, inputs: Inputs, output: Output) -> Counter[str]:
    """Write the rows that a job makes of the documents in `inputs`.

    Return how many `rows` and `tokens` the output has. Of several ranks, only the first one writes, and only it knows
    these counts.

    On the same CPU with as many threads, a resumed run ends byte for byte as if it had never stopped. Inputs, model,
    chunk and options must be the same as in the earlier run. A resumed run leaves out again what the earlier run left
    out. The manifest has the counts of the reader's `events.left_out`, and the digests of the inputs: those of finished
    shards must be the same in a resumed run.

    Raises ConfigError for invalid options and for a folder that is in use, DataError for no document or a damaged
    shard, LongNetError when a write fails. After an error there is no output file, and a folder keeps its finished
    shards.
    """
    in_folder = is_folder(output.path, resume=output.resume)
    names_apart = job.names_apart and inputs.id_column is None
    reading = inputs.documents(
        digests=in_folder and job.reader.all_ranks.writes,
        names_apart=names_apart and inputs.shares_documents,
        note=job.reader.events.note,
    )
    documents = _begin_reading(job, inputs, reading)
    # documents of one name get two, also if a document without a row stands between them
    name = Apart().name if names_apart else str
    sequences = partial(job.sequences, documents, name, lambda: reading.fraction)
    if in_folder:
        return _write_to_folder(job, inputs, output, sequences(), reading.opened)
    return _write_one_output(job, output, sequences(reading.ready))


def _begin_reading(job: RowJob, inputs: Inputs, reading: Iterable[Document]) -> Iterator[Document]:
    """Return the documents of `inputs`, whose pass `reading` is. Set the columns that they carry to the output.

    Raises the error of a document that is too long for the model if its length is known at once.
    """
    documents = iter(reading)
    if inputs.keep or job.text_fields:  # first_kept waits for the first document
        job.kept_fields, documents = first_kept(documents, job.text_fields)
    if job.reader.model.config.max_tokens is not None and not job.reader.events.left_out.skip:
        for document in inputs.stored():
            job.take(document, None)
    return documents


def _write_one_output(
    job: RowJob,
    output: Output,
    sequences: Iterator[InputSequence[Document] | None],
) -> Counter[str]:
    """Write the rows to a file, a stream or the sink of `output`, and return their counts."""
    sink = output.sink
    rows_at_once = 1  # rows that are written at a time, or fewer where the input waits
    if sink is None:
        sink = ShardWriter(output.path, job.schema, lines=output.lines)
        rows_at_once = job.batch_rows
    written = Counter[str]()
    waiting = list[pa.RecordBatch]()

    def flush() -> None:
        for batch in pa.Table.from_batches(waiting, job.schema).combine_chunks().to_batches():
            opened.write(batch)
        waiting.clear()

    with sink if job.reader.all_ranks.writes else _Nowhere() as opened:
        for portion, batches in job.rows_by_portion(sequences):
            for batch in batches:
                written.update(rows=len(batch), tokens=tokens_of(batch))
                waiting.append(batch)
                if sum(map(len, waiting)) >= rows_at_once:
                    flush()
            if portion.ends_early:
                flush()
        flush()
        job.end(written["tokens"])
    return written


def _write_to_folder(
    job: RowJob,
    inputs: Inputs,
    output: Output,
    sequences: Iterator[InputSequence[Document] | None],
    opened: Sequence[tuple[str, str | None]],
) -> Counter[str]:
    """Write the rows to a folder of shards, and return the counts of what it has. `opened` grows, as in ShardFolder."""
    shard_size = output.shard_size or job.shard_size
    if output.resume:
        text = _pattern_as_written(output.path, job.facts.pattern)
        job.facts = replace(job.facts, pattern=text)
    settings = _settings(job, inputs, shard_size)
    folder: ShardFolder | _Nowhere = _Nowhere()
    if job.reader.all_ranks.writes:
        folder = ShardFolder(
            output.path,
            job.schema,
            settings=settings,
            name=job.shard_name,
            format=output.shard_format,
            resume=output.resume,
            left_out=job.reader.events.left_out,
            opened=opened,
        )
    with folder:
        _write_shards(job, sequences, folder, shard_size)
    return folder.totals


class _Nowhere:
    """The sink, or the folder, of a rank that does not write: it keeps no rows."""

    finished = False

    def __init__(self) -> None:
        self.totals = Counter[str]()

    def __enter__(self) -> _Nowhere:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""

    def write(self, *_: pa.RecordBatch, **counts: int) -> None:
        """Do nothing."""

    count = end_shard = write


def _pattern_as_written(folder: str | Path, pattern: str | None) -> str | None:
    """Return the text of the pattern in the earlier run of a folder if it is the same pattern, otherwise `pattern`.

    Another version may write another text of it, and all files of a folder must hold one text.
    """
    earlier = read_manifest(folder)
    text = earlier.settings.get("pattern") if earlier else None
    with suppress(ValueError):
        if text and pattern and parse_pattern(text) == parse_pattern(pattern):
            return text
    return pattern


def _settings(job: RowJob, inputs: Inputs, shard_size: int) -> dict[str, object]:
    """Return what decides the bytes of a folder, which a resumed run must share."""
    reader = job.reader
    settings = inputs.settings(inputs.tokenizer, job.kept_fields) | {
        "eos": inputs.eos_id,
        # before the model, whose digest then differs too: errors name the first
        "pattern": job.facts.pattern,
        "model": job.digest[:16],
        "kernel": check_kernel(reader.device, reader.dtype, reader.model.config.head_dim),
    }
    settings |= {
        name: value
        for name, value in (asdict(job.options) | asdict(job.facts)).items()
        if value is not None and value is not False and value != ()
    }
    settings |= {
        "chunk": reader.chunk,
        "dtype": reader.dtype,
        f"shard_{job.shard_unit}": shard_size,
    }
    if reader.ranks.world > 1:  # more ranks sum in another order
        settings["ranks"] = reader.ranks.world
    return settings


def _write_shards(
    job: RowJob,
    sequences: Iterator[InputSequence[Document] | None],
    folder: ShardFolder | _Nowhere,
    shard_size: int,
) -> None:
    """Write the rows of the documents that no finished shard has to the first rank's `folder`."""
    ranks = job.reader.all_ranks
    if ranks.any(folder.finished):
        return
    done = ranks.from_first(folder.totals["documents"])
    tokens = ranks.from_first(folder.totals["tokens"])
    if isinstance(folder, ShardFolder):
        sequences = folder.unread(sequences)
    else:
        sequences = islice(sequences, done, None)
    for portion, batches in job.rows_by_portion(sequences, shard_size):
        for batch in batches:
            tokens += tokens_of(batch)
            folder.write(batch, tokens=tokens_of(batch))
        folder.count(documents=portion.count)
        if portion.ends_shard:
            folder.end_shard()
    job.end(tokens)
