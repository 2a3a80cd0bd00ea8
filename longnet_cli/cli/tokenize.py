"""`longnet tokenize`: text in, Arrow shards of token ids out."""

from __future__ import annotations

from typing import Annotated

from longnet_cli.basics.errors import ConfigError
from longnet_cli.basics.sizes import format_count
from longnet_cli.cli import options as shared
from longnet_cli.cli.options import COMPUTE, INPUT, OUTPUT, Names, bare_or, option, size_option
from longnet_cli.cli.output import check_output, count_left_out, end, tell
from longnet_cli.cli.progress import progress
from longnet_cli.cli.starting import ask_hub, launch
from longnet_cli.running.ranks.launch import under_torchrun

TOKENS = "Tokens"


def tokenize(
    inputs: Names,
    output: Annotated[
        str,
        option(
            OUTPUT,
            "--output -o",
            "PATH",
            "Write a new folder of shards, one .arrow, .parquet or .jsonl file, or - for stdout, with the tokenizer. "
            "An existing file is replaced when the new one is whole.",
        ),
    ],
    shard_tokens: Annotated[
        int | None, size_option(OUTPUT, "--shard-tokens", "Start a new shard after this many tokens.", "128Mi")
    ] = None,
    shard_format: shared.ShardFormatOption = "arrow",
    resume: shared.ResumeOption = False,
    column: Annotated[
        str | None, option(INPUT, "--column", "NAME", "Read this column.", "text, otherwise messages")
    ] = None,
    id_column: shared.IdColumnOption = None,
    skip_bad: shared.SkipBadOption = False,
    tokenizer: Annotated[
        str,
        option(
            TOKENS,
            "--tokenizer",
            "NAME|PATH",
            "Use bytes (one id per byte), a tokenizer.json, or a model's: shipped, or ORG/NAME on the hub.",
        ),
    ] = "bytes",
    update: shared.UpdateOption = False,
    train_vocab: Annotated[
        int | None,
        size_option(TOKENS, "--train-vocab", "First train a byte-level BPE tokenizer of this many ids on the inputs."),
    ] = None,
    eos: Annotated[
        str | None,
        option(
            TOKENS,
            "--eos",
            "[TOKEN|ID]",
            "End documents with this token, or with the tokenizer's own if you name none.",
            "nothing is appended",
        ),
    ] = None,
    dp: Annotated[
        int | None,
        size_option(COMPUTE, "--dp", "Share the documents among N processes (ranks).", "this process", metavar="N"),
    ] = None,
    quiet: shared.QuietOption = False,
) -> None:
    """Turn text into token ids once, to read them many times.

    Every command also reads text. If you read the same data often, tokenize it once.
    """
    from longnet_cli.data.inputs import Inputs
    from longnet_cli.data.overwriting import refuse_overwriting
    from longnet_cli.data.tokenizer import Tokenizer
    from longnet_cli.jobs.tokenizing import SHARD_TOKENS, tokenizer_beside
    from longnet_cli.jobs.tokenizing import tokenize as run

    if update:
        ask_hub(None, tokenizer)
    beside = tokenizer_beside(output)
    data = Inputs(inputs, column=column, id_column=id_column, skip_bad=skip_bad)
    refuse_overwriting("-o", [output, *([beside] if beside else [])], data, [Tokenizer.find(tokenizer)])
    for_folder = {"--shard-tokens": shard_tokens, "--shard-format": shard_format != "arrow"}
    where_to = "token ids are binary, stdout is a terminal: name a folder or a file (-o tokens), or pipe them"
    earlier = check_output(output, where_to, for_folder, resume=resume)
    if train_vocab is not None and (dp or 1) > 1:
        raise ConfigError("--train-vocab is for one process: train the tokenizer first, without --dp")
    launch(None, inputs, dp=dp)
    ranks = None
    if under_torchrun():
        from longnet_cli.running.ranks.ranks import join, leave

        ranks, _ = join("cpu", sp=1)
        if dp not in (None, ranks.world):
            raise ConfigError(f"--dp is {dp}, and there are {ranks.world} processes: leave it out")
        quiet = quiet or not ranks.first
    done = earlier.totals["bytes"] if earlier else 0
    left_out = count_left_out(skip_bad, quiet)
    with progress("tokenizing", total=data.num_bytes(), unit="B", start=done, quiet=quiet) as advance:

        def on_progress(documents: int, tokens: int, size: int) -> None:
            nonlocal done
            advance(size - done, documents=documents, tokens=format_count(tokens))
            done = size

        result = run(
            data,
            output,
            tokenizer=tokenizer,
            train_vocab=train_vocab,
            shard_tokens=shard_tokens or SHARD_TOKENS,
            shard_format=shard_format,
            eos=bare_or(eos, True),
            resume=resume,
            ranks=ranks,
            left_out=left_out,
            on_progress=on_progress,
        )
    if ranks:
        leave()
    if result:
        counts = [
            f"{result.documents} document{'s' * (result.documents != 1)}",
            f"{format_count(result.tokens)} tokens",
            f"{result.bytes / result.tokens:.2f} bytes per token" if result.tokens else "all of them empty",
            f"vocabulary {result.tokenizer.vocab_size}",
        ]
        shards = f" ({len(result.shards)} shards)" if len(result.shards) > 1 else ""
        place = "stdout" if output == "-" else output
        skipped = f"; {left_out.skipped} document{'s' * (left_out.skipped > 1)} left out" if left_out.skipped else ""
        tell(f"{', '.join(counts)} -> {place}{shards}{skipped}", quiet)
    end(left_out, first=result is not None, quiet=True)  # the line above has the count
