"""The jobs that read documents, and the one writer of their rows: to a folder of shards, a file or a stream.

    documents --sequence--> portions --results, dealt out to groups of ranks--> scores, or record batches --> output

Each portion of documents is read independently of the others. So a run that is resumed, or shared by many processes,
pads and sums as an uninterrupted run of one process does, and a folder has the same bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import pyarrow as pa

from longnet_cli.basics.errors import ConfigError, NoTokensError
from longnet_cli.data.documents import Document, checked
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.kept import first_kept, kept_settings
from longnet_cli.data.left_out import LeftOut, OnSkip
from longnet_cli.data.names import Apart
from longnet_cli.data.outputs import ShardWriter, is_folder
from longnet_cli.data.shards import ShardFolder, ShardFormat, run_to_resume
from longnet_cli.nets.net import InputSequence, Net
from longnet_cli.nets.weights import model_digest
from longnet_cli.running.chunk_size import chunk_of, default_chunk
from longnet_cli.running.device import check_kernel, resolve_dtype
from longnet_cli.running.ranks.dealing import BATCHES, Codec, deal
from longnet_cli.running.ranks.portions import Portion
from longnet_cli.running.ranks.ranks import Ranks
from longnet_cli.running.reader import OnWindows, Reader, share_reader

R = TypeVar("R")
Sequences = Iterable[InputSequence[Document]]


class Sink(Protocol):
    """What takes the rows of a job: a file, a stream, or what prints them."""

    def write(self, batch: pa.RecordBatch, /) -> None: ...


class DocumentJob(ABC, Generic[R]):
    """A job that turns documents into results, in order, on the ranks of one group."""

    codec: Codec[R]  # for results that another group of ranks sends
    skips_empty: ClassVar[bool] = False  # an empty document has no result
    scores: ClassVar[bool] = False  # it computes logits
    nothing: str  # the error for results without any token

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    @abstractmethod
    def sequence(self, document: Document) -> InputSequence[Document]:
        """Return a document as the model reads it. Raises ConfigError or DataError if the job refuses it."""

    @abstractmethod
    def window_sizes(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Yield (tokens, wanted tokens) of each window in which a document of so many tokens is read."""

    @abstractmethod
    def results(self, sequences: Sequences) -> Iterator[R]:
        """Yield the results of these documents, in order."""

    @abstractmethod
    def tokens(self, result: R) -> int:
        """Return how many tokens a result stands for."""

    def tell_progress(self, portion: Portion[InputSequence[Document]]) -> None:
        """Report the tokens that another group of ranks has read."""
        self.reader.on_progress(portion.length)

    def kept_bytes(self, tokens: int) -> dict[str, int]:
        """Return the bytes that the job itself keeps of a document of so many tokens, by kind."""
        return {}

    def checked(
        self,
        documents: Iterable[Document],
        stored: Iterable[Document] = (),
        on_skip: OnSkip | None = None,
        on_empty: Callable[[Document], None] | None = None,
    ) -> Iterator[InputSequence[Document]]:
        """Return the `documents` that have results. Without `on_skip`, check all `stored` documents now."""
        for document in stored if on_skip is None else ():
            self.sequence(document)
        empty = (on_empty or (lambda document: None)) if self.skips_empty else None
        return checked(documents, self.sequence, on_skip, empty)

    def deal(
        self, sequences: Sequences, ranks: Ranks, tokens: int = 0, **shards: Any
    ) -> Iterator[tuple[Portion[InputSequence[Document]], R | None]]:
        """Yield each portion with each of its results, and then with None.

        Raises NoTokensError at the end if there are no `tokens` of earlier runs and none in the results.
        """
        portions = self.reader.portions(sequences, **shards)
        for portion, results in deal(portions, self.results, ranks, self.codec, self.tell_progress):
            for result in results:
                tokens += self.tokens(result)
                yield portion, result
            yield portion, None
        if not tokens and (ranks.first or ranks.dp == 1):
            raise NoTokensError(self.nothing)

    def all_results(self, sequences: Sequences, ranks: Ranks) -> Iterator[R]:
        """Yield the results of all portions, each as soon as it is there."""
        return (result for _, result in self.deal(sequences, ranks) if result is not None)


