"""The `encode` job: vectors of documents, or of their spans, pooled from the hidden states after the final norm.

    documents --Reader--> hidden states --Pooling--> rows --> Arrow batches, which `rows` writes

Hidden states are pooled piece by piece. Spans of tokens have their places in the text, in characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from longnet_cli.basics.errors import ConfigError, NotFiniteError
from longnet_cli.basics.notation import format_pattern
from longnet_cli.data.documents import BLOCK, Document
from longnet_cli.data.kept import kept_columns, row_schema
from longnet_cli.data.left_out import OnSkip
from longnet_cli.data.tables import numpy_dtype
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.jobs.row_jobs import RowJob
from longnet_cli.models.folder import Loaded, ModelFolder
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Bos, InputSequence, Net, bos_ids
from longnet_cli.running.layerwise import LayerStates
from longnet_cli.running.ranks.ranks import Ranks
from longnet_cli.running.reader import Piece, Reader, Window, share_reader

Pool = Literal["mean", "last", "first", "cls"]


@dataclass(frozen=True)
class Row:
    """The vector (dim,) of the tokens [start, end), span number `span` of a document."""

    document: Document
    span: int
    start: int
    end: int
    vector: Tensor
    layers: Tensor | None = None  # (num_layers + 1, dim), with all_layers


class Pooling:
    """The pooling of one document: takes hidden states in order, in pieces of any size; yields the finished rows.

    The first span also has the hidden states of `before` tokens that stand before the document.
    """

    def __init__(self, document: Document, pool: Pool, span: int | None, before: int = 0) -> None:
        self.document, self.pool = document, pool
        self.length = span or len(document)
        self.position, self.first = -before, -before  # the next token; the first one of the open span
        self.layers: Callable[[], Tensor | None] = lambda: None
        self.state: Tensor | None = None  # of the open span: the sum so far (float64), or the first or last state

    def add(self, hidden: Tensor) -> Iterator[Row]:
        """Take the next hidden states (n, dim). A span ends every `span` tokens and with the document."""
        while len(hidden):
            index = max(0, self.position) // self.length
            start, end = index * self.length, min((index + 1) * self.length, len(self.document))
            part, hidden = hidden[: end - self.position], hidden[end - self.position :]
            self.position += len(part)
            if self.pool == "mean":
                new = part.sum(0, dtype=torch.float64)
                self.state = new if self.state is None else self.state + new
            elif self.pool == "last" or self.state is None:
                self.state = part[-1 if self.pool == "last" else 0]
            if self.position == end:
                vector = self.state / (end - self.first) if self.pool == "mean" else self.state
                yield Row(self.document, index, start, end, vector.float(), self.layers())
                self.state, self.first = None, end


class ClsPooling(Pooling):
    """The pooling of one document by CLS: takes hidden states from CLS on; yields the row of CLS."""

    def add(self, hidden: Tensor) -> Iterator[Row]:
        if self.state is None:
            self.state = hidden[0]
        self.position += len(hidden)
        if self.position == len(self.document) + 1:
            yield Row(self.document, 0, 0, len(self.document), self.state.float(), self.layers())


PLACE_FIELDS = (pa.field("char_start", pa.int64()), pa.field("char_end", pa.int64()))


class TextPlaces:
    """The places of spans in the text of one document; spans come in order.

    They are known if the document was made from text by a byte-level tokenizer whose tokens are the text's bytes.
    """

    def __init__(self, document: Document) -> None:
        self.document, self.known = document, False
        self._position = self._begun = 0
        words = document.tokenizer
        if words is not None and words.token_bytes is not None:
            sizes = (words.n_bytes(document.read(i, i + BLOCK)) or 0 for i in range(0, len(document), BLOCK))
            self.known = sum(sizes) == document.n_bytes  # otherwise the tokenizer changed the text
            self._begin, self._inside = _characters(words)

    def of(self, start: int, end: int) -> tuple[int | None, int | None]:
        """Return the first character of the tokens [start, end), and the one after their last; None if not known.

        A character of which the span has only some bytes counts as its own.
        """
        if not self.known:
            return None, None
        self._count(start)
        first = self._begun - int(self._inside[self.document.read(start, start + 1)].sum())
        self._count(end)
        return first, self._begun

    def _count(self, stop: int) -> None:
        """Count the characters that begin before token `stop`."""
        while self._position < stop:
            ids = self.document.read(self._position, min(stop, self._position + BLOCK))
            self._begun += int(self._begin[ids].sum())
            self._position += len(ids)


@cache
def _characters(words: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each id, how many characters begin in its bytes, and whether it begins inside of one."""
    begin, inside = np.zeros(words.vocab_size, np.int64), np.zeros(words.vocab_size, bool)
    for index, data in words.bytes_of_tokens():
        follows = [byte & 0xC0 == 0x80 for byte in data]
        begin[index], inside[index] = follows.count(False), follows[:1] == [True]
    return begin, inside


