"""Documents in: Arrow IPC files and streams, Parquet and UTF-8 text, from files, folders, globs, @lists and stdin.

    inputs --_sources--> _Source --_open--> Text | _Table --> Text (read_texts) | Document (read_documents)

What an input is, its first 8 bytes say, never its name. A new format is one more case in `_open`; a new kind of
address is one more case in `_sources`. Token columns are memory-mapped and sliced, never joined by Arrow: its 32-bit
list offsets overflow at 2^31 tokens.
"""

import glob
import json
import os
import re
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc

from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.errors import ConfigError, DataError

TOKEN_COLUMNS = ("input_ids", "tokens", "token_ids", "ids")
SHARD_SUFFIXES = (".arrow", ".feather", ".parquet")

BLOCK = 1 << 22  # tokens looked at together where a pass needs memory of its own
PARQUET_BATCH_BYTES = 64 << 20
SPOOL_BYTES = 256 << 20  # a document that must be copied and is larger than this goes to a file in $TMPDIR

_INTEGERS = (pa.uint8(), pa.uint16(), pa.uint32(), pa.int8(), pa.int16(), pa.int32(), pa.int64())
_TEXTS = (pa.string(), pa.large_string())

Value = TypeVar("Value")


@dataclass(frozen=True)
class Text:
    """A document as text; `where` is "file" or "file, row 3" (rows count from 0)."""

    doc_id: str
    text: str
    where: str


@dataclass(frozen=True)
class Document:
    """A document as token ids.

    `tokens` is (tokens,) int32 or int64. Where possible it is a read-only view of a memory-mapped file: copy what
    you cut from it (`.astype(np.int64)`) before torch sees it, as torch would write into the map and crash.
    `n_bytes` counts the UTF-8 bytes of its text, None where they are unknown.
    """

    doc_id: str
    tokens: np.ndarray
    n_bytes: int | None
    where: str


@dataclass(frozen=True)
class _Source:
    """One file to read, or stdin where `path` is None. `name` becomes the doc_id, `where` goes into messages."""

    path: Path | None
    name: str
    where: str


@dataclass(frozen=True)
class _Table:
    """An opened Arrow or Parquet input; `read` yields batches that hold at least the columns it is given."""

    name: str
    where: str
    schema: pa.Schema
    read: Callable[[list[str]], Iterator[pa.RecordBatch]]


def read_texts(inputs: Sequence[str | Path], column: str | None = None) -> Iterator[Text]:
    """Yield the documents of text files and of text columns, in order; one file is held in memory at a time.

    Raises ConfigError for a table without a text column, DataError for missing, empty or damaged data.
    """
    for source in _sources(inputs):
        opened = _open(source)
        if isinstance(opened, Text):
            yield opened
        else:
            yield from _table_texts(opened, _choose_column(opened, column, text_only=True))


def read_documents(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer | None,
    *,
    column: str | None = None,
    vocab_size: int | None = None,
) -> Iterator[Document]:
    """Yield the documents of every input, in order, as token ids.

    Token columns are checked against `vocab_size` (without it, the tokenizer's); text needs the tokenizer. A row is a
    document, and neighbouring rows of a file with one `doc_id` are one; a flat integer column is cut at the EOS id.
    Raises ConfigError for a missing tokenizer or column, DataError for missing, empty, damaged or out-of-range data.
    """
    limit = vocab_size if vocab_size is not None or tokenizer is None else tokenizer.vocab_size
    for source in _sources(inputs):
        opened = _open(source)
        if isinstance(opened, Text):
            yield _encode(opened, tokenizer, limit)
            continue
        name = _choose_column(opened, column, text_only=False)
        kind = opened.schema.field(name).type
        if kind in _TEXTS:
            for text in _table_texts(opened, name):
                yield _encode(text, tokenizer, limit)
        else:
            rows = _stream_rows if kind in _INTEGERS else _list_rows
            for doc_id, where, parts in rows(opened, name, limit, tokenizer):
                tokens = _join(parts)
                yield Document(doc_id, tokens, tokenizer.n_bytes(tokens) if tokenizer else None, where)


# --- which files -----------------------------------------------------------------------------------------


