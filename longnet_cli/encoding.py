"""The `encode` job: vectors of documents, or of their spans, pooled from the hidden states after the final norm.

documents --+-- short --batches_by_length--> padded forwards --+--> hidden --_Pooling--> rows --> Arrow batches
            +-- longer than a chunk --CausalStream, or layer --+
                by layer where the net is bidirectional

Into a folder, documents are cut into shards first, and each shard is encoded as if it were all there is: so a run that
is resumed pads and adds up as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from longnet_cli.data.shards import ShardFolder, run_to_resume
from longnet_cli.data.sources import Document
from longnet_cli.errors import ConfigError, DataError
from longnet_cli.model import LongNet
from longnet_cli.model.net import Net
from longnet_cli.model.weights import fingerprint
from longnet_cli.runtime.chunks import default_chunk, open_stream
from longnet_cli.runtime.device import check_kernel, precision, resolve_dtype
from longnet_cli.runtime.launch import Ranks
from longnet_cli.runtime.layerwise import hidden_in_chunks
from longnet_cli.runtime.ranks import Exchange, even_edges
from longnet_cli.scoring import NotFiniteError, batches_by_length, check_length, read_sequence

Pool = Literal["mean", "last", "first"]
EmbeddingDtype = Literal["float32", "float16"]

SHARD_ROWS = 1 << 14


def encode(
    model: Net,
    documents: Iterable[Document],
    *,
    bos: int | None,
    pool: Pool = "mean",
    normalize: bool = True,
    span: int | None = None,
    chunk: int | None = None,
    spill: str | Path | None = None,
    dtype: str = "auto",
    embedding_dtype: EmbeddingDtype = "float32",
    device: torch.device | str | None = None,
    ranks: Ranks | None = None,
    model_name: str | None = None,
    tokenizer_sha256: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> pa.RecordBatchReader:
    """Read `documents` lazily and give a row each, in order: a reader of record batches (see `embedding_schema`).

    `pool` takes the mean of the hidden states of a document's tokens, or the one of its last or first token;
    `normalize` then scales the vector to length 1. With `span` there is a row for every `span` tokens of a document.
    `bos` (the tokenizer's end-of-text id) is put before each document of a causal model, as in scoring, and not pooled.

    `chunk` is the most tokens of one forward, by default what `default_chunk` gives. Short documents share a forward;
    a longer one goes chunk by chunk, with the same result. A causal net needs no more memory for it; a bidirectional
    one keeps its hidden states in memory or, with `spill`, in a file in that folder. A net that does not stream reads
    it in one forward.

    Several `ranks`, all given the same documents, share every long one, `chunk` tokens each, and deal out the forwards
    of short ones; every rank gets all rows.

    `device` moves the model there; None leaves it where it is. `model_name` and `tokenizer_sha256` go into the schema's
    metadata. `on_progress` gets the number of tokens that each forward has encoded. Raises ConfigError for a model
    without a vocabulary; the reader, DataError for an empty document, ConfigError for one with more tokens than the
    model has positions, MemoryLimitError for hidden states that do not fit, NotFiniteError for a vector with NaN or an
    infinity.
    """
    for name, value in (("span", span), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be 1 or more, not {value}")
    if not model.config.vocab_size:
        raise ConfigError("this model has no token embedding (vocab_size 0): it reads embeddings, not tokens")
    if device is not None:
        model.to(device)
    schema = embedding_schema(
        model.config.dim,
        pool=pool,
        normalize=normalize,
        embedding_dtype=embedding_dtype,
        model_name=model_name,
        tokenizer_sha256=tokenizer_sha256,
    )
    ranks = ranks or Ranks()
    # ranks may have other amounts of free memory
    chunk = chunk or int(ranks.smallest(default_chunk(model.config, next(model.parameters()).device)))
    encoder = _Encoder(model, bos, pool, span, chunk, spill, dtype, ranks, on_progress)
    batches = (_record_batch(schema, rows, normalize) for rows in encoder.run(documents) if rows)
    return pa.RecordBatchReader.from_batches(schema, batches)


def encode_to_folder(
    model: Net,
    documents: Iterable[Document],
    output: str | Path,
    *,
    settings: Mapping[str, Any],
    bos: int | None,
    pool: Pool = "mean",
    normalize: bool = True,
    span: int | None = None,
    chunk: int | None = None,
    spill: str | Path | None = None,
    dtype: str = "auto",
    embedding_dtype: EmbeddingDtype = "float32",
    model_name: str | None = None,
    tokenizer_sha256: str | None = None,
    shard_rows: int = SHARD_ROWS,
    resume: bool = False,
    ranks: Ranks | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> ShardFolder | None:
    """Write what `encode` gives to `vectors-00000.arrow`, ... in the folder `output`, which is returned closed.

    Of several `ranks` the first one writes; the others, which see no folder, get None.

    A shard ends with the document that brings it to `shard_rows` rows. `resume` goes on with a folder that an earlier
    run left unfinished, without encoding again what is in finished shards: byte for byte as if it had never stopped,
    on the same machine with as many threads. `settings` (JSON values) says what the documents are; with the model and
    the options it must be the earlier run's. Only `chunk`, where it is None, is taken from there: on a GPU the default
    depends on the memory that is free.

    Raises ConfigError for options and for a folder that is in use, DataError for an empty document or a damaged shard,
    LongNetError when a write fails. After an error the finished shards stay.
    """
    if shard_rows < 1:
        raise ConfigError(f"shard_rows must be 1 or more, not {shard_rows}")
    ranks = ranks or Ranks()
    earlier = run_to_resume(output, resume=resume) if ranks.first else None
    device = next(model.parameters()).device
    if chunk is None:
        found = earlier.settings.get("chunk") if earlier else None
        chunk = int(ranks.smallest(found or default_chunk(model.config, device)))
        chunk = int(ranks.largest(found or 0)) or chunk  # the earlier run's, which the first one knows
    schema_options: dict[str, Any] = {
        "pool": pool,
        "normalize": normalize,
        "embedding_dtype": embedding_dtype,
        "model_name": model_name,
        "tokenizer_sha256": tokenizer_sha256,
    }
    options = {**schema_options, "bos": bos, "span": span, "chunk": chunk, "dtype": resolve_dtype(dtype, device)}
    decisive = {
        **settings,
        "model": fingerprint(model),
        "kernel": check_kernel(device, dtype, model.config.head_dim),
        **options,
        "shard_rows": shard_rows,
        **({"ranks": ranks.world} if ranks.world > 1 else {}),  # they add up in another order
    }
    schema = embedding_schema(model.config.dim, **schema_options)
    with ExitStack() as stack:
        folder = None
        if ranks.first:
            shards = ShardFolder(output, schema, settings=decisive, name="vectors", resume=resume)
            folder = stack.enter_context(shards)
        if ranks.any(folder is not None and folder.finished):
            return folder
        done = int(ranks.largest(folder.documents if folder else 0))
        for shard in _shards(islice(documents, done, None), shard_rows, span):
            for batch in encode(model, shard, spill=spill, ranks=ranks, on_progress=on_progress, **options):
                begun = int(np.count_nonzero(batch["span"].to_numpy() == 0))  # and ended, in a whole shard
                if folder:
                    folder.write(batch, documents=begun, tokens=int(batch["n_tokens"].to_numpy().sum()))
            if folder:
                folder.end_shard()
    return folder


def _shards(documents: Iterable[Document], rows: int, span: int | None) -> Iterator[Iterator[Document]]:
    """Cut documents into shards, each to be used up before the next."""
    remaining = iter(documents)

    def shard(first: Document) -> Iterator[Document]:
        count = 0
        for document in chain([first], remaining):
            yield document
            count += -(-len(document) // span) if span else 1
            if count >= rows:
                return

    for first in remaining:
        yield shard(first)


def embedding_schema(
    dim: int,
    *,
    pool: Pool = "mean",
    normalize: bool = True,
    embedding_dtype: EmbeddingDtype = "float32",
    model_name: str | None = None,
    tokenizer_sha256: str | None = None,
) -> pa.Schema:
    """The schema of embeddings of size `dim`. A vector stands for the tokens [start, end) of document `doc_id`.

    The metadata keys are `longnet.*`; what is not known is left out.
    """
    known = {
        "longnet.model": model_name,
        "longnet.pooling": pool,
        "longnet.normalized": "true" if normalize else "false",
        "longnet.tokenizer_sha256": tokenizer_sha256,
    }
    fields = [
        pa.field("doc_id", pa.string()),
        pa.field("span", pa.int32()),
        pa.field("start", pa.int64()),
        pa.field("end", pa.int64()),
        pa.field("n_tokens", pa.int64()),
        pa.field("embedding", pa.list_(pa.float32() if embedding_dtype == "float32" else pa.float16(), dim)),
    ]
    return pa.schema(fields, metadata={key: value for key, value in known.items() if value is not None})


@dataclass(frozen=True)
class _Row:
    """The vector (dim,) of the tokens [start, end) of a document, its `span`-th."""

    document: Document
    span: int
    start: int
    end: int
    vector: Tensor


class _Pooling:
    """One document's hidden states in, in order and in pieces of any size; the rows of finished spans out."""

    def __init__(self, document: Document, pool: Pool, span: int | None) -> None:
        self.document, self.pool = document, pool
        self.length = span or len(document)
        self.position = 0
        self.state: Tensor | None = None  # of the span that is open: the sum so far (float64), or its first or last one

    def add(self, hidden: Tensor) -> Iterator[_Row]:
        """Take the next (n, dim); spans end every `span` tokens and with the document."""
        while len(hidden):
            index = self.position // self.length
            start, end = index * self.length, min((index + 1) * self.length, len(self.document))
            part, hidden = hidden[: end - self.position], hidden[end - self.position :]
            self.position += len(part)
            if self.pool == "mean":
                new = part.sum(0, dtype=torch.float64)
                self.state = new if self.state is None else self.state + new
            elif self.pool == "last" or self.state is None:
                self.state = part[-1 if self.pool == "last" else 0]
            if self.position == end:
                vector = self.state / (end - start) if self.pool == "mean" else self.state
                yield _Row(self.document, index, start, end, vector.float())
                self.state = None


class _Encoder:
    """Documents in, rows of vectors out in the same order; short documents wait until a forward is full."""

    def __init__(
        self,
        model: Net,
        bos: int | None,
        pool: Pool,
        span: int | None,
        chunk: int,
        spill: str | Path | None,
        dtype: str,
        ranks: Ranks,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self.ranks = ranks
        self.model, self.pool, self.span, self.chunk = model, pool, span, chunk
        self.spill, self.dtype, self.on_progress = spill, dtype, on_progress
        self.bos = bos if model.config.causal else None
        self.first = 0 if self.bos is None else 1  # where a document begins in what the model reads
        self.device = next(model.parameters()).device

    def run(self, documents: Iterable[Document]) -> Iterator[list[_Row]]:
        waiting: list[Document] = []
        tokens = 0  # that wait
        for document in documents:
            if not len(document):
                raise DataError(f"{document.where}: document {document.doc_id!r} is empty: there is nothing to encode")
            total = len(document) + self.first
            check_length(document, total, self.model, "encode it in shorter documents")
            if total > self.chunk and self.model.config.streams:
                yield self._forward(waiting)
                waiting, tokens = [], 0
                yield from self._stream(document)
                continue
            waiting.append(document)
            tokens += len(document)
            if tokens >= self.chunk:
                yield self._forward(waiting)
                waiting, tokens = [], 0
        yield self._forward(waiting)

    def _forward(self, documents: Sequence[Document]) -> list[_Row]:
        """The rows of short documents, from padded forwards of similar lengths."""
        rows: list[list[_Row]] = [[] for _ in documents]
        lengths = [len(document) + self.first for document in documents]
        for turn, batch in enumerate(batches_by_length(lengths, self.chunk)):
            if turn % self.ranks.world == self.ranks.rank:
                padded = torch.zeros(len(batch), max(lengths[i] for i in batch), dtype=torch.int64)
                for row, i in zip(padded, batch, strict=True):
                    row[: lengths[i]] = torch.from_numpy(read_sequence(documents[i], self.bos, 0, lengths[i]))
                with torch.inference_mode(), precision(self.dtype, self.device):
                    found = self.model(padded.to(self.device), lengths=[lengths[i] for i in batch])
            else:
                found = self._nothing(max(lengths[i] for i in batch)).expand(len(batch), -1, -1)
            with torch.inference_mode():
                for i, hidden in zip(batch, found, strict=True):
                    pooling = _Pooling(documents[i], self.pool, self.span)
                    rows[i] = list(pooling.add(hidden[self.first : lengths[i]]))
            if self.on_progress:
                self.on_progress(sum(len(documents[i]) for i in batch))
        return self._of_all_ranks([row for found in rows for row in found])

    def _stream(self, document: Document) -> Iterator[list[_Row]]:
        """The rows of a document that is longer than a chunk, as its spans end."""
        pooling = _Pooling(document, self.pool, self.span)
        skip = self.first
        for pieces in self._hidden(document):
            rows = []
            with torch.inference_mode():
                for hidden in pieces:
                    rows += list(pooling.add(hidden[0, skip:]))
                    skip = max(0, skip - hidden.shape[1])
            yield self._of_all_ranks(rows)

    def _hidden(self, document: Document) -> Iterator[list[Tensor]]:
        """Its hidden states, chunk by chunk, as the ranks' shards (1, n, dim): zeros for those of other ranks."""
        total, model, ranks = len(document) + self.first, self.model, self.ranks

        def read(start: int, stop: int) -> Tensor:
            return torch.from_numpy(read_sequence(document, self.bos, start, stop))[None].to(self.device)

        chunk = self.chunk * ranks.world
        if not model.config.causal and total > chunk:
            assert isinstance(model, LongNet)  # no other net goes layer by layer
            options: dict[str, Any] = {"spill": self.spill, "dtype": self.dtype, "ranks": ranks}
            done = _Share(self.on_progress, model.config.num_layers)
            mine = hidden_in_chunks(model, read, total, self.chunk, on_chunk=done, **options)
            for turn in range(0, total, chunk):
                starts = range(turn, min(turn + chunk, total), self.chunk)
                yield [
                    next(mine) if index == ranks.rank else self._nothing(min(self.chunk, total - start))
                    for index, start in enumerate(starts)
                ]
            return
        stream = open_stream(model, ranks.group) if model.config.causal else None
        for start in range(0, total, chunk):
            stop = min(start + chunk, total)
            edges = even_edges(start, stop - start, ranks.world)
            ids = read(edges[ranks.rank], edges[ranks.rank + 1])
            with torch.inference_mode(), precision(self.dtype, self.device):
                if stream:
                    hidden = stream(ids, edges=edges if ranks.group else None)
                else:
                    exchange = Exchange(model.config, edges, group=ranks.group)
                    hidden = model(ids, start=exchange.start, far=exchange, total=total)
            if self.on_progress:
                self.on_progress(stop - max(start, self.first))
            yield [
                hidden if rank == ranks.rank else self._nothing(edges[rank + 1] - edges[rank])
                for rank in range(ranks.world)
            ]

    def _nothing(self, tokens: int) -> Tensor:
        """(1, tokens, dim) zeros that take no memory: what a rank adds to spans of other ranks' tokens."""
        return torch.zeros(1, 1, 1, device=self.device).expand(1, tokens, self.model.config.dim)

    def _of_all_ranks(self, rows: list[_Row]) -> list[_Row]:
        """The same rows with the sum of all ranks' vectors: pooling is linear."""
        if self.ranks.world == 1 or not rows:
            return rows
        vectors = torch.stack([row.vector for row in rows])
        self.ranks.sum(vectors)
        return [replace(row, vector=vector) for row, vector in zip(rows, vectors, strict=True)]


class _Share:
    """Tells `on_progress` of a token when all `layers` layers are done with it."""

    def __init__(self, on_progress: Callable[[int], None] | None, layers: int) -> None:
        self.on_progress, self.layers, self.done = on_progress, layers, 0

    def __call__(self, tokens: int) -> None:
        before, self.done = self.done // self.layers, self.done + tokens
        if self.on_progress and self.done // self.layers > before:
            self.on_progress(self.done // self.layers - before)


def _record_batch(schema: pa.Schema, rows: Sequence[_Row], normalize: bool) -> pa.RecordBatch:
    vectors = torch.stack([row.vector for row in rows])  # (rows, dim)
    if normalize:
        vectors = F.normalize(vectors, dim=-1)
    kind = schema.field("embedding").type
    with np.errstate(over="ignore"):  # told of below
        numbers = vectors.cpu().numpy().astype(kind.value_type.to_pandas_dtype())
    finite = np.isfinite(numbers).all(axis=1)
    if not finite.all():
        row = rows[int(np.argmin(finite))]
        raise NotFiniteError(
            f"{row.document.where}: document {row.document.doc_id!r}: the vector of tokens {row.start} to "
            f"{row.end - 1} is not finite: take --dtype bf16 or fp32, and --embedding-dtype float32"
        )
    values = pa.array(numbers.reshape(-1))
    return pa.record_batch(
        [
            pa.array([row.document.doc_id for row in rows], pa.string()),
            pa.array([row.span for row in rows], pa.int32()),
            pa.array([row.start for row in rows], pa.int64()),
            pa.array([row.end for row in rows], pa.int64()),
            pa.array([row.end - row.start for row in rows], pa.int64()),
            pa.FixedSizeListArray.from_arrays(values, kind.list_size),
        ],
        schema=schema,
    )
