"""`longnet encode`: a vector per document, or per span of a document, as Arrow or Parquet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from longnet_cli.basics.sizes import format_count
from longnet_cli.cli import options as shared
from longnet_cli.cli.dry_run import Format, check_sample, dry_run
from longnet_cli.cli.model_and_inputs import ModelAndInputs, Opened
from longnet_cli.cli.options import OUTPUT, Computing, Documents, HelpPanel, Mesh, ModelChoice, Running
from longnet_cli.cli.output import count_left_out, end, say_what_is_kept, tell
from longnet_cli.cli.pairs import SAMPLE, check_pairs
from longnet_cli.cli.progress import ExpectedTokens, progress

if TYPE_CHECKING:
    from longnet_cli.data.manifest import Manifest
    from longnet_cli.jobs.encoding import EncodeOptions

VECTORS = HelpPanel("Vectors")


@dataclass(frozen=True, kw_only=True)
class EncodeCommand:
    """The options of `encode`. Those of vectors are as in `EncodeOptions.of_model`."""

    documents: Documents
    choice: ModelChoice
    pool: str | None = VECTORS.option(
        "--pool NAME[+NAME]",
        "Take the mean over the tokens, the first or last token's vector, the cls, max, or the sqrt or weighted "
        "mean of sentence-transformers; several are joined. (default: the model's, otherwise mean)",
    )
    prefix: str | None = VECTORS.option(
        "--prefix TEXT|none",
        "Read this before each document, as a part of it. (default: the model's prompt for documents)",
    )
    dims: int | None = VECTORS.size("--dims N", "Keep the first N numbers of each vector. (default: all)")
    span: int | None = VECTORS.size(
        "--span SIZE",
        "Make one vector per this many tokens. Each has the whole document as context. (default: one per document)",
    )
    context: int | None = VECTORS.size(
        "--context SIZE",
        "Read windows of this many tokens, special ones included, with a model that looks both ways. (default: the "
        "most that it was made for)",
    )
    stride: int | None = VECTORS.size(
        "--stride SIZE", "Start a window every this many tokens of the document. (default: no overlap)"
    )
    normalize: bool | None = VECTORS.option(
        "--normalize/--no-normalize", "Scale every vector to length 1. (default: the model's, otherwise normalize)"
    )
    all_layers: bool = VECTORS.flag(
        "--all-layers", "Add the column layers: such a vector of the first layer's input and of each layer."
    )
    tile_size: int | None = VECTORS.size(
        "--tile-size SIZE",
        "Set the side of a slide's tiles, in the units of their coordinates. (default: the file's, otherwise the "
        "model's)",
    )
    output: str = OUTPUT.option(
        "--output -o PATH",
        "Write a new folder of shards, one .arrow, .parquet or .jsonl file, or - for an Arrow stream on stdout. An "
        "existing file is replaced when the new one is whole.",
        default="-",
    )
    embedding_dtype: Literal["float32", "float16"] = OUTPUT.option(
        "--embedding-dtype float32|float16", "Write numbers of this type.", default="float32"
    )
    shard_rows: int | None = OUTPUT.size(
        "--shard-rows SIZE", "Start a new shard after this many vectors. (default: 16Ki)"
    )
    shard_format: Literal["arrow", "parquet"] = shared.shard_format_option()
    running: Running
    format: Format = OUTPUT.option("--format text|json", "Print --dry-run in this format.", default="text")
    mesh: Mesh
    computing: Computing


def encode(options: EncodeCommand) -> None:
    """Turn each document, or each span of it, into one vector, for search or clustering.

    A slide encoder, or a model without a vocabulary, reads documents of vectors: a column features, embedding or
    embeddings in Arrow, Parquet or HDF5 files (HDF5 needs the extra `h5`).
    The columns are doc_id, span, start, end, n_tokens and embedding; for text also char_start and char_end, the place
    of a vector's tokens in it. Rows come in input order.
    """
    output, running = options.output, options.running
    check_pairs([SAMPLE], options)
    check_sample(running.sample)
    named = ModelAndInputs(options.documents, options.choice, output if running.resume else None, embeds=True)
    where_to = "embeddings are binary, stdout is a terminal: name a file (-o embeddings.arrow) or pipe them"
    for_folder = {"--shard-rows": options.shard_rows, "--shard-format": options.shard_format != "arrow"}
    earlier = named.check_outputs({"-o": output}, where_to, for_folder, running)
    opened, own = _open(options, named)
    if opened.room:
        from longnet_cli.jobs.encoding import Encoder

        job = partial(Encoder, options=own)
        dry_run(opened, job, "encoding", output, options.format, running, options.computing)
    else:
        _write(options, opened, own, earlier)


def _open(options: EncodeCommand, named: ModelAndInputs) -> tuple[Opened, EncodeOptions]:
    """Return the model with what it reads, and the options of its vectors: its own, where none is given."""
    opened = named.open(options.mesh, options.computing, dry_run=options.running.dry_run)
    from longnet_cli.jobs.encoding import EncodeOptions

    own = EncodeOptions.of_model(
        named.folder,
        opened.loaded,
        pool=options.pool,
        prefix=options.prefix,
        normalize=options.normalize,
        context=options.context,
        stride=options.stride,
        span=options.span,
        embedding_dtype=options.embedding_dtype,
        all_layers=options.all_layers,
        tile_size=options.tile_size,
        dims=options.dims,
    )
    return opened._replace(inputs=replace(opened.inputs, tokenizer=own.tokenizer_for(opened.loaded))), own


def _write(options: EncodeCommand, opened: Opened, own: EncodeOptions, earlier: Manifest | None) -> None:
    """Write the vectors, and say how many."""
    from longnet_cli.jobs.encoding import PLACE_FIELDS, Encoder
    from longnet_cli.jobs.row_jobs import write_rows
    from longnet_cli.running.ranks.ranks import leave

    net, data, quiet, computing = opened.loaded.net, opened.inputs, opened.quiet, options.computing
    done = earlier.totals["tokens"] if earlier else 0
    left_out = count_left_out(data.skip_bad, quiet)
    expected = ExpectedTokens(data)
    opened = opened._replace(inputs=expected.inputs, counted=expected.counted)
    with (
        say_what_is_kept(options.output, quiet),
        progress("encoding", total=data.num_tokens() or expected.total, start=done, quiet=quiet) as advance,
    ):
        written = write_rows(
            partial(Encoder, options=own),
            net,
            expected.inputs,
            options.output,
            shard_size=options.shard_rows,
            shard_format=options.shard_format,
            resume=options.running.resume,
            left_out=left_out,
            of_text=PLACE_FIELDS,
            telling=opened.telling(computing),
            ranks=opened.ranks,
            chunk=computing.chunk,
            dtype=computing.dtype,
            spill=computing.spill,
            on_progress=advance,
        )
    leave()
    if written is not None:
        rows = written["rows"]
        counts = f"{rows} vector{'s' * (rows != 1)} of {format_count(written['tokens'])} tokens"
        tell(f"{counts} -> {'stdout' if options.output == '-' else options.output}", quiet)
    end(left_out, first=opened.ranks.first, quiet=quiet)
