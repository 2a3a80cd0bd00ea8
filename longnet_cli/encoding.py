"""The `encode` job: vectors of documents, or of their spans, pooled from the hidden states after the final norm.

    documents --Reader--> hidden states --Pooling--> rows --> Arrow batches

Documents are first grouped into portions, and each portion is encoded independently of the others. So a run that is
resumed, or shared by many processes, pads and sums as an uninterrupted run of one process does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from longnet_cli.data.documents import Document, checked
from longnet_cli.data.kept import kept_column, kept_settings, kept_value, with_kept
from longnet_cli.data.shards import ShardFolder, ShardFormat, run_to_resume
from longnet_cli.data.tables import numpy_dtype
from longnet_cli.errors import ConfigError, DataError, LongNetError, NotFiniteError
from longnet_cli.model import LongNet
from longnet_cli.model.net import Net
from longnet_cli.model.sequence import Bos, InputSequence
from longnet_cli.model.weights import model_digest
from longnet_cli.pooling import ClsPooling, Pool, Pooling, Row
from longnet_cli.runtime.chunks import chunk_of, default_chunk
from longnet_cli.runtime.dealing import BATCHES, deal
from longnet_cli.runtime.device import check_kernel, resolve_dtype
from longnet_cli.runtime.layers import LayerStates
from longnet_cli.runtime.portions import Portion
from longnet_cli.runtime.ranks import Ranks
from longnet_cli.runtime.reader import Piece, Reader, Window, share_reader

EmbeddingDtype = Literal["float32", "float16"]
OnSkip = Callable[[Document, LongNetError], None]  # called with a skipped document and the reason

SHARD_ROWS = 1 << 14


class NothingToEncodeError(DataError):
    """An error for documents without any token to encode."""


@dataclass(frozen=True)
class EncodeOptions:
    """The options that determine the rows of `encode`, together with the net and the documents.

    `bos` (the id of the tokenizer's end of text, or several ids) is put before each document of a causal model, as in
    scoring. It is not pooled.
    `pool` takes the mean of the hidden states of a document's tokens, the hidden state of the last or first token, or
    the hidden state of the CLS that a slide encoder puts before them. `normalize` then scales the vector to length 1.
    With `span`, a document has a row for every `span` tokens.
    `all_layers` adds the column `layers`: such a vector of the first layer's input, and of each layer's output.
    `tile_size` is the side of a tile in the pixels of its coordinates. It overrides the document's and model's values.
    `model_name`, `tokenizer_sha256` and `pattern` (a text of `longnet_cli.notation`) go into the schema's metadata.
    """

    bos: Bos = None
    pool: Pool = "mean"
    normalize: bool = True
    span: int | None = None
    embedding_dtype: EmbeddingDtype = "float32"
    all_layers: bool | None = None  # not False: folders started without it keep their settings
    tile_size: int | None = None
    model_name: str | None = None
    tokenizer_sha256: str | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.span is not None and self.span < 1:
            raise ConfigError(f"span must be 1 or more, not {self.span}")
        if self.span is not None and self.pool == "cls":
            raise ConfigError("a span has no CLS of its own: take the mean of its tiles (--pool mean)")
        if self.span is not None and self.all_layers:
            raise ConfigError("all layers are given for whole documents: leave out --span, or --all-layers")

    def rows_of(self, sequence: InputSequence[Document]) -> int:
        """Return the number of rows of a document."""
        return -(-len(sequence.document) // self.span) if self.span else 1

    def check(self, net: Net) -> None:
        """Raise ConfigError for options that `net` does not support."""
        if self.pool == "cls" and not net.has_cls:
            raise ConfigError("this model has no CLS: take the mean (--pool mean), or the first or last vector")
        if self.tile_size and not net.has_grid:
            raise ConfigError("this model has no grid of tiles: leave out --tile-size")
        if self.all_layers and not net.layer_by_layer:
            raise ConfigError("the layers of a Hugging Face model are not listened to: leave out --all-layers")

    def sequence(self, net: Net, document: Document) -> InputSequence[Document]:
        """Return a document as `net` reads it. Raises as `Net.sequence`, and TooLongError for too many tokens."""
        return net.sequence(document, self.bos, self.tile_size).check("encode it in shorter documents")

    def schema(self, dim: int, model_sha256: str | None = None, kept_fields: Sequence[pa.Field] = ()) -> pa.Schema:
        """Return the schema of embeddings (dim,) from the model with this digest, and of the columns `kept_fields`.

        A vector stands for the tokens [start, end) of document `doc_id`. The metadata keys are `longnet.*`; unknown
        values are left out.
        """
        known = {
            "longnet.model": self.model_name,
            "longnet.model_sha256": model_sha256,
            "longnet.pooling": self.pool,
            "longnet.normalized": "true" if self.normalize else "false",
            "longnet.tokenizer_sha256": self.tokenizer_sha256,
            "longnet.pattern": self.pattern,
        }
        number = pa.float32() if self.embedding_dtype == "float32" else pa.float16()
        fields = [
            pa.field("doc_id", pa.string()),
            pa.field("span", pa.int32()),
            pa.field("start", pa.int64()),
            pa.field("end", pa.int64()),
            pa.field("n_tokens", pa.int64()),
            pa.field("embedding", pa.list_(number, dim)),
        ]
        return pa.schema(
            with_kept(fields, kept_fields), metadata={key: value for key, value in known.items() if value is not None}
        )


def encode(
    model: Net,
    documents: Iterable[Document],
    options: EncodeOptions,
    *,
    stored: Iterable[Document] = (),
    kept_fields: Sequence[pa.Field] = (),
    chunk: int | None = None,
    spill: str | Path | None = None,
    dtype: str = "auto",
    ranks: Ranks | None = None,
    on_skip: OnSkip | None = None,
    on_empty: Callable[[Document], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> pa.RecordBatchReader:
    """Encode `documents` lazily, in order; return a reader of record batches of their rows (`EncodeOptions.schema`).

    A model that reads vectors takes documents of `data.vectors`; "tokens" here are then vectors. A document that is too
    long for the model, or has invalid ids, ends the run. With `on_skip`, it is passed to `on_skip` and left out
    instead. An empty document has no rows and is passed to `on_empty`. The `stored` documents are the part of
    `documents` whose lengths are cheap to read; without `on_skip`, they are checked before anything else. `kept_fields`
    are columns that documents carry to the output (`data.kept`). `chunk`, `spill`, `dtype`, `ranks` and `on_progress`
    are as in `runtime.reader.Reader`. All ranks need the same documents. In one group of ranks, which share each
    document, all get all rows. Several groups divide the documents between them; then rank 0 gets all rows and the
    others none.

    Raises ConfigError for options that the model does not support. The reader raises DataError if no document has rows,
    ConfigError for a document with more tokens than the model reads, MemoryLimitError for hidden states that do not
    fit, NotFiniteError for a vector with NaN or an infinity.
    """
    ranks = ranks or Ranks()
    reader = share_reader(model, chunk=chunk, dtype=dtype, spill=spill, ranks=ranks, on_progress=on_progress)
    encoder = _Encoder(reader, options, _schema(options, model, model_digest(model), kept_fields))
    parts = reader.portions(encoder.checked(documents, stored, on_skip, on_empty))
    dealt = deal(parts, encoder.batches, ranks, BATCHES, encoder.tell_progress)
    return pa.RecordBatchReader.from_batches(encoder.schema, (batch for _, found in dealt for batch in found))


def encode_to_folder(
    model: Net,
    documents: Iterable[Document],
    output: str | Path,
    options: EncodeOptions,
    *,
    settings: Mapping[str, Any],
    shard_rows: int = SHARD_ROWS,
    shard_format: ShardFormat = "arrow",
    resume: bool = False,
    chunk: int | None = None,
    stored: Iterable[Document] = (),
    kept_fields: Sequence[pa.Field] = (),
    spill: str | Path | None = None,
    dtype: str = "auto",
    ranks: Ranks | None = None,
    on_skip: OnSkip | None = None,
    on_empty: Callable[[Document], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> ShardFolder | None:
    """Write the rows of `encode` to `vectors-00000.arrow`, ... (or .parquet) in the folder `output`; return it closed.

    Of several `ranks`, only the first one accesses the folder. The others get None.

    A shard ends with the document that brings it to `shard_rows` rows. `resume` continues a folder that an earlier run
    left unfinished, without encoding the documents of finished shards again. On the same machine with as many threads,
    the result is byte for byte as if the run had never stopped. `settings` (JSON values) identifies the documents;
    settings, model and options must be the same as in the earlier run. Only a `chunk` of None takes the earlier run's
    value, because on a GPU the default depends on the free memory. A resumed run also passes to `on_skip` the documents
    that the earlier run skipped; the manifest has their number.

    Raises ConfigError for invalid options and for a folder that is in use, DataError for no document or a damaged
    shard, LongNetError when a write fails. After an error the finished shards stay.
    """
    if shard_rows < 1:
        raise ConfigError(f"shard_rows must be 1 or more, not {shard_rows}")
    ranks = ranks or Ranks()
    earlier = run_to_resume(output, resume=resume) if ranks.first else None
    device = next(model.parameters()).device
    before = earlier.settings.get("chunk") if earlier else None
    chunk = chunk_of(chunk, default_chunk(model.config, device), before, ranks)
    dtype = resolve_dtype(dtype, device)
    digest = model_digest(model)
    decisive = {
        **settings,
        "pattern": options.pattern,  # before the model, whose digest then differs too: errors name the first
        "model": digest[:16],
        "kernel": check_kernel(device, dtype, model.config.head_dim),
        **asdict(options),
        **kept_settings(kept_fields),
        "chunk": chunk,
        "dtype": dtype,
        "shard_rows": shard_rows,
        **({"ranks": ranks.sp} if ranks.sp > 1 else {}),  # more ranks sum in another order
    }
    schema = _schema(options, model, digest, kept_fields)
    with ExitStack() as stack:
        folder = None
        if ranks.first:
            shards = ShardFolder(output, schema, settings=decisive, name="vectors", format=shard_format, resume=resume)
            folder = stack.enter_context(shards)
        if ranks.any(folder is not None and folder.finished):
            return folder
        done = int(ranks.largest(folder.documents if folder else 0))

        def skip(document: Document, error: LongNetError) -> None:
            if folder:
                folder.skip()
            if on_skip:
                on_skip(document, error)

        reader = share_reader(model, chunk=chunk, dtype=dtype, spill=spill, ranks=ranks, on_progress=on_progress)
        encoder = _Encoder(reader, options, schema)

        def pass_over(document: Document) -> None:
            if folder:
                folder.skip("empty")
            if on_empty:
                on_empty(document)

        taken = encoder.checked(documents, stored, skip if on_skip else None, pass_over)
        parts = reader.portions(islice(taken, done, None), shard=shard_rows, size_of=options.rows_of)
        for part, batches in deal(parts, encoder.batches, ranks, BATCHES, encoder.tell_progress):
            for batch in batches:
                begun = int(np.count_nonzero(batch["span"].to_numpy() == 0))  # a portion holds whole documents
                if folder:
                    folder.write(batch, documents=begun, tokens=int(batch["n_tokens"].to_numpy().sum()))
            if folder and part.ends_shard:
                folder.end_shard()
    return folder


@dataclass(frozen=True)
class _PooledWindow(Window):
    """A whole document, and the pooling that takes its hidden states."""

    pooling: Pooling


class _Encoder:
    """An encoder of documents to rows of vectors, in the same order."""

    def __init__(self, reader: Reader, options: EncodeOptions, schema: pa.Schema) -> None:
        options.check(reader.model)
        self.reader, self.options, self.schema = reader, options, schema

    def checked(
        self,
        documents: Iterable[Document],
        stored: Iterable[Document],
        on_skip: OnSkip | None,
        on_empty: Callable[[Document], None] | None,
    ) -> Iterator[InputSequence[Document]]:
        """Return the `documents` that are not empty as the model reads them, each checked before it is yielded.

        Without `on_skip`, check all `stored` documents now. Raises DataError at the end if no document is left.
        """
        make = partial(self.options.sequence, self.reader.model)
        for document in stored if on_skip is None else ():
            make(document)

        def with_tokens() -> Iterator[InputSequence[Document]]:
            found = False
            for sequence in checked(documents, make, on_skip):
                if len(sequence.document):
                    found = True
                    yield sequence
                elif on_empty:
                    on_empty(sequence.document)
            if not found:
                raise NothingToEncodeError("there is nothing to encode: every document is empty or left out")

        return with_tokens()

    def batches(self, sequences: Iterable[InputSequence[Document]]) -> pa.RecordBatchReader:
        """Return a reader of the rows of checked documents, in order."""
        schema, normalize = self.schema, self.options.normalize
        head = torch.inference_mode()(self.reader.model.head)
        found = (_record_batch(schema, rows, head, normalize) for rows in self._rows(sequences) if rows)
        return pa.RecordBatchReader.from_batches(schema, found)

    def tell_progress(self, portion: Portion[InputSequence[Document]]) -> None:
        """Report the tokens that another group of ranks has read."""
        self.reader.on_progress(portion.length)

    def _rows(self, sequences: Iterable[InputSequence[Document]]) -> Iterator[list[Row]]:
        windows = map(self._window, sequences)
        for pieces in self._layer_by_layer(windows) if self.options.all_layers else self.reader.read(windows):
            with torch.inference_mode():
                rows = [row for piece in pieces for row in piece.window.pooling.add(self._hidden(piece))]
                yield self._of_all_ranks(rows)

    def _layer_by_layer(self, windows: Iterable[_PooledWindow]) -> Iterator[list[Piece[_PooledWindow]]]:
        """Read one document after the other, and give each pooling the states of all layers."""
        with LayerStates(cast(LongNet, self.reader.model)) as states:
            for window in windows:
                first, stop = {
                    "cls": (0, 1),
                    "mean": (window.wanted, window.stop),
                    "first": (window.wanted, window.wanted + 1),
                    "last": (window.stop - 1, window.stop),
                }[self.options.pool]
                states.begin(first, stop)
                window.pooling.layers = states.mean
                yield from self.reader.read([window])

    def _window(self, sequence: InputSequence[Document]) -> _PooledWindow:
        whole = self.options.pool == "cls"
        pooling = (ClsPooling if whole else Pooling)(sequence.document, self.options.pool, self.options.span)
        return _PooledWindow(sequence, 0, len(sequence), 0 if whole else sequence.first, pooling)

    def _hidden(self, piece: Piece[_PooledWindow]) -> Tensor:
        """Return the hidden states of a piece, or zeros that take no memory for a piece of another rank."""
        if piece.hidden is not None:
            return piece.hidden
        return torch.zeros(1, 1, device=self.reader.device).expand(len(piece), self.reader.model.config.dim)

    def _of_all_ranks(self, rows: list[Row]) -> list[Row]:
        """Return the same rows with vectors summed over all ranks, which is exact because pooling is linear."""
        if self.reader.ranks.world == 1 or not rows:
            return rows
        vectors = torch.stack([row.vector for row in rows])
        self.reader.ranks.sum(vectors, *(row.layers for row in rows if row.layers is not None))
        return [replace(row, vector=vector) for row, vector in zip(rows, vectors, strict=True)]


def _schema(options: EncodeOptions, model: Net, digest: str, kept_fields: Sequence[pa.Field]) -> pa.Schema:
    """Return the schema of the rows of `model`, with the column `layers` after `embedding` if `all_layers` is set."""
    schema = options.schema(model.config.dim, digest, kept_fields)
    if options.all_layers:
        kind = pa.list_(schema.field("embedding").type, model.config.num_layers + 1)
        schema = schema.insert(schema.get_field_index("embedding") + 1, pa.field("layers", kind))
    return schema


def _record_batch(
    schema: pa.Schema, rows: Sequence[Row], head: Callable[[Tensor], Tensor], normalize: bool
) -> pa.RecordBatch:
    found = [torch.stack([row.vector for row in rows])]  # (rows, dim)
    if rows[0].layers is not None:
        found.append(torch.stack([cast(Tensor, row.layers) for row in rows]))  # (rows, num_layers + 1, dim)
    arrays = [_array(schema.field("embedding").type, rows, head(vectors), normalize) for vectors in found]
    if rows[0].layers is not None:
        arrays[1] = pa.FixedSizeListArray.from_arrays(arrays[1], schema.field("layers").type.list_size)
    return pa.record_batch(
        [
            pa.array([row.document.doc_id for row in rows], pa.string()),
            pa.array([row.span for row in rows], pa.int32()),
            pa.array([row.start for row in rows], pa.int64()),
            pa.array([row.end for row in rows], pa.int64()),
            pa.array([row.end - row.start for row in rows], pa.int64()),
            *arrays,
            *(
                kept_column((kept_value(row.document, field) for row in rows), field)
                for field in list(schema)[5 + len(arrays) :]
            ),
        ],
        schema=schema,
    )


def _array(kind: pa.DataType, rows: Sequence[Row], vectors: Tensor, normalize: bool) -> pa.Array:
    """Return vectors (rows, dim), or (rows, n, dim), as one flat array of vectors. Raises NotFiniteError."""
    if normalize:
        vectors = F.normalize(vectors, dim=-1)
    with np.errstate(over="ignore"):  # reported below
        numbers = vectors.cpu().numpy().astype(numpy_dtype(kind.value_type))
    finite = np.isfinite(numbers).reshape(len(rows), -1).all(axis=1)
    if not finite.all():
        row = rows[int(np.argmin(finite))]
        raise NotFiniteError(
            f"{row.document.where}: document {row.document.doc_id!r}: the vector of tokens {row.start} to "
            f"{row.end - 1} is not finite: take --dtype bf16 or fp32, and --embedding-dtype float32"
        )
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), kind.list_size)
