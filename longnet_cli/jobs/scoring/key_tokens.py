"""Key tokens: those for which long context matters, by the losses of a judge at two contexts (arXiv 2410.23771).

The judge's log-probabilities are two files of `score --token-logprobs`, at a short and at a long context, of the
documents that are scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.documents import Document
from longnet_cli.jobs.scoring.measures import MANY_NATS
from longnet_cli.jobs.scoring.token_logprobs import LogprobFile

MOST_NATS = 2.0  # a key token's loss at the long context is less: the judge knows it there


class _Judged(LogprobFile):
    """The rows of a judge's file, document by document."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._rows = self.rows()

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


class Judge:
    """The key tokens of documents, in the order in which they are scored."""

    def __init__(self, files: Sequence[str], tokenizer_sha256: str | None) -> None:
        """Open the file of the short context and that of the long one, for documents of a tokenizer.

        Raises ConfigError for files of another tokenizer or of two models, DataError as for any damaged file.
        """
        self._short, self._long = short, long = [_Judged(name) for name in files]
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
