"""The choice of a table's columns (documents, their names, columns to carry along), and a check of token types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

import pyarrow as pa

from longnet_cli.basics.errors import ConfigError, DataError

from .opened_inputs import CHAT_COLUMN, JSON_LINES, TOKEN_COLUMNS, Table, find_column

_SIGNED = (pa.int8(), pa.int16(), pa.int32(), pa.int64())
INTEGERS = (*_SIGNED, pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
FLOATS = (pa.float16(), pa.float32(), pa.float64())
_TEXTS = (pa.string(), pa.large_string(), pa.string_view())
NO_TYPE = pa.null()  # of a column or of items that there are not
# The ids of types whose lists follow one another, and of all types of lists
_LISTS = {pa.list_(NO_TYPE).id, pa.large_list(NO_TYPE).id, pa.list_(NO_TYPE, 1).id}
_ANY_LISTS = {*_LISTS, pa.list_view(NO_TYPE).id, pa.large_list_view(NO_TYPE).id}

VECTOR_COLUMNS = ("features", "embedding", "embeddings")
ID_COLUMNS = ("doc_id", "id")
COORDS = (("coords",), ("x", "y"))


# What documents are read as: ids, texts and chats are all tokens; texts alone; texts and chats; vectors
Form = Literal["tokens", "text", "chats", "vectors"]


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
    doc_id: str | None = None
    part: str | None = None
    keep: tuple[str, ...] = ()
    coords: tuple[str, ...] = ()

    @property
    def of_texts(self) -> bool:
        """True for texts and chats; the numbers of other documents stay in their file until they are needed."""
        return is_text(self.type) or is_chat(self.type)

    @property
    def needed(self) -> list[str]:
        """The names of the columns in which a row must have a value, with the documents' column first."""
        return [name for name in (self.documents, self.doc_id, self.part) if name is not None]

    @property
    def names(self) -> list[str]:
        """The names, each once, with the documents' column first."""
        return list(dict.fromkeys((*self.needed, *self.coords, *self.keep)))