class RowJob(DocumentJob[pa.RecordBatch]):
    """A job that turns documents into rows with a column `n_tokens`.

    `options` is a dataclass that determines the rows, together with the net and the documents. `kept_fields` are
    columns that documents carry to the output (`data.kept`).
    """

    codec = BATCHES
    schema: pa.Schema
    shard_name: ClassVar[str]
    shard_unit: ClassVar[str]  # what is counted to fill a shard
    shard_size: ClassVar[int]
    batch_rows: ClassVar[int] = 1  # a file or a stream has batches of this many rows or more
    names_apart: ClassVar[bool] = False  # neighbouring documents of one name get names of their own in an output
    says_no_id_column: ClassVar[bool] = False  # its folders have the setting `id_column` even if it is None

    def __init__(self, reader: Reader, options: Any, kept_fields: Sequence[pa.Field] = ()) -> None:
        super().__init__(reader)
        self.options, self.kept_fields = options, kept_fields

    @abstractmethod
    def size(self, sequence: InputSequence[Document]) -> int:
        """Return how many units of a shard a document fills."""

    def tokens(self, result: pa.RecordBatch) -> int:
        return int(result["n_tokens"].to_numpy().sum())

    def option_settings(self) -> dict[str, Any]:
        """Return the options that were chosen, as settings of a folder."""
        return {name: x for name, x in asdict(self.options).items() if x is not None and x is not False}

    @cached_property
    def digest(self) -> str:
        """The digest of the model."""
        return model_digest(self.reader.model)

    def rows(
        self,
        documents: Iterable[Document],
        *,
        stored: Iterable[Document] = (),
        ranks: Ranks | None = None,
        on_skip: OnSkip | None = None,
        on_empty: Callable[[Document], None] | None = None,
    ) -> pa.RecordBatchReader:
        """Return a reader of the rows of `documents`, lazily and in order. The arguments are as in `encoding.encode`.

        The reader raises NoTokensError at the end if no row has tokens.
        """
        sequences = self.checked(documents, stored, on_skip, on_empty)
        return pa.RecordBatchReader.from_batches(self.schema, self.all_results(sequences, ranks or Ranks()))


def write_rows(
    make_job: Callable[..., RowJob],
    model: Net,
    inputs: Inputs,
    output: str | Path,
    *,
    shard_size: int | None = None,
    shard_format: ShardFormat = "arrow",
    resume: bool = False,
    left_out: LeftOut | None = None,
    telling: Callable[[Iterator[Document]], Iterator[Document]] = iter,
    of_text: Sequence[pa.Field] = (),
    ranks: Ranks | None = None,
    chunk: int | None = None,
    dtype: str = "auto",
    spill: str | Path | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_choice: OnWindows | None = None,
    sink: Callable[[pa.Schema], AbstractContextManager[Sink]] | None = None,
) -> Counter[str] | None:
    """Write the rows of the documents in `inputs` to `output`: a folder of shards, a file, or `-`, a stream on stdout.

    Return how many `rows` and `tokens` the output has. Of several `ranks`, only the first one writes. The others get
    None. `make_job(reader, kept_fields=...)` returns the job. `chunk`, `dtype`, `spill`, `on_progress` and `on_choice`
    are as in `running.reader.Reader`. A `sink(schema)` gets the rows instead of a file or stream, each batch at once.

    A shard ends with the document that brings it to `shard_size`, in the job's `shard_unit`. `resume` continues a
    folder that an earlier run left unfinished, without reading the documents of finished shards again. On the same
    CPU with as many threads, the result is byte for byte as if the run had never stopped. Inputs, model and options
    must be the same as in the earlier run. Only a `chunk` of None takes the earlier run's value, because on a GPU the
    default depends on the free memory. A resumed run leaves out again what the earlier run left out. The manifest has
    the counts of `left_out`, and the digests of the inputs: those of finished shards must be the same in a resumed run.

    `telling` gets the documents, and yields them: it may say something of each one before it is read. The columns
    `of_text` are added to the job's `kept_fields` if the input is text.

    Raises ConfigError for invalid options and for a folder that is in use, DataError for no document or a damaged
    shard, LongNetError when a write fails. After an error there is no output file, and a folder keeps its finished
    shards.
    """
    ranks, left_out, in_folder = ranks or Ranks(), left_out or LeftOut(), is_folder(output, resume=resume)
    earlier = run_to_resume(output, resume=resume) if in_folder and ranks.first else None
    device = next(model.parameters()).device
    before = earlier.settings.get("chunk") if earlier else None
    chunk = chunk_of(chunk, default_chunk(model.config, device), before, ranks)
    dtype = resolve_dtype(dtype, device)
    opened: list[tuple[str, str | None]] | None = [] if in_folder and ranks.first else None
    inputs = replace(inputs, opened=opened)
    kept: Sequence[pa.Field] = ()
    documents: Iterator[Document] = inputs.documents()
    if inputs.keep or of_text:  # first_kept waits for the first document
        kept, documents = first_kept(documents, of_text)
    stored = inputs.stored() if model.config.max_tokens is not None else ()
    reader = share_reader(
        model, chunk=chunk, dtype=dtype, spill=spill, ranks=ranks, on_progress=on_progress, on_choice=on_choice
    )
    job = make_job(reader, kept_fields=kept)
    read = partial(job.checked, telling(documents), stored, left_out.skip, left_out.pass_over)
    if job.names_apart and inputs.id_column is None:
        read = partial(_named_apart, read)
    if not in_folder:
        batches = job.all_results(read(), ranks)
        opened_sink = partial(sink or partial(ShardWriter, output), job.schema) if ranks.first else nullcontext
        return _write_stream(job, batches if sink else _joined(batches, job.batch_rows), opened_sink)
    shard_size = job.shard_size if shard_size is None else shard_size
    if shard_size < 1:
        raise ConfigError(f"shard_{job.shard_unit} must be 1 or more, not {shard_size}")
    settings = _settings(job, inputs, shard_size, ranks)
    folder = None
    if ranks.first:
        about: dict[str, Any] = {"settings": settings, "name": job.shard_name, "format": shard_format}
        folder = ShardFolder(output, job.schema, **about, resume=resume, left_out=left_out, opened=opened)
    with folder or nullcontext():
        _write_folder(job, read, folder, shard_size, ranks)
    return folder.totals if folder else None


