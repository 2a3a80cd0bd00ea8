"""Vectors and scores of Arrow record batches, for engines that map a function over them: Ray Data, Spark and others.

    dataset.map_batches(encode_batches, batch_format="pyarrow")        Ray Data: a table in, a table out
    frame.mapInArrow(encode, schema)                                   Spark: an iterator in, an iterator out

A process loads a model on its first call and keeps it. A row is a document. Each batch is read independently of the
others, so it does not matter which process gets which batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from longnet_cli.data.columns import ID_COLUMNS, INTEGERS
from longnet_cli.data.documents import Document
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.tables import Table
from longnet_cli.encoding import EmbeddingDtype, EncodeOptions, NothingToEncodeError, encode
from longnet_cli.errors import ConfigError, DataError, LongNetError
from longnet_cli.gains import GainOptions, gains
from longnet_cli.model_folder import Loaded, ModelFolder
from longnet_cli.notation import format_pattern, read_pattern
from longnet_cli.pooling import Pool
from longnet_cli.runtime.device import select_device
from longnet_cli.scoring import NothingToScoreError, OnSkip


@dataclass(frozen=True)
class Reading:
    """The model and the way to read documents from batches: options that `longnet encode` and `longnet score` share.

    `id_column` holds the names of the documents; without it, `doc_id` is used, otherwise `id`. `column` holds the
    documents, as text or as lists of token ids. The columns of `keep` are copied to the rows of the output. With
    `skip_bad`, a document that the model cannot read has no rows.
    """

    model: str = "longnet-tiny"
    tokenizer: str | None = None
    pattern: str | None = None
    bos: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    chunk: int | None = None
    column: str | None = None
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    skip_bad: bool = False

    def load(self) -> Loaded:
        """Return the model and its tokenizer, loaded once per process. Raises what `ModelFolder.load` raises."""
        return _load(self.model, self.tokenizer, self.pattern, self.bos, self.device, self.dtype)

    def origin(self) -> dict[str, Any]:
        """Return the fields of `EncodeOptions` and `GainOptions` that describe the model."""
        loaded = self.load()
        return {
            "bos": loaded.bos,
            "model_name": self.model,
            "tokenizer_sha256": loaded.tokenizer_sha256,
            "pattern": format_pattern(loaded.net.config.pattern),
        }


def encode_batches(
    batches: Any,
    *,
    pool: Pool = "mean",
    span: int | None = None,
    normalize: bool = True,
    embedding_dtype: EmbeddingDtype = "float32",
    **reading: Any,
) -> Any:
    """Encode the documents of a table or of record batches, and return the rows of `longnet encode`.

    A table gives a table. Record batches give a lazy iterator of record batches. The output has the columns of
    `EncodeOptions.schema`, then the columns of `keep`. The options are as in `EncodeOptions` and `Reading`. An empty
    document has no rows.

    Raises ConfigError for invalid options and for a batch without the id column or the document column, DataError for
    bad values, TypeError for an unknown option, and what `encode` raises.
    """
    how = Reading(**reading)

    def run(documents: Iterator[Document], on_skip: OnSkip | None) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        chosen = EncodeOptions(
            pool=pool, span=span, normalize=normalize, embedding_dtype=embedding_dtype, **how.origin()
        )
        net, index = how.load().net, -1
        reader = encode(net, documents, chosen, chunk=how.chunk, dtype=how.dtype, on_skip=on_skip)
        with suppress(NothingToEncodeError):  # there may be tokens in other batches
            for batch in reader:
                indices = index + np.cumsum(batch["span"].to_numpy() == 0)
                index = int(indices[-1])
                yield batch, indices
        yield pa.RecordBatch.from_pylist([], reader.schema), np.empty(0, int)

    return _mapped(batches, how, run, empty=False)


def score_batches(
    batches: Any, *, context: int | Sequence[int] | None = None, stride: int | None = None, **reading: Any
) -> Any:
    """Score the documents of a table or of record batches, and return the rows of `longnet score -o`.

    A table gives a table. Record batches give a lazy iterator of record batches. The output has the columns of
    `GainOptions.schema`, then the columns of `keep`. The options are `context`, `stride` and the options of `Reading`.
    With several contexts, the rows also show what a document gains from the longest one.

    Raises ConfigError for invalid options and for a batch without the id column or the document column, DataError for
    bad values, TypeError for an unknown option, and what `score` raises.
    """
    how = Reading(**reading)
    contexts = None if context is None else (context,) if isinstance(context, int) else tuple(context)

    def run(documents: Iterator[Document], on_skip: OnSkip | None) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        chosen, net, index = GainOptions(context=contexts, stride=stride, **how.origin()), how.load().net, 0
        with suppress(NothingToScoreError):  # there may be tokens in other batches
            for batch in gains(net, documents, chosen, chunk=how.chunk, dtype=how.dtype, on_skip=on_skip):
                yield batch, np.arange(index, index + batch.num_rows)
                index += batch.num_rows

    return _mapped(batches, how, run, empty=True)


@cache
def _load(model: str, tokenizer: str | None, pattern: str | None, bos: str | None, device: str, dtype: str) -> Loaded:
    parsed = read_pattern(pattern, "pattern")
    folder = ModelFolder.find(model, gguf=True)
    return folder.load(device=select_device(device), dtype=dtype, tokenizer=tokenizer, pattern=parsed, bos=bos)


# Takes documents; yields batches of rows, and for each row the index of its document, skipped documents not counted
Run = Callable[[Iterator[Document], OnSkip | None], Iterator[tuple[pa.RecordBatch, np.ndarray]]]


def _mapped(batches: Any, how: Reading, run: Run, *, empty: bool) -> Any:
    """Apply `run` to a table or to batches, and return the same kind. With `empty`, empty documents are read too."""
    if isinstance(batches, pa.Table):
        return pa.Table.from_batches(_DocumentTable(batches, "table", how).rows(run, empty))
    tables = (pa.Table.from_batches([batch]) for batch in batches)
    found = (_DocumentTable(table, f"batch {index}", how).rows(run, empty) for index, table in enumerate(tables))
    return (rows for batch in found for rows in batch if rows.num_rows)


class _DocumentTable:
    """A table whose rows are documents. Raises ConfigError and DataError for a table that cannot be read this way."""

    def __init__(self, table: pa.Table, where: str, how: Reading) -> None:
        self.table, self.where, self.how = table, where, how
        self.names = table.schema.names
        wanted = [how.id_column] if how.id_column else ID_COLUMNS
        self.id_column = next((name for name in wanted if name in self.names), "")
        if not self.id_column:
            raise ConfigError(
                f"{where}: there is no column {' or '.join(map(repr, wanted))} that names the documents: choose one "
                f"(id_column); its columns are {', '.join(self.names)}"
            )
        for name in how.keep:
            if name not in self.names:
                raise ConfigError(f"{where}: there is no column {name!r}; its columns are {', '.join(self.names)}")
        self.doc_ids = table[self.id_column].cast(pa.string())
        if self.doc_ids.null_count:
            row = self.doc_ids.is_null().to_pylist().index(True)
            raise DataError(f"{where}, row {row}, {self.id_column}: the value is null")
        if "part" in self.names and pa.types.is_integer(table.schema.field("part").type):
            parts = table["part"].to_pylist()
            row = next((row for row, part in enumerate(parts) if part), None)
            if row is not None:
                raise DataError(
                    f"{where}, row {row}: part {parts[row]} of document {self.doc_ids[row].as_py()!r}: in batches a "
                    "row is a document: join its parts, or read the files themselves (longnet encode, longnet score)"
                )

    def rows(self, run: Run, empty: bool) -> Iterator[pa.RecordBatch]:
        """Yield the rows of all documents. If there are none, yield an empty batch, so that the schema is known."""
        taken: list[int] = []

        def documents() -> Iterator[Document]:
            for row, document in enumerate(self.documents() if len(self.table) else ()):
                if len(document) or empty:
                    taken.append(row)
                    yield document

        def skip(document: Document, error: LongNetError) -> None:
            taken.pop()  # the skipped document is always the last one taken

        for batch, indices in run(documents(), skip if self.how.skip_bad else None):
            places = pa.array(np.array(taken, int)[indices])
            columns = [self.doc_ids, *(self.table[name] for name in self.how.keep)]
            if clash := set(batch.schema.names) & set(self.how.keep):
                raise ConfigError(f"keep {min(clash)}: the output has a column of this name")
            doc_ids, *kept = (column.take(places).combine_chunks() for column in columns)
            fields = [self.table.schema.field(name) for name in self.how.keep]
            schema = pa.schema([*batch.schema, *fields], metadata=batch.schema.metadata)
            yield pa.record_batch([doc_ids, *batch.columns[1:], *kept], schema=schema)

    def documents(self) -> Iterator[Document]:
        """Return an iterator over the documents, one per row."""
        own = [index for index, name in enumerate(self.names) if name not in (self.id_column, "doc_id", "part")]
        table = self.table.select(own)
        found = Table(self.where, self.where, table.schema, lambda names: iter(table.select(names).to_batches()))
        inputs = Inputs((), column=self.how.column)
        columns = inputs.columns_of(found)
        if columns.type in INTEGERS:
            raise ConfigError(
                f"{self.where}: column {columns.documents!r} has one id per row: in batches a row is a document, a "
                "list of ids or a text"
            )
        loaded = self.how.load()
        inputs = replace(inputs, tokenizer=loaded.tokenizer, vocab_size=loaded.net.config.vocab_size)
        return inputs.documents_of(found)