def _sources(inputs: Sequence[str | Path]) -> list[_Source]:
    """Expand folders, globs and lists into files; a name that occurs twice becomes the whole path."""
    if not inputs:
        raise ConfigError("no input: name a file, a folder, a glob, @list.txt, or - for stdin")
    if sum(str(item) == "-" for item in inputs) > 1:
        raise ConfigError("stdin (-) can be read only once")
    found = [source for item in inputs for source in _expand(str(item), in_list=False)]
    times = Counter(source.name for source in found)
    return [source if times[source.name] == 1 else _Source(source.path, source.where, source.where) for source in found]


def _expand(item: str, *, in_list: bool) -> list[_Source]:
    path = Path(item)
    if item == "-":
        return [_stdin_source()]
    if path.is_dir():
        return [_Source(file, file.relative_to(path).as_posix(), str(file)) for file in _folder_files(path)]
    if path.exists():
        return [_Source(path, path.name, item)]
    if item.startswith("@") and not in_list:
        return _list_sources(Path(item[1:]))
    if glob.has_magic(item):
        files = sorted((match for match in glob.glob(item, recursive=True) if os.path.isfile(match)), key=_natural)
        if files:
            return [_Source(Path(file), Path(file).name, file) for file in files]
        raise DataError(f"{item}: no file matches")
    raise DataError(f"{item}: no such file or folder")


def _stdin_source() -> _Source:
    """`< file` is a file like any other, which can be memory-mapped; anything else is read once, forwards."""
    try:
        handle = sys.stdin.fileno()
        regular = stat.S_ISREG(os.fstat(handle).st_mode) and os.lseek(handle, 0, os.SEEK_CUR) == 0
    except (OSError, ValueError):
        regular = False
    return _Source(Path("/dev/stdin") if regular else None, "stdin", "stdin")


def _list_sources(path: Path) -> list[_Source]:
    """One input a line, as typed on the command line; blank lines and # comments are skipped."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"@{path}: cannot read the list: {error}") from error
    items = [line for line in lines if line and not line.startswith("#")]
    if not items:
        raise DataError(f"@{path}: the list names no input")
    return [source for item in items for source in _expand(item, in_list=True)]


def _folder_files(folder: Path) -> list[Path]:
    """The shards of a data set in its own order, or else every text file below the folder, naturally sorted."""
    state = folder / "state.json"
    if state.exists():  # written by `datasets.save_to_disk`, beside caches that are no part of it
        try:
            shards = [folder / entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        except (ValueError, KeyError, TypeError):
            shards = []
        missing = next((shard for shard in shards if not shard.exists()), None)
        if missing:
            raise DataError(f"{missing}: no such file, but {state} lists it")
        if shards:
            return shards
    if (folder / "dataset_dict.json").exists():
        splits = ", ".join(sorted(str(child) for child in folder.iterdir() if child.is_dir()))
        raise ConfigError(f"{folder} holds several splits of a data set: name one of {splits}")
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    files = sorted((file for file in files if file.is_file()), key=lambda file: _natural(file.as_posix()))
    shards = [file for file in files if file.suffix in SHARD_SUFFIXES]
    shards = [shard for shard in shards if shard.parent == folder] or shards
    chosen = shards or [file for file in files if _looks_like_text(file)]
    if not chosen:
        raise DataError(f"{folder}: the folder holds nothing readable (Arrow, Parquet or text files)")
    return chosen


def _looks_like_text(file: Path) -> bool:
    """Whether a file met in a folder is worth opening: images and empty `__init__.py` files are passed over."""
    with _reading(str(file)), file.open("rb") as opened:
        head = opened.read(8192)
    return bool(head) and (b"\0" not in head or _format(head) != "text")


def _natural(name: str) -> list[str | int]:
    """Sort key that puts part-2 before part-10."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]+)", name))]


# --- opening: what is in a file --------------------------------------------------------------------------


def _format(head: bytes) -> str:
    if head.startswith(b"ARROW1\0\0"):
        return "file"
    if head.startswith(b"\xff\xff\xff\xff"):
        return "stream"
    return "parquet" if head.startswith(b"PAR1") else "text"


def _open(source: _Source) -> Text | _Table:
    if source.path is None:
        return _open_pipe(source, sys.stdin.buffer)
    with _reading(source.where):
        if not source.path.is_file():  # a named pipe, or the shell's <(command)
            return _open_pipe(source, open(source.path, "rb"))
        with open(source.path, "rb") as opened:
            kind = _format(opened.peek(8))
            if kind == "text":
                return _decode(source, opened.read())
        if kind == "parquet":
            return _open_parquet(source, str(source.path))
        mapped = pa.memory_map(str(source.path))
        if kind == "stream":
            return _open_stream(source, mapped)
        reader = ipc.open_file(mapped)
    return _Table(source.name, source.where, reader.schema, lambda columns: _file_batches(reader, source.where))


