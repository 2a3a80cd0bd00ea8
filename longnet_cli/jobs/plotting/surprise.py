"""Documents with the nats of each token, from files of `score --token-logprobs`: where a model is surprised.

    files --read_surprise--> documents of pieces and nats --write_surprise--> a page

A page is one HTML file: the text, the nats of each token as its background, and a strip of the whole. A page holds its
data in two script elements that no browser runs: `facts`, JSON, and `data`, base64 of zlib of

    top        uint32  of each token, the index of the most likely one in `tops`; if the files have it
    lengths    uint16  of each token, UTF-16 units of text
    nats       uint16  of each token, in thousandths
    other      uint16  the same of the second file, if there is one
    top_nats   uint16  the same of the most likely token; if the files have it
    text       UTF-8   of all documents

little-endian, each list without a gap after the one before. Elements are made for the tokens in sight alone.
"""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import zip_longest
from pathlib import Path

import numpy as np

from longnet_cli.basics.atomic import write_file
from longnet_cli.basics.errors import CheckpointError, ConfigError, DataError
from longnet_cli.data.documents.tokenizer import TextStream, Tokenizer
from longnet_cli.data.files.file_kinds import ARROW_KINDS, sniff
from longnet_cli.jobs.scoring.token_logprobs import Logged, LogprobFile

MOST_TOKENS = 1 << 22  # of all documents; a page of them has some 30 MB
PART_OF_CHARACTER = "\u25af"  # a token that ends within a character, and so completes none
_SHA256 = "longnet.tokenizer_sha256"


@dataclass(frozen=True)
class SurpriseDocument:
    """The scored tokens of a document, from `start` on: what each adds to the text, and its numbers.

    `lists` has those that a page has, (n,) each, by their names there: `nats`, and maybe `other`, `top` and `top_nats`.
    """

    doc_id: str
    start: int
    pieces: list[str]
    lists: dict[str, np.ndarray]

    @property
    def means(self) -> list[float]:
        """The mean nats in each file."""
        return [float(self.lists[name].mean()) for name in ("nats", "other") if name in self.lists]


@dataclass(frozen=True)
class Surprise:
    """The documents of one or two files, by the `names` of the files. `tops` are the texts of most likely tokens."""

    names: list[str]
    documents: list[SurpriseDocument]
    tops: list[str]


def has_columns(path: str) -> bool:
    """Return whether a file, or stdin (-), is Arrow or Parquet: curves are drawn from text."""
    head = b""
    pipe = getattr(sys.stdin, "buffer", None)
    if path == "-" and isinstance(pipe, BufferedReader):
        head = pipe.peek(8)
    elif Path(path).is_file():
        with open(path, "rb") as file:
            head = file.read(8)
    return sniff(head) in ARROW_KINDS


def read_surprise(names: Sequence[str], tokenizer_name: str | None = None) -> Surprise:
    """Read one file of log-probabilities, or two of the same tokens: what the second one saves is then of interest.

    The tokenizer is that of the model in the file's metadata, or the one that `tokenizer_name` names. Raises DataError
    for damaged files, and for two of other tokens; ConfigError for a tokenizer that is missing or another one, for more
    than two files, and for more than MOST_TOKENS tokens.
    """
    files = [*map(LogprobFile, names)]
    if len(files) > 2:
        raise ConfigError(
            f"{len(files)} files of log-probabilities: give one, or two to see their difference"
        )
    texts = _TokenTexts(_tokenizer(files, tokenizer_name))
    documents = [*zip_longest(*map(_whole_documents, files))]
    for pair in documents if len(files) > 1 else ():
        _check_same(files, *pair)
    if not documents:
        raise DataError(f"{files[0].where}: it has no tokens")
    return Surprise(list(names), [_document(texts, *logged) for logged in documents], texts.tops)


def _tokenizer(files: Sequence[LogprobFile], name: str | None) -> Tokenizer:
    """Return the tokenizer of files, checked by its digest in each of them. Raises ConfigError."""
    where = files[0].where
    model = name or files[0].metadata.get("longnet.model")
    if not model:
        raise ConfigError(f"{where} does not say which model it is of: give --tokenizer")
    try:
        tokenizer = Tokenizer.load(model)
    except (ConfigError, CheckpointError) as error:
        if name:
            raise
        raise ConfigError(
            f"{where}: the tokenizer of its model {model} cannot be read: give --tokenizer"
        ) from error
    for file in files:
        if file.metadata.get(_SHA256, tokenizer.sha256) != tokenizer.sha256:
            which = f"--tokenizer {name}" if name else f"the tokenizer of {model}"
            raise ConfigError(
                f"{file.where} is of another tokenizer than {which}: give the one it was scored with"
            )
    return tokenizer


def _whole_documents(file: LogprobFile) -> Iterator[Logged]:
    """Yield the documents of a file, each in one. Raises ConfigError for too many tokens."""
    tokens = 0
    documents: list[list[Logged]] = []
    expected: tuple[str, int] | None = None  # of the next row of the same document
    for row in file.rows():
        tokens += len(row.ids)
        if tokens > MOST_TOKENS:
            raise ConfigError(
                f"{file.where}: more than {MOST_TOKENS:,} tokens, the most that are shown: score fewer documents, or "
                "the end of each (--last)"
            )
        if row[:2] != expected:
            documents.append([])
        documents[-1].append(row)
        expected = row.doc_id, row.start + len(row.ids)
    for rows in documents:
        doc_ids, starts, *lists = zip(*rows, strict=True)
        yield Logged(doc_ids[0], starts[0], *map(np.concatenate, lists))


