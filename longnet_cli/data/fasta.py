"""FASTA, by its name: a record is a document, with its name as `id` and its letters as `text`.

    >chr1 assembled 2026        id "chr1", description "assembled 2026"
    ACGTTGCA                    lines are joined
    NNNN

Letters stay as they are: upper and lower case, gaps, and N are a tokenizer's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pyarrow as pa

from longnet_cli.basics.errors import DataError
from longnet_cli.data.names import Source
from longnet_cli.data.tables import Pipe, Table, reading

BATCH_BYTES = 4 << 20  # of the letters in one batch
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.large_string()), ("description", pa.string())])

LIKE_FASTA = re.compile(r">.*\n[A-Za-z]+\r?(\n|\Z)")  # a header, and a line that is all letters


def open_fasta(source: Source, pipe: Pipe) -> Table:
    """Open a file of records as a table with the columns of SCHEMA. Reading raises DataError for what is no record."""

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        rows: list[tuple[str, str, str]] = []
        size, before = 0, None
        for number, header, letters in _records(pipe, source.where):
            name, _, description = header.partition(" ")
            if not name or name == before:
                why = f"the name {name!r} again, and neighbours of one name are one document" if name else "no name"
                raise DataError(f"{source.where}, line {number}: {why}: give each record a name of its own")
            rows.append((name, letters, description))
            before, size = name, size + len(letters)
            if size >= BATCH_BYTES:
                yield _batch(rows)
                rows, size = [], 0
        if rows:
            yield _batch(rows)

    return Table(source.name, source.where, SCHEMA, batches, "FASTA", numbered="record")


def _batch(rows: list[tuple[str, str, str]]) -> pa.RecordBatch:
    return pa.record_batch([*map(list, zip(*rows, strict=True))], schema=SCHEMA)


def _records(pipe: Pipe, where: str) -> Iterator[tuple[int, str, str]]:
    """Yield the number of each record's first line, counted from 1, its header and its letters."""
    begun: tuple[int, str] | None = None
    letters: list[str] = []
    with reading(where):
        for number, data in enumerate(iter(pipe.readline, b""), 1):
            try:
                line = data.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                why = f"not UTF-8: byte {error.start} is 0x{data[error.start]:02x}"
                raise DataError(f"{where}, line {number}: {why}") from None
            if line.startswith(">"):
                if begun:
                    yield *begun, "".join(letters)
                begun, letters = (number, line[1:].strip()), []
            elif line and not line.startswith(";"):  # a comment
                if begun is None:
                    raise DataError(f"{where}, line {number}: FASTA begins with a name, as in '>chr1': {line[:20]!r}")
                letters.append(line)
    if begun:
        yield *begun, "".join(letters)
