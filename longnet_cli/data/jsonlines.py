"""JSON Lines: one object per line, with a text, a list of token ids or a chat, read line by line in bounded memory."""

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import repeat
from typing import Any

import pyarrow as pa

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.columns import ID_COLUMNS, Wanted
from longnet_cli.data.compressed import bare_name
from longnet_cli.data.folders import JSON_SUFFIXES
from longnet_cli.data.names import Source
from longnet_cli.data.tables import BYTE_ORDER_MARK, CHAT_COLUMN, TOKEN_COLUMNS, Pipe, Table, one_line

BATCH_BYTES = 4 << 20  # of the lines in one batch
LOOK_AHEAD = 1 << 20  # bytes of lines that decide the types of carried columns
HEAD_LINES, HEAD_BYTES = 100, 16 << 20  # of the lines that tell whether an input is JSON Lines
PATIENCE = 0.5  # seconds that a line from a slow producer waits for others

_BEGINNING = re.compile(rb"(\xef\xbb\xbf)?\{|\s")
_ABSENT = object()  # in place of a value, null or not
_TEXT, _IDS = pa.large_string(), pa.large_list(pa.int64())
_CHAT = pa.list_(pa.map_(pa.string(), pa.string()))  # of messages with any keys


# Not pyarrow.json: one bad line ends its file, without its number, and rows of a pipe wait for a whole block.
def open_json_lines(source: Source, pipe: Pipe, wanted: Wanted) -> Table | None:
    """Open a JSON Lines input as a table. Return None for plain text, and leave all of it in the pipe.

    An input is JSON Lines if its name says so, or if its first line that is not blank begins with `{` and one of the
    first HEAD_LINES is an object, unless they are one JSON value of several lines or one object without a usual key.
    The first line with the documents' column of `wanted` or, if it names none, with `text`, a list of ids under one of
    TOKEN_COLUMNS, or `messages`, decides which keys are columns; nothing after it is waited for. The lines before it
    are bad. The first lines decide the types of columns that are carried along, which a line may lack. Raises
    DataError for JSON Lines that begin without such a line. Reading to the end raises ConfigError, listing the keys,
    for a column to carry along that no line has.
    """
    column = wanted.column
    named = bare_name(source.name).endswith(JSON_SUFFIXES)
    usual = (column,) if column else ("text", *TOKEN_COLUMNS, CHAT_COLUMN)
    fields: dict[str, pa.DataType] = {}
    lines, objects, problems = list[bytes](), list[dict[str, Any]](), list[str]()
    for line in _head(pipe, named):
        lines.append(line)
        try:
            row = _parse(line.strip() and line)
        except ValueError as error:
            problems.append(str(error))
            continue
        if named or line.startswith((b"{", BYTE_ORDER_MARK)):  # the objects in a pretty-printed one are indented
            objects.append(row)
            names = [*row, *(name for name in wanted.names if name not in row)]
            kinds = {name: kind for name in names if (kind := _column_type(name, _value(row, name), wanted.id_column))}
            fields = fields or (kinds if kinds.keys() & {*usual} else {})
            problems.append(_problem(row, usual))
        if fields and (named or not _is_one_value(lines)):
            break
    head = b"".join(lines)
    pipe.unread(head)
    other = not fields and b"\n" not in head.strip() and not any(row.keys() & {*usual, "text"} for row in objects)
    if not head or (not named and (not objects or other or _is_one_value(lines))):
        return None
    if not fields:
        beside = f" ({source.beside})" if source.beside else ""
        raise DataError(f"{source.where}, line 1: not JSON Lines of documents: {problems[0]}{beside}")
    fields |= _kept_types(pipe, source.where, [name for name in wanted.keep if name not in (*fields, column)])
    schema = pa.schema(list(fields.items()))
    bad: dict[int, str] = {}
    begins: set[int] = set()

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        id_column = next((name for name in (wanted.id_column, *ID_COLUMNS) if name in columns), "")
        before: Any = None
        chosen = pa.schema([schema.field(name) for name in columns])
        rows: list[list[Any]] = []
        size, begun = 0, time.monotonic()
        missing, keys = wanted.keep, dict[str, None]()
        try:
            for number, row in enumerate(_lines(pipe)):
                try:
                    value = _parse(row)
                    if missing:
                        missing = tuple(name for name in missing if _value(value, name, _ABSENT) is _ABSENT)
                        keys |= dict.fromkeys(value)
                    rows.append([_cell(value, field.name, field.type, field.name in wanted.keep) for field in chosen])
                    doc_id, before = before, _value(value, id_column)
                    if type(doc_id) is not type(before):  # 1 and "1" are two documents
                        begins.add(number)
                except ValueError as error:
                    whole = row.endswith(b"\n") or not row
                    cut = "" if whole else " (the last line is not whole: is the input truncated?)"
                    bad[number] = f"{error}{cut}"
                    rows.append([None] * len(columns))
                size += len(row)
                if bad or size >= BATCH_BYTES or time.monotonic() - begun > PATIENCE:
                    yield _batch(rows, chosen)
                    rows, size, begun = [], 0, time.monotonic()
        except DataError:  # the rows before it come first, however fast they came
            if rows:
                yield _batch(rows, chosen)
            raise
        if missing:  # in a small file, before any document has been read
            raise ConfigError(f"{source.where}: there is no column {missing[0]!r}; its columns are {', '.join(keys)}")
        if rows:
            yield _batch(rows, chosen)

    return Table(
        source.name, source.where, schema, batches, "JSON Lines", numbered="line", typed=False, bad=bad, begins=begins
    )


