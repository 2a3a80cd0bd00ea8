"""The rows of `score -o`: a document each, with its nats per token at each context and the gain of the longest one.

documents --Scorer--> scores, context by context --> rows --> Arrow batches, which `write_rows` writes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from longnet_cli.data.documents import Document
from longnet_cli.data.kept import kept_columns, row_schema
from longnet_cli.jobs.row_jobs import RowJob
from longnet_cli.jobs.scoring.measures import DocumentScore, Gain
from longnet_cli.jobs.scoring.scoring import Cut, Scorer
from longnet_cli.nets.net import Bos, InputSequence
from longnet_cli.running.ranks.portions import Portion
from longnet_cli.running.reader import Reader

TABLE = pa.list_(pa.struct([("from", pa.int64()), ("to", pa.int64()), ("n_tokens", pa.int64()), ("nll", pa.float64())]))


@dataclass(frozen=True)
class ScoreOptions:
    """The options that determine the rows of `score -o`, together with the net and the documents.

    `bos`, `context`, `stride`, `last` and `by_position` are as in `scoring.score`; contexts are sorted in
    ascending order. With two or more contexts, the rows have columns for the gain of the longest over the shortest.
    `model_name`, `tokenizer_sha256` and `pattern` (a text of `attention.notation`) go into the schema's metadata.
    """

    bos: Bos = None
    context: tuple[int, ...] | None = None
    stride: int | None = None
    last: int | None = None
    model_name: str | None = None
    tokenizer_sha256: str | None = None
    pattern: str | None = None
    by_position: bool = False

    def __post_init__(self) -> None:
        if self.context is not None:
            object.__setattr__(self, "context", tuple(sorted(self.context)))

    def schema(self, kept_fields: Sequence[pa.Field] = ()) -> pa.Schema:
        """Return the schema of the rows, with the columns `kept_fields`.

        `n_tokens` is the number of scored tokens, the same at each context. Nats are means over these tokens, null if
        there are none. The columns of the gain are those of `measures.Gain`. `by_position` and `by_segment_position`
        are lists of rows as in the machine formats. The name of a column that is there once for each context ends with
        the context. The metadata keys are `longnet.*`; unknown values are left out.
        """
        known = {
            "longnet.model": self.model_name,
            "longnet.tokenizer_sha256": self.tokenizer_sha256,
            "longnet.pattern": self.pattern,
        }
        tables = ["by_position", "by_segment_position"] if self.by_position else []
        contexts = self.context or (None,)
        fields = [
            pa.field("doc_id", pa.string()),
            pa.field("n_tokens", pa.int64()),
            pa.field("n_bytes", pa.int64()),
            *(pa.field(_column("nats", context), pa.float64()) for context in contexts),
            *(pa.field(name, pa.float64()) for name in Gain._fields if len(contexts) > 1),
            *(pa.field(_column(name, context), TABLE) for name in tables for context in contexts),
        ]
        return row_schema(fields, kept_fields, known)


class RowScorer(RowJob):
    """The job that `row_jobs.write_rows` needs for the rows of `score -o`. `count_bytes` is as in `scoring.score`."""

    options: ScoreOptions
    shard_name, shard_unit, shard_size = "gains", "tokens", 1 << 22
    batch_rows, says_no_id_column, scores = 1 << 12, True, True

    def __init__(
        self,
        reader: Reader,
        options: ScoreOptions,
        kept_fields: Sequence[pa.Field] = (),
        count_bytes: Callable[[np.ndarray], int | None] | None = None,
    ) -> None:
        super().__init__(reader, options, kept_fields)
        self.schema = options.schema(kept_fields)
        self.cut = Cut.of(reader.model, options.bos, options.context, options.stride, options.last)
        self.nothing = self.cut.nothing
        self.scorer = Scorer(reader, self.cut, options.by_position, count_bytes)

    def sequence(self, document: Document) -> InputSequence[Document]:
        return self.scorer.sequence(document)

    def window_sizes(self, tokens: int) -> Iterator[tuple[int, int]]:
        return self.scorer.window_sizes(tokens)

    def results(self, sequences: Iterable[InputSequence[Document]]) -> Iterator[pa.RecordBatch]:
        """Yield one batch, when all documents have been read."""
        scores, documents = self.scorer.results(sequences), []
        while at_all_contexts := list(islice(scores, len(self.cut.contexts))):
            documents.append(at_all_contexts)
        rows, own = list(map(_row, documents)), list(self.schema)[: -len(self.kept_fields) or None]
        columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in own]
        kept = kept_columns([scores[0] for scores in documents], self.kept_fields)
        yield pa.record_batch([*columns, *kept], schema=self.schema)

    def size(self, sequence: InputSequence[Document]) -> int:
        return len(sequence.document) + 1

    def tell_progress(self, portion: Portion[InputSequence[Document]]) -> None:
        self.scorer.tell_progress(portion)

    def option_settings(self) -> dict[str, Any]:
        """Return the options, without tables that were not chosen: folders of older runs do not have these settings."""
        return {name: value for name, value in asdict(self.options).items() if value is not False}


def _column(name: str, context: int | None) -> str:
    return name if context is None else f"{name}_{context}"


def _row(scores: Sequence[DocumentScore]) -> dict[str, Any]:
    """Return the row of a document, from its scores at all contexts. Columns that it lacks are null."""
    total = scores[0].score
    row: dict[str, Any] = {"doc_id": scores[0].doc_id, "n_tokens": total.n_tokens, "n_bytes": total.n_bytes}
    for of_context in scores:
        if total.n_tokens:
            row[_column("nats", of_context.context)] = of_context.score.nll_sum / total.n_tokens
        tables = of_context.by_position.as_dict() if of_context.by_position else {}
        row |= {_column(name, of_context.context): rows for name, rows in tables.items()}
        row |= of_context.gain._asdict() if of_context.gain else {}
    return row