def _open_pipe(source: _Source, raw: Any) -> Text | _Table:
    pipe = _Pipe(raw)
    with _reading(source.where):
        kind = _format(pipe.peek(8))
        if kind == "text":
            return _decode(source, pipe.read())
        if kind == "parquet":  # its index is at its end
            return _open_parquet(source, pa.BufferReader(pipe.read()))
        if kind == "file":  # after its magic, an IPC file is a stream and then an index
            pipe.read(8)
        return _open_stream(source, pipe, index_follows=kind == "file")


class _Pipe:
    """A pipe as a file object for pyarrow, which takes a short read for the end of the data: these reads are whole."""

    closed = False

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._head = b""
        self._position = 0

    def peek(self, size: int) -> bytes:
        """The first bytes, fewer only at the end; they stay in the pipe."""
        self._head = self.read(size)
        self._position = 0
        return self._head

    def read(self, size: int = -1) -> bytes:
        wanted = sys.maxsize if size is None or size < 0 else size
        parts = [self._head[:wanted]] if self._head else []
        self._head = self._head[wanted:]
        missing = wanted - sum(map(len, parts))
        while missing and (part := self._raw.read(min(missing, 1 << 30))):
            parts.append(part)
            missing -= len(part)
        self._position += wanted - missing
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True


def _decode(source: _Source, data: bytes) -> Text:
    """A text file is one document, byte for byte: no newline translation, no normalisation."""
    if not data:
        raise DataError(f"{source.where}: the file is empty (0 bytes)")
    bad = data.find(b"\0")
    if bad < 0:
        try:
            return Text(source.name, data.decode("utf-8"), source.where)
        except UnicodeDecodeError as error:
            bad = error.start
    raise DataError(
        f"{source.where}: neither Arrow, Parquet nor UTF-8 text: the byte at offset {bad} is 0x{data[bad]:02x}"
    )


def _file_batches(reader: "ipc.RecordBatchFileReader", where: str) -> Iterator[pa.RecordBatch]:
    for index in range(reader.num_record_batches):
        with _reading(f"{where}, batch {index}"):
            batch = reader.get_batch(index)
        yield batch


def _open_stream(source: _Source, stream: Any, *, index_follows: bool = False) -> _Table:
    where = source.where
    reader = ipc.open_stream(stream)

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        index = 0
        while True:
            before = stream.tell()
            with _reading(f"{where}, batch {index}"):
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    break
            yield batch
            index += 1
        # pyarrow takes the end of the data for the end of the stream. Only a marker tells the two apart.
        if stream.tell() == before:
            raise DataError(f"{where}: truncated after {index} batches: the end-of-stream marker is missing")
        tail = stream.read(8)
        if index_follows:
            while piece := stream.read(1 << 20):
                tail = (tail + piece)[-8:]
            if not tail.endswith(b"ARROW1"):
                raise DataError(f"{where}: truncated: the index at the end of the Arrow file is missing")
        elif tail:
            raise DataError(f"{where}: more data follows the end of the Arrow stream; give one stream a file")

    return _Table(source.name, where, reader.schema, batches)