def is_chat(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds chats: lists of messages, which have a `role` and a `content`."""
    message = _item_type(kind)
    if pa.types.is_map(message):  # the type in which JSON Lines are read
        return True
    if not pa.types.is_struct(message):
        return False
    texts = {field.name for field in message if is_text(field.type)}
    return texts >= {"role", "content"}


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds text, plain or encoded by a dictionary."""
    return _plain(kind) in _TEXTS


def _item_type(kind: pa.DataType, lists: Set[int] = _ANY_LISTS) -> pa.DataType:
    """Return the type of the items of a list, which is one of `lists`; NO_TYPE for a type of anything else."""
    return kind.value_type if kind.id in lists else NO_TYPE


def choose_columns(
    table: Table,
    wanted: Wanted,
    form: Form = "tokens",
    *,
    coords: bool = False,
) -> Columns:
    """Choose the columns to read.

    Documents are in the column asked for, otherwise in the usual one of the form (see _FORMS). The coordinates of
    vectors are chosen with `coords`. Names of documents are in the column asked for, otherwise in the first of
    the form's.

    Raises ConfigError, listing the columns, when none or several would do, and for an id column or a carried column
    that is asked for beside a flat column. Raises DataError for a name that several columns have, and for document
    names that are not text or integers.
    """
    usual = _FORMS[form]
    present = table.schema.names
    documents = _choose(table, wanted.column, usual)
    kind = _type(table, documents)
    for name in wanted.keep:
        _type(table, name)
    if kind in INTEGERS:
        chosen = Columns(documents, kind)
        for name in wanted.names:
            if name != wanted.column:
                raise ConfigError(
                    f"{table.where}: column {documents!r} is one stream of ids, in which a document has no row for "
                    f"{name!r}"
                )
    else:
        doc_ids = [name for name in _fitting(table, usual.doc_ids) if name != documents]
        doc_id = wanted.id_column or next(iter(doc_ids), None)
        part = None
        if doc_id:
            if not _is_name(id_type := _type(table, doc_id)):
                raise DataError(
                    f"{table.where}: {doc_id} has type {id_type}: text or whole numbers are needed"
                )
            part = next(iter(_fitting(table, usual.parts)), None)
        places = [names for names in COORDS if coords and {*names} <= {*present}]
        chosen = Columns(documents, kind, doc_id, part, wanted.keep, *places[:1])
    for used in (*chosen.names, "doc_id", "part"):
        if present.count(used) > 1:
            raise DataError(
                f"{table.where}: several columns are named {used!r}: rename them, or leave the others out"
            )
    return chosen


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


def _fitting(table: Table, tests: _Tests) -> list[str]:
    """Return the names of the columns that a table has, if their types pass the tests."""
    kinds = dict(zip(table.schema.names, table.schema.types, strict=True))
    return [name for name, fits in tests.items() if name in kinds and fits(kinds[name])]


def _refusal(table: Table, problem: str) -> ConfigError:
    columns = ", ".join(f"{field.name}: {field.type}" for field in table.schema)
    return ConfigError(f"{table.where}: {problem}; its columns are {columns}")


def _choose(table: Table, column: str | None, usual: _Usual) -> str:
    """Return the column of the documents: the one asked for, otherwise the one of the first group that has any."""
    groups = usual.groups
    if column is not None:
        kind = _type(table, column)
        if any(test(kind) for group in groups for test in group.values()):
            return column
        raise _refusal(table, f"column {column!r} does not hold {usual.what}")
    for group in groups:
        fitting = _fitting(table, group)
        if len(fitting) > 1:
            several = f"several columns may hold the documents ({', '.join(fitting)})"
            raise _refusal(table, f"{several}: choose one (--column)")
        if fitting:
            return fitting[0]
    names = ", ".join(dict.fromkeys(chain.from_iterable(groups)))
    raise _refusal(table, f"no column named {names} with {usual.what}: choose one (--column)")


class TokenTypes:
    """A check that all inputs hold one type of token: int32 beside int64 mostly means two tokenizers, or a mistake."""

    def __init__(self) -> None:
        self._first: tuple[str, pa.DataType] | None = None  # where a type was found, and the type

    def check(self, table: Table, columns: Columns) -> None:
        """Raise DataError when an input of token ids has another type than an earlier one."""
        if table.format == JSON_LINES:  # which has no types of integers
            return
        kind = token_type(columns.type)
        self._first = self._first or (table.where, kind)
        where, expected = self._first
        if kind != expected:
            raise DataError(
                f"{table.where}: its tokens are {kind} and those of {where} are {expected}: all inputs need one "
                "type: write one of them again"
            )


def token_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type of the ids in a column of this type; None for text and for types that hold no ids."""
    return next((ids for ids in (kind, _item_type(kind)) if ids in INTEGERS), None)


def is_vector(kind: pa.DataType) -> bool:
    """Return whether each value of a column of this type is a vector: a list of floating-point numbers."""
    return _item_type(kind, _LISTS) in FLOATS


def is_vectors(kind: pa.DataType) -> bool:
    """Return whether each value of a column of this type is a list of vectors."""
    return is_vector(_item_type(kind, _LISTS))


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds lists, of fixed size or not, that follow one another."""
    return kind.id in _LISTS


def _is_id_list(kind: pa.DataType) -> bool:
    return _item_type(kind) in INTEGERS


def _is_any(kind: pa.DataType) -> bool:
    return True


_Tests = Mapping[str, Callable[[pa.DataType], bool]]  # of the types of columns, by their names
# A `doc_id` that holds no names is refused later; an `id` may be something else
_DOC_IDS = {"doc_id": _is_any, "id": _is_name}
_PARTS = {"part": pa.types.is_integer}


class _Usual(NamedTuple):
    """The usual columns of documents that are read in one form, each with a test of its type.

    `groups` are those of the documents, the first group before the others, and `what` is what they hold. `doc_ids` may
    hold the names of documents, `parts` the numbers of their rows.
    """

    groups: Sequence[_Tests]
    what: str
    doc_ids: _Tests = _DOC_IDS
    parts: _Tests = _PARTS


_ID_LISTS = dict.fromkeys(TOKEN_COLUMNS, _is_id_list)
_TEXT = {"text": is_text}
_CHATS = {CHAT_COLUMN: is_chat}
_VECTORS = dict.fromkeys(VECTOR_COLUMNS, lambda kind: is_vector(kind) or is_vectors(kind))
_FORMS: dict[Form, _Usual] = {
    "tokens": _Usual(
        (_ID_LISTS, _TEXT | dict.fromkeys(TOKEN_COLUMNS, INTEGERS.__contains__), _CHATS),
        "text, token ids or chats",
    ),
    "text": _Usual((_TEXT,), "text"),
    "chats": _Usual((_TEXT, _CHATS), "text or chats"),
    "vectors": _Usual(
        (_VECTORS,),
        "vectors, lists of float16, float32 or float64, which the model reads",
        dict.fromkeys(("slide_id", "doc_id"), _is_any),
        dict.fromkeys(("part", "span"), pa.types.is_integer),
    ),
}