def _head(pipe: Pipe, named: bool) -> Iterator[bytes]:
    """Yield the first lines, if the input is `named` JSON Lines or the first that is not blank begins with `{`."""
    size = count = 0
    while count < HEAD_LINES and size < HEAD_BYTES and (named or _BEGINNING.match(pipe.peek(4))):
        if not (line := pipe.readline()):
            break
        yield line
        if line.strip() and line[:1].isspace() and not named:  # indented text
            break
        named = named or bool(line.strip())
        size += len(line) if count else 0  # a first line of any size has a second
        count += 1


def _is_one_value(lines: list[bytes]) -> bool:
    """Return whether the lines are, or begin, one JSON value of several lines, such as pretty-printed JSON."""
    text = b"".join(lines).removeprefix(BYTE_ORDER_MARK).decode("utf-8", "replace").strip()
    try:
        return "\n" in text[: json.JSONDecoder().raw_decode(text)[1]]
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        return False


def _problem(row: dict[str, Any], names: Sequence[str]) -> str:
    """Return why a row has no document under any of `names`."""
    key = next((name for name in names if _value(row, name, _ABSENT) is not _ABSENT), None)
    if key:
        null = _value(row, key) is None
        return f"{key!r} is {'null' if null else 'neither text, a list of token ids nor a chat'}"
    return f"no key {names[0]!r}" if len(names) == 1 else f"no key text, {', '.join(TOKEN_COLUMNS)}"


def _lines(pipe: Pipe) -> Iterator[bytes]:
    """Yield the lines, except blank ones at the end. Earlier blank lines stay, so line numbers are row numbers."""
    blank = 0
    while line := pipe.readline():
        if not line.strip():
            blank += 1
            continue
        yield from repeat(b"", blank)
        yield line
        blank = 0


def _kept_types(pipe: Pipe, where: str, names: Sequence[str]) -> dict[str, pa.DataType]:
    """Return the types of columns to carry along, by the first lines, which stay in the pipe.

    Raises DataError for values of different types.
    """
    if not names:
        return {}
    lines: list[bytes] = []
    begun = time.monotonic()
    with suppress(DataError):  # of damaged packed data, which raises it again
        while sum(map(len, lines)) < LOOK_AHEAD and (line := pipe.readline()):
            lines.append(line)
            if time.monotonic() - begun > PATIENCE:
                break
    pipe.unread(b"".join(lines))
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for line in lines:
        with suppress(ValueError):
            row = _parse(line)
            for name in names:
                columns[name].append(_value(row, name))
    types = {}
    for name, values in columns.items():
        try:
            kind = pa.array(values).type
        except (pa.ArrowException, OverflowError, TypeError) as error:
            raise DataError(f"{where}: the values of {name!r} are not of one type: {one_line(error)}") from None
        types[name] = _TEXT if pa.types.is_null(kind) else kind
    return types


