"""The `tokenize` job: text documents in, Arrow shards of token ids and a tokenizer.json out."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from longnet_cli.data.formats import Text
from longnet_cli.data.inputs import SHARD_SUFFIXES
from longnet_cli.data.sinks import ShardWriter, sync_folder, token_batch, token_schema
from longnet_cli.data.sources import read_texts
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.errors import ConfigError

SHARD_TOKENS = 1 << 27
BATCH_BYTES = 64 << 20  # of token ids in a record batch
TEXT_CHARS = 4 << 20  # of text encoded together


@dataclass(frozen=True)
class TokenizeResult:
    """What was written: `bytes` counts the texts' UTF-8 bytes; `shards` is empty when the output is stdout."""

    documents: int
    tokens: int
    bytes: int
    shards: list[Path]
    tokenizer: Tokenizer


def tokenize(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path | Tokenizer = "bytes",
    train_vocab: int | None = None,
    column: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> TokenizeResult:
    """Write the inputs' texts as token ids: a row a document, split over rows of one doc_id past 64 MB.

    `output` is a folder (`shard-00000.arrow` ..., `tokenizer.json`), one .arrow, .feather or .parquet file (with
    `NAME.tokenizer.json` beside it), or `-`: a stream on stdout. A shard ends at the first document with which it
    would pass `shard_tokens`. `train_vocab` first trains a byte-level BPE of that size on the same inputs.
    `on_progress` is called with (documents, tokens, bytes) so far. Raises ConfigError for options that do not fit
    together and for a folder that is in use, DataError for bad input; then no output is left behind.
    """
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens must be 1 or more, not {shard_tokens}")
    name = str(output)
    if name != "-" and not name.endswith(SHARD_SUFFIXES):
        _refuse_used(Path(output))
    trained = _tokenizer(inputs, tokenizer, train_vocab, column)
    texts = read_texts(inputs, column)
    if name == "-" or name.endswith(SHARD_SUFFIXES):
        result = _write(texts, trained, lambda index: output, None, on_progress)
        if name != "-":
            trained.save(Path(output).with_suffix(".tokenizer.json"))
        return result
    with _new_folder(Path(output)) as folder:
        result = _write(texts, trained, lambda index: folder / f"shard-{index:05d}.arrow", shard_tokens, on_progress)
        trained.save(folder / "tokenizer.json")
    shards = [Path(output) / shard.name for shard in result.shards]
    return TokenizeResult(result.documents, result.tokens, result.bytes, shards, trained)


def _tokenizer(
    inputs: Sequence[str | Path], tokenizer: str | Path | Tokenizer, train_vocab: int | None, column: str | None
) -> Tokenizer:
    if train_vocab is None:
        return tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    if tokenizer != "bytes":
        raise ConfigError("give a tokenizer or train one, not both")
    if any(str(item) == "-" for item in inputs):
        raise ConfigError("training a tokenizer reads the inputs twice, and stdin can be read once: save it to a file")
    return Tokenizer.train((text.text for text in read_texts(inputs, column)), train_vocab)


def _write(
    texts: Iterator[Text],
    tokenizer: Tokenizer,
    place: Callable[[int], str | Path],
    shard_tokens: int | None,
    on_progress: Callable[[int, int, int], None] | None,
) -> TokenizeResult:
    """Encode and write everything; `place` names the shard of an index, `shard_tokens` None means one shard."""
    documents = tokens = size = 0
    last, repeats = None, 0
    with _Shards(tokenizer, place, shard_tokens) as shards:
        for group in _groups(texts):
            for text, ids in zip(group, tokenizer.encode_batch([text.text for text in group]), strict=True):
                # Neighbours of one doc_id would be read back as one document.
                repeats = repeats + 1 if text.doc_id == last else 0
                last = text.doc_id
                shards.add(f"{text.doc_id}#{repeats}" if repeats else text.doc_id, ids)
                documents += 1
                tokens += len(ids)
                size += len(text.text.encode())
            if on_progress:
                on_progress(documents, tokens, size)
    return TokenizeResult(documents, tokens, size, shards.paths, tokenizer)


def _groups(texts: Iterator[Text]) -> Iterator[list[Text]]:
    """Collect documents until they hold TEXT_CHARS, so that the tokenizer has work for all cores."""
    group: list[Text] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text.text)
        if size >= TEXT_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group


class _Shards:
    """Rows into batches of at most BATCH_BYTES, batches into shards; a shard opens with its first document."""

    def __init__(self, tokenizer: Tokenizer, place: Callable[[int], str | Path], shard_tokens: int | None) -> None:
        self.paths: list[Path] = []
        self._place = place
        self._shard_tokens = shard_tokens
        self._schema = token_schema(
            vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, tokenizer_sha256=tokenizer.sha256
        )
        self._batch_tokens = BATCH_BYTES // (self._schema.field("input_ids").type.value_type.bit_width // 8)
        self._open = ExitStack()  # holds the writer, so that an error discards its file
        self._writer: ShardWriter | None = None
        self._rows: list[tuple[str, np.ndarray]] = []
        self._pending = 0  # tokens in _rows
        self._written = 0  # tokens in this shard, _rows included

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            with self._open:  # discards the shard if its last batch cannot be written
                self._flush()
        else:
            self._open.__exit__(kind, error, traceback)

    def add(self, doc_id: str, ids: np.ndarray) -> None:
        """Append one document of (tokens,) ids."""
        if self._shard_tokens and self._written and self._written + len(ids) > self._shard_tokens:
            self._flush()
            self._open.close()
            self._writer, self._written = None, 0
        if self._writer is None:
            path = self._place(len(self.paths))
            self._writer = self._open.enter_context(ShardWriter(path, self._schema))
            if str(path) != "-":
                self.paths.append(Path(path))
        for start in range(0, max(1, len(ids)), self._batch_tokens):
            part = ids[start : start + self._batch_tokens]
            if self._pending + len(part) > self._batch_tokens:
                self._flush()
            self._rows.append((doc_id, part))
            self._pending += len(part)
        self._written += len(ids)

    def _flush(self) -> None:
        if self._rows and self._writer:
            self._writer.write(token_batch(self._schema, self._rows))
        self._rows, self._pending = [], 0


def _refuse_used(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder: name a new one, or remove it first")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it when the block ends without an error."""
    target = Path(os.path.realpath(folder))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write: {error.strerror}") from error
    try:
        yield temporary
        _refuse_used(folder)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(target.parent)