EmbeddingDtype = Literal["float32", "float16"]
NO_PREFIX = "none"


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
    The ids `prefix` are read after `bos`, and pooled with the document's first span. `dims` numbers of a vector are
    kept, before it is scaled.
    `model_name`, `tokenizer_sha256`, `pattern` (a text of `basics.notation`) and `query_prompt`, of a model that
    was trained by contrast, go into the schema's metadata.
    """

    bos: Bos = None
    pool: Pool = "mean"
    normalize: bool = True
    span: int | None = None
    embedding_dtype: EmbeddingDtype = "float32"
    all_layers: bool | None = None  # not False: folders started without it keep their settings
    tile_size: int | None = None
    prefix: list[int] | None = None
    dims: int | None = None
    query_prompt: str | None = None
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

    @classmethod
    def of_model(
        cls, folder: ModelFolder, loaded: Loaded, *, pool: Pool | None = None, prefix: str | None = None, **more: Any
    ) -> EncodeOptions:
        """Return options for the model of a folder, with its own pooling and document prompt unless others are given.

        `prefix` is a text, NO_PREFIX is an empty one. Raises ConfigError for a prefix if the model has no tokenizer.
        """
        stored, net, tokenizer = folder.embedder, loaded.net, loaded.tokenizer
        if prefix is None:
            prefix = stored.document if stored else ""
        elif prefix == NO_PREFIX:
            prefix = ""
        elif tokenizer is None:
            if net.row_size is not None:
                raise ConfigError(f"{folder.name} reads vectors, which have no tokens: leave out --prefix")
            raise ConfigError(f"{folder.name} has no tokenizer, which --prefix needs: give --tokenizer")
        if pool is None:
            whole = net.has_cls and more.get("span") is None
            pool = stored.pool if stored else "cls" if whole else "mean"
        return cls(
            bos=loaded.bos,
            pool=pool,
            prefix=tokenizer.encode(prefix).tolist() if prefix and tokenizer else None,
            query_prompt=stored.query if stored else None,
            model_name=loaded.origin,
            tokenizer_sha256=loaded.tokenizer_sha256,
            pattern=format_pattern(net.config.pattern),
            **more,
        )

    def check(self, net: Net) -> None:
        """Raise ConfigError for options that `net` does not support."""
        if self.pool == "cls" and not net.has_cls:
            raise ConfigError("this model has no CLS: take the mean (--pool mean), or the first or last vector")
        if self.prefix and not net.config.causal:
            raise ConfigError("a bidirectional model reads nothing before a document: leave out --prefix")
        if self.dims is not None and not 1 <= self.dims <= net.config.dim:
            raise ConfigError(f"--dims {self.dims}: a vector of this model has 1 to {net.config.dim} numbers")
        if self.tile_size and not net.has_grid:
            raise ConfigError("this model has no grid of tiles: leave out --tile-size")
        if self.all_layers and not net.layer_by_layer:
            raise ConfigError("--all-layers is for a LongNet: leave it out for a Hugging Face model")

    def sequence(self, net: Net, document: Document) -> InputSequence[Document]:
        """Return a document as `net` reads it. Raises as `Net.sequence`, and TooLongError for too many tokens."""
        before = (*bos_ids(self.bos), *(self.prefix or ()))
        return net.sequence(document, before, self.tile_size).check("encode it in shorter documents")

    def schema(self, net: Net, model_sha256: str, kept_fields: Sequence[pa.Field] = ()) -> pa.Schema:
        """Return the schema of embeddings from `net`, which has this digest, and of the columns `kept_fields`.

        A vector stands for the tokens [start, end) of document `doc_id`. The metadata keys are `longnet.*`; unknown
        values are left out.
        """
        known = {
            "longnet.model": self.model_name,
            "longnet.model_sha256": model_sha256,
            "longnet.pooling": self.pool,
            "longnet.query_prompt": self.query_prompt,
            "longnet.normalized": "true" if self.normalize else "false",
            "longnet.tokenizer_sha256": self.tokenizer_sha256,
            "longnet.pattern": self.pattern,
        }
        vector = pa.list_(
            pa.float32() if self.embedding_dtype == "float32" else pa.float16(), self.dims or net.config.dim
        )
        fields = [
            pa.field("doc_id", pa.string()),
            pa.field("span", pa.int32()),
            pa.field("start", pa.int64()),
            pa.field("end", pa.int64()),
            pa.field("n_tokens", pa.int64()),
            pa.field("embedding", vector),
            *([pa.field("layers", pa.list_(vector, net.config.num_layers + 1))] if self.all_layers else []),
        ]
        return row_schema(fields, kept_fields, known)


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
    are columns that documents carry to the output (`data.kept`). `chunk`, `spill`, `dtype`, `ranks` and
    `on_progress` are as in `running.reader.Reader`. All ranks need the same documents. In one group of ranks, which
    share each document, all get all rows. Several groups divide the documents between them; then rank 0 gets all rows
    and the others none.

    Raises ConfigError for options that the model does not support. The reader raises DataError if no document has rows,
    ConfigError for a document with more tokens than the model reads, MemoryLimitError for hidden states that do not
    fit, NotFiniteError for a vector with NaN or an infinity.
    """
    reader = share_reader(model, chunk=chunk, dtype=dtype, spill=spill, ranks=ranks, on_progress=on_progress)
    encoder = Encoder(reader, options, kept_fields)
    return encoder.rows(documents, stored=stored, ranks=ranks, on_skip=on_skip, on_empty=on_empty)


