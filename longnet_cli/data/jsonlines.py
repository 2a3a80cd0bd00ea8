"""JSON Lines: one object per line, with a text, a list of token ids or a chat, read line by line in bounded memory."""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa

from longnet_cli.basics.errors import ConfigError, DataError

from .column_choice import ID_COLUMNS, Wanted
from .file_kinds import JSON_SUFFIXES, bare_name
from .input_files import InputFile
from .opened_inputs import (
    BYTE_ORDER_MARK,
    CHAT_COLUMN,
    JSON_LINES,
    TOKEN_COLUMNS,
    Pipe,
    Table,
    first_line,
)

BATCH_BYTES = 4 << 20  # of the lines in one batch
MOST_NAMED = 20  # keys in an error
LOOK_AHEAD = 1 << 20  # bytes of lines that decide the types of carried columns
# of the lines that tell whether an input is JSON Lines
HEAD_LINES = 100
HEAD_BYTES = 16 << 20
PATIENCE = 0.5  # seconds that a line from a slow producer waits for others

_BEGINNING = re.compile(rb"(\xef\xbb\xbf)?\{|\s")
_ABSENT = object()  # in place of a value, null or not
_TEXT = pa.large_string()
_IDS = pa.large_list(pa.int64())
_NAMES = (str, int)  # types of a document's name, and no bool
_CHAT = pa.list_(pa.map_(pa.string(), pa.string()))  # of messages with any keys
_Reader = Callable[[dict[str, Any]], Any]


# Not pyarrow.json: one bad line ends its file, without its number, and rows of a pipe wait for a whole block.
def open_json_lines(input_file: InputFile, pipe: Pipe, wanted: Wanted) -> Table | None:
    """Open a JSON Lines input as a table. Return None for plain text, and leave all of it in the pipe.

    An input is JSON Lines if its name says so, or if its first line that is not blank begins with `{` and one of the
    first HEAD_LINES is an object, unless they are one JSON value of several lines or one object without a usual key.
    The first line with the documents' column of `wanted` or, if it names none, with `text`, a list of ids under one of
    TOKEN_COLUMNS, or `messages`, decides which keys are columns; nothing after it is waited for. The lines before it
    are bad. The first lines decide the types of columns that are carried along, which a line may lack. Raises
    DataError for JSON Lines that begin without such a line. Reading to the end raises ConfigError, listing the keys,
    for a column to carry along that no line has.
    """
    named = bare_name(input_file.name).endswith(JSON_SUFFIXES)
    beginning = _beginning(pipe, wanted, named)
    if beginning is None:
        return None
    fields, problem = beginning
    pipe.by_lines = True
    if not fields:
        raise DataError(f"{input_file.where}, line 1: not JSON Lines of documents: {problem}")
    documents = (wanted.column, *TOKEN_COLUMNS)
    unsure = (pa.string(), _IDS)  # an empty list may be one of anything
    names = [
        name
        for name in wanted.keep
        if name not in documents and fields.get(name, unsure[0]) in unsure
    ]
    fields |= _kept_types(pipe, input_file.where, names, fields)
    rows = _OpenedLines(input_file.where, pipe, wanted, pa.schema(fields))
    return Table(
        input_file.name,
        input_file.where,
        rows.schema,
        rows.batches,
        JSON_LINES,
        bad=rows.bad,
        blank=rows.blank,
    )


def _beginning(
    pipe: Pipe, wanted: Wanted, named: bool
) -> tuple[dict[str, pa.DataType], str] | None:
    """Return the types of columns, as the first line with a document has them, and what is wrong with the first line.

    Return None for plain text. The lines stay in the pipe.
    """
    usual = (wanted.column,) if wanted.column else ("text", *TOKEN_COLUMNS, CHAT_COLUMN)
    fields: dict[str, pa.DataType] = {}
    lines = list[bytes]()
    objects = list[dict[str, Any]]()
    problem = ""
    for line in _head(pipe, named):
        lines.append(line)
        try:
            row = _parse(line.strip() and line)
        except ValueError as error:
            problem = problem or str(error)
            continue
        # the objects in a pretty-printed one are indented
        if named or line.startswith((b"{", BYTE_ORDER_MARK)):
            objects.append(row)
            fields = fields or _column_types(row, wanted, usual)
            problem = problem or _problem(row, usual)
        if fields and (named or not _is_one_value(lines)):
            break
    head = b"".join(lines)
    pipe.unread(head)
    other = (
        not fields
        and b"\n" not in head.strip()
        and not any(row.keys() & {*usual, "text"} for row in objects)
    )
    is_text = not named and (not objects or other or _is_one_value(lines))
    return None if not head or is_text else (fields, problem)