def _open_parquet(source: _Source, place: Any) -> _Table:
    import pyarrow.parquet as pq  # 30 ms that Arrow input need not pay

    file = pq.ParquetFile(place, memory_map=isinstance(place, str))
    group_bytes = [file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups)]
    rows = max(1, PARQUET_BATCH_BYTES * file.metadata.num_rows // max(1, sum(group_bytes)))

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        reader = file.iter_batches(batch_size=rows, columns=columns)
        index = 0
        while True:
            with _reading(f"{source.where}, batch {index}"):
                batch = next(reader, None)
            if batch is None:
                return
            yield batch
            index += 1

    return _Table(source.name, source.where, file.schema_arrow, batches)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn what pyarrow or the system says about an input into one line that names it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            raise DataError(f"{what}: {error.strerror}") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{what}: the data is damaged or truncated ({reason})") from error


# --- tables: which column, which rows --------------------------------------------------------------------


def _is_list(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and kind.value_type in _INTEGERS


def _choose_column(table: _Table, column: str | None, *, text_only: bool) -> str:
    """The column of documents: the one asked for, else the one list of ids, else the one flat or text column."""

    def refuse(problem: str) -> ConfigError:
        columns = ", ".join(f"{field.name}: {field.type}" for field in table.schema)
        return ConfigError(f"{table.where}: {problem}; its columns are {columns}")

    kinds = {field.name: field.type for field in table.schema}
    if column is not None:
        if column not in kinds:
            raise refuse(f"there is no column {column!r}")
        kind = kinds[column]
        if kind in _TEXTS or (not text_only and (kind in _INTEGERS or _is_list(kind))):
            return column
        raise refuse(f"column {column!r} does not hold {'text' if text_only else 'token ids or text'}")
    flat = ["text"] if kinds.get("text") in _TEXTS else []
    lists: list[str] = []
    if not text_only:
        lists = [name for name in TOKEN_COLUMNS if name in kinds and _is_list(kinds[name])]
        flat += [name for name in TOKEN_COLUMNS if kinds.get(name) in _INTEGERS]
    found = lists or flat
    if len(found) > 1:
        raise refuse(f"several columns may hold the documents ({', '.join(found)}): choose one (--column)")
    if not found:
        names = "text" if text_only else f"{', '.join(TOKEN_COLUMNS)} or text"
        raise refuse(f"no column named {names} of a fitting type: choose one (--column)")
    return found[0]


def _columns(table: _Table, name: str) -> Iterator[tuple[int, pa.Array, list[str] | None]]:
    """Yield (first row, the column, the doc_ids) of each batch, all checked for damage and nulls."""
    ids_kind = table.schema.field("doc_id").type if "doc_id" in table.schema.names and name != "doc_id" else None
    has_ids = ids_kind in _TEXTS or (ids_kind is not None and pa.types.is_integer(ids_kind))
    row = 0
    for index, batch in enumerate(table.read([name, "doc_id"] if has_ids else [name])):
        column = batch.column(name)
        with _reading(f"{table.where}, batch {index}"):
            column.validate(full=True)  # list offsets that point outside the data would crash, not raise
        _refuse_nulls(column, table.where, row)
        doc_ids = None
        if has_ids:
            _refuse_nulls(batch.column("doc_id"), f"{table.where}, doc_id", row)
            doc_ids = [str(doc_id) for doc_id in batch.column("doc_id").to_pylist()]
        yield row, column, doc_ids
        row += batch.num_rows
    if row == 0:
        raise DataError(f"{table.where}: the table has 0 rows")


def _refuse_nulls(column: pa.Array, where: str, first_row: int) -> None:
    if column.null_count:
        row = first_row + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{where}, row {row}: the value is null")


def _group(table: _Table, rows: Iterator[tuple[int, str | None, Value]]) -> Iterator[tuple[str, str, list[Value]]]:
    """Collect (row, doc_id, value) into (doc_id, where, values): neighbours that share a doc_id are one document."""
    for doc_id, members in groupby(rows, key=lambda row: row[1] if row[1] is not None else row[0]):
        document = list(members)
        first = document[0][0]
        name = doc_id if isinstance(doc_id, str) else f"{table.name}:{first}"
        yield name, f"{table.where}, row {first}", [value for _, _, value in document]


def _table_texts(table: _Table, name: str) -> Iterator[Text]:
    def rows() -> Iterator[tuple[int, str | None, str]]:
        for first, column, doc_ids in _columns(table, name):
            for index, value in enumerate(column):
                yield first + index, doc_ids[index] if doc_ids else None, value.as_py()

    for doc_id, where, texts in _group(table, rows()):
        yield Text(doc_id, "".join(texts), where)


def _list_rows(
    table: _Table, name: str, limit: int | None, tokenizer: Tokenizer | None
) -> Iterator[tuple[str, str, list[np.ndarray]]]:
    """Yield (doc_id, where, parts) of a list column, parts being (tokens,) views of its memory."""

    def rows() -> Iterator[tuple[int, str | None, np.ndarray]]:
        for first, column, doc_ids in _columns(table, name):
            if pa.types.is_fixed_size_list(column.type):
                size = column.type.list_size
                offsets = (np.arange(len(column) + 1, dtype=np.int64) + column.offset) * size
            else:
                offsets = column.offsets.to_numpy()
            # `values` ignores the column's own slice; the offsets are into all of it.
            start, end = int(offsets[0]), int(offsets[-1])
            bounds = offsets.astype(np.int64) - start
            ids = _checked_ids(column.values.slice(start, end - start), table.where, first, bounds, limit)
            for index in range(len(column)):
                yield first + index, doc_ids[index] if doc_ids else None, ids[bounds[index] : bounds[index + 1]]

    yield from _group(table, rows())


def _stream_rows(
    table: _Table, name: str, limit: int | None, tokenizer: Tokenizer | None
) -> Iterator[tuple[str, str, list[np.ndarray]]]:
    """Yield (doc_id, where, parts) of a flat column: what lies between its EOS ids, nothing where two are adjacent."""
    written = (table.schema.metadata or {}).get(b"longnet.eos_id")
    eos_id = tokenizer.eos_id if tokenizer else int(written) if written else None
    if eos_id is None:
        raise ConfigError(
            f"{table.where}: column {name!r} is one stream of ids, which only an end-of-text id can cut into "
            "documents: give a tokenizer that has one"
        )
    parts: list[np.ndarray] = []
    start = count = 0

    def document() -> tuple[str, str, list[np.ndarray]]:
        return f"{table.name}:{count}", f"{table.where}, row {start}", parts

    for first, column, _ in _columns(table, name):
        all_ids = _checked_ids(column, table.where, first, None, limit)
        for block in range(0, len(all_ids), BLOCK):
            ids = all_ids[block : block + BLOCK]
            begin = 0
            for end in [*np.flatnonzero(ids == eos_id).tolist(), len(ids)]:
                if end > begin:
                    if not parts:
                        start = first + block + begin
                    parts.append(ids[begin:end])
                if end < len(ids) and parts:
                    yield document()
                    parts, count = [], count + 1
                begin = end + 1
    if parts:
        yield document()
    elif count == 0:
        raise DataError(f"{table.where}: column {name!r} holds nothing but end-of-text ids")


# --- ids -------------------------------------------------------------------------------------------------


def _checked_ids(ids: pa.Array, where: str, first_row: int, bounds: np.ndarray | None, limit: int | None) -> np.ndarray:
    """The (tokens,) ids as a view of Arrow's memory, when none is null, negative, or `limit` or more.

    `bounds` (rows + 1,) says where each row begins, None when every id is a row; both count from `first_row`.
    """

    def refuse(bad: np.ndarray, problem: str) -> DataError:
        position = int(np.flatnonzero(bad)[0])
        row, offset = position, 0
        if bounds is not None:
            row = int(np.searchsorted(bounds, position, side="right")) - 1
            offset = position - int(bounds[row])
        return DataError(f"{where}, row {first_row + row}, offset {offset}: {problem.format(ids[position])}")

    if ids.null_count:
        raise refuse(ids.is_null().to_numpy(zero_copy_only=False), "the token id is null")
    array: np.ndarray = ids.to_numpy(zero_copy_only=True)
    if len(ids):
        low, high = (pc.min_max(ids)[key].as_py() for key in ("min", "max"))
        if low < 0:
            raise refuse(array < 0, "token id {} is negative")
        if limit is not None and high >= limit:
            raise refuse(array >= limit, f"token id {{}} does not fit a vocabulary of {limit}")
    return array


def _encode(text: Text, tokenizer: Tokenizer | None, limit: int | None) -> Document:
    if tokenizer is None:
        raise ConfigError(f"{text.where}: this is text: give a tokenizer (bytes, or a tokenizer.json)")
    tokens = tokenizer.encode(text.text)
    if limit is not None and limit < tokenizer.vocab_size:
        offsets = np.array([0, len(tokens)])
        _checked_ids(pa.array(tokens), text.where, 0, offsets, limit)
    return Document(text.doc_id, tokens, len(text.text.encode()), text.where)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """One (tokens,) int32 or int64 array: the part itself if it is that already, else a copy.

    A large copy is made in an unnamed temporary file and mapped read-only, so 1e9 tokens take disk, not memory.
    """
    if len(parts) == 1 and parts[0].dtype in (np.int32, np.int64):
        return parts[0]
    wide = any(part.dtype in (np.uint32, np.int64) for part in parts)
    dtype = np.dtype(np.int64 if wide else np.int32)
    total = sum(len(part) for part in parts)
    if total * dtype.itemsize <= SPOOL_BYTES:
        return np.concatenate(parts, dtype=dtype)
    with tempfile.TemporaryFile() as file:
        for part in parts:
            for start in range(0, len(part), BLOCK):
                file.write(part[start : start + BLOCK].astype(dtype).tobytes())
        file.flush()
        return np.memmap(file, dtype, mode="r", shape=(total,))
