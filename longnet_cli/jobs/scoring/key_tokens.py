"""Key tokens: those for which long context matters, by the losses of a judge at two contexts (arXiv 2410.23771).

The judge's log-probabilities are two files of `score --token-logprobs`, at a short and at a long context, of the
documents that are scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.columns import Wanted
from longnet_cli.data.documents import Document
from longnet_cli.data.formats import open_source
from longnet_cli.data.names import find_sources
from longnet_cli.data.tables import Table, pick
from longnet_cli.jobs.scoring.measures import MANY_NATS

MOST_NATS = 2.0  # a key token's loss at the long context is less: the judge knows it there
_COLUMNS = ["doc_id", "start", "input_ids", "logprobs"]  # an Arrow file would leave the ids of the first one on disk


class _Logged(NamedTuple):
    """Ids and log-probabilities (n,) of the tokens of a document from `start` on."""

    doc_id: str
    start: int
    ids: np.ndarray
    logprobs: np.ndarray


class _Logprobs:
    """The rows of one file, document by document."""

    def __init__(self, name: str) -> None:
        """Open a file. Raises DataError for one that is missing, damaged or has no log-probabilities."""
        sources, missing = find_sources([name])
        if missing:
            raise missing[0]
        table = open_source(sources[0], Wanted()) if len(sources) == 1 else None
        if not isinstance(table, Table) or not {*_COLUMNS} <= {*table.schema.names}:
            raise DataError(f"{name}: not a file of log-probabilities, which `longnet score --token-logprobs` writes")
        self.where, self._rows = table.where, self._read(table)
        self.metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}

    def take(self, document: Document, first: int, count: int) -> np.ndarray:
        """Return the log-probabilities (count,) of the tokens of a document from `first` on, which come next.

        Raises DataError if the file has other tokens.
        """
        parts: list[np.ndarray] = []
        seen, ids = first, document.read(first, first + count) if count else np.empty(0)
        while seen < first + count:
            row = next(self._rows, None)
            if row is None or (row.doc_id, row.start) != (document.doc_id, seen) or seen + len(row.ids) > first + count:
                has = "ends" if row is None else f"has tokens from {row.start} on of document {row.doc_id!r}"
                raise DataError(
                    f"{self.where}: it {has} where {document.where} has tokens from {seen} to {first + count} of "
                    f"document {document.doc_id!r}: the judge must score the same documents, with the same --last"
                )
            differ = row.ids != ids[seen - first : seen - first + len(row.ids)]
            if differ.any():
                raise DataError(
                    f"{self.where}: token {seen + int(differ.argmax())} of document {document.doc_id!r} is another: "
                    "the judge must score the same text, by the same tokenizer"
                )
            parts.append(row.logprobs)
            seen += len(row.ids)
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def end(self) -> None:
        """Raise DataError if there are more rows."""
        if (row := next(self._rows, None)) is not None:
            raise DataError(f"{self.where}: it has more documents than are scored, the next is {row.doc_id!r}")

    @staticmethod
    def _read(table: Table) -> Iterator[_Logged]:
        row = 0
        for batch in table.read(_COLUMNS):
            names, starts, ids, logprobs = (pick(batch, name) for name in _COLUMNS)
            for index in range(batch.num_rows):
                try:
                    of_row = (np.asarray(column[index].values) for column in (ids, logprobs))
                    logged = _Logged(names[index].as_py(), int(starts[index].as_py()), *of_row)
                    if logged.ids.shape != logged.logprobs.shape or not len(logged.ids):
                        raise ValueError("as many log-probabilities as ids are needed")
                except (AttributeError, TypeError, ValueError) as error:
                    raise DataError(f"{table.place(row)}: not a row of log-probabilities: {error}") from None
                yield logged
                row += 1


class Judge:
    """The key tokens of documents, in the order in which they are scored."""

    def __init__(self, files: Sequence[str], tokenizer_sha256: str | None) -> None:
        """Open the file of the short context and that of the long one, for documents of a tokenizer.

        Raises ConfigError for files of another tokenizer or of two models, DataError as for any damaged file.
        """
        self._short, self._long = short, long = [_Logprobs(name) for name in files]
        for file in (short, long):
            if tokenizer_sha256 and file.metadata.get("longnet.tokenizer_sha256", tokenizer_sha256) != tokenizer_sha256:
                raise ConfigError(f"--key-tokens: {file.where} is of another tokenizer than the model that is scored")
        models = [file.metadata.get("longnet.model") for file in (short, long)]
        if models[0] != models[1]:
            raise ConfigError(
                f"--key-tokens: {short.where} is of model {models[0]} and {long.where} of {models[1]}: a judge is one "
                "model, at a short and a long context"
            )

    def keys(self, document: Document, first: int, count: int) -> np.ndarray:
        """Return for the tokens of the next document, from `first` on, whether they are key tokens: (count,) bool.

        Raises DataError for files with other tokens.
        """
        short, long = (file.take(document, first, count).astype(np.float64) for file in (self._short, self._long))
        return (long - short > MANY_NATS) & (long > -MOST_NATS)

    def end(self) -> None:
        """Check, after the last document, that the files have no others. Raises DataError."""
        self._short.end()
        self._long.end()
