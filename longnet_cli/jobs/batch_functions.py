"""Vectors of texts; and vectors and scores of the rows of a table, also for engines that map a function over tables.

    vectors = embed(texts, model="org/name")                           a numpy array, a row for each text
    dataset.map_batches(encode_batches, batch_format="pyarrow")        Ray Data: a table in, a table out

A process loads a model on its first call and keeps it. A row is a document. Each table is read independently of the
others, so it does not matter which process gets which one.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache, partial
from inspect import Parameter, Signature
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from longnet_cli.attention import Pattern
from longnet_cli.attention.notation import read_pattern
from longnet_cli.basics.errors import ConfigError, DataError, InputWarning, NoTokensError
from longnet_cli.basics.events import Events, LeftOut
from longnet_cli.basics.sizes import parse_size
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.data.files.column_choice import ID_COLUMNS, INTEGERS, is_text
from longnet_cli.data.files.opened_inputs import Table, find_column, numpy_dtype, plain
from longnet_cli.jobs.scoring.scoring import Scorer
from longnet_cli.models.folder import Loaded, ModelFolder
from longnet_cli.nets.weights import model_digest
from longnet_cli.running.device import select_device
from longnet_cli.running.reader import Reader

from .encoding import EncodeFacts, Encoder, for_model
from .job_options import UNITS, EncodeOptions, ScoreOptions
from .row_jobs import RowJob

SIZE_OPTIONS = {"span", "stride", "dims", "tile_size", "last", "chunk", "context"}
Options = TypeVar("Options")
JobAndTokenizer = Callable[[], tuple[RowJob, Tokenizer | None]]


@dataclass(frozen=True)
class Reading:
    """The model and the way to read documents from batches: options that `longnet encode` and `longnet score` share.

    `id_column` holds the names of the documents; without it, `doc_id` is used, otherwise `id`. `column` holds the
    documents, as text or as lists of token ids. The columns of `keep` are copied to the rows of the output. With
    `skip_bad`, a document that the model cannot read has no rows.
    """

    model: str = "longnet-tiny"
    tokenizer: str | None = None
    pattern: str | Pattern | None = None
    bos: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    chunk: int | None = None
    column: str | None = None
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    skip_bad: bool = False

    def load(self, embeds: bool = False) -> Loaded:
        """Return the model and its tokenizer, loaded once per process: to make vectors, if it `embeds`.

        Raises what `ModelFolder.load` raises.
        """
        return _load(
            self.model,
            self.tokenizer,
            self.pattern,
            self.bos,
            self.device,
            self.dtype,
            embeds,
        )

    def reader(self, loaded: Loaded) -> Reader:
        """Return a reader with the model."""
        events = Events(left_out=LeftOut.of(self.skip_bad))
        return Reader(loaded.net, chunk=self.chunk, dtype=self.dtype, events=events)


def _signature(*kinds: type) -> Signature:
    """Return the signature of a function that takes the fields of these dataclasses as keyword arguments."""
    table = Parameter("table", Parameter.POSITIONAL_OR_KEYWORD)
    keyword = partial(Parameter, kind=Parameter.KEYWORD_ONLY)
    options = [
        keyword(option.name, default=option.default, annotation=option.type)
        for option in chain.from_iterable(map(fields, kinds))
    ]
    return Signature([table, *options])


def embed(
    texts: Iterable[str] | pa.Array | pa.ChunkedArray,
    *,
    model: str,
    **options: Any,
) -> np.ndarray:
    """Return the vectors of texts, (texts, dim): one row for each, NaN for a text without tokens.

    The texts may be a column of Arrow. `options` are those of `encode_batches` but for `span` and `keep`: without
    `pool` and `prefix`, the model's own. The dtype is float32, unless `embedding_dtype` says float16. With `skip_bad`,
    a text that the model cannot read is NaN. Raises ConfigError for what is no list of texts, and what `encode_batches`
    raises.
    """
    listed = texts.to_pylist() if isinstance(texts, pa.Array | pa.ChunkedArray) else [*texts]
    if isinstance(texts, str) or not all(isinstance(text, str) for text in listed):
        raise ConfigError(
            "a list of texts is needed, each a str: [text] for one, encode_batches for a table"
        )
    numbers = pa.array(range(len(listed)), pa.int64())
    table = pa.table({"doc_id": numbers, "text": pa.array(listed, pa.large_string())})
    rows = encode_batches(table, model=model, span=None, keep=(), **options)
    embeddings = rows["embedding"].combine_chunks()
    kind = embeddings.type
    vectors = np.full((len(listed), kind.list_size), np.nan, numpy_dtype(kind.value_type))
    places = rows["doc_id"].to_numpy().astype(int)
    vectors[places] = embeddings.flatten().to_numpy().reshape(-1, kind.list_size)
    return vectors


def encode_batches(table: Any, **options: Any) -> pa.Table:
    """Encode the documents of a table, and return the rows of `longnet encode`, as a pyarrow table.

    A table is all that passes Arrow data on (`__arrow_c_stream__`), as a frame of polars or pandas, a relation of
    DuckDB, or a Dataset of Hugging Face; a record batch; and a list of texts. The output has the columns of
    `Encoder.schema`, for text `char_start` and `char_end`, then the columns of `keep`. The options are those of
    `EncodeOptions` and `Reading`: without `pool` and `prefix`, the model's own. Sizes may be texts, as on the command
    line: `span="1Ki"`. An empty document has no rows.

    A frame without a column of names, or a list of texts, has its row numbers as `doc_id`, from "0" on. A pyarrow table
    or batch needs such a column: an engine passes it one part of the rows after the other, and each would begin at 0.

    Raises ConfigError for invalid options, for what is no table, and for a table without the id column or the document
    column, DataError for bad values, and what `encode` raises.
    """
    asked, reading = _read(options, EncodeOptions)

    def job_and_tokenizer() -> tuple[RowJob, Tokenizer | None]:
        loaded = reading.load(embeds=True)
        options, facts, tokenizer = _encoding(reading.model, loaded, asked)
        return Encoder(reading.reader(loaded), options, facts), tokenizer

    return _read_table(table, reading, job_and_tokenizer)


def score_batches(table: Any, **options: Any) -> pa.Table:
    """Score the documents of a table, and return the rows of `longnet score -o`, as a pyarrow table.

    Tables are those of `encode_batches`. The output has the columns of `Scorer.schema`, then
    the columns of `keep`. The options are those of `ScoreOptions` and `Reading`. With several contexts, `(64, 1024)` or
    `"64,1Ki"`, the rows also show what a document gains from the longest one.

    Raises ConfigError for invalid options, for what is no table, and for a table without the id column or the document
    column, DataError for bad values, and what `score` raises.
    """
    context = options.get("context")
    if isinstance(context, str | int):
        context = str(context).split(",")
    options["context"] = context and tuple(_size("context", size) for size in context)
    asked, reading = _read(options, ScoreOptions)

    def job_and_tokenizer() -> tuple[RowJob, Tokenizer | None]:
        loaded = reading.load()
        return Scorer.of_model(reading.reader(loaded), asked, loaded), loaded.tokenizer

    return _read_table(table, reading, job_and_tokenizer)


encode_batches.__signature__ = _signature(EncodeOptions, Reading)  # type: ignore[attr-defined]
score_batches.__signature__ = _signature(ScoreOptions, Reading)  # type: ignore[attr-defined]


def _read(options: Mapping[str, Any], kind: Callable[..., Options]) -> tuple[Options, Reading]:
    """Return what is asked of a job, and of the reading. Raises TypeError for a name that neither has."""
    sizes = {name: _size(name, value) for name, value in options.items() if name in SIZE_OPTIONS}
    keep = options.get("keep", ())
    columns = (keep,) if isinstance(keep, str) else tuple(keep)
    of_job = {**options, **sizes, "keep": columns}
    of_reading = {
        field.name: of_job.pop(field.name) for field in fields(Reading) if field.name in of_job
    }
    return kind(**of_job), Reading(**of_reading)


def _size(name: str, size: int | str | None) -> int | str | None:
    """Return a size that may be a text, such as `64Ki`, or the unit of a span.

    Raises ConfigError, with the option's name, for other texts.
    """
    if not isinstance(size, str) or (name == "span" and size in UNITS):
        return size
    try:
        return parse_size(size)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


@cache
def _load(
    model: str,
    tokenizer: str | None,
    pattern: str | Pattern | None,
    bos: str | None,
    device: str,
    dtype: str,
    embeds: bool,
) -> Loaded:
    notes = list[str]()
    loaded = ModelFolder.find(model, gguf=True, embeds=embeds).load(
        device=select_device(device),
        dtype=dtype,
        tokenizer=tokenizer,
        pattern=read_pattern(pattern, "pattern"),
        bos=bos,
        note=notes.append,
    )
    for line in notes if loaded.embedding else ():
        warnings.warn(line, InputWarning, stacklevel=2)
    loaded.net.digest = model_digest(loaded.net)  # once per process, not once per batch
    return loaded


@cache
def _encoding(
    model: str,
    loaded: Loaded,
    asked: EncodeOptions,
) -> tuple[EncodeOptions, EncodeFacts, Tokenizer | None]:
    """Return the options of `encode`, what it knows of the model, and what tokenizes texts, once per process."""
    folder = ModelFolder.find(model, gguf=True, embeds=True)
    options, facts = for_model(asked, folder, loaded)
    return options, facts, facts.tokenizer_for(loaded)


def _read_table(data: Any, reading: Reading, job_and_tokenizer: JobAndTokenizer) -> pa.Table:
    """Return the rows of a job, with what tokenizes texts for it, for the documents of a table."""
    numbered = not isinstance(data, pa.Table | pa.RecordBatch)
    return pa.Table.from_batches(_rows(as_table(data), reading, job_and_tokenizer, numbered))


def as_table(data: Any) -> pa.Table:
    """Return what has Arrow data, or is a list of texts, as a table. Raises ConfigError for all else."""
    kind = type(data).__name__
    if kind in _MAKES_A_TABLE:
        raise ConfigError(_NO_TABLE.format(kind, _MAKES_A_TABLE[kind]))
    if hasattr(data, "with_format") and hasattr(data, "__getitem__"):  # a Dataset of Hugging Face
        data = data.with_format("arrow")[:]
    are_texts = (
        isinstance(data, list | tuple) and data and all(isinstance(text, str) for text in data)
    )
    if not (are_texts or hasattr(data, "__arrow_c_stream__") or isinstance(data, pa.RecordBatch)):
        raise ConfigError(_NO_TABLE.format(kind, "pyarrow.table"))
    try:
        return pa.table({"text": data} if are_texts else data)
    # pandas' columns may have values of any types
    except (pa.ArrowException, TypeError, ValueError) as error:
        why = "; ".join(map(str, error.args))
        raise DataError(f"the table cannot be Arrow data: {why}") from error


_NO_TABLE = (
    "a table (of pyarrow, or a frame that passes Arrow data on) is needed, not {}: {} makes one"
)
# by the class, of polars, pandas or pyarrow: a column passes Arrow data on as well, and is no table
_MAKES_A_TABLE = {
    "LazyFrame": ".collect()",
    "Series": ".to_frame()",
    "ChunkedArray": "pyarrow.table",
}


def _rows(
    table: pa.Table,
    reading: Reading,
    job_and_tokenizer: JobAndTokenizer,
    numbered: bool = False,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a table whose rows are documents, then an empty batch, so that the schema is known if none are.

    If it is `numbered`, its row numbers are the names of the documents unless a column is. Raises ConfigError and
    DataError for a table that cannot be read this way.
    """
    wanted = [reading.id_column] if reading.id_column else ID_COLUMNS
    names = table.schema.names
    if not {*wanted} & {*names}:
        if reading.id_column or not numbered:
            raise ConfigError(
                f"table: there is no column {' or '.join(map(repr, wanted))} that names the documents: choose one "
                f"(id_column); its columns are {', '.join(names)}"
            )
        table = table.append_column("doc_id", pa.array(range(len(table)), pa.int64()))
    job, tokenizer = job_and_tokenizer()
    batches = table.to_batches()
    opened = Table("table", "table", table.schema, lambda names: iter(batches), rows_alone=True)
    inputs = Inputs(
        (),
        tokenizer,
        reading.column,
        reading.id_column,
        reading.keep,
        vocab_size=job.reader.model.config.vocab_size,
        skip_bad=reading.skip_bad,
        unit=job.unit,
    )
    columns = inputs.columns_of(opened)
    if columns.type in INTEGERS:
        raise ConfigError(
            f"table: column {columns.documents!r} has one id per row: in batches a row is a document, a list of ids "
            "or a text"
        )
    carried = [*job.text_fields] if is_text(columns.type) else []
    carried += [
        pa.field(name, plain(pa.nulls(0, place.type)).type)
        for name in reading.keep
        if (place := find_column(table.schema, name))
    ]
    job.kept_fields = carried
    with suppress(NoTokensError):  # there may be tokens in other batches
        yield from job.rows(inputs.documents_of(opened) if len(table) else ())
    yield pa.RecordBatch.from_pylist([], job.schema)
