"""Documents with the nats of each token, from files of `score --token-logprobs`: where a model is surprised.

files --read_surprise--> documents of pieces and nats --surprise_text, surprise_page--> a terminal, a page
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from longnet_cli.basics.errors import CheckpointError, ConfigError, DataError
from longnet_cli.data.folders import sniff
from longnet_cli.data.text_stream import TextStream
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.jobs.scoring.token_logprobs import Logged, LogprobFile

from .seen_blocks import SeenBlocks, has_blocks, read_blocks

MOST_TOKENS = 1 << 22  # of all documents; a page of them has some 30 MB
PART_OF_CHARACTER = "\u25af"  # a token that ends within a character, and so completes none
_SHA256 = "longnet.tokenizer_sha256"


@dataclass(frozen=True)
class SurpriseDocument:
    """The scored tokens of a document, from `start` on: what each adds to the text, and its nats (n,) float32.

    `other_nats` are those of the second file. `top` has the index of the most likely token in `tops`, texts of tokens,
    (n,) int64, and `top_nats` its nats (n,).
    """

    doc_id: str
    start: int
    pieces: list[str]
    nats: np.ndarray
    other_nats: np.ndarray | None = None
    top: np.ndarray | None = None
    top_nats: np.ndarray | None = None

    @property
    def gains(self) -> np.ndarray:
        """The nats (n,) that the second file saves; negative where it costs more."""
        return self.nats - self.other_nats


@dataclass(frozen=True)
class Surprise:
    """The documents of one or two files, by the `names` of the files. `tops` are the texts of most likely tokens.

    `seen` are the chosen blocks that tokens saw, if a file of these was named, too.
    """

    names: list[str]
    documents: list[SurpriseDocument]
    tops: list[str]
    seen: SeenBlocks | None = None


def has_columns(path: str) -> bool:
    """Return whether a file, or stdin (-), is Arrow or Parquet: curves are drawn from text."""
    if path == "-":
        return isinstance(pipe := getattr(sys.stdin, "buffer", None), BufferedReader) and _has_columns(pipe.peek(8))
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return _has_columns(file.read(8))


def _has_columns(head: bytes) -> bool:
    return sniff(head) in ("file", "stream", "parquet")


def read_surprise(names: Sequence[str], tokenizer_name: str | None = None) -> Surprise:
    """Read one file of log-probabilities, or two of the same tokens: what the second one saves is then of interest.

    Beside them, a file of `score --chosen` says what each token saw.

    The tokenizer is that of the model in the file's metadata, or the one that `tokenizer_name` names. Raises DataError
    for damaged files, and for two of other tokens; ConfigError for a tokenizer that is missing or another one, for more
    than two files, and for more than MOST_TOKENS tokens.
    """
    chosen = [name for name in names if has_blocks(name)]
    names = [name for name in names if name not in chosen]
    if len(chosen) > 1 or (chosen and not names):
        raise ConfigError(
            f"{chosen[0]}: name one file of chosen blocks, beside one of log-probabilities, which has the text"
        )
    files = [LogprobFile(name) for name in names]
    if len(files) > 2:
        raise ConfigError(f"{len(files)} files of log-probabilities: give one, or two to see their difference")
    texts = _TokenTexts(_tokenizer(files, tokenizer_name))
    documents = [*zip_longest(*(_whole_documents(file) for file in files))]
    for pair in documents if len(files) > 1 else ():
        _check_same(files, *pair)
    if not documents:
        raise DataError(f"{files[0].where}: it has no tokens")
    shown = [_document(texts, *logged) for logged in documents]
    return Surprise(list(names), shown, texts.tops, _seen(chosen[0], shown) if chosen else None)


def _seen(name: str, documents: Sequence[SurpriseDocument]) -> SeenBlocks:
    places, begin = dict[str, tuple[int, int]](), 0
    for document in documents:
        if document.start > 1 or document.doc_id in places:
            raise ConfigError(f"{name}: chosen blocks are shown of whole documents (no --last), each with its own name")
        places[document.doc_id] = begin, len(document.pieces)
        begin += len(document.pieces)
    return read_blocks(name, places)


def _tokenizer(files: Sequence[LogprobFile], name: str | None) -> Tokenizer:
    """Return the tokenizer of files, checked by its digest. Raises ConfigError."""
    digests = {file.metadata[_SHA256] for file in files if _SHA256 in file.metadata}
    if len(digests) > 1:
        raise ConfigError(f"{files[0].where} and {files[1].where} are of two tokenizers: their tokens differ")
    where, model = files[0].where, name or files[0].metadata.get("longnet.model")
    if not model:
        raise ConfigError(f"{where} does not say which model it is of: give --tokenizer")
    try:
        tokenizer = Tokenizer.load(model)
    except (ConfigError, CheckpointError) as error:
        if name:
            raise
        raise ConfigError(f"{where}: the tokenizer of its model {model} cannot be read: give --tokenizer") from error
    if digests and tokenizer.sha256 not in digests:
        which = f"--tokenizer {name}" if name else f"the tokenizer of {model}"
        raise ConfigError(f"{where} is of another tokenizer than {which}: give the one it was scored with")
    return tokenizer


def _whole_documents(file: LogprobFile) -> Iterator[Logged]:
    """Yield the documents of a file, each in one. Raises ConfigError for too many tokens."""
    tokens, rows = 0, list[Logged]()
    for row in file.rows(top=True):
        tokens += len(row.ids)
        if tokens > MOST_TOKENS:
            raise ConfigError(
                f"{file.where}: more than {MOST_TOKENS:,} tokens, the most that are shown: score fewer documents, or "
                "the end of each (--last)"
            )
        if rows and (row.doc_id != rows[0].doc_id or row.start != rows[-1].start + len(rows[-1].ids)):
            yield _joined(rows)
            rows = []
        rows.append(row)
    if rows:
        yield _joined(rows)


def _joined(rows: Sequence[Logged]) -> Logged:
    """Return rows of a document as one."""
    columns = zip(*(row[2:] for row in rows), strict=True)
    joined: list[Any] = [None if column[0] is None else np.concatenate(column) for column in columns]
    return Logged(*rows[0][:2], *joined)


def _check_same(files: Sequence[LogprobFile], one: Logged | None, other: Logged | None) -> None:
    """Raise DataError unless both are the same tokens of the same document."""
    if one and other and one[:2] == other[:2] and np.array_equal(one.ids, other.ids):
        return
    said = (f"tokens from {x.start} on of document {x.doc_id!r}" if x else "no more documents" for x in (one, other))
    what = "other tokens of the same document" if one and other and one[:2] == other[:2] else " and ".join(said)
    raise DataError(
        f"{files[0].where} and {files[1].where} have {what}: score the same documents, with the same --last"
    )


def _document(texts: _TokenTexts, logged: Logged, other: Logged | None = None) -> SurpriseDocument:
    last = other or logged
    return SurpriseDocument(
        logged.doc_id or "",
        logged.start,
        texts.pieces(logged.ids),
        -logged.logprobs,
        None if other is None else -other.logprobs,
        None if last.top_ids is None else texts.of_top(last.top_ids),
        None if last.top_logprobs is None else -last.top_logprobs,
    )


class _TokenTexts:
    """The texts of tokens, in their document and alone. `tops` are those that `of_top` was asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tops: list[str] = []
        self._places: dict[int, int] = {}  # in `tops`, by id

    def pieces(self, ids: np.ndarray) -> list[str]:
        """Return what each of (n,) ids adds to their text. Special tokens and unknown ids are named."""
        stream, special, size = TextStream(self.tokenizer), self.tokenizer.special_ids, self.tokenizer.vocab_size
        pieces = []
        for index in ids.tolist():
            named = index in special or not 0 <= index < size
            pieces.append(self._name(index) if named else stream.add(index))
        if rest := stream.end():
            pieces[-1] += rest
        return [piece or PART_OF_CHARACTER for piece in pieces]

    def of_top(self, ids: np.ndarray) -> np.ndarray:
        """Return the places (n,) in `tops` of the texts of (n,) ids."""
        kinds, places = np.unique(ids, return_inverse=True)
        for index in kinds.tolist():
            if index not in self._places:
                self._places[index] = len(self.tops)
                known = index < self.tokenizer.vocab_size
                text = self.tokenizer.decode(np.array([index])) if known else ""
                self.tops.append(text or self._name(index))
        return np.array([self._places[index] for index in kinds.tolist()])[places]

    def _name(self, index: int) -> str:
        return self.tokenizer.token_of(index) or f"[{index}]"
