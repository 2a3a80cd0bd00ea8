"""The `encode` job: one vector a document, pooled from the hidden states after the final norm, as Arrow batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from longnet_cli.data.sources import Document
from longnet_cli.errors import ConfigError, DataError
from longnet_cli.model.longnet import LongNet
from longnet_cli.runtime.device import precision
from longnet_cli.scoring import BATCH_TOKENS, batches_by_length

Pool = Literal["mean", "last", "first"]
EmbeddingDtype = Literal["float32", "float16"]


def encode(
    model: LongNet,
    documents: Iterable[Document],
    *,
    bos: int | None,
    pool: Pool = "mean",
    normalize: bool = True,
    dtype: str = "auto",
    embedding_dtype: EmbeddingDtype = "float32",
    device: torch.device | str | None = None,
    model_name: str | None = None,
    tokenizer_sha256: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> pa.RecordBatchReader:
    """Read `documents` lazily and give a row each, in order: a reader of record batches (see `embedding_schema`).

    `pool` takes the mean of the hidden states of a document's tokens, or the one of its last or first token;
    `normalize` then scales the vector to length 1. `bos` (the tokenizer's end-of-text id) is put before each document
    of a causal model, as in scoring, and not pooled. `device` moves the model there; None leaves it where it is.
    `model_name` and `tokenizer_sha256` go into the schema's metadata. `on_progress` gets the number of tokens that each
    forward has encoded. Raises ConfigError for a model without a vocabulary; the reader, DataError for an empty
    document.
    """
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
    before = bos if model.config.causal else None

    def batches() -> Iterator[pa.RecordBatch]:
        for group in _groups(documents):
            vectors = _vectors(model, group, before, pool, dtype, on_progress)
            if normalize:
                vectors = F.normalize(vectors, dim=-1)
            yield _record_batch(schema, group, vectors.cpu().numpy())

    return pa.RecordBatchReader.from_batches(schema, batches())


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


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Collect documents until they hold BATCH_TOKENS."""
    group: list[Document] = []
    size = 0
    for document in documents:
        if not len(document.tokens):
            raise DataError(f"{document.where}: document {document.doc_id!r} is empty: there is nothing to encode")
        group.append(document)
        size += len(document.tokens)
        if size >= BATCH_TOKENS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _vectors(
    model: LongNet,
    group: Sequence[Document],
    bos: int | None,
    pool: Pool,
    dtype: str,
    on_progress: Callable[[int], None] | None,
) -> Tensor:
    """The pooled (documents, dim) float32 vectors of a group, in its order."""
    vectors: list[Tensor] = [torch.empty(0)] * len(group)
    for batch in batches_by_length([len(document.tokens) + (bos is not None) for document in group]):
        tokens = [group[index].tokens for index in batch]
        for index, vector in zip(batch, _pooled(model, tokens, bos, pool, dtype), strict=True):
            vectors[index] = vector
        if on_progress:
            on_progress(sum(map(len, tokens)))
    return torch.stack(vectors)


@torch.inference_mode()
def _pooled(model: LongNet, documents: Sequence[np.ndarray], bos: int | None, pool: Pool, dtype: str) -> list[Tensor]:
    """One forward over right-padded documents of (tokens,) ids; a (dim,) float32 vector each."""
    device = next(model.parameters()).device
    first = 0 if bos is None else 1  # where a document begins in its row
    lengths = [first + len(tokens) for tokens in documents]
    padded = torch.zeros(len(documents), max(lengths), dtype=torch.int64)
    for row, tokens, length in zip(padded, documents, lengths, strict=True):
        if bos is not None:
            row[0] = bos
        row[first:length] = torch.from_numpy(tokens.astype(np.int64))
    with precision(dtype, device):
        hidden = model(padded.to(device), lengths=lengths)
    if pool == "mean":
        return [h[first:n].mean(0, dtype=torch.float32) for h, n in zip(hidden, lengths, strict=True)]
    return [h[n - 1 if pool == "last" else first].float() for h, n in zip(hidden, lengths, strict=True)]


def _record_batch(schema: pa.Schema, documents: Sequence[Document], vectors: np.ndarray) -> pa.RecordBatch:
    """Rows of whole documents, from their (documents, dim) vectors."""
    kind = schema.field("embedding").type
    values = pa.array(vectors.astype(kind.value_type.to_pandas_dtype()).reshape(-1))
    counts = pa.array([len(document.tokens) for document in documents], pa.int64())
    zeros = np.zeros(len(documents), np.int64)
    return pa.record_batch(
        [
            pa.array([document.doc_id for document in documents], pa.string()),
            pa.array(zeros.astype(np.int32)),
            pa.array(zeros),
            counts,
            counts,
            pa.FixedSizeListArray.from_arrays(values, kind.list_size),
        ],
        schema=schema,
    )
