"""The file of token log-probabilities that `score --token-logprobs` writes, and its reader."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from longnet_cli.basics.errors import DataError
from longnet_cli.data.documents.token_documents import Document, TextPlaces
from longnet_cli.data.files.column_choice import Wanted
from longnet_cli.data.files.input_files import InputFiles
from longnet_cli.data.files.opened_inputs import Table, pick
from longnet_cli.data.files.opening import open_input
from longnet_cli.data.outputs.row_writer import ShardWriter

BATCH = 1 << 18  # tokens per record batch
# an Arrow file would leave the ids of the first one on disk
_COLUMNS = ["doc_id", "start", "input_ids", "logprobs"]
_TOP = ["top_ids", "top_logprobs"]


def logprob_schema(metadata: Mapping[str, str] | None = None, top: bool = False) -> pa.Schema:
    """Return the schema of token log-probabilities, in nats: a row has the tokens of a document from `start` on.

    A long document has several rows, with `part` 0, 1, 2, ... and one doc_id. `metadata` is `weights.model_origin`.
    With `top`, there are columns for the most likely token in the place of each one, and for its log-probability. The
    place of each token in the text is last, [char_start, char_end), null for a document of ids (`TextPlaces`).
    """
    ids = pa.large_list(pa.int32())
    logprobs = pa.large_list(pa.float32())
    places = pa.large_list(pa.int64())
    lists = {"input_ids": ids, "logprobs": logprobs}
    if top:
        lists |= {"top_ids": ids, "top_logprobs": logprobs}
    fields = [
        pa.field("doc_id", pa.string()),
        pa.field("part", pa.int32()),
        pa.field("start", pa.int64()),
        *(pa.field(name, kind, nullable=False) for name, kind in lists.items()),
        pa.field("char_start", places),
        pa.field("char_end", places),
    ]
    return pa.schema(fields, metadata=metadata)


@contextmanager
def write_token_logprobs(
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    top: bool = False,
) -> Iterator[Callable[..., None]]:
    """Open a file for token log-probabilities (see `logprob_schema`), and yield what takes them."""
    rows: list[dict[str, Any]] = []
    size = part = 0
    latest: Document | None = None
    places_in = lru_cache(1)(TextPlaces)

    with ShardWriter(path, logprob_schema(metadata, top)) as writer:

        def flush() -> None:
            nonlocal rows, size
            if rows:
                writer.write(pa.RecordBatch.from_pylist(rows, writer.schema))
            rows = []
            size = 0

        def take(document: Document, start: int, *lists: np.ndarray) -> None:
            nonlocal size, part, latest
            part += 1
            if document is not latest:
                part = 0
                latest = document
            ids = lists[0]
            in_text = places_in(document).of_tokens(start, start + len(ids))
            row = (document.doc_id, part, start, *lists, *in_text)
            rows.append(dict(zip(writer.schema.names, row, strict=True)))
            size += len(ids)
            if size >= BATCH:
                flush()

        yield take
        flush()


NONE_LOGGED = np.empty(0)


class Logged(NamedTuple):
    """Ids and log-probabilities (n,) of the tokens of a document from `start` on.

    Those of the most likely tokens are empty if the file does not have them.
    """

    doc_id: str
    start: int
    ids: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray = NONE_LOGGED
    top_logprobs: np.ndarray = NONE_LOGGED


class LogprobFile:
    """A file of token log-probabilities. `where` names it in messages; `metadata` is that of its schema."""

    def __init__(self, name: str) -> None:
        """Open a file. Raises DataError for one that is missing, damaged or has no log-probabilities."""
        sources = [*InputFiles([name])]
        table = open_input(sources[0], Wanted()) if len(sources) == 1 else None
        if not isinstance(table, Table) or not {*_COLUMNS} <= {*table.schema.names}:
            raise DataError(
                f"{name}: not a file of log-probabilities, which `longnet score --token-logprobs` writes"
            )
        self._table = table
        self.where = table.where
        self.metadata = table.metadata

    def rows(self) -> Iterator[Logged]:
        """Yield the rows in order, with the most likely tokens if the file has them.

        Raises DataError for a damaged row.
        """
        table = self._table
        row = 0
        names = [*_COLUMNS]
        if {*_TOP} <= {*table.schema.names}:
            names += _TOP
        for batch in table.read(names):
            doc_ids, starts, *lists = (pick(batch, name) for name in names)
            for index in range(batch.num_rows):
                try:
                    of_row = [np.asarray(column[index].values) for column in lists]
                    logged = Logged(doc_ids[index].as_py(), int(starts[index].as_py()), *of_row)
                    if len({values.shape for values in of_row}) > 1 or not len(logged.ids):
                        raise ValueError("as many log-probabilities as ids are needed")
                except (AttributeError, TypeError, ValueError) as error:
                    raise DataError(
                        f"{table.place(row)}: not a row of log-probabilities: {error}"
                    ) from None
                yield logged
                row += 1