def _value(row: dict[str, Any], name: str, default: Any = None) -> Any:
    """Return the value of a key, which may lead into objects (`doc.body`), or the default where there is none."""
    if name in row or "." not in name:
        return row.get(name, default)
    value: Any = row
    for step in name.split("."):
        value = value.get(step, default) if isinstance(value, dict) else default
    return value


def _parse(line: bytes) -> dict[str, Any]:
    """Return the object on one line. Raises ValueError, with a message of one line, for a bad one."""
    if not line:
        raise ValueError("the line is empty: JSON Lines holds one object a line")
    try:
        value = json.loads(line.removeprefix(BYTE_ORDER_MARK).decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} is 0x{line[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or deeply nested brackets
        raise ValueError(f"not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _column_type(key: str, value: Any, id_column: str | None) -> pa.DataType | None:
    if key in (*ID_COLUMNS, id_column) and _is_id(value):
        return pa.string()
    if key == "part" and _is_id(value) and not isinstance(value, str):
        return pa.int64()
    if isinstance(value, str):
        return _TEXT
    if isinstance(value, list) and all(isinstance(item, int) or item is None for item in value):
        return _IDS
    if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
        return _CHAT
    return None


def _is_id(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _cell(row: dict[str, Any], key: str, kind: pa.DataType, kept: bool) -> Any:
    """Return the value of a key in the form that `_batch` takes for a column of `kind`.

    A value that is only `kept` may be missing. Raises ValueError for a value of another kind.
    """
    value = _value(row, key)
    if value is None:
        if kept:
            return None
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
    if kind == _CHAT and isinstance(value, list):
        return [_message(item, key) for item in value]
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
    if kept:
        try:
            array = pa.array([value], kind if pa.types.is_nested(kind) else None)
            if array.type == kind or (pa.types.is_integer(array.type) and pa.types.is_floating(kind)):
                return array.cast(kind)[0].as_py()
        except (pa.ArrowException, OverflowError, ValueError, TypeError):
            pass
        raise ValueError(f"{key!r} is not {kind}, as it is in the first lines")
    wanted = {
        _TEXT: "text",
        _IDS: "a list of token ids",
        _CHAT: "a list of messages",
        pa.string(): "text or an integer",
    }.get(kind, "an integer")
    raise ValueError(f"{key!r} is not {wanted}")


def _message(message: Any, key: str) -> list[tuple[str, str]]:
    """Return the keys and texts of a message of a chat, without nulls. Raises ValueError for anything else."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{key!r} holds what is no message, with a role and a content")
    texts = {name: text for name, text in message.items() if text is not None}
    if other := next((name for name, text in texts.items() if not isinstance(text, str)), None):
        raise ValueError(f"{key!r} holds a message whose {other!r} is no text")
    return list(texts.items())


def _batch(rows: list[list[Any]], schema: pa.Schema) -> pa.RecordBatch:
    arrays = []
    for index, field in enumerate(schema):
        cells = [row[index] for row in rows]
        if field.type == _IDS:
            offsets, missing = [0], pa.array([cell is None for cell in cells])
            lists = [pa.array([], pa.int64()) if cell is None else cell for cell in cells]
            for cell in lists:
                offsets.append(offsets[-1] + len(cell))
            ids = pa.concat_arrays(lists)
            arrays.append(pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), ids, mask=missing))
        else:
            arrays.append(pa.array(cells, field.type))
    return pa.record_batch(arrays, schema=schema)
