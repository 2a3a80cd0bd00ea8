"""Files of documents in every format, and what `Inputs` reads of them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest

from longnet_cli.basics.errors import DataError
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.data.documents.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
TEXTS = ["hello", "wörld, 漢字\n", "x" * 70]
IDS = [list(text.encode()) for text in TEXTS]


def write_file(path: Any, table: pa.Table, rows: int = 2, **options: Any) -> Any:
    with ipc.new_file(path, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def write_stream(path: Any, table: pa.Table, rows: int = 2, **options: Any) -> Any:
    with ipc.new_stream(path, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def write_parquet(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path, row_group_size=2)
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write rows as Parquet, JSON Lines, an Arrow stream (.stream) or an Arrow file, two at a time."""
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".jsonl":
        return write_lines(path, rows)
    if path.suffix == ".parquet":
        return write_parquet(path, table)
    return (write_stream if path.suffix == ".stream" else write_file)(path, table)


def token_table(kind: pa.DataType, name: str = "input_ids", **more: list) -> pa.Table:
    return pa.table({name: pa.array(IDS, kind), **more})


def tokens(documents: list[Document]) -> list[list[int]]:
    """All ids of all documents, each document read in two slices, which checks them."""
    return [[*document.read(0, 2).tolist(), *document.read(2).tolist()] for document in documents]


def read(*inputs: Any, tokenizer: Tokenizer | None = BYTES, **options: Any) -> list[Document]:
    return list(Inputs(inputs, tokenizer, **options).documents())


def pipe(data: bytes, texts: bool = False) -> Any:
    """The ids, or the texts, of documents that come through a pipe as stdin, in small writes; or the error."""
    reader, writer = os.pipe()

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), open(writer, "wb", buffering=0) as end:
            # The first part is shorter than the first bytes by which a format is known
            for part in (data[:3], data[3:9], data[9:40], data[40:]):
                end.write(part)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        with pytest.MonkeyPatch.context() as patch, open(reader) as stdin:
            patch.setattr(sys, "stdin", stdin)
            if texts:
                return [text.text for text in Inputs(["-"]).texts()]
            return [document.read().tolist() for document in Inputs(["-"], BYTES).documents()]
    except DataError as error:
        return str(error)
    finally:
        feeder.join()


def form(
    name: str, write: Callable[..., Path], content: Any, **options: Any
) -> Callable[[Path], Path]:
    """What writes a file of this name to a folder."""
    return lambda folder: write(folder / name, content, **options)


arrow_file = partial(form, "x.arrow", write_file)
parquet_file = partial(form, "x.parquet", write_parquet)
PARTED = [IDS[0], IDS[1][:3], IDS[1][3:], IDS[2][:60], IDS[2][60:65], IDS[2][65:]]
LZ4 = ipc.IpcWriteOptions(compression="lz4")
FORMATS: dict[str, Callable[[Path], Path]] = {
    "file": arrow_file(token_table(pa.list_(pa.int32()))),
    "file lz4": arrow_file(token_table(pa.list_(pa.int32())), options=LZ4),
    "file named txt": form("x.txt", write_file, token_table(pa.large_list(pa.uint16()))),
    "stream": form("x.arrow", write_stream, token_table(pa.large_list(pa.int64()))),
    "stream uint8": form("x.arrow", write_stream, token_table(pa.list_(pa.uint8()), "tokens")),
    "parquet list": parquet_file(token_table(pa.list_(pa.int32()))),
    "parquet large_list": parquet_file(token_table(pa.large_list(pa.uint32()), "token_ids")),
    "text column": arrow_file(pa.table({"text": TEXTS, "other": [1, 2, 3]})),
    "large text column": parquet_file(pa.table({"text": pa.array(TEXTS, pa.large_string())})),
    "flat column": arrow_file(
        pa.table({"tokens": pa.array([i for x in IDS for i in (256, *x)], pa.int32())}),
        rows=7,
    ),
    "flat parquet": parquet_file(
        pa.table({"ids": pa.array([i for x in IDS for i in (*x, 256)], pa.uint16())}),
    ),
    "split documents": arrow_file(
        pa.table(
            {
                "doc_id": [*"abbbc"],
                "input_ids": pa.array([*PARTED[:2], [], PARTED[2], IDS[2]], pa.list_(pa.uint16())),
            }
        ),
    ),
    "split documents in parquet": parquet_file(
        pa.table(
            {
                "doc_id": [*"abbccc"],
                "part": [0, 0, 1, 0, 1, 2],
                "tokens": pa.array(PARTED, pa.list_(pa.uint16())),
            }
        ),
    ),
    "fixed_size_list": arrow_file(
        pa.table(
            {
                "doc_id": [n for n, ids in enumerate(IDS) for _ in ids],
                "ids": pa.array([[i] for ids in IDS for i in ids], pa.list_(pa.int16(), 1)),
            }
        ),
    ),
    "int64 file in one batch": arrow_file(token_table(pa.list_(pa.int64())), rows=99),
    "uint64 lz4 stream": form(
        "x.arrow", write_stream, token_table(pa.list_(pa.uint64())), options=LZ4
    ),
    "json lines of ids": form(
        "x.jsonl", write_lines, [{"id": n, "input_ids": ids} for n, ids in enumerate(IDS)]
    ),
    "json lines of text": form(
        "x.json", write_lines, [{"text": text, "meta": {"n": [1]}} for text in TEXTS]
    ),
    "json lines in parts": form(
        "x",
        write_lines,
        [
            {"doc_id": name, "part": part, "text": text}
            for name, part, text in [
                ("a", 0, TEXTS[0]),
                ("b", 0, "w"),
                ("b", 1, TEXTS[1][1:]),
                ("c", 0, TEXTS[2]),
            ]
        ],
    ),
    "split texts": form(
        "x.arrow",
        write_stream,
        pa.table(
            {"doc_id": [7, 8, 8, 9], "text": [TEXTS[0], TEXTS[1][:4], TEXTS[1][4:], TEXTS[2]]}
        ),
    ),
}
