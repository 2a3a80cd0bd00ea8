"""The `encode` job: vectors of documents, or of their spans, pooled from the hidden states after the final norm.

    documents --Reader--> hidden states --Pooling--> rows --> Arrow batches, which `row_jobs.write_rows` writes

Hidden states are pooled piece by piece. Spans of tokens have their places in the text, in characters.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from longnet_cli.basics.errors import ConfigError, DataError, NotFiniteError
from longnet_cli.data.documents.text_pieces import Unit
from longnet_cli.data.documents.token_documents import Document, TextPlaces
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.data.files.opened_inputs import numpy_dtype
from longnet_cli.data.outputs.row_writer import kept_columns, row_schema
from longnet_cli.models.folder import Embedding, Loaded, ModelFolder
from longnet_cli.nets.net import InputSequence, Net, bos_ids
from longnet_cli.running.reader import Piece, Reader, Window

from .job_options import ONE_STATE, EncodeOptions
from .pooling import (
    SHORT,
    SUMMED,
    Pooling,
    Row,
    WindowMean,
    pool_together,
    windows_of,
)
from .row_jobs import ModelFacts, RowJob

NO_LIMIT = sys.maxsize  # tokens of a window that holds any document
PLACE_FIELDS = (pa.field("char_start", pa.int64()), pa.field("char_end", pa.int64()))


@dataclass(frozen=True)
class EncodeFacts(ModelFacts):
    """The facts of a model that `encode` needs, for the prompt that was asked for.

    The ids `prefix` are read after `bos`. An embedding model reads windows as its tokenizer's template writes a text:
    the ids `bos` and `prefix`, tokens of the document, the ids `closing`. These are pooled too, except the first
    `unpooled` rows of the document; another model's `bos` is not pooled. `prompt` (the text of `prefix`), `modules`
    (the pooling, and what follows it) and `query_prompt` go into the schema's metadata. `splits_special` is the
    tokenizer's.
    """

    prefix: Sequence[int] = ()
    query_prompt: str | None = None
    closing: list[int] | None = None  # not None: an embedding model's
    unpooled: int | None = None
    prompt: str | None = None
    modules: str | None = None
    splits_special: bool | None = None

    @property
    def framed(self) -> bool:
        """True where each window is written by a template, as embedding models have one."""
        return self.closing is not None

    @property
    def before(self) -> tuple[int, ...]:
        """The ids before a document, or before its part in a window."""
        return (*bos_ids(self.bos), *self.prefix)

    @property
    def after(self) -> tuple[int, ...]:
        """The ids after a document, or after its part in a window."""
        return tuple(self.closing or ())

    @property
    def first_pooled(self) -> int:
        """The first row of a framed document that is pooled."""
        return self.unpooled or 0

    @property
    def around(self) -> int:
        """The number of tokens of a window that are not the document's."""
        return len(self.before) + len(self.after)

    def tokenizer_for(self, loaded: Loaded) -> Tokenizer | None:
        """Return the tokenizer that reads documents of text: after the prompt of an embedding model, with places."""
        tokenizer = loaded.embedding.tokenizer if loaded.embedding else loaded.tokenizer
        return tokenizer and tokenizer.for_documents(self.prompt or "")


