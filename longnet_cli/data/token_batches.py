"""Token ids, collected document by document into record batches of a given size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa

from longnet_cli.data.outputs import token_batch
from longnet_cli.data.tables import numpy_dtype

BATCH_ROWS = 1 << 16


class TokenBatches:
    """A collector of ids into batches of whole documents. A document larger than a batch gets a batch for each part.

    `totals` counts documents, tokens and bytes, starting from the totals of an earlier run. The batches depend only
    on the documents since the last `end_shard`, so shards are the same wherever a run resumes.
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
        dtype = numpy_dtype(schema.field("input_ids").type.value_type)
        self._values = np.empty(max(1, batch_bytes // dtype.itemsize), dtype)
        self._used = 0  # values, the open document's included
        self._rows: list[tuple[str, int, int]] = []  # ended rows: doc_id, part, end of their values
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
        """Write the rows that have ended, and move the open row to the front."""
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
