"""FASTA and FASTQ, by their names: a record is a document, with its name as `id` and its letters as `text`.

    >chr1 assembled 2026        id "chr1", description "assembled 2026"
    ACGTTGCA                    lines are joined
    NNNN
    @read7 2:N:0:ATCG           FASTQ: the second read of a pair is "read7/2", since both have one name
    ACGT
    +
    IIII                        qualities are not read

Letters stay as they are: upper and lower case, gaps, and N are a tokenizer's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from longnet_cli.basics.errors import DataError
from longnet_cli.data.compressed import bare_name
from longnet_cli.data.folders import FASTA_SUFFIXES, FASTQ_SUFFIXES
from longnet_cli.data.names import Source
from longnet_cli.data.tables import Pipe, Table, reading

BATCH_BYTES = 4 << 20  # of the letters in one batch
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.large_string()), ("description", pa.string())])

_BEGINNING = re.compile(r">.*\n[A-Za-z]+\r?(\n|\Z)")
_MATE = re.compile(r"([12]):[YN]:")  # the number of a read in its pair


class _Record(NamedTuple):
    """A record, and the line on which it begins."""

    line: int
    header: str
    letters: str


def is_fasta(name: str) -> bool:
    """Return whether a file with this name, which may be compressed, holds FASTA or FASTQ."""
    return bare_name(name).endswith((*FASTA_SUFFIXES, *FASTQ_SUFFIXES))


def begins_like_fasta(text: str) -> bool:
    """Return whether a text begins with a header, and a line that is all letters."""
    return _BEGINNING.match(text) is not None


def open_fasta(source: Source, pipe: Pipe) -> Table:
    """Open a file of records as a table with the columns of SCHEMA. Reading raises DataError for what is no record."""
    read = _fastq if bare_name(source.name).endswith(FASTQ_SUFFIXES) else _fasta

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        rows: list[tuple[str, str, str]] = []
        size, before = 0, None
        for record in read(_lines(pipe, source.where), source.where):
            name, _, description = record.header.partition(" ")
            if mate := _MATE.match(description):
                name = f"{name}/{mate[1]}"
            if not name or name == before:
                why = f"the name {name!r} again, and neighbours of one name are one document" if name else "no name"
                raise DataError(f"{source.where}, line {record.line}: {why}: give each record a name of its own")
            rows.append((name, record.letters, description))
            before, size = name, size + len(record.letters)
            if size >= BATCH_BYTES:
                yield _batch(rows)
                rows, size = [], 0
        if rows:
            yield _batch(rows)

    return Table(source.name, source.where, SCHEMA, batches, "FASTA", numbered="record")


def _batch(rows: list[tuple[str, str, str]]) -> pa.RecordBatch:
    return pa.record_batch([*map(list, zip(*rows, strict=True))], schema=SCHEMA)


def _lines(pipe: Pipe, where: str) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line, without spaces and tabs around it."""
    number = 0
    while True:
        with reading(where):
            line = pipe.readline()
        if not line:
            return
        number += 1
        try:
            yield number, line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            why = f"not UTF-8: byte {error.start} is 0x{line[error.start]:02x}"
            raise DataError(f"{where}, line {number}: {why}") from None


def _fasta(lines: Iterator[tuple[int, str]], where: str) -> Iterator[_Record]:
    begun: tuple[int, str] | None = None
    letters: list[str] = []
    for number, line in lines:
        if line.startswith(">"):
            if begun:
                yield _Record(*begun, "".join(letters))
            begun, letters = (number, line[1:].strip()), []
        elif line and not line.startswith(";"):  # a comment
            if begun is None:
                raise DataError(f"{where}, line {number}: FASTA begins with a name, as in '>chr1': {line[:20]!r}")
            letters.append(line)
    if begun:
        yield _Record(*begun, "".join(letters))


def _fastq(lines: Iterator[tuple[int, str]], where: str) -> Iterator[_Record]:
    for number, header in lines:
        if not header:
            continue
        if not header.startswith("@"):
            raise DataError(
                f"{where}, line {number}: a FASTQ record begins with a name, as in '@read7': {header[:20]!r}"
            )
        letters, qualities, parted = "", 0, False
        for _, line in lines:
            if not parted and line.startswith("+"):
                parted = True
            elif not parted:
                letters += line
            else:
                qualities += len(line)
            if parted and qualities >= len(letters):
                break
        if not parted or qualities != len(letters):
            why = f"{len(letters)} letters and {qualities} qualities: is the file truncated?"
            raise DataError(f"{where}, line {number}: the record {header[1:21]!r} has {why}")
        yield _Record(number, header[1:].strip(), letters)