class WindowCut:
    """The cut of documents into windows. Raises ConfigError for a context, a stride and a span that leave no room.

    `room` is the most tokens of a document in a window, without a limit if the document is read in one piece. A window
    has `size` of them or fewer, and one begins every `stride` tokens. With `one_state`, a window has one vector,
    because a pooling takes one of its states: then a span is a window.
    """

    def __init__(self, options: EncodeOptions, facts: EncodeFacts) -> None:
        self.room = self.size = self.stride = NO_LIMIT
        self.one_state = False
        if options.context is None:
            return
        self.room = self.size = room = options.context - facts.around
        if room < 1:
            raise ConfigError(
                f"a window of {options.context} tokens has no room for a document beside its prompt and special "
                f"tokens, which are {facts.around}: give a longer --context, or a shorter --prefix"
            )
        self.one_state = not ONE_STATE.isdisjoint(options.pools)
        if self.one_state and options.span_tokens is not None:
            if options.stride is not None:
                raise ConfigError(f"--stride {options.stride}: each span is a window: leave it out")
            if isinstance(options.span, int) and options.span > room:
                raise ConfigError(
                    f"--span {options.span}: with --pool {options.pool}, a span is a window, which holds {room} tokens "
                    "of a document: give as many, or less"
                )
            self.size = min(room, options.span_tokens)
        self.stride = options.stride or self.size
        if self.stride > room:
            raise ConfigError(
                f"--stride {self.stride}: a window holds {room} tokens of a document: give as many, or less"
            )

    def windows(self, tokens: int) -> Iterator[tuple[int, int, int, int]]:
        """Return the windows in which a document of so many tokens is read, as `windows_of`."""
        return windows_of(tokens, self.size, self.stride)


def for_model(
    options: EncodeOptions,
    folder: ModelFolder,
    loaded: Loaded,
) -> tuple[EncodeOptions, EncodeFacts]:
    """Return the options with the model's own where none is given, and what `encode` knows of the model.

    Raises ConfigError for a prefix if the model has no tokenizer, and for vectors that it scales itself.
    """
    facts = EncodeFacts(**vars(ModelFacts.of(loaded)))
    embedding = loaded.embedding
    if embedding is None:
        return options, replace(facts, prefix=_prefix_ids(options.text_before, folder, loaded))
    model = embedding.model
    if options.normalize is False and "Normalize" in model.modules:
        raise ConfigError(
            f"{folder.name} scales vectors amid its modules ({model.modules}): leave out --no-normalize"
        )
    options = options.completed(
        pool=model.pool,
        prefix=model.document_prompt,
        normalize=model.normalized,
        context=_own_window(loaded.net, model.window),
    )
    return options, _with_prompt(facts, embedding, options.text_before)


def _prefix_ids(prefix: str, folder: ModelFolder, loaded: Loaded) -> Sequence[int]:
    """Return the ids of a prefix. Raises ConfigError for one that a model without a tokenizer is to read."""
    if not prefix:
        return ()
    if loaded.tokenizer is not None:
        return loaded.tokenizer.encode(prefix).tolist()
    problem = "has no tokenizer, which --prefix needs: give --tokenizer"
    if loaded.net.row_size is not None:
        problem = "reads vectors, which have no tokens: leave out --prefix"
    raise ConfigError(f"{folder.name} {problem}")


def _own_window(net: Net, window: int | None) -> int | None:
    """Return the most tokens that an embedding model was made to read at once; None for one that reads any number."""
    if net.config.causal or net.dilated:
        return None
    return min(filter(None, (window, net.config.max_tokens)), default=None)


def _with_prompt(facts: EncodeFacts, embedding: Embedding, prompt: str) -> EncodeFacts:
    """Return the facts of an embedding model that reads texts after a `prompt`."""
    model = embedding.model
    tokenizer = embedding.tokenizer.for_documents(prompt)
    opening, closing = tokenizer.ids_around
    unpooled = None
    if prompt and not model.pools_prompt:
        # as the library counts: it may take a token of the text for the prompt's
        alone = (*opening, *tokenizer.encode(prompt).tolist(), *closing)
        unpooled = len(alone) - (not tokenizer.special_ids.isdisjoint(alone[-1:]))
    return replace(
        facts,
        bos=opening,
        tokenizer_sha256=tokenizer.sha256,
        prefix=tokenizer.prompt_ids,
        query_prompt=model.query_prompt,
        closing=list(closing),
        unpooled=unpooled,
        prompt=prompt or None,
        modules=model.modules if model.of_folder else None,
        splits_special=tokenizer.splits_special,
    )