def _column_types(
    row: dict[str, Any], wanted: Wanted, usual: Sequence[str]
) -> dict[str, pa.DataType]:
    """Return the types of columns by a row; none where it has no document under a `usual` key."""
    kinds = {}
    for name in dict.fromkeys((*row, *wanted.names)):
        if kind := _column_type(name, _value(row, name), wanted.id_column):
            kinds[name] = kind
    return kinds if kinds.keys() & {*usual} else {}


class _OpenedLines:
    """The rows of an opened input, as `Table` tells of `bad` and `blank` ones."""

    def __init__(self, where: str, pipe: Pipe, wanted: Wanted, schema: pa.Schema) -> None:
        self.where = where
        self.pipe = pipe
        self.wanted = wanted
        self.schema = schema
        self.bad: dict[int, str] = {}
        self.blank = list[int]()
        # columns that no line has so far; keys of all lines
        self._missing = wanted.keep
        self._keys = dict[str, None]()

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        schema = pa.schema([self.schema.field(name) for name in columns])
        readers = [
            _reader(field.name, field.type, field.name in self.wanted.keep) for field in schema
        ]
        rows: list[list[Any]] = []
        size = 0
        begun = time.monotonic()
        try:
            for number, line in enumerate(self._lines()):
                rows.append(self._read(number, line, readers))
                size += len(line)
                late = time.monotonic() - begun > PATIENCE or not self.pipe.ready()
                if self.bad or size >= BATCH_BYTES or late:
                    yield _batch(rows, schema)
                    rows = []
                    size = 0
                    begun = time.monotonic()
        except DataError:  # the rows before it come first, however fast they came
            if rows:
                yield _batch(rows, schema)
            raise
        if self._missing:  # in a small file, before any document has been read
            keys = ", ".join(self._keys)
            raise ConfigError(
                f"{self.where}: there is no column {self._missing[0]!r}; its columns are {keys}"
            )
        if rows:
            yield _batch(rows, schema)

    def _lines(self) -> Iterator[bytes]:
        """Yield the lines that are not blank."""
        number = 0
        while line := self.pipe.readline():
            if line.strip():
                yield line
                number += 1
            else:
                self.blank.append(number)

    def _read(self, number: int, line: bytes, readers: Sequence[_Reader]) -> list[Any]:
        """Return the cells of a line, nulls for a bad one."""
        try:
            row = _parse(line)
            if self._missing:
                self._missing = tuple(
                    name for name in self._missing if _value(row, name, _ABSENT) is _ABSENT
                )
                self._keys |= dict.fromkeys(row)
            return [read(row) for read in readers]
        except ValueError as error:
            whole = line.endswith(b"\n")
            self.bad[number] = (
                f"{error}{'' if whole else ' (the last line is not whole: is the input truncated?)'}"
            )
            return [None] * len(readers)


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
    missing = repr(names[0]) if len(names) == 1 else f"text, {', '.join(TOKEN_COLUMNS)}"
    return f"no key {missing}; its keys are {', '.join([*row][:MOST_NAMED]) or 'none'}: choose one (--column)"


