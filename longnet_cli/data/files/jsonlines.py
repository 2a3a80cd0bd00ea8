"""JSON Lines: one object per line, with a text, a list of token ids or a chat, read line by line in bounded memory."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from longnet_cli.basics.configuration import without_none
from longnet_cli.basics.errors import DataError, first_line

from .column_choice import ID_COLUMNS, Wanted
from .input_files import InputFile
from .opened_inputs import (
    CHAT_COLUMN,
    JSON_LINES,
    TOKEN_COLUMNS,
    Pipe,
    Table,
)

BATCH_BYTES = 1 << 20  # of the lines in one batch
PATIENCE = 0.5  # seconds that a line from a slow producer waits for others
FIRST_LINES = 100  # that are searched for a document
MOST_NAMED = 20  # keys in an error

_ABSENT = object()  # in place of a value, null or not
_TEXT = pa.large_string()
_IDS = pa.large_list(pa.int64())
_NAMES = (str, int)  # types of a document's name, and no bool
_CHAT = pa.list_(pa.map_(pa.string(), pa.string()))  # of messages with any keys
# In place of types that pyarrow gives to values
_PLAIN = {pa.string(): _TEXT, pa.list_(pa.null()): _IDS, pa.list_(pa.int64()): _IDS}
_PLAIN_OR_NULL = {**_PLAIN, pa.null(): _TEXT}  # a column of nulls alone counts as text
_Reader = Callable[[dict[str, Any]], Any]


# Not pyarrow.json: one bad line ends its file, without its number, and rows of a pipe wait for a whole block.
def open_json_lines(input_file: InputFile, pipe: Pipe, wanted: Wanted) -> Table:
    """Open JSON Lines as a table, of which the first batch of lines decides the columns.

    They are the keys of the first line with a document: under the column that `wanted` names or, if it names none,
    under `text`, one of TOKEN_COLUMNS or `messages`. The lines before it are bad. A column to carry along, which a line
    may lack, has the type of all its values in the first batch.

    Raises DataError for JSON Lines that begin without a document, and for a carried column of several types.
    """
    pipe.by_lines = True
    blank = list[int]()
    batches_of_lines = _batches_of_lines(pipe, blank)
    first = list[bytes]()
    fields: dict[str, pa.DataType] = {}
    for lines in batches_of_lines:
        first += lines
        fields, problem = _columns(first, wanted, input_file.where)
        if fields or len(first) >= FIRST_LINES:
            break
    if not fields:
        raise DataError(f"{input_file.where}, line 1: not JSON Lines of documents: {problem}")
    bad: dict[int, str] = {}

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        schema = pa.schema([(name, fields[name]) for name in columns])
        readers = {name: _reader(name, fields[name], name in wanted.keep) for name in columns}
        number = 0
        for lines in chain([first], batches_of_lines):
            rows = []
            for line in lines:
                try:
                    row = _parse(line)
                    rows.append({name: read(row) for name, read in readers.items()})
                except ValueError as error:
                    rows.append({})  # of nulls
                    bad[number] = str(error)
                    if not line.endswith(b"\n"):
                        bad[number] += " (the last line is not whole: is the input truncated?)"
                number += 1
            yield pa.RecordBatch.from_pylist(rows, schema=schema)

    return Table(
        input_file.name,
        input_file.where,
        pa.schema(fields),
        batches,
        JSON_LINES,
        bad=bad,
        blank=blank,
    )


def _batches_of_lines(pipe: Pipe, blank: list[int]) -> Iterator[list[bytes]]:
    """Yield the lines that are not blank, as many at a time as come soon, and BATCH_BYTES of them at most.

    `blank` gets the number of these lines before each blank one.
    """
    count = 0
    size = 0
    lines = list[bytes]()
    begun = time.monotonic()
    try:
        while line := pipe.readline():
            if not line.strip():
                blank.append(count)
                continue
            lines.append(line)
            count += 1
            size += len(line)
            waited = time.monotonic() - begun
            if waited > PATIENCE or size >= BATCH_BYTES or not pipe.ready():
                yield lines
                lines = []
                size = 0
                begun = time.monotonic()
    except DataError:  # of damaged packed data: the lines before it come first
        yield lines
        raise
    yield lines


def _columns(
    lines: Sequence[bytes],
    wanted: Wanted,
    where: str,
) -> tuple[dict[str, pa.DataType], str]:
    """Return the types of the columns, none if no line has a document, and what is wrong with the first line."""
    rows = list[dict[str, Any]]()
    types: dict[str, pa.DataType] = {}
    problems = list[str]()
    for line in lines:
        try:
            row = _parse(line)
            rows.append(row)
            types = types or _columns_of_document(row, wanted)
        except ValueError as error:
            problems.append(str(error))
    for name in wanted.keep:
        present = [value for row in rows if (value := _value(row, name, _ABSENT)) is not _ABSENT]
        if types and present and types.get(name) != _CHAT:
            types[name] = _type_of_all(present, types.get(name), f"{where}: the values of {name!r}")
    return types, next(iter(problems), "every line is blank")


def _columns_of_document(row: dict[str, Any], wanted: Wanted) -> dict[str, pa.DataType]:
    """Return the types of columns by one row. Raises ValueError if it has no document under a usual key."""
    types = {}
    for name in dict.fromkeys((*row, *wanted.names)):
        if kind := _column_type(name, _value(row, name), wanted.id_column):
            types[name] = kind
    usual = (wanted.column,) if wanted.column else ("text", *TOKEN_COLUMNS, CHAT_COLUMN)
    if types.keys() & {*usual}:
        return types
    keys = ", ".join([*row][:MOST_NAMED]) or "none"
    raise ValueError(
        f"no text, token ids or chat under {', '.join(usual)}; its keys are {keys}: choose one (--column)"
    )


def _type_of_all(values: list[Any], of_first: pa.DataType | None, what: str) -> pa.DataType:
    """Return the type of all values, of which `of_first` is the one with a document. Names may be of two types."""
    is_name = of_first == pa.string()
    try:
        kind = pa.array(values).type
    except (pa.ArrowException, OverflowError, TypeError) as error:
        if is_name:
            return of_first
        raise DataError(f"{what} are not of one type: {first_line(error)}") from None
    if is_name and not pa.types.is_integer(kind):
        return of_first
    return _PLAIN_OR_NULL.get(kind, kind)


def _value(row: dict[str, Any], name: str, default: Any = None) -> Any:
    """Return the value of a key, which may lead into objects (`doc.body`), or the default where there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for step in name.split("."):
        value = value.get(step, default) if isinstance(value, dict) else default
    return value