def encode(
    model: Net,
    documents: Iterable[Document],
    options: EncodeOptions = EncodeOptions(),  # noqa: B008
    facts: EncodeFacts = EncodeFacts(),
    **reading: Any,
) -> pa.RecordBatchReader:
    """Encode `documents` lazily, in order; return a reader of record batches of their rows (`Encoder.schema`).

    A model that reads vectors takes documents of `data.documents.vectors`; "tokens" here are then vectors. A document
    that is too long for the model, or has invalid ids, ends the run, unless `events.left_out` counts it. An empty
    document has no rows. `reading` are arguments of `running.reader.Reader`: `ranks`, `chunk`, `dtype`, `spill` and
    `events`. All ranks need the same documents. In one group of ranks, which share each document, all get all rows.
    Several groups divide the documents between them; then rank 0 gets all rows and the others none.

    Raises ConfigError for options that the model does not support. The reader raises DataError if no document has rows,
    ConfigError for a document with more tokens than the model reads, MemoryLimitError for hidden states that do not
    fit, NotFiniteError for a vector with NaN or an infinity.
    """
    return Encoder(Reader(model, **reading), options, facts).rows(documents)


@dataclass(frozen=True)
class _PooledWindow(Window):
    """A window of a document, the pooling that takes its hidden states, and `finish`, which takes the pooling's rows.

    Of the document's tokens, `tokens` take their states from it.
    """

    pooling: Pooling
    finish: Callable[[Row], Iterable[Row]]
    tokens: int

    @property
    def counted(self) -> int:
        return self.tokens


