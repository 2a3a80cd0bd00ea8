"""JSON Lines: an object a line, with a text or a list of token ids, read line by line in bounded memory."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from longnet_cli.data.folders import JSON_SUFFIXES
from longnet_cli.data.inputs import Source
from longnet_cli.data.tables import TOKEN_COLUMNS, Pipe, Table, one_line
from longnet_cli.errors import DataError

BATCH_BYTES = 4 << 20  # of lines that become one batch
PATIENCE = 0.5  # seconds that a line from a slow producer waits for others

_OBJECT = re.compile(rb'(\xef\xbb\xbf)?\{[ \t]*"')  # a Python dict, a pretty-printed .json and a CSS rule differ
_TEXT, _IDS = pa.large_string(), pa.large_list(pa.int64())


def open_json_lines(source: Source, pipe: Pipe, column: str | None) -> Table | None:
    """The table of a JSON Lines input, None (and nothing is read) when the input is plain text.

    JSON Lines is what begins with a line that is an object with a `text`, a list of ids under one of TOKEN_COLUMNS,
    or `column`. The first line decides which keys are columns; `id` counts as doc_id. DataError for a file that is
    named .jsonl or .ndjson and begins otherwise.
    """
    named = source.name.endswith(JSON_SUFFIXES)
    line = pipe.readline() if named or _OBJECT.match(pipe.peek(32)) else b""
    pipe.unread(line)
    try:
        first = _parse(line)
    except ValueError as error:
        first, problem = {}, str(error)
    else:
        problem = f"no key {column!r}" if column else f"no key text, {', '.join(TOKEN_COLUMNS)}"
    fields = {key: kind for key, value in first.items() if (kind := _column_type(key, value))}
    if not fields.keys() & ({column} if column else {"text", *TOKEN_COLUMNS}):
        if named and line:
            raise DataError(f"{source.where}, line 1: not JSON Lines of documents: {problem}")
        return None
    keys = {name: name for name in fields}
    if "id" in keys and "doc_id" not in keys:
        keys["doc_id"] = "id"
        fields["doc_id"] = fields.pop("id")
    schema = pa.schema(list(fields.items()))

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        wanted = [(keys[name], schema.field(name).type) for name in columns]
        kept = pa.schema([schema.field(name) for name in columns])
        rows: list[list[Any]] = []
        size, begun = 0, time.monotonic()
        for number, row in enumerate(_lines(pipe, source.where), start=1):
            try:
                value = _parse(row)
                rows.append([_cell(value, key, kind) for key, kind in wanted])
            except ValueError as error:
                cut = "" if row.endswith(b"\n") else " (the last line is not whole: is the input truncated?)"
                raise DataError(f"{source.where}, line {number}: {error}{cut}") from error
            size += len(row)
            if size >= BATCH_BYTES or time.monotonic() - begun > PATIENCE:
                yield _batch(rows, kept)
                rows, size, begun = [], 0, time.monotonic()
        if rows:
            yield _batch(rows, kept)

    return Table(source.name, source.where, schema, batches, "JSON Lines", numbered="line", typed=False)


def _lines(pipe: Pipe, where: str) -> Iterator[bytes]:
    """Lines; blank ones may only stand at the end, so that line numbers are row numbers."""
    blank = number = 0
    while line := pipe.readline():
        number += 1
        if not line.strip():
            blank = blank or number
        elif blank:
            raise DataError(f"{where}, line {blank}: the line is empty: JSON Lines holds one object per line")
        else:
            yield line


def _parse(line: bytes) -> dict[str, Any]:
    """The object of one line; ValueError says what is wrong with it in one line."""
    try:
        value = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} is 0x{line[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        raise ValueError(f"not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _column_type(key: str, value: Any) -> pa.DataType | None:
    if key in ("doc_id", "id") and _is_id(value):
        return pa.string()
    if key == "part" and _is_id(value) and not isinstance(value, str):
        return pa.int64()
    if isinstance(value, str):
        return _TEXT
    if isinstance(value, list) and all(isinstance(item, int) or item is None for item in value):
        return _IDS
    return None


def _is_id(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _cell(row: dict[str, Any], key: str, kind: pa.DataType) -> Any:
    """The value of a key as what `_batch` takes for a column of `kind`; ValueError when it is something else."""
    value = row.get(key)
    if value is None:
        raise ValueError(f"{key!r} is null" if key in row else f"there is no {key!r}")
    if kind == _IDS and isinstance(value, list):
        try:
            ids = pa.array(value) if value else pa.array([], pa.int64())
        except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
            raise ValueError(f"{key!r} holds something that is not a token id: {one_line(error)}") from error
        if pa.types.is_null(ids.type):
            ids = ids.cast(pa.int64())
        if ids.type != pa.int64():
            raise ValueError(f"{key!r} holds something that is not a token id: {ids.type}")
        return ids
    if kind == pa.int64() and _is_id(value) and not isinstance(value, str) and abs(value) < 1 << 63:
        return value
    if kind == pa.string() and _is_id(value):
        value = str(value)
    if kind in (_TEXT, pa.string()) and isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{key!r} holds half of a surrogate pair at character {error.start}") from error
        return value
    wanted = {_TEXT: "text", _IDS: "a list of token ids", pa.string(): "text or an integer"}.get(kind, "an integer")
    raise ValueError(f"{key!r} is not {wanted}")


def _batch(rows: list[list[Any]], schema: pa.Schema) -> pa.RecordBatch:
    arrays = []
    for index, field in enumerate(schema):
        cells = [row[index] for row in rows]
        if field.type == _IDS:
            offsets = [0]
            for cell in cells:
                offsets.append(offsets[-1] + len(cell))
            arrays.append(pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.concat_arrays(cells)))
        else:
            arrays.append(pa.array(cells, field.type))
    return pa.record_batch(arrays, schema=schema)
