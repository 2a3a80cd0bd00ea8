"""The choice of a table's columns (documents, their names, columns to carry along), and a check of token types.

Lists in columns: where each one lies in the column's values, and these values as numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.opened_inputs import CHAT_COLUMN, TOKEN_COLUMNS, Table, find_column
from longnet_cli.data.stored_files import StoredIds


def list_bounds(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return where each list of a column starts and stops in its `values`, (lists,) int64 each.

    `values` ignores that a column may be a slice; the bounds are positions in all of it.
    """
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        starts = (np.arange(len(column), dtype=np.int64) + column.offset) * kind.list_size
        return starts, starts + kind.list_size
    starts = column.offsets.to_numpy().astype(np.int64)
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return starts, starts + column.sizes.to_numpy()
    return starts[:-1], starts[1:]


def numbers(
    table: Table, values: pa.Array
) -> tuple[np.ndarray | StoredIds, pa.BooleanArray | None]:
    """Return the numbers of the last batch, a view of their file or of Arrow's memory, and which are not null.

    Both have the shape (values,); the second is None if no number is null.
    """
    valid = None
    if values.null_count:
        bitmap, data = values.buffers()
        bare, valid = (
            pa.Array.from_buffers(kind, len(values), [None, buffer], offset=values.offset)
            for kind, buffer in ((values.type, data), (pa.bool_(), bitmap))
        )
        values = bare
    stored = table.stored(values)
    return values.to_numpy(zero_copy_only=True) if stored is None else stored, valid


INTEGERS = (
    pa.uint8(),
    pa.uint16(),
    pa.uint32(),
    pa.uint64(),
    pa.int8(),
    pa.int16(),
    pa.int32(),
    pa.int64(),
)
FLOATS = (pa.float16(), pa.float32(), pa.float64())
_TEXTS = (pa.string(), pa.large_string(), pa.string_view())
_PLAIN_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_LISTS = (*_PLAIN_LISTS, pa.types.is_list_view, pa.types.is_large_list_view)


VECTOR_COLUMNS = ("features", "embedding", "embeddings")
ID_COLUMNS, VECTOR_ID_COLUMNS = ("doc_id", "id"), ("slide_id", "doc_id")
COORDS = (("coords",), ("x", "y"))


Form = Literal[
    "text", "tokens", "vectors"
]  # what documents are read as; ids and text are both tokens


@dataclass(frozen=True)
class Wanted:
    """Columns asked for by name: the documents, their names, the columns to carry along. None is the usual column.

    A dot leads into a column of structs: `doc.body`.
    """

    column: str | None = None
    id_column: str | None = None
    keep: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [name for name in (self.column, self.id_column, *self.keep) if name is not None]


class Columns(NamedTuple):
    """The columns of a table to read; None for one that it lacks. `type` is the type of the documents' column.

    Neighbouring rows with the same `doc_id` are one document, whose rows `part` counts, or `span` those of vectors.
    `coords` are the columns of the coordinates of vectors.
    """

    documents: str
    type: pa.DataType
    doc_id: str | None
    part: str | None
    keep: tuple[str, ...]
    coords: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The names, each once, with the documents' column first."""
        columns = dict.fromkeys((self.documents, self.doc_id, self.part, *self.coords, *self.keep))
        return [name for name in columns if name is not None]


def is_chat(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds chats: lists of messages, which have a `role` and a `content`."""
    if not any(test(kind) for test in _LISTS):
        return False
    message = kind.value_type
    if pa.types.is_map(message):  # the type in which JSON Lines are read
        return True
    return pa.types.is_struct(message) and all(
        message.get_field_index(name) >= 0 and is_text(message.field(name).type)
        for name in ("role", "content")
    )


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds text, plain or encoded by a dictionary (categorical)."""
    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in _TEXTS


def _is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in _LISTS) and kind.value_type in INTEGERS


def choose_columns(
    table: Table, wanted: Wanted, form: Form = "tokens", *, chats: bool = True, coords: bool = False
) -> Columns:
    """Choose the columns to read.

    Documents are in the column asked for, otherwise in a list of ids, otherwise in text or a flat column of ids,
    otherwise in chats. Ids and chats are considered only for the form `tokens` and with `chats`. Documents of vectors
    are in the column asked for, otherwise in one of VECTOR_COLUMNS, and their coordinates are chosen with `coords`.
    Names of documents are in the column asked for, otherwise in the first of ID_COLUMNS or VECTOR_ID_COLUMNS.

    Raises ConfigError, listing the columns, when none or several would do, and for an id column or a carried column
    that is asked for beside a flat column. Raises DataError for a name that several columns have, and for document
    names that are not text or integers.
    """
    if form == "vectors":
        documents, id_columns = _choose_vectors(table, wanted.column), VECTOR_ID_COLUMNS
    else:
        documents, id_columns = _choose(table, wanted.column, form == "tokens", chats), ID_COLUMNS
    kind = _type(table, documents)
    candidates = [name for name in id_columns if name in table.schema.names and name != documents]
    if candidates[:1] == ["id"] and not _is_name(_type(table, "id")):
        candidates = []  # such an `id` names no document
    doc_id = wanted.id_column or next(iter(candidates), None)
    if doc_id is not None and not _is_name(id_type := _type(table, doc_id)):
        raise DataError(
            f"{table.where}: {doc_id} has type {id_type}: text or whole numbers are needed"
        )
    for name in wanted.keep:
        _type(table, name)
    if kind in INTEGERS:
        beside = [*filter(None, (wanted.id_column,)), *wanted.keep]
        if beside:
            raise ConfigError(
                f"{table.where}: column {documents!r} is one stream of ids, in which a document has no row for "
                f"{beside[0]!r}"
            )
        chosen = Columns(documents, kind, None, None, ())
    else:
        part = _part(table, form) if doc_id is not None else None
        places = _places(table) if form == "vectors" and coords else ()
        chosen = Columns(documents, kind, doc_id, part, wanted.keep, places)
    for used in (*chosen.names, "doc_id", "part"):
        if table.schema.names.count(used) > 1:
            raise DataError(
                f"{table.where}: several columns are named {used!r}: rename them, or leave the others out"
            )
    return chosen