class Encoder(RowJob):
    """The job of `encode`: a row for each vector. The arguments are as those of `encode`."""

    options: EncodeOptions
    facts: EncodeFacts
    doing = "encoding"
    row_name = "vector"
    text_fields = PLACE_FIELDS
    shard_name = "vectors"
    shard_unit = "rows"
    shard_size = 1 << 12
    names_apart = True
    no_tokens_error = "there is nothing to encode: every document is empty or left out"

    def __init__(
        self,
        reader: Reader,
        options: EncodeOptions = EncodeOptions(),  # noqa: B008
        facts: EncodeFacts = EncodeFacts(),
    ) -> None:
        super().__init__(reader, options.completed(pool="mean", normalize=True), facts)
        # whether it may read a document in windows
        self.windowed = facts.framed and not reader.model.config.causal
        for is_refused, problem in self._refusals():
            if is_refused:
                raise ConfigError(problem)
        self.cut = WindowCut(options, facts)
        self.unit = cast(Unit, options.span) if isinstance(options.span, str) else None
        self.places_in = lru_cache(1)(TextPlaces)  # the rows of a document come in order

    def _refusals(self) -> Iterator[tuple[object, str]]:
        """Yield each thing that is wrong with options for the net, as (whether it is so, what the error then says)."""
        options = self.options
        facts = self.facts
        net = self.reader.model
        pools = options.pools
        yield (
            options.text_before and not (facts.prefix or facts.prompt),
            "a prefix becomes ids with the model's tokenizer: take the options of `for_model`",
        )
        yield (
            facts.prefix and not net.config.causal and not facts.framed,
            "a bidirectional model reads nothing before a document: leave out --prefix",
        )
        yield (
            (options.context or options.stride) and not self.windowed,
            "the model reads a document in one piece, not in windows: leave out --context, --stride",
        )
        yield (
            options.stride and not options.context,
            f"--stride {options.stride}: the model reads a document in one piece: leave it out, or give --context",
        )
        most = net.config.max_tokens
        yield (
            most and (options.context or 0) > most,
            f"--context {options.context}: the model reads {most} tokens at most",
        )
        yield (
            "cls" in pools and not (net.has_cls or facts.framed),
            "this model has no CLS: take the mean (--pool mean), or the first or last vector",
        )
        yield (
            net.has_cls and "cls" in pools and (options.span or pools[1:]),
            "a span has no CLS of its own: take the mean of its tiles (--pool mean), and that alone",
        )
        apart = [pool for pool in pools if pool not in SUMMED]
        yield (
            apart and self.reader.ranks.world > 1,
            f"--pool {'+'.join(apart)} of a document is not shared by ranks: give each rank its own documents (--dp)",
        )
        size = self.vector_size  # raises for poolings that the net does not take
        yield (
            options.dims is not None and not 1 <= options.dims <= size,
            f"--dims {options.dims}: a vector of this model has 1 to {size} numbers",
        )
        yield (
            options.tile_size and not net.has_grid,
            "this model has no grid of tiles: leave out --tile-size",
        )

    @property
    def vector_size(self) -> int:
        """The numbers of a whole vector. Raises ConfigError for poolings that the net does not take."""
        net = self.reader.model
        return net.vector_size(net.config.dim * len(self.options.pools))

    @cached_property
    def schema(self) -> pa.Schema:
        """The schema of the rows, with the columns `kept_fields`.

        A vector stands for the tokens [start, end) of document `doc_id`. The metadata keys are `longnet.*`; unknown
        values are left out.
        """
        options = self.options
        facts = self.facts
        known = facts.metadata | {
            "longnet.model_sha256": self.digest,
            "longnet.pooling": options.pool,
            "longnet.modules": facts.modules,
            "longnet.prompt": facts.prompt,
            "longnet.query_prompt": facts.query_prompt,
            "longnet.normalized": str(options.normalize).lower(),
            "longnet.context": options.context,
            "longnet.stride": self.cut.stride if options.context else None,
        }
        size = options.dims or self.vector_size
        kinds = {
            "doc_id": pa.string(),
            "span": pa.int32(),
            "start": pa.int64(),
            "end": pa.int64(),
            "n_tokens": pa.int64(),
            "embedding": pa.list_(pa.type_for_alias(options.embedding_dtype), size),
        }
        return row_schema(pa.schema(kinds), self.kept_fields, known)

    def sequence(self, document: Document) -> InputSequence[Document]:
        """Return a document as the net reads it, in one piece. Raises as `Net.sequence`.

        Also raises TooLongError for too many tokens, ConfigError for ids that have the template's special tokens, and
        DataError for a document that has nothing to pool.
        """
        facts = self.facts
        net = self.reader.model
        if self.unit and document.ends is None:
            raise ConfigError(
                f"{document.where}: this is no text with a {self.unit}: give texts, or --span 256"
            )
        if _has_frame(document, facts):
            raise ConfigError(
                f"{document.where}: the ids {bos_ids(facts.bos)} and {facts.after} stand around the document, and "
                "encode adds them itself: leave them out when you tokenize (longnet tokenize does)"
            )
        sequence = net.sequence(document, facts.before, self.options.tile_size, facts.closing)
        if len(document) and len(sequence) <= facts.first_pooled:
            raise DataError(
                f"{document.where}: nothing is pooled: {facts.unpooled} tokens count as the prompt's, as in "
                f"sentence-transformers, and the text has {len(sequence)} with it: leave out --prefix, or the document"
            )
        if self.options.context:
            return sequence
        advice = "encode it in shorter documents"
        if self.windowed:
            advice += ", or in windows (--context)"
        return sequence.check(advice)

    def window_sizes(self, tokens: int) -> Iterator[tuple[int, int]]:
        facts = self.facts
        around = facts.around
        if not facts.framed:
            around = len(self.reader.model.start_rows(facts.before))
        for start, stop, *_ in self.cut.windows(tokens):
            yield around + stop - start, 0

    def size(self, document: Document) -> int:
        if document.ends is not None:
            return len(document.ends)
        return len(self._ends(document))

    def _ends(self, document: Document) -> Sequence[int]:
        """Return the tokens before which the spans of a document end; the last may be after its end.

        A token belongs to the unit of a text in which it ends. Raises ConfigError if nobody knows where that is.
        """
        tokens = len(document)
        if document.ends is None:
            size = self.options.span_tokens or tokens
            return range(size, tokens + size, size)
        counts = TextPlaces(document).tokens_before(document.ends)
        if counts is None:
            raise ConfigError(
                f"{document.where}: its tokens have no places in the text: give a size (--span 256)"
            )
        counts[-1] = tokens
        ends = [0, *np.unique(counts[counts > 0]).tolist()]
        most = self.cut.room if self.cut.one_state else tokens
        stops: list[int] = []
        for start, end in pairwise(ends):
            stops += range(start + most, end, most)
            stops.append(end)
        return stops

    def results(self, sequences: Iterable[InputSequence[Document]]) -> Iterator[pa.RecordBatch]:
        head = torch.inference_mode()(self.reader.model.head)
        for pieces in self.reader.read(self._windows(sequences)):
            with torch.inference_mode():
                self._pool_together(pieces)
                rows = list(chain.from_iterable(map(self._pooled, pieces)))
            if rows:
                yield self._record_batch(rows, head)

    def _windows(self, sequences: Iterable[InputSequence[Document]]) -> Iterator[_PooledWindow]:
        """Yield the windows of each document, in order."""
        windows = self._pooled_apart if self.cut.one_state else self._pooled_as_one
        for sequence in sequences:
            ends = self._ends(sequence.document)
            skipped = self._skipped(sequence.own_start, ends[0])
            yield from windows(sequence, ends, skipped)

    def _pooled_as_one(
        self,
        sequence: InputSequence[Document],
        ends: Sequence[int],
        skipped: int,
    ) -> Iterator[_PooledWindow]:
        """Yield the windows of a document, with one pooling, which takes the states of each token once."""
        document = sequence.document
        before = sequence.own_start
        after = len(sequence.end_rows)
        pools = self.options.pools
        pooling = Pooling(document, pools, ends, before - skipped, after, skipped=skipped)
        for start, stop, first, last in self.cut.windows(len(document)):
            rows = sequence.window(start, stop)
            first_row = before + first - start  # in this window, of the token `first`
            last_row = before + last - start
            # the first window and the last one also give the states of what stands beside the document
            wanted = first_row if start else skipped
            wanted_stop = last_row if stop < len(document) else len(rows)
            ids = (rows, 0, len(rows), wanted, wanted_stop)
            yield _PooledWindow(*ids, pooling, _as_it_is, last - first)

    def _pooled_apart(
        self,
        sequence: InputSequence[Document],
        ends: Sequence[int],
        skipped: int,
    ) -> Iterator[_PooledWindow]:
        """Yield the windows of a document, each with a pooling of its own, which takes all of the window's states.

        Without spans, the document has the mean of the windows' vectors.
        """
        document = sequence.document
        before = sequence.own_start - skipped
        after = len(sequence.end_rows)
        finish = WindowMean().add if self.options.span is None else _as_it_is
        parts = self.cut.windows(len(document))
        if self.unit:
            parts = ((start, end, start, end) for start, end in pairwise((0, *ends)))
        for number, (start, stop, first, last) in enumerate(parts):
            rows = sequence.window(start, stop)
            lead = {"skipped": skipped, "begin": start, "number": number}
            pooling = Pooling(document, self.options.pools, [stop], before, after, **lead)
            ids = (rows, 0, len(rows), skipped, len(rows))
            yield _PooledWindow(*ids, pooling, finish, last - first)

    def _skipped(self, before: int, first_end: int) -> int:
        """Return how many rows, from the first on, are not pooled.

        `before` rows stand before the document, whose first span ends before its token `first_end`.
        """
        facts = self.facts
        if not facts.framed:
            return 0 if self.options.pool == "cls" else before - len(facts.prefix)
        skipped = facts.first_pooled
        as_prompt = skipped - before  # tokens of the document that count as the prompt's
        if self.options.span is not None and first_end <= as_prompt:
            return before  # otherwise the first span would have nothing
        return skipped

    def _pool_together(self, pieces: Sequence[Piece[_PooledWindow]]) -> None:
        """Pool the whole documents among the pieces in a few calls. A CPU adds long ones faster one by one."""
        limit = SHORT if self.reader.device.type == "cpu" else self.reader.chunk
        whole = [
            (piece.window.pooling, piece.hidden)
            for piece in pieces
            if piece.hidden is not None and piece.window.pooling.is_whole(piece.hidden, limit)
        ]
        if whole:
            pool_together(whole)

    def _pooled(self, piece: Piece[_PooledWindow]) -> Iterable[Row]:
        """Return the rows that a piece finishes."""
        window = piece.window
        hidden = piece.hidden
        if hidden is None:  # it is of another rank: zeros that take no memory
            hidden = torch.zeros(1, 1, device=self.reader.device).expand(
                len(piece), self.reader.model.config.dim
            )
        return chain.from_iterable(map(window.finish, window.pooling.add(hidden)))

    def _record_batch(
        self,
        rows: Sequence[Row],
        head: Callable[[Tensor], Tensor],
    ) -> pa.RecordBatch:
        schema = self.schema
        pooled = torch.stack([row.vector for row in rows])  # (rows, dim)
        self.reader.ranks.sum(pooled)  # exact but for rounding, because pooling is linear
        vectors = head(pooled)[:, : self.options.dims]
        if self.options.normalize:
            vectors = F.normalize(vectors, dim=-1)
        columns = _columns(map(_SPAN, rows), schema)
        columns.append(_array(schema.field("embedding").type, rows, vectors))
        carried = [field for field in self.kept_fields if field not in PLACE_FIELDS]
        if len(carried) < len(self.kept_fields):
            columns += _columns(map(self._place, rows), PLACE_FIELDS)
        columns += kept_columns([row.document for row in rows], carried)
        return pa.record_batch(columns, schema=schema)

    def _place(self, row: Row) -> tuple[int | None, int | None]:
        """Return where a row's span is in the text of its document."""
        return self.places_in(row.document).of(row.start, row.end)


