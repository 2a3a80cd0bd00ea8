"""The `gains` job: a row per document, with its nats per token at each context and the gain of the longest context.

    documents --score--> nats of each token, context by context --_Gain--> rows --> Arrow batches

Documents are first grouped into portions, and each portion is scored independently of the others. So a run that is
resumed, or shared by many processes, writes the same bytes as an uninterrupted run of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from longnet_cli.cuts import Cut
from longnet_cli.data.documents import Document
from longnet_cli.data.kept import kept_column, kept_settings, kept_value, with_kept
from longnet_cli.data.shards import ShardFolder, run_to_resume
from longnet_cli.errors import ConfigError, LongNetError
from longnet_cli.measures import DocumentScore
from longnet_cli.model.net import Net
from longnet_cli.model.sequence import Bos, InputSequence
from longnet_cli.model.weights import model_digest
from longnet_cli.runtime.chunks import same_chunk
from longnet_cli.runtime.dealing import BATCHES, deal
from longnet_cli.runtime.device import check_kernel, resolve_dtype
from longnet_cli.runtime.ranks import Ranks
from longnet_cli.runtime.reader import Reader, share_reader
from longnet_cli.scoring import NothingToScoreError, OnSkip, Scorer

SHARD_TOKENS = 1 << 22
BATCH_ROWS = 1 << 12


@dataclass(frozen=True)
class GainOptions:
    """The options that determine the rows of `gains`, together with the net and the documents.

    `bos`, `context`, `stride` and `last` are as in `scoring.score`; contexts are sorted in ascending order. With two or
    more contexts, the rows have columns for the gain of the longest over the shortest. `model_name`, `tokenizer_sha256`
    and `pattern` (a text of `longnet_cli.notation`) go into the schema's metadata.
    """

    bos: Bos = None
    context: tuple[int, ...] | None = None
    stride: int | None = None
    last: int | None = None
    model_name: str | None = None
    tokenizer_sha256: str | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.context is not None:
            object.__setattr__(self, "context", tuple(sorted(self.context)))

    @property
    def compares(self) -> bool:
        """Return whether the rows have a gain, which takes two contexts or more."""
        return len(self.context or ()) > 1

    @property
    def nats(self) -> list[str]:
        """The names of the columns of nats per token, one for each context."""
        return [f"nats_{context}" for context in self.context] if self.context else ["nats"]

    def schema(self, kept_fields: Sequence[pa.Field] = ()) -> pa.Schema:
        """Return the schema of the rows, with the columns `kept_fields`.

        `n_tokens` is the number of scored tokens, the same at each context. Nats are means over these tokens, null if
        there are none. `gain` is the nats at the shortest context minus the nats at the longest, `gain_se` its standard
        error over blocks of 128 tokens (null for fewer than two blocks), `gain_share` the share of tokens that gain
        more than 2 nats. The metadata keys are `longnet.*`; unknown values are left out.
        """
        known = {
            "longnet.model": self.model_name,
            "longnet.tokenizer_sha256": self.tokenizer_sha256,
            "longnet.pattern": self.pattern,
        }
        fields = [
            pa.field("doc_id", pa.string()),
            pa.field("n_tokens", pa.int64()),
            pa.field("n_bytes", pa.int64()),
            *(pa.field(name, pa.float64()) for name in self.nats),
            *(pa.field(name, pa.float64()) for name in ("gain", "gain_se", "gain_share") if self.compares),
        ]
        return pa.schema(
            with_kept(fields, kept_fields), metadata={key: value for key, value in known.items() if value is not None}
        )


def gains(
    model: Net,
    documents: Iterable[Document],
    options: GainOptions,
    *,
    stored: Iterable[Document] = (),
    kept_fields: Sequence[pa.Field] = (),
    count_bytes: Callable[[np.ndarray], int | None] | None = None,
    ranks: Ranks | None = None,
    on_skip: OnSkip | None = None,
    **running: Any,
) -> Iterator[pa.RecordBatch]:
    """Score `documents` lazily and yield their rows, in order, in record batches of `options.schema(kept_fields)`.

    `kept_fields` are columns that documents carry to the output (`data.kept`); a value of the wrong type is a
    DataError. The other arguments are as in `scoring.score`, and `running` has the options of its Reader (`chunk`,
    `dtype`, `on_progress`). Raises what `score` raises. A document's nats at the shortest context are kept
    until the longest is scored: 4 bytes per token, in a file in $TMPDIR if they are many.
    """
    ranks = ranks or Ranks()
    scorer = _GainScorer(share_reader(model, ranks=ranks, **running), options, kept_fields, count_bytes)
    parts = scorer.reader.portions(scorer.checked(documents, stored, on_skip))
    waiting: list[pa.RecordBatch] = []
    scored = 0
    for _, found in deal(parts, scorer.batches, ranks, BATCHES, scorer.tell_progress):
        for batch in found:
            scored += _tokens(batch)
            waiting.append(batch)
            if sum(map(len, waiting)) >= BATCH_ROWS:
                yield from _joined(waiting)
                waiting = []
    yield from _joined([*waiting, pa.RecordBatch.from_pylist([], scorer.schema)])
    if not scored and (ranks.first or ranks.dp == 1):  # after the rows, which each show 0 tokens
        raise scorer.nothing()


def gains_to_folder(
    model: Net,
    documents: Iterable[Document],
    output: str | Path,
    options: GainOptions,
    *,
    settings: Mapping[str, Any],
    shard_tokens: int = SHARD_TOKENS,
    resume: bool = False,
    chunk: int | None = None,
    stored: Iterable[Document] = (),
    kept_fields: Sequence[pa.Field] = (),
    count_bytes: Callable[[np.ndarray], int | None] | None = None,
    dtype: str = "auto",
    ranks: Ranks | None = None,
    on_skip: OnSkip | None = None,
    **running: Any,
) -> ShardFolder | None:
    """Write the rows of `gains` to `gains-00000.arrow`, ... in the folder `output`, and return it closed.

    A shard ends with the document that brings it to `shard_tokens`. The rest is as in `encoding.encode_to_folder`: of
    several `ranks`, the first one writes and the others get None; `resume` continues a folder that an earlier run with
    the same `settings`, model and options left unfinished.

    Raises ConfigError for invalid options and for a folder that is in use, DataError for a damaged shard, LongNetError
    when a write fails, and what `score` raises. After an error the finished shards stay.
    """
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens must be 1 or more, not {shard_tokens}")
    ranks = ranks or Ranks()
    earlier = run_to_resume(output, resume=resume) if ranks.first else None
    device = next(model.parameters()).device
    if chunk is None:
        chunk = same_chunk(model.config, device, ranks, earlier.settings.get("chunk") if earlier else None)
    dtype = resolve_dtype(dtype, device)
    decisive = {
        **settings,
        "pattern": options.pattern,  # before the model, whose digest then differs too: errors name the first
        "model": model_digest(model)[:16],
        "kernel": check_kernel(device, dtype, model.config.head_dim),
        **asdict(options),
        **kept_settings(kept_fields),
        "chunk": chunk,
        "dtype": dtype,
        "shard_tokens": shard_tokens,
        **({"ranks": ranks.sp} if ranks.sp > 1 else {}),  # more ranks sum in another order
    }
    reader = share_reader(model, chunk=chunk, dtype=dtype, ranks=ranks, **running)
    scorer = _GainScorer(reader, options, kept_fields, count_bytes)
    with ExitStack() as stack:
        folder = None
        if ranks.first:
            shards = ShardFolder(output, options.schema(kept_fields), settings=decisive, name="gains", resume=resume)
            folder = stack.enter_context(shards)
        if ranks.any(folder is not None and folder.finished):
            return folder
        # folders from before 2026-11-26 count what was left out among their documents
        done = int(ranks.largest(folder.documents - folder.totals["left_out"] if folder else 0))
        scored = int(ranks.largest(folder.totals["tokens"] if folder else 0))

        def skip(document: Document, error: LongNetError) -> None:
            if folder:
                folder.skip()
            if on_skip:
                on_skip(document, error)

        taken = scorer.checked(documents, stored, skip if on_skip else None)
        rest = islice(taken, done, None)
        parts = reader.portions(rest, shard=shard_tokens, size_of=lambda sequence: len(sequence.document) + 1)
        for part, found in deal(parts, scorer.batches, ranks, BATCHES, scorer.tell_progress):
            for batch in found:  # one batch, when all documents of the portion have been read
                scored += _tokens(batch)
                if folder:
                    folder.write(batch, tokens=_tokens(batch), documents=part.items)
            if folder and part.ends_shard:
                folder.end_shard()
        if not scored and (ranks.first or ranks.dp == 1):
            raise NothingToScoreError("no token could be scored: every document is empty, too short or left out")
    return folder


def _tokens(batch: pa.RecordBatch) -> int:
    return int(batch["n_tokens"].to_numpy().sum())


def _joined(batches: Sequence[pa.RecordBatch]) -> Sequence[pa.RecordBatch]:
    """Return the same rows in few batches; if there are no rows, in one empty batch."""
    return pa.Table.from_batches(batches).combine_chunks().to_batches() or batches[:1]


class _GainScorer:
    """A scorer of documents that yields a batch of their rows, on the ranks of one group."""

    def __init__(
        self,
        reader: Reader,
        options: GainOptions,
        kept_fields: Sequence[pa.Field],
        count_bytes: Callable[[np.ndarray], int | None] | None,
    ) -> None:
        self.reader, self.options, self.kept_fields = reader, options, kept_fields
        self.schema = options.schema(kept_fields)
        self.contexts = options.context or (None,)
        cut = Cut.of(reader.model, options.bos, options.context, options.stride, options.last)
        self.scorer = Scorer(reader, cut, count_bytes=count_bytes)
        self.checked, self.nothing = self.scorer.checked, self.scorer.nothing
        self.tell_progress = self.scorer.tell_progress

    def batches(self, sequences: Iterable[InputSequence[Document]]) -> Iterator[pa.RecordBatch]:
        """Yield one batch with the rows of checked documents, in order."""
        scores, rows = self.scorer.run(sequences), []
        while found := list(islice(scores, len(self.contexts))):
            row = _row(self.options, found)
            rows.append(row | {field.name: kept_value(found[0], field) for field in self.kept_fields})
        yield _record_batch(rows, self.schema, self.kept_fields)


def _row(options: GainOptions, found: Sequence[DocumentScore]) -> dict[str, Any]:
    """Return the row of a document, from its scores at all contexts. Columns that it lacks are null."""
    score = found[0].score
    row: dict[str, Any] = {"doc_id": found[0].doc_id, "n_tokens": score.n_tokens, "n_bytes": score.n_bytes}
    if score.n_tokens:
        row |= {name: each.score.nll_sum / score.n_tokens for name, each in zip(options.nats, found, strict=True)}
    gain = found[-1].gain
    row |= gain._asdict() if gain else {}
    return row


def _record_batch(
    rows: Sequence[Mapping[str, Any]], schema: pa.Schema, kept_fields: Sequence[pa.Field]
) -> pa.RecordBatch:
    found = [
        pa.array([row.get(field.name) for row in rows], field.type)
        for field in list(schema)[: -len(kept_fields) or None]
    ]
    found += [kept_column((row[field.name] for row in rows), field) for field in kept_fields]
    return pa.record_batch(found, schema=schema)