def _named_apart(read: Callable[[], Sequences]) -> Iterator[InputSequence[Document]]:
    apart = Apart()
    for sequence in read():
        sequence.document.doc_id = apart.name(sequence.document.doc_id)
        yield sequence


def _write_stream(
    job: RowJob, batches: Iterable[pa.RecordBatch], open_sink: Callable[[], AbstractContextManager[Sink | None]]
) -> Counter[str] | None:
    """Write the batches to a sink, and return their counts where there is one: on the first rank."""
    written = Counter[str]()
    with open_sink() as sink:
        for batch in batches:
            written.update(rows=len(batch), tokens=job.tokens(batch))
            if sink:
                sink.write(batch)
    return written if sink else None


def _settings(job: RowJob, inputs: Inputs, shard_size: int, ranks: Ranks) -> dict[str, Any]:
    """Return what decides the bytes of a folder, which a resumed run must share."""
    from longnet_cli.data.chat import chat_settings  # loads Jinja, which files and streams do not need

    reader = job.reader
    return {
        "inputs": inputs.fingerprint(),
        "column": inputs.column,
        **({"id_column": inputs.id_column} if inputs.id_column or job.says_no_id_column else {}),
        "eos": inputs.eos_id,
        **chat_settings(inputs.tokenizer),
        "pattern": job.options.pattern,  # before the model, whose digest then differs too: errors name the first
        "model": job.digest[:16],
        "kernel": check_kernel(reader.device, reader.dtype, reader.model.config.head_dim),
        **job.option_settings(),
        **kept_settings(job.kept_fields),
        "chunk": reader.chunk,
        "dtype": reader.dtype,
        f"shard_{job.shard_unit}": shard_size,
        **({"ranks": ranks.sp} if ranks.sp > 1 else {}),  # more ranks sum in another order
    }


def _write_folder(
    job: RowJob,
    read: Callable[[], Iterator[InputSequence[Document]]],
    folder: ShardFolder | None,
    shard_size: int,
    ranks: Ranks,
) -> None:
    """Write the rows of the documents that no finished shard has to the first rank's `folder`; `read` returns all."""
    if ranks.any(folder is not None and folder.finished):
        return
    done = ranks.from_first(folder.documents if folder else 0)
    tokens = ranks.from_first(folder.totals["tokens"] if folder else 0)
    unread = folder.unread(read()) if folder else islice(read(), done, None)
    for portion, batch in job.deal(unread, ranks, tokens, shard=shard_size, size_of=job.size):
        if folder and batch is not None:
            folder.write(batch, tokens=job.tokens(batch))
        elif folder:
            folder.count(documents=portion.items)
            if portion.ends_shard:
                folder.end_shard()


def _joined(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the same rows in batches of `rows` or more, except the last one."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= rows:
            yield from pa.Table.from_batches(waiting).combine_chunks().to_batches()
            waiting = []
    if waiting:
        yield from pa.Table.from_batches(waiting).combine_chunks().to_batches()