@dataclass(frozen=True)
class _PooledWindow(Window):
    """A whole document, and the pooling that takes its hidden states."""

    pooling: Pooling


class Encoder(RowJob):
    """The job that `row_jobs.write_rows` needs for the rows of `encode`."""

    options: EncodeOptions
    shard_name, shard_unit, shard_size = "vectors", "rows", 1 << 14
    skips_empty = True
    nothing = "there is nothing to encode: every document is empty or left out"

    def __init__(self, reader: Reader, options: EncodeOptions, kept_fields: Sequence[pa.Field] = ()) -> None:
        options.check(reader.model)
        super().__init__(reader, options, kept_fields)
        self.schema = options.schema(reader.model, self.digest, kept_fields)
        self.carried = [field for field in kept_fields if field not in PLACE_FIELDS]
        self.places: TextPlaces | None = None  # in the document of the last row

    def sequence(self, document: Document) -> InputSequence[Document]:
        return self.options.sequence(self.reader.model, document)

    def size(self, sequence: InputSequence[Document]) -> int:
        return -(-len(sequence.document) // self.options.span) if self.options.span else 1

    def batches(self, sequences: Iterable[InputSequence[Document]]) -> Iterator[pa.RecordBatch]:
        head = torch.inference_mode()(self.reader.model.head)
        for rows in filter(None, self._rows(sequences)):
            yield self._record_batch(rows, head)

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
        before = len(self.options.prefix or ())
        pooling = (ClsPooling if whole else Pooling)(sequence.document, self.options.pool, self.options.span, before)
        return _PooledWindow(sequence, 0, len(sequence), 0 if whole else sequence.first - before, pooling)

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

    def _record_batch(self, rows: Sequence[Row], head: Callable[[Tensor], Tensor]) -> pa.RecordBatch:
        schema, options = self.schema, self.options
        found = [torch.stack([row.vector for row in rows])]  # (rows, dim)
        if rows[0].layers is not None:
            found.append(torch.stack([cast(Tensor, row.layers) for row in rows]))  # (rows, num_layers + 1, dim)
        vectors = [head(each)[..., : options.dims] for each in found]
        arrays = [_array(schema.field("embedding").type, rows, each, options.normalize) for each in vectors]
        if rows[0].layers is not None:
            arrays[1] = pa.FixedSizeListArray.from_arrays(arrays[1], schema.field("layers").type.list_size)
        columns = [
            pa.array([row.document.doc_id for row in rows], pa.string()),
            pa.array([row.span for row in rows], pa.int32()),
            pa.array([row.start for row in rows], pa.int64()),
            pa.array([row.end for row in rows], pa.int64()),
            pa.array([row.end - row.start for row in rows], pa.int64()),
        ]
        kept = kept_columns([row.document for row in rows], self.carried)
        if len(self.carried) < len(self.kept_fields):
            places = zip(*map(self._place, rows), strict=True)
            kept = [pa.array(each, pa.int64()) for each in places] + kept
        return pa.record_batch([*columns, *arrays, *kept], schema=schema)

    def _place(self, row: Row) -> tuple[int | None, int | None]:
        """Return where a row's span is in the text of its document. The rows of a document come in order."""
        if self.places is None or self.places.document is not row.document:
            self.places = TextPlaces(row.document)
        return self.places.of(row.start, row.end)


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
