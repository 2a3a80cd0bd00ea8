"""`longnet encode`: a vector per document, or per span of a document, as Arrow or Parquet."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from longnet_cli.basics.sizes import format_count
from longnet_cli.cli import options as shared
from longnet_cli.cli.dry_run import Format, check_sample, estimate_reading
from longnet_cli.cli.model_and_inputs import ModelAndInputs, check_spill, say_state
from longnet_cli.cli.options import DEFAULT_MODEL, OUTPUT, Names, option, size_option
from longnet_cli.cli.output import check_output, count_left_out, end, tell
from longnet_cli.cli.progress import progress

VECTORS = "Vectors"


def encode(
    inputs: Names,
    tokenizer: shared.TokenizerOption = None,
    tokenizer_differs: shared.TokenizerDiffersOption = False,
    column: shared.ColumnOption = None,
    id_column: shared.IdColumnOption = None,
    keep: shared.KeepOption = None,
    eos: shared.EosOption = None,
    bos: shared.BosOption = None,
    skip_bad: shared.SkipBadOption = False,
    model: shared.ModelOption = DEFAULT_MODEL,
    update: shared.UpdateOption = False,
    pattern: shared.PatternOption = None,
    pool: Annotated[
        str | None,
        option(
            VECTORS,
            "--pool",
            "NAME[+NAME]",
            "Take the mean over the tokens, the first or last token's vector, the cls, max, or the sqrt or weighted "
            "mean of sentence-transformers; several are joined.",
            "the model's, otherwise mean",
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        option(
            VECTORS,
            "--prefix",
            "TEXT|none",
            "Read this before each document, as a part of it.",
            "the model's prompt for documents",
        ),
    ] = None,
    dims: Annotated[
        int | None,
        size_option(VECTORS, "--dims", "Keep the first N numbers of each vector.", "all", metavar="N"),
    ] = None,
    span: Annotated[
        int | None,
        size_option(
            VECTORS,
            "--span",
            "Make one vector per this many tokens. Each has the whole document as context.",
            "one per document",
        ),
    ] = None,
    context: Annotated[
        int | None,
        size_option(
            VECTORS,
            "--context",
            "Read windows of this many tokens, special ones included, with a model that looks both ways.",
            "the most that it was made for",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        size_option(VECTORS, "--stride", "Start a window every this many tokens of the document.", "no overlap"),
    ] = None,
    normalize: Annotated[
        bool | None,
        option(
            VECTORS,
            "--normalize/--no-normalize",
            None,
            "Scale every vector to length 1.",
            "the model's, otherwise normalize",
        ),
    ] = None,
    all_layers: Annotated[
        bool,
        option(
            VECTORS,
            "--all-layers",
            None,
            "Add the column layers: such a vector of the first layer's input and of each layer.",
        ),
    ] = False,
    tile_size: Annotated[
        int | None,
        size_option(
            VECTORS,
            "--tile-size",
            "Set the side of a slide's tiles, in the units of their coordinates.",
            "the file's, otherwise the model's",
        ),
    ] = None,
    output: Annotated[
        str,
        option(
            OUTPUT,
            "--output -o",
            "PATH",
            "Write a new folder of shards, one .arrow, .parquet or .jsonl file, or - for an Arrow stream on stdout. "
            "An existing file is replaced when the new one is whole.",
        ),
    ] = "-",
    embedding_dtype: Annotated[
        Literal["float32", "float16"],
        option(OUTPUT, "--embedding-dtype", "float32|float16", "Write numbers of this type."),
    ] = "float32",
    shard_rows: Annotated[
        int | None, size_option(OUTPUT, "--shard-rows", "Start a new shard after this many vectors.", "16Ki")
    ] = None,
    shard_format: shared.ShardFormatOption = "arrow",
    resume: shared.ResumeOption = False,
    dry_run: shared.DryRunOption = False,
    sample: shared.SampleOption = None,
    format: Annotated[Format, option(OUTPUT, "--format", "text|json", "Print --dry-run in this format.")] = "text",
    nproc: shared.NprocOption = None,
    sp: shared.SpOption = None,
    dp: shared.DpOption = None,
    device: shared.DeviceOption = "auto",
    dtype: shared.DtypeOption = "auto",
    chunk: shared.ChunkOption = None,
    spill: shared.SpillOption = None,
    quiet: shared.QuietOption = False,
) -> None:
    """Turn each document, or each span of it, into one vector, for search or clustering.

    A slide encoder, or a model without a vocabulary, reads documents of vectors: a column features, embedding or
    embeddings in Arrow, Parquet or HDF5 files (HDF5 needs the extra `h5`).
    The columns are doc_id, span, start, end, n_tokens and embedding; for text also char_start and char_end, the place
    of a vector's tokens in it. Rows come in input order.
    """
    check_sample(sample, dry_run)
    earlier_run = output if resume else None
    named = ModelAndInputs(
        inputs, model, tokenizer, column, id_column, keep, skip_bad, update, earlier_run, embeds=True
    )
    named.refuse_overwriting("-o", output)
    check_spill(spill)
    for_folder = {"--shard-rows": shard_rows, "--shard-format": shard_format != "arrow"}
    where_to = "embeddings are binary, stdout is a terminal: name a file (-o embeddings.arrow) or pipe them"
    earlier = check_output(output, where_to, for_folder, resume=resume, dry_run=dry_run)
    opened = named.open(
        nproc=nproc, sp=sp, dp=dp, device=device, dtype=dtype, tokenizer_differs=tokenizer_differs, pattern=pattern,
        bos=bos, eos=eos, dry_run=dry_run, quiet=quiet, embeds=True,
    )  # fmt: skip
    loaded, data, ranks, room, quiet = opened
    net = loaded.net
    from longnet_cli.jobs.encoding import PLACE_FIELDS, EncodeOptions, Encoder
    from longnet_cli.jobs.row_jobs import write_rows
    from longnet_cli.running.ranks.ranks import leave

    check_spill(spill, net)
    options = EncodeOptions.of_model(
        named.folder,
        loaded,
        pool=pool,
        prefix=prefix,
        normalize=normalize,
        context=context,
        stride=stride,
        span=span,
        embedding_dtype=embedding_dtype,
        all_layers=all_layers or None,
        tile_size=tile_size,
        dims=dims,
    )
    data = replace(data, tokenizer=options.tokenizer_for(loaded))
    opened = opened._replace(inputs=data)
    running: dict[str, Any] = {"chunk": chunk, "dtype": dtype, "spill": spill}
    if room:
        estimate_reading(
            opened,
            partial(Encoder, options=options),
            "encoding",
            output,
            format,
            sample=sample,
            resume=resume,
            **running,
        )
        return
    known = data.stored() if not skip_bad else ()
    done = earlier.totals["tokens"] if earlier else 0
    left_out = count_left_out(skip_bad, quiet)
    with progress("encoding", total=data.num_tokens(), start=done, quiet=quiet) as advance:
        written = write_rows(
            partial(Encoder, options=options),
            net,
            data,
            output,
            shard_size=shard_rows,
            shard_format=shard_format,
            resume=resume,
            left_out=left_out,
            of_text=PLACE_FIELDS,
            telling=partial(say_state, stored=known, net=net, **running, quiet=quiet),
            ranks=ranks,
            on_progress=advance,
            **running,
        )
    leave()
    if written is not None:
        rows = written["rows"]
        counts = f"{rows} vector{'s' * (rows != 1)} of {format_count(written['tokens'])} tokens"
        tell(f"{counts} -> {'stdout' if output == '-' else output}", quiet)
    end(left_out, first=ranks.first, quiet=quiet)