def _parse(line: bytes) -> dict[str, Any]:
    """Return the object on one line. Raises ValueError, with a message of one line, for a bad one."""
    try:
        value = json.loads(line.decode("utf-8").removeprefix("\ufeff").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} is 0x{line[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        problem = error.msg.removesuffix(" at")  # Unterminated string starting at
        raise ValueError(f"not JSON: {problem} at character {error.pos}") from error
    # A number of thousands of digits, or deeply nested brackets
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _column_type(key: str, value: Any, id_column: str | None) -> pa.DataType | None:
    """Return the type of a column of names, parts or documents by one value; None if it holds something else."""
    if key in (*ID_COLUMNS, id_column) and type(value) in _NAMES:
        return pa.string()
    if key == "part" and type(value) is int:
        return pa.int64()
    items = value if isinstance(value, list) else []
    if any(isinstance(item, dict) and "role" in item for item in items):
        return _CHAT
    with suppress(pa.ArrowException, OverflowError, ValueError, TypeError):
        return _PLAIN.get(pa.array([value]).type)
    return None


def _reader(key: str, kind: pa.DataType, kept: bool) -> _Reader:
    """Return what takes the value of a key from a row, in the form that pyarrow takes for a column of `kind`.

    A value that is `kept` may be missing. It raises ValueError for a value of another kind.
    """
    form = _FORMS.get(kind, _other_form(kind))

    def read(row: dict[str, Any]) -> Any:
        value = _value(row, key)
        if value is None:
            if kept:
                return None
            raise ValueError(f"{key!r} is null" if key in row else f"there is no {key!r}")
        if type(value) not in form.types:
            raise ValueError(f"{key!r} is not {form.what}")
        return form.convert(value, key)

    return read


class _Form(NamedTuple):
    """The kind of values that a column has, in words and in types of Python. `convert` takes a value and its key.

    It returns the value for the column, and raises ValueError for one that the column does not take.
    """

    what: str
    types: Sequence[type]
    convert: Callable[[Any, str], Any]


def _text(value: str, key: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key!r} holds half of a surrogate pair at character {error.start}"
        ) from error
    return value


def _ids(value: list[Any], key: str) -> np.ndarray | list[Any]:
    """Return the ids of a list, as an array if none is null. Raises ValueError for a list of anything else."""
    try:
        ids = pa.array(value)
    except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
        raise ValueError(
            f"{key!r} holds something that is not a token id: {first_line(error)}"
        ) from error
    if ids.type not in (pa.int64(), pa.null()):
        raise ValueError(f"{key!r} holds something that is not a token id: {ids.type}")
    return value if ids.null_count else ids.cast(pa.int64()).to_numpy()


def _messages(value: list[Any], key: str) -> list[list[tuple[str, str]]]:
    """Return the keys and texts of each message of a chat, without nulls. Raises ValueError for another list."""
    chat = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{key!r} holds what is no message, with a role and a content")
        texts = without_none(message)
        if other := next((name for name, text in texts.items() if not isinstance(text, str)), None):
            raise ValueError(f"{key!r} holds a message whose {other!r} is no text")
        chat.append(list(texts.items()))
    return chat


def _name(value: str | int, key: str) -> str:
    return _text(str(value), key)


_FORMS = {
    _TEXT: _Form("text", (str,), _text),
    _IDS: _Form("a list of token ids", (list,), _ids),
    _CHAT: _Form("a list of messages", (list,), _messages),
    pa.string(): _Form("text or an integer", _NAMES, _name),
}
# In a column of integers, pyarrow would make 1 of 1.5
_SCALARS = {pa.int64(): (int,), pa.float64(): (int, float), pa.bool_(): (bool,)}


def _other_form(kind: pa.DataType) -> _Form:
    """Return the form of a column of another type, which is that of the values in the first lines."""
    what = f"{kind}, as it is in the first lines"

    def convert(value: Any, key: str) -> Any:
        try:
            pa.array([value], kind)
        except (pa.ArrowException, OverflowError, TypeError):
            raise ValueError(f"{key!r} is not {what}") from None
        return value

    return _Form(what, _SCALARS.get(kind, (list, dict)), convert)
