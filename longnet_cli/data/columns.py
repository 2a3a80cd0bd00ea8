"""Choose the column of a table that holds the documents, and check the type of their tokens."""

import pyarrow as pa

from longnet_cli.data.tables import TOKEN_COLUMNS, Table
from longnet_cli.errors import ConfigError, DataError

INTEGERS = (
    *(pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
    *(pa.int8(), pa.int16(), pa.int32(), pa.int64()),
)
FLOATS = (pa.float16(), pa.float32(), pa.float64())
_TEXTS = (pa.string(), pa.large_string(), pa.string_view())
_LISTS = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds text, written out or as numbers of a dictionary (categorical)."""
    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in _TEXTS


def _is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in _LISTS) and kind.value_type in INTEGERS


def choose_column(table: Table, column: str | None, *, text_only: bool = False) -> str:
    """The column of documents: the one asked for, otherwise the one list of ids, otherwise the one flat or text column.

    Raises ConfigError, listing the columns, when none or several would do, DataError where its name is that of several.
    """
    name = _choose(table, column, text_only)
    for used in (name, "doc_id", "part"):
        if table.schema.names.count(used) > 1:
            raise DataError(f"{table.where}: several columns are named {used!r}: rename them, or leave the others out")
    return name


def _choose(table: Table, column: str | None, text_only: bool) -> str:

    def refuse(problem: str) -> ConfigError:
        columns = ", ".join(f"{field.name}: {field.type}" for field in table.schema)
        return ConfigError(f"{table.where}: {problem}; its columns are {columns}")

    kinds = {field.name: field.type for field in table.schema}
    if column is not None:
        if column not in kinds:
            raise refuse(f"there is no column {column!r}")
        kind = kinds[column]
        if is_text(kind) or (not text_only and (kind in INTEGERS or _is_list(kind))):
            return column
        raise refuse(f"column {column!r} does not hold {'text' if text_only else 'token ids or text'}")
    flat = ["text"] if "text" in kinds and is_text(kinds["text"]) else []
    lists: list[str] = []
    if not text_only:
        lists = [name for name in TOKEN_COLUMNS if name in kinds and _is_list(kinds[name])]
        flat += [name for name in TOKEN_COLUMNS if kinds.get(name) in INTEGERS]
    found = lists or flat
    if len(found) > 1:
        raise refuse(f"several columns may hold the documents ({', '.join(found)}): choose one (--column)")
    if not found:
        names = "text" if text_only else f"{', '.join(TOKEN_COLUMNS)} or text"
        raise refuse(f"no column named {names} with text or integers: choose one (--column)")
    return found[0]


class TokenTypes:
    """Check that all inputs hold one type of token: int32 beside int64 is mostly two tokenizers, or a mistake."""

    def __init__(self) -> None:
        self.first: tuple[str, pa.DataType] | None = None

    def check(self, table: Table, column: str) -> None:
        """DataError when another input had another type; text has none."""
        kind = token_type(table.schema, column)
        if kind is None or not table.typed:
            return
        self.first = self.first or (table.where, kind)
        where, expected = self.first
        if kind != expected:
            raise DataError(
                f"{table.where}: its tokens are {kind} and those of {where} are {expected}: all inputs need one "
                "type: write one of them again"
            )


def token_type(schema: pa.Schema, column: str) -> pa.DataType | None:
    """The type of the ids in a column, None for text and for what no id can be of."""
    kind = schema.field(column).type
    if kind in INTEGERS:
        return kind
    return kind.value_type if _is_list(kind) else None


def is_vector(kind: pa.DataType) -> bool:
    """Return whether each value of a column of this type is a vector: a list of floating-point numbers."""
    return any(test(kind) for test in _LISTS[:3]) and kind.value_type in FLOATS


def is_vectors(kind: pa.DataType) -> bool:
    """Return whether each value of a column of this type is a list of vectors."""
    return any(test(kind) for test in _LISTS[:3]) and is_vector(kind.value_type)


def stays_in_file(schema: pa.Schema, column: str) -> bool:
    """Return whether the numbers of a column, token ids or vectors, are read only when they are wanted."""
    kind = schema.field(column).type
    return token_type(schema, column) is not None or is_vector(kind) or is_vectors(kind)
