"""The file of token log-probabilities that `score --token-logprobs` writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from longnet_cli.data.documents import Document
from longnet_cli.data.outputs import ShardWriter
from longnet_cli.scoring import OnTokens

BATCH = 1 << 18  # tokens per record batch


def logprob_schema(metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """Return the schema of token log-probabilities, in nats: a row has the tokens of a document from `start` on.

    A long document has several rows, with `part` 0, 1, 2, ... and one doc_id. `metadata` is `weights.model_origin`.
    """
    fields = [
        pa.field("doc_id", pa.string()),
        pa.field("part", pa.int32()),
        pa.field("start", pa.int64()),
        pa.field("input_ids", pa.large_list(pa.int32()), nullable=False),
        pa.field("logprobs", pa.large_list(pa.float32()), nullable=False),
    ]
    return pa.schema(fields, metadata=dict(metadata or {}))


@contextmanager
def write_token_logprobs(path: str | Path, metadata: Mapping[str, str] | None = None) -> Iterator[OnTokens]:
    """Open a file for token log-probabilities (see `logprob_schema`), and yield the `on_tokens` of `score`."""
    rows: list[tuple[str, int, int, np.ndarray, np.ndarray]] = []
    size = part = 0
    last: Document | None = None

    with ShardWriter(path, logprob_schema(metadata)) as writer:

        def flush() -> None:
            nonlocal rows, size
            if rows:
                columns = [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), writer.schema, strict=True)]
                writer.write(pa.record_batch(columns, schema=writer.schema))
            rows, size = [], 0

        def on_tokens(document: Document, start: int, ids: np.ndarray, logprobs: np.ndarray) -> None:
            nonlocal size, part, last
            part = part + 1 if document is last else 0
            last = document
            rows.append((document.doc_id, part, start, ids, logprobs))
            size += len(ids)
            if size >= BATCH:
                flush()

        yield on_tokens
        flush()