def _check_same(files: Sequence[LogprobFile], one: Logged | None, other: Logged | None) -> None:
    """Raise DataError unless both are the same tokens of the same document."""
    what = "other tokens of the same document"
    if not (one and other and one[:2] == other[:2]):
        what = " and ".join(
            f"tokens from {row.start} on of document {row.doc_id!r}" if row else "no more documents"
            for row in (one, other)
        )
    elif np.array_equal(one.ids, other.ids):
        return
    raise DataError(
        f"{files[0].where} and {files[1].where} have {what}: score the same documents, with the same --last"
    )


def _document(texts: _TokenTexts, logged: Logged, other: Logged | None = None) -> SurpriseDocument:
    lists = {"nats": -logged.logprobs}
    if other:
        lists["other"] = -other.logprobs
    last = other or logged
    if len(last.top_ids):
        lists["top"] = texts.of_top(last.top_ids)
        lists["top_nats"] = -last.top_logprobs
    return SurpriseDocument(logged.doc_id or "", logged.start, texts.pieces(logged.ids), lists)


class _TokenTexts:
    """The texts of tokens, in their document and alone. `tops` are those that `of_top` was asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tops: list[str] = []
        self._places: dict[int, int] = {}  # in `tops`, by id

    def pieces(self, ids: np.ndarray) -> list[str]:
        """Return what each of (n,) ids adds to their text. Special tokens and unknown ids are named."""
        tokenizer = self.tokenizer
        stream = TextStream(tokenizer)
        pieces = []
        for index in ids.tolist():
            named = index in tokenizer.special_ids or not 0 <= index < tokenizer.vocab_size
            pieces.append(self._name(index) if named else stream.add(index))
        pieces[-1] += stream.end()
        return [piece or PART_OF_CHARACTER for piece in pieces]

    def of_top(self, ids: np.ndarray) -> np.ndarray:
        """Return the places (n,) in `tops` of the texts of (n,) ids."""
        different, places = np.unique(ids, return_inverse=True)
        return np.array([*map(self._place, different.tolist())])[places]

    def _place(self, index: int) -> int:
        if index not in self._places:
            self._places[index] = len(self.tops)
            is_token = index < self.tokenizer.vocab_size
            text = self.tokenizer.decode(np.array([index])) if is_token else ""
            self.tops.append(text or self._name(index))
        return self._places[index]

    def _name(self, index: int) -> str:
        return self.tokenizer.token_of(index) or f"[{index}]"


PAGE = ".html"
STEPS = 1000  # of a nat
# From the least to the most, on a light ground: the page has these, too
COLORS = {
    "nats": ["#ffffff", "#fff0c2", "#fdc86b", "#f0883a", "#b93a0c", "#5c1808"],
    "gains": ["#8a3b00", "#e08214", "#fdd9a8", "#ffffff", "#bcd9f5", "#4292d6", "#08366b"],
}
_TEMPLATE = Path(__file__).with_suffix(PAGE)


def write_surprise(surprise: Surprise, output: str | Path) -> None:
    """Write a page, whole or not at all. Raises ConfigError for the name of another kind of file."""
    if Path(output).suffix.lower() != PAGE:
        raise ConfigError(
            f"{output}: log-probabilities are drawn as a page: its name ends in {PAGE}"
        )
    before, between, after = re.split("@FACTS@|@DATA@", _TEMPLATE.read_text(encoding="utf-8"))
    facts = json.dumps(_facts(surprise), ensure_ascii=False).replace("<", "\\u003c")
    data = base64.b64encode(zlib.compress(_data(surprise), 6)).decode()
    write_file(output, (before + facts + between + data + after).encode("utf-8", "replace"))


def _facts(surprise: Surprise) -> dict[str, object]:
    """Return what a page knows of its documents: names, numbers of tokens, and which lists its data has."""
    documents = []
    tokens = 0
    for shown in surprise.documents:
        length = len(shown.pieces)
        tokens += length
        documents.append(
            {"id": shown.doc_id, "start": shown.start, "tokens": length, "nats": shown.means}
        )
    return {
        "names": surprise.names,
        "documents": documents,
        "tops": surprise.tops,
        "tokens": tokens,
        "other": len(surprise.names) > 1,
        "top": any("top" in shown.lists for shown in surprise.documents),
        "steps": STEPS,
        "colors": COLORS,
    }


def _data(surprise: Surprise) -> bytes:
    """Return the lists of a page, one after the other: those that it does not have are empty."""

    data = io.BytesIO()

    def write(name: str, kind: str, steps: int = 1) -> None:
        most = np.iinfo(kind).max
        for document in surprise.documents:
            values = document.lists.get(name, np.empty(0))
            data.write(np.rint(values * steps).clip(0, most).astype(kind).tobytes())

    write("top", "<u4")
    pieces = [
        piece.encode("utf-16-le", "replace")
        for document in surprise.documents
        for piece in document.pieces
    ]
    units = np.array([*map(len, pieces)]) // 2
    data.write(units.astype("<u2").tobytes())
    for name in ("nats", "other", "top_nats"):
        write(name, "<u2", STEPS)
    text = b"".join(pieces).decode("utf-16-le")
    data.write(text.encode())
    return data.getvalue()