# the first columns of a Row
_SPAN = attrgetter("document.doc_id", "span", "start", "end", "n_tokens")


def _as_it_is(row: Row) -> Iterable[Row]:
    return (row,)


def _columns(rows: Iterable[tuple], fields: Iterable[pa.Field]) -> list[pa.Array]:
    """Return the columns of rows, in the types of the first fields."""
    columns = zip(zip(*rows, strict=True), fields, strict=False)
    return [pa.array(values, field.type) for values, field in columns]


def _has_frame(document: Document, facts: EncodeFacts) -> bool:
    """Return whether the ids that a template puts around a document of ids stand there already."""
    opening = bos_ids(facts.bos)
    closing = facts.after
    size = len(document)
    is_text = document.tokenizer is not None
    if is_text or not facts.framed or not 0 < len(opening + closing) <= size:
        return False
    first = document.read(0, len(opening))
    last = document.read(size - len(closing), size)
    return [*first, *last] == [*opening, *closing]


def _array(kind: pa.DataType, rows: Sequence[Row], vectors: Tensor) -> pa.Array:
    """Return vectors (rows, dim) as one array of vectors. Raises NotFiniteError."""
    with np.errstate(over="ignore"):  # reported below
        numbers = vectors.cpu().numpy().astype(numpy_dtype(kind.value_type))
    finite = np.isfinite(numbers).all(axis=1)
    if not finite.all():
        row = rows[int(np.argmin(finite))]
        raise NotFiniteError(
            f"{row.document.where}: document {row.document.doc_id!r}: the vector of tokens {row.start} to "
            f"{row.end - 1} is not finite: take --dtype bf16 or fp32, and --embedding-dtype float32"
        )
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), kind.list_size)
