"""The `inspect` job: the contents of files of tokens, text or vectors, and all problems in them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from longnet_cli.basics.errors import ConfigError, DataError, one_line
from longnet_cli.basics.events import Events
from longnet_cli.data.documents.input_documents import DocumentPass, Inputs, encode_text
from longnet_cli.data.documents.token_documents import STEP, Document, Unread
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.data.documents.whole_columns import NeedsRowsError, whole_columns
from longnet_cli.data.files.column_choice import Columns, TokenTypes, token_type
from longnet_cli.data.files.local_files import FileChangedError
from longnet_cli.data.files.opened_inputs import Table, Text

MAX_PROBLEMS = 1000  # problems whose lines are kept
# Of the machine format, in order
KEYS = (
    "documents",
    "tokens",
    "byte_tokens",
    "vectors",
    "sizes",
    "n_bytes",
    "length",
    "histogram",
    "ids",
    "formats",
    "token_types",
    "metadata",
    "n_problems",
    "problems",
)
RANGE = ("from", "to", "documents")


@dataclass
class Inspection:
    """The contents of the good documents, and a line for each problem (the first MAX_PROBLEMS of `num_problems`).

    `byte_tokens` of the `tokens` are bytes of text, which no other tokenizer has counted. `n_bytes` counts UTF-8 bytes,
    None where unknown; `low` and `high` are the smallest and largest id. `lengths` counts documents by their tokens or
    `vectors`: it has at most sqrt(2 x tokens) entries, so memory stays small. `sizes` counts those of vectors by the
    numbers of a vector. `formats`, `token_types` and `metadata` (the files'
    `longnet.*` keys, each with its values) count files.
    """

    documents: int = 0
    tokens: int = 0
    byte_tokens: int = 0
    vectors: int = 0
    n_bytes: int | None = 0
    low: int | None = None
    high: int | None = None
    lengths: Counter[int] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    token_types: Counter[str] = field(default_factory=Counter)
    metadata: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0

    def length(self) -> dict[str, float | None]:
        """Return the min, mean, median and max tokens or vectors of a document; None for each without documents."""
        if not self.documents:
            return dict.fromkeys(("min", "mean", "median", "max"))
        lengths, counts = np.array(sorted(self.lengths.items())).T
        ends = np.cumsum(counts)  # the documents of a length or less
        middle = [(self.documents - 1) // 2, self.documents // 2]
        median = lengths[ends.searchsorted(middle, "right")].mean()
        total = self.tokens + self.vectors
        return {
            "min": int(lengths[0]),
            "mean": round(total / self.documents, 3),
            "median": float(median),
            "max": int(lengths[-1]),
        }

    def histogram(self) -> list[tuple[int, int, int]]:
        """Return (first, last, documents), the number of documents with first..last tokens: 0, 1, 2..3, 4..7, ..."""
        buckets = Counter[int]()
        for length, count in self.lengths.items():
            buckets[length.bit_length()] += count
        powers = range(min(buckets, default=0), max(buckets, default=-1) + 1)
        return [((1 << bits) // 2, (1 << bits) - 1, buckets[bits]) for bits in powers]

    def as_dict(self) -> dict[str, object]:
        """Return a dict with the keys of the machine format."""
        histogram = [dict(zip(RANGE, row, strict=True)) for row in self.histogram()]
        shown = vars(self) | {
            "length": self.length(),
            "histogram": histogram,
            "ids": {"min": self.low, "max": self.high},
            "n_problems": self.num_problems,
        }
        return {key: shown[key] for key in KEYS}


def inspect(
    inputs: Inputs,
    *,
    events: Events = Events(),  # noqa: B008
) -> Inspection:
    """Read every document of every input. A problem ends its document or its file, and a file that changes the reading.

    Text without a tokenizer counts one token per byte. `events.progress` gets the tokens of each document, or of many
    at a time. Raises ConfigError for no input and for a web address.
    """
    inspection = Inspection()
    inputs = replace(inputs, skip_bad=True)
    tokenizer = inputs.tokenizer or Tokenizer.bytes()

    def read(opened: Text | Table, types: TokenTypes) -> Iterator[Any]:
        with _noting(inspection):
            yield from _items(inspection, inputs, opened, types, events)

    def finish(item: Text | Document) -> Document:
        return encode_text(item, tokenizer, inputs.vocab_size) if isinstance(item, Text) else item

    with _noting(inspection):  # a file that changes ends the pass
        for document in DocumentPass(inputs, read, finish=finish):
            with _noting(inspection):
                if isinstance(document, Unread):
                    raise document.error
                _count(inspection, document, bool(document.tokenizer) and tokenizer.is_bytes)
                events.progress(len(document))
    if not inspection.documents:
        inspection.n_bytes = None
    return inspection


def _items(
    inspection: Inspection,
    inputs: Inputs,
    opened: Text | Table,
    types: TokenTypes,
    events: Events,
) -> Iterable[Any]:
    """Record the format of an opened file, and return its items (see `Inputs.items`) if nothing has counted them."""
    if isinstance(opened, Text):
        inspection.formats["text"] += 1
        return inputs.items(opened, types)
    inspection.formats[opened.format] += 1
    _note_metadata(inspection, opened)
    inputs, columns = _columns(inputs, opened)
    kind = token_type(columns.type)
    inspection.token_types["vectors" if inputs.vectors else str(kind or "text")] += 1
    with _noting(inspection):
        types.check(opened, columns)
    if kind in (None, columns.type) or not _count_columns(
        inspection, inputs, opened, columns, events
    ):
        return inputs.items(opened, TokenTypes())
    return ()


def _count_columns(
    inspection: Inspection,
    inputs: Inputs,
    opened: Table,
    columns: Columns,
    events: Events,
) -> bool:
    """Add the documents of a column of lists of ids, many rows at a time, if the file can be read again.

    Return whether that was so, and all of them are good. If not, nothing is added: the rows tell more.
    """
    tokenizer = inputs.tokenizer
    ends: list[int] = []
    lengths = Counter[int]()
    n_bytes = None if tokenizer is None else 0
    try:
        again = inputs.opened_again(opened)
        if again is None:
            return False
        for ids, lengths_of_ended in whole_columns(again, columns, inputs.vocab_size_of(opened)):
            sizes, counts = np.unique(lengths_of_ended, return_counts=True)
            lengths.update(dict(zip(sizes.tolist(), counts.tolist(), strict=True)))
            if not len(ids):
                continue
            ends += (int(ids.min()), int(ids.max()))
            if tokenizer and n_bytes is not None:
                more = tokenizer.n_bytes(ids)
                n_bytes = None if more is None else n_bytes + more
            events.progress(len(ids))
    except FileChangedError:
        raise
    except (NeedsRowsError, ConfigError, DataError):
        return False
    inspection.tokens += sum(length * count for length, count in lengths.items())
    _add(inspection, lengths, n_bytes, ends)
    return True


def _columns(inputs: Inputs, table: Table) -> tuple[Inputs, Columns]:
    """Return the inputs as they read this table, and its columns: vectors where it has neither ids nor text."""
    try:
        return inputs, inputs.columns_of(table)
    except ConfigError:
        reads_vectors = replace(inputs, vectors=True)
        with suppress(ConfigError):
            return reads_vectors, reads_vectors.columns_of(table)
        raise


def _note_metadata(inspection: Inspection, table: Table) -> None:
    for name, text in table.metadata.items():
        if not name.startswith("longnet."):
            continue
        texts = inspection.metadata[name]
        texts[text] += 1
        first = next(iter(texts))
        with _noting(inspection):
            if name == "longnet.tokenizer_sha256" and text != first:
                raise ConfigError(
                    f"{table.where}: its tokens were made by tokenizer {text[:12]}, the first by {first[:12]}"
                )


def _count(inspection: Inspection, document: Document, in_bytes: bool) -> None:
    """Read a document to its end, and add it to `inspection` if it is good."""
    ends: list[int] = []
    step = min(STEP, document.step)
    for start in range(0, len(document), step):
        ids = document.read(start, start + step)
        ends += (ids.min(), ids.max())
    n_bytes = document.n_bytes
    if document.has_vectors:
        inspection.vectors += len(document)
        inspection.sizes[document.width] += bool(len(document))
        ends = []
    else:
        inspection.tokens += len(document)
    inspection.byte_tokens += len(document) * in_bytes
    _add(inspection, {len(document): 1}, n_bytes, ends)


def _add(
    inspection: Inspection,
    lengths: Mapping[int, int],
    n_bytes: int | None,
    ends: Iterable[int],
) -> None:
    """Add good documents: how many have which length, their UTF-8 bytes, and ids with the lowest and the highest."""
    inspection.documents += sum(lengths.values())
    inspection.lengths.update(lengths)
    ids = [id_ for id_ in (inspection.low, inspection.high, *ends) if id_ is not None]
    if ids:
        inspection.low = int(min(ids))
        inspection.high = int(max(ids))
    if n_bytes is None:
        inspection.n_bytes = None
    elif inspection.n_bytes is not None:
        inspection.n_bytes += n_bytes


@contextmanager
def _noting(inspection: Inspection) -> Iterator[None]:
    """Record a problem of the data instead of stopping. Other errors, such as memory that runs out, pass through."""
    try:
        yield
    except (ConfigError, DataError) as error:
        inspection.num_problems += 1
        if len(inspection.problems) < MAX_PROBLEMS:
            inspection.problems.append(one_line(error))
