"""`longnet encode`: a vector per document, or per span of a document, as Arrow or Parquet."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from longnet_cli.basics.errors import ConfigError

from . import options as shared
from .dry_run import show_job
from .options import (
    OUTPUT,
    Computing,
    Documents,
    HelpPanel,
    Mesh,
    ModelChoice,
    Running,
)
from .starting import open_command

VECTORS = HelpPanel("Vectors")


@dataclass(frozen=True, kw_only=True)
class EncodeCommand:
    """The options of `encode`. Those of vectors are `EncodeOptions`."""

    documents: Documents
    choice: ModelChoice
    pool: str | None = VECTORS.common(
        "--pool NAME[+NAME]",
        "Take the mean over the tokens, the first or last token's vector, the cls, max, or the sqrt or weighted "
        "mean of sentence-transformers; several are joined. (default: the model's, otherwise mean)",
    )
    prefix: str | None = VECTORS.option(
        "--prefix TEXT|none",
        "Read this before each document, as a part of it. (default: the model's prompt for documents)",
    )
    dims: int | None = VECTORS.size(
        "--dims N", "Keep the first N numbers of each vector. (default: all)"
    )
    span: str | None = VECTORS.common(
        "--span SIZE|UNIT",
        "Make one vector per this many tokens, or per sentence, paragraph or passage of a text. Its context is "
        "all that is read with it. (default: one per document)",
    )
    context: int | None = VECTORS.size(
        "--context SIZE",
        "Read windows of this many tokens, special ones included, with a model that looks both ways. (default: the "
        "most that it was made for)",
        common=True,
    )
    stride: int | None = VECTORS.size(
        "--stride SIZE",
        "Start a window every this many tokens of the document. (default: no overlap)",
    )
    normalize: bool | None = VECTORS.option(
        "--normalize/--no-normalize",
        "Scale every vector to length 1. (default: the model's, otherwise normalize)",
    )
    tile_size: int | None = VECTORS.size(
        "--tile-size SIZE",
        "Set the side of a slide's tiles, in the units of their coordinates. (default: the file's, otherwise the "
        "model's)",
    )
    output: str = OUTPUT.common(
        "--output -o PATH",
        "Write a new folder of shards, one .arrow, .parquet, .jsonl or .npy file, or - for an Arrow stream on stdout. "
        "An existing file is replaced when the new one is whole.",
        default="-",
    )
    embedding_dtype: Literal["float32", "float16"] = OUTPUT.option(
        "--embedding-dtype float32|float16",
        "Write numbers of this type.",
        default="float32",
    )
    shard_rows: int | None = OUTPUT.size(
        "--shard-rows SIZE",
        "Start a new shard after this many vectors; no document is divided. (default: 4Ki)",
    )
    shard_format: Literal["arrow", "parquet"] = shared.shard_format_option()
    running: Running
    format: Literal["text", "json", "jsonl"] = OUTPUT.option(
        "--format text|json|jsonl",
        "With jsonl, print a line of JSON per vector on stdout. Print --dry-run as text or json.",
        default="text",
    )
    mesh: Mesh
    computing: Computing


def encode(options: EncodeCommand) -> None:
    """Turn documents, or spans of them, into vectors for search.

    Example: longnet encode docs/*.md --model ./minilm --span passage -o v.arrow

    A slide encoder, or a model without a vocabulary, reads documents of vectors: a column features, embedding or
    embeddings in Arrow, Parquet or HDF5 files (HDF5 needs the extra `h5`).
    The columns are doc_id, span, start, end, n_tokens and embedding; for text also char_start and char_end, the place
    of a vector's tokens in it. Rows come in input order.
    """
    from longnet_cli.jobs.job_options import EncodeOptions

    names = (field.name for field in fields(EncodeOptions))
    asked = EncodeOptions(**{name: getattr(options, name) for name in names})
    lines = options.format == "jsonl"
    dry_run = options.running.dry_run
    if lines and (dry_run or options.output != "-"):
        why = "--dry-run prints one value" if dry_run else "a file is what its name says"
        raise ConfigError(f"--format jsonl is for vectors on stdout, and {why}: leave it out")
    where_to = "embeddings are binary, stdout is a terminal: name a file (-o embeddings.arrow) or pipe them"
    opened = open_command(options, "" if lines else where_to, embeds=True)
    from longnet_cli.jobs.encoding import Encoder, for_model
    from longnet_cli.jobs.row_jobs import Output

    settled, facts = for_model(asked, opened.found.folder, opened.loaded)
    job = Encoder(opened.reader(), settled, facts)
    inputs = replace(opened.inputs(facts.tokenizer_for(opened.loaded)), unit=job.unit)
    if options.running.dry_run:
        show_job(opened, job, inputs, options.format)
        return
    resume = options.running.resume
    output = Output(options.output, options.shard_rows, options.shard_format, resume, lines=lines)
    opened.run(job, inputs, output)
    opened.end()
