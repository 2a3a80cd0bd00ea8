"""The choice of a table's columns (documents, their names, columns to carry along), and a check of token types.

Lists in columns: where each one lies in the column's values, and these values as numbers.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from longnet_cli.basics.errors import ConfigError, DataError

from .opened_inputs import CHAT_COLUMN, TOKEN_COLUMNS, Table, find_column
from .stored_files import StoredIds


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
        size = len(values)
        offset = values.offset
        valid = pa.Array.from_buffers(pa.bool_(), size, [None, bitmap], offset=offset)
        values = pa.Array.from_buffers(values.type, size, [None, data], offset=offset)
    stored = table.stored(values)
    return values.to_numpy(zero_copy_only=True) if stored is None else stored, valid


INTEGERS = [pa.type_for_alias(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
FLOATS = (pa.float16(), pa.float32(), pa.float64())
_TEXTS = (pa.string(), pa.large_string(), pa.string_view())
_PLAIN_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_LISTS = (*_PLAIN_LISTS, pa.types.is_list_view, pa.types.is_large_list_view)


VECTOR_COLUMNS = ("features", "embedding", "embeddings")
ID_COLUMNS = ("doc_id", "id")
VECTOR_ID_COLUMNS = ("slide_id", "doc_id")
COORDS = (("coords",), ("x", "y"))


# What documents are read as: ids and text are both tokens
Form = Literal["text", "tokens", "vectors"]


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
    """Return whether a column of this type holds text, plain or encoded by a dictionary."""
    return _plain(kind) in _TEXTS


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
    vectors = form == "vectors"
    present = table.schema.names
    if vectors:
        documents = _choose_vectors(table, wanted.column)
    else:
        documents = _choose(table, wanted.column, form == "tokens", chats)
    kind = _type(table, documents)
    for name in wanted.keep:
        _type(table, name)
    if kind in INTEGERS:
        chosen = Columns(documents, kind, None, None, ())
        for name in wanted.names:
            if name != wanted.column:
                raise ConfigError(
                    f"{table.where}: column {documents!r} is one stream of ids, in which a document has no row for "
                    f"{name!r}"
                )
    else:
        doc_id = wanted.id_column or _id_column(table, documents, vectors)
        parts = [name for name in ("part", "span")[: 1 + vectors] if name in present]
        part = next((name for name in parts if pa.types.is_integer(_type(table, name))), None)
        places = [names for names in COORDS if vectors and coords and {*names} <= {*present}]
        chosen = Columns(
            documents, kind, doc_id, part if doc_id else None, wanted.keep, *places[:1]
        )
        if doc_id and not _is_name(id_type := _type(table, doc_id)):
            raise DataError(
                f"{table.where}: {doc_id} has type {id_type}: text or whole numbers are needed"
            )
    for used in (*chosen.names, "doc_id", "part"):
        if present.count(used) > 1:
            raise DataError(
                f"{table.where}: several columns are named {used!r}: rename them, or leave the others out"
            )
    return chosen


def _id_column(table: Table, documents: str, vectors: bool) -> str | None:
    """Return the usual column of names, None without one. An `id` that names no document is none."""
    for name in VECTOR_ID_COLUMNS if vectors else ID_COLUMNS:
        if name in table.schema.names and name != documents:
            return name if name != "id" or _is_name(_type(table, name)) else None
    return None


def _is_name(kind: pa.DataType) -> bool:
    return is_text(kind) or pa.types.is_integer(_plain(kind))


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type of values, also of those that a dictionary encodes (categorical)."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


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
    if column is not None:
        kind = _type(table, column)
        if is_text(kind) or (ids and token_type(kind)) or (chats and is_chat(kind)):
            return column
        raise _refusal(
            table, f"column {column!r} does not hold {'token ids or text' if ids else 'text'}"
        )
    kinds = defaultdict(pa.null, ((field.name, field.type) for field in table.schema))
    of_ids = TOKEN_COLUMNS * ids
    of_chats = (CHAT_COLUMN,) * chats
    lists = [name for name in of_ids if _is_list(kinds[name])]
    flat = [name for name in of_ids if kinds[name] in INTEGERS]
    if is_text(kinds["text"]):
        flat = ["text", *flat]
    candidates = lists or flat or [name for name in of_chats if is_chat(kinds[name])]
    names = _either([*of_ids, "text", *of_chats])
    what = _either(["text", *["integers"] * ids, *["chats"] * chats])
    missing = f"no column named {names} with {what}: choose one (--column)"
    return _only(table, candidates, "documents", missing)


def _choose_vectors(table: Table, column: str | None) -> str:
    names = [name for name in VECTOR_COLUMNS if name in table.schema.names]
    which = f"no column named {', '.join(VECTOR_COLUMNS)} holds"
    if column is not None:
        names = [column]
        which = f"column {column!r} does not hold"
    kinds = {name: _type(table, name) for name in names}
    candidates = [name for name, kind in kinds.items() if is_vector(kind) or is_vectors(kind)]
    missing = f"{which} vectors, lists of float16, float32 or float64, which the model reads"
    return _only(table, candidates, "vectors", missing)


def _only(table: Table, candidates: Sequence[str], what: str, missing: str) -> str:
    """Return the only candidate. Raises ConfigError, which says what is `missing`, without any, and for several."""
    if len(candidates) == 1:
        return candidates[0]
    several = f"several columns may hold the {what} ({', '.join(candidates)})"
    raise _refusal(table, f"{several}: choose one (--column)" if candidates else missing)


def _either(names: Sequence[str]) -> str:
    """Return `a, b or c`."""
    return ", ".join(names[:-1]) + " or " * (len(names) > 1) + names[-1]


class TokenTypes:
    """A check that all inputs hold one type of token: int32 beside int64 mostly means two tokenizers, or a mistake."""

    def __init__(self) -> None:
        self._first: tuple[str, pa.DataType] | None = None  # where a type was found, and the type

    def check(self, table: Table, columns: Columns) -> None:
        """Raise DataError when an earlier input had another type. Text has no type."""
        kind = token_type(columns.type)
        if kind is None or not table.typed:
            return
        self._first = self._first or (table.where, kind)
        where, expected = self._first
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
