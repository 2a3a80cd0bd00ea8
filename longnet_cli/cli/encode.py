"""`longnet encode`: a vector a document or a span of it, as Arrow or Parquet."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from typing import Annotated, Any, Literal

import typer

from longnet_cli.cli.launch import launch
from longnet_cli.cli.options import (
    DEFAULT_MODEL,
    AttentionOption,
    ChunkOption,
    ColumnOption,
    DeviceOption,
    DilationRatesOption,
    DtypeOption,
    EosOption,
    Inputs,
    ModelOption,
    NprocOption,
    PatternOption,
    QuietOption,
    SegmentLengthsOption,
    TokenizerDiffersOption,
    TokenizerOption,
    read_pattern,
    size_option,
)
from longnet_cli.cli.progress import progress
from longnet_cli.cli.score import load_model, refuse_overwriting
from longnet_cli.errors import ConfigError


def encode(
    inputs: Inputs,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="A new folder for shards, one .arrow, .parquet or .jsonl file (which is replaced when the new one is "
            "whole), or - for an Arrow stream on stdout.",
        ),
    ] = "-",
    model: ModelOption = DEFAULT_MODEL,
    pool: Annotated[
        Literal["mean", "last", "first"],
        typer.Option("--pool", help="A document's vector: the mean over its tokens, or that of one token."),
    ] = "mean",
    normalize: Annotated[
        bool, typer.Option("--normalize/--no-normalize", help="Scale every vector to length 1.")
    ] = True,
    span: Annotated[
        int | None,
        size_option(
            "--span",
            help="A vector for every so many tokens, each with the whole document as context.",
            show_default="one vector a document",
        ),
    ] = None,
    chunk: ChunkOption = None,
    spill: Annotated[
        str | None,
        typer.Option(
            "--spill",
            metavar="FOLDER",
            help="Keep a bidirectional model's hidden states on this disk, for documents longer than memory.",
        ),
    ] = None,
    embedding_dtype: Annotated[
        Literal["float32", "float16"],
        typer.Option("--embedding-dtype", help="Type of the numbers written; float16 takes half the space."),
    ] = "float32",
    shard_rows: Annotated[
        int | None,
        size_option("--shard-rows", help="Begin a new shard after so many vectors.", show_default="16Ki"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on where an earlier run with the same inputs and options left the folder."),
    ] = False,
    tokenizer: TokenizerOption = None,
    tokenizer_differs: TokenizerDiffersOption = False,
    column: ColumnOption = None,
    eos: EosOption = None,
    attention: AttentionOption = "dilated",
    pattern: PatternOption = None,
    segment_lengths: SegmentLengthsOption = None,
    dilation_rates: DilationRatesOption = None,
    nproc: NprocOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Turn each document, or each span of it, into one vector, for search or clustering.

    Columns: doc_id, span, start, end, n_tokens, embedding; rows in input order, written as they are known.
    """
    if output == "-" and sys.stdout and sys.stdout.isatty():  # said before a model is loaded
        raise ConfigError("embeddings are binary, stdout is a terminal: name a file (-o embeddings.arrow) or pipe them")
    refuse_overwriting("-o", [output], inputs, model, tokenizer)
    if spill and not os.path.isdir(spill):
        raise ConfigError(f"--spill {spill}: no such folder")
    launch(nproc, inputs, model)
    from longnet_cli.data.inputs import fingerprint
    from longnet_cli.data.shards import run_to_resume
    from longnet_cli.data.sinks import ShardWriter, is_folder
    from longnet_cli.data.sources import read_documents
    from longnet_cli.patterns import format_pattern

    in_folder = is_folder(output)
    if resume and not in_folder:
        raise ConfigError(f"{output}: only a folder of shards can be resumed: a single file or stream has no parts")
    if shard_rows is not None and not in_folder:
        raise ConfigError(f"{output}: --shard-rows is for a folder of shards: a single file or stream has no parts")
    earlier = run_to_resume(output, resume=resume) if in_folder else None

    from longnet_cli.runtime.ranks import join, leave

    ranks, where = join(device)
    quiet = quiet or not ranks.first
    asked = read_pattern(segment_lengths, dilation_rates, pattern)
    net, words, bos = load_model(model, tokenizer, tokenizer_differs, where, dtype, attention, asked, quiet)
    from longnet_cli.encoding import SHARD_ROWS, EncodeOptions, encode_to_folder
    from longnet_cli.encoding import encode as run

    documents = read_documents(inputs, words, column=column, vocab_size=net.config.vocab_size, eos_id=eos)
    options = EncodeOptions(
        bos=bos,
        pool=pool,
        normalize=normalize,
        span=span,
        embedding_dtype=embedding_dtype,
        model_name=model,
        tokenizer_sha256=words.sha256 if words else None,
        pattern="dense" if attention == "dense" else format_pattern(net.config.pattern),
    )
    done = earlier.totals["tokens"] if earlier else 0
    with progress("encoding", total=None, start=done, quiet=quiet) as advance:
        reading: dict[str, Any] = {
            "chunk": chunk,
            "spill": spill,
            "dtype": dtype,
            "ranks": ranks,
            "on_progress": advance,
        }
        if in_folder:
            encode_to_folder(
                net,
                documents,
                output,
                options,
                settings={"inputs": fingerprint(inputs), "column": column, "eos": eos},
                shard_rows=shard_rows or SHARD_ROWS,
                resume=resume,
                **reading,
            )
        else:
            batches = run(net, documents, options, **reading)
            with ShardWriter(output, batches.schema) if ranks.first else nullcontext() as writer:
                for batch in batches:
                    if writer:
                        writer.write(batch)
    leave()