def _part(table: Table, form: Form) -> str | None:
    """Return the column that counts the rows of a document; None without one."""
    for name in ("part", "span") if form == "vectors" else ("part",):
        if name in table.schema.names and pa.types.is_integer(_type(table, name)):
            return name
    return None


def _places(table: Table) -> tuple[str, ...]:
    """Return the columns of coordinates; none without any."""
    for names in COORDS:
        if {*names} <= {*table.schema.names}:
            return names
    return ()


def _is_name(kind: pa.DataType) -> bool:
    return is_text(kind) or pa.types.is_integer(
        kind.value_type if pa.types.is_dictionary(kind) else kind
    )


def _type(table: Table, name: str) -> pa.DataType:
    """Return the type of a column. Raises ConfigError for a missing column."""
    place = find_column(table.schema, name)
    if place is None:
        raise _refusal(table, f"there is no column {name!r}")
    return place.type


def _refusal(table: Table, problem: str) -> ConfigError:
    columns = ", ".join(f"{field.name}: {field.type}" for field in table.schema)
    return ConfigError(f"{table.where}: {problem}; its columns are {columns}")


def _choose(table: Table, column: str | None, ids: bool, chats: bool) -> str:
    kinds = {field.name: field.type for field in table.schema}
    if column is not None:
        kind = _type(table, column)
        if (
            is_text(kind)
            or (ids and (kind in INTEGERS or _is_list(kind)))
            or (chats and is_chat(kind))
        ):
            return column
        raise _refusal(
            table, f"column {column!r} does not hold {'token ids or text' if ids else 'text'}"
        )
    flat = ["text"] if "text" in kinds and is_text(kinds["text"]) else []
    lists: list[str] = []
    if ids:
        lists = [name for name in TOKEN_COLUMNS if name in kinds and _is_list(kinds[name])]
        flat += [name for name in TOKEN_COLUMNS if kinds.get(name) in INTEGERS]
    if chats and not flat and CHAT_COLUMN in kinds and is_chat(kinds[CHAT_COLUMN]):
        flat = [CHAT_COLUMN]
    names = [*(TOKEN_COLUMNS if ids else ()), "text", *([CHAT_COLUMN] if chats else [])]
    what = ["text", *(["integers"] if ids else []), *(["chats"] if chats else [])]
    missing = f"no column named {_either(names)} with {_either(what)}: choose one (--column)"
    return _only(table, lists or flat, "documents", missing)


def _choose_vectors(table: Table, column: str | None) -> str:
    kinds = {field.name: field.type for field in table.schema}
    if column is not None:
        kinds[column] = _type(table, column)
    names = VECTOR_COLUMNS if column is None else (column,)
    candidates = [
        name
        for name in names
        if name in kinds and (is_vector(kinds[name]) or is_vectors(kinds[name]))
    ]
    which = (
        f"column {column!r} does not hold"
        if column
        else f"no column named {', '.join(names)} holds"
    )
    missing = f"{which} vectors, lists of float16, float32 or float64, which the model reads"
    return _only(table, candidates, "vectors", missing)


def _only(table: Table, candidates: Sequence[str], what: str, missing: str) -> str:
    """Return the only candidate. Raises ConfigError, which says what is `missing`, without any, and for several."""
    if len(candidates) > 1:
        raise _refusal(
            table,
            f"several columns may hold the {what} ({', '.join(candidates)}): choose one (--column)",
        )
    if not candidates:
        raise _refusal(table, missing)
    return candidates[0]


def _either(names: Sequence[str]) -> str:
    """Return `a, b or c`."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


class TokenTypes:
    """A check that all inputs hold one type of token: int32 beside int64 mostly means two tokenizers, or a mistake."""

    def __init__(self) -> None:
        self._known: tuple[str, pa.DataType] | None = (
            None  # where the first type was found, and the type
        )

    def check(self, table: Table, columns: Columns) -> None:
        """Raise DataError when an earlier input had another type. Text has no type."""
        kind = token_type(columns.type)
        if kind is None or not table.typed:
            return
        self._known = self._known or (table.where, kind)
        where, expected = self._known
        if kind != expected:
            raise DataError(
                f"{table.where}: its tokens are {kind} and those of {where} are {expected}: all inputs need one "
                "type: write one of them again"
            )


def token_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type of the ids in a column of this type; None for text and for types that hold no ids."""
    if kind in INTEGERS:
        return kind
    return kind.value_type if _is_list(kind) else None


def is_vector(kind: pa.DataType) -> bool:
    """Return whether each value of a column of this type is a vector: a list of floating-point numbers."""
    return is_list(kind) and kind.value_type in FLOATS


def is_vectors(kind: pa.DataType) -> bool:
    """Return whether each value of a column of this type is a list of vectors."""
    return is_list(kind) and is_vector(kind.value_type)


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds lists, of fixed size or not, that follow one another."""
    return any(test(kind) for test in _PLAIN_LISTS)


def stays_in_file(kind: pa.DataType) -> bool:
    """Return whether the numbers of a column of this type, token ids or vectors, are read only when needed."""
    return token_type(kind) is not None or is_vector(kind) or is_vectors(kind)