def _kept_types(
    pipe: Pipe, where: str, names: Sequence[str], fields: Mapping[str, pa.DataType]
) -> dict[str, pa.DataType]:
    """Return the types of columns to carry along, by the first lines, which stay in the pipe.

    Of `fields`, these are integers in place of names, and lists of anything but integers. Raises DataError for values
    of different types.
    """
    if not names:
        return {}
    lines = bytearray()
    rows = []
    types = {}
    begun = time.monotonic()
    with suppress(DataError):  # of damaged packed data, which raises it again
        while len(lines) < LOOK_AHEAD and (line := pipe.readline()):
            lines += line
            with suppress(ValueError):
                rows.append(_parse(line))
            if time.monotonic() - begun > PATIENCE or not pipe.ready():
                break
    pipe.unread(bytes(lines))
    for name in names:
        try:
            kind = pa.array([_value(row, name) for row in rows]).type
        except (pa.ArrowException, OverflowError, TypeError) as error:
            if fields.get(name) == pa.string():  # names may be of two types
                continue
            raise DataError(
                f"{where}: the values of {name!r} are not of one type: {first_line(error)}"
            ) from None
        if fields.get(name) == _IDS:
            if pa.types.is_list(kind) and kind.value_type not in (pa.int64(), pa.null()):
                types[name] = kind
        elif name not in fields or pa.types.is_integer(kind):
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
        problem = error.msg.removesuffix(" at")  # Unterminated string starting at
        raise ValueError(f"not JSON: {problem} at character {error.pos}") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, or deeply nested brackets
        raise ValueError(f"not JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _column_type(key: str, value: Any, id_column: str | None) -> pa.DataType | None:
    if key in (*ID_COLUMNS, id_column) and type(value) in _NAMES:
        return pa.string()
    if key == "part" and type(value) is int:
        return pa.int64()
    if isinstance(value, str):
        return _TEXT
    if isinstance(value, list):
        if all(item is None or isinstance(item, int) for item in value):
            return _IDS
        if all(isinstance(item, dict) and "role" in item for item in value):
            return _CHAT
    return None


def _reader(key: str, kind: pa.DataType, kept: bool) -> _Reader:
    """Return what takes the value of a key from a row, in the form that pyarrow takes for a column of `kind`.

    A value that is only `kept` may be missing. It raises ValueError for a value of another kind.
    """
    what, convert = _FORMS.get(kind, ("", lambda value, key: None))

    def read(row: dict[str, Any]) -> Any:
        value = _value(row, key)
        if value is None:
            if kept:
                return None
            raise ValueError(f"{key!r} is null" if key in row else f"there is no {key!r}")
        if (cell := convert(value, key)) is not None:
            return cell
        if what and not kept:
            raise ValueError(f"{key!r} is not {what}")
        with suppress(pa.ArrowException, OverflowError, ValueError, TypeError):
            array = pa.array([value], kind if pa.types.is_nested(kind) else None)
            if array.type == kind or (
                pa.types.is_integer(array.type) and pa.types.is_floating(kind)
            ):
                return array.cast(kind)[0].as_py()
        raise ValueError(f"{key!r} is not {kind}, as it is in the first lines")

    return read


# Each of these returns the value of a key for a column, and None for a value of another kind.


def _text(value: Any, key: str) -> str | None:
    if not isinstance(value, str):
        return None
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key!r} holds half of a surrogate pair at character {error.start}"
        ) from error
    return value


def _ids(value: Any, key: str) -> np.ndarray | list[Any] | None:
    """Return the ids of a list, as an array if none is null. Raises ValueError for a list of anything else."""
    if not isinstance(value, list):
        return None
    try:
        ids = pa.array(value)
    except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
        raise ValueError(
            f"{key!r} holds something that is not a token id: {first_line(error)}"
        ) from error
    if pa.types.is_null(ids.type):
        ids = ids.cast(pa.int64())
    if ids.type != pa.int64():
        raise ValueError(f"{key!r} holds something that is not a token id: {ids.type}")
    return value if ids.null_count else ids.to_numpy()


def _messages(value: Any, key: str) -> list[list[tuple[str, str]]] | None:
    """Return the keys and texts of each message of a chat, without nulls. Raises ValueError for another list."""
    if not isinstance(value, list):
        return None
    chat = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{key!r} holds what is no message, with a role and a content")
        texts = {name: text for name, text in message.items() if text is not None}
        if other := next((name for name, text in texts.items() if not isinstance(text, str)), None):
            raise ValueError(f"{key!r} holds a message whose {other!r} is no text")
        chat.append(list(texts.items()))
    return chat


def _name(value: Any, key: str) -> str | None:
    return _text(str(value), key) if type(value) in _NAMES else None


def _number(value: Any, key: str) -> int | None:
    return value if type(value) is int and abs(value) < 1 << 63 else None


_FORMS: dict[pa.DataType, tuple[str, Callable[[Any, str], Any]]] = {
    _TEXT: ("text", _text),
    _IDS: ("a list of token ids", _ids),
    _CHAT: ("a list of messages", _messages),
    pa.string(): ("text or an integer", _name),
    pa.int64(): ("an integer", _number),
}


def _batch(rows: list[list[Any]], schema: pa.Schema) -> pa.RecordBatch:
    cells = zip(*rows, strict=True)
    columns = [pa.array(column, kind) for column, kind in zip(cells, schema.types, strict=True)]
    return pa.record_batch(columns, schema=schema)
