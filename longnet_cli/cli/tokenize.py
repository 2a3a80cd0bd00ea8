"""`longnet tokenize`: text in, Arrow shards of token ids out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, Literal

from longnet_cli.basics.events import Events
from longnet_cli.basics.sizes import count_of, format_count

from . import options as shared
from .command import given_names
from .options import INPUT, OUTPUT, HelpPanel, bare_or
from .output import check_output, count_left_out, note, say_left_out, tell
from .progress import progress
from .starting import ask_hub, refuse_read_once

if TYPE_CHECKING:
    from longnet_cli.data.documents.input_documents import Inputs
    from longnet_cli.data.files.manifest import Manifest
    from longnet_cli.jobs.tokenizing import TokenizeResult

TOKENS = HelpPanel("Tokens")


@dataclass(frozen=True)
class TokenizeCommand:
    """The options of `tokenize`."""

    inputs: list[str] = shared.inputs_argument()
    output: str = OUTPUT.common(
        "--output -o PATH",
        "Write a new folder of shards, one .arrow, .parquet or .jsonl file, or - for stdout, with the tokenizer. An "
        "existing file is replaced when the new one is whole.",
        default=MISSING,
    )
    shard_tokens: int | None = OUTPUT.size(
        "--shard-tokens SIZE",
        "Start a new shard after this many tokens. (default: 128Mi)",
        common=True,
    )
    shard_format: Literal["arrow", "parquet"] = shared.shard_format_option()
    resume: bool = shared.resume_flag()
    column: str | None = INPUT.common(
        "--column NAME", "Read this column. (default: text, otherwise messages)"
    )
    id_column: str | None = shared.id_column_option()
    keep: Sequence[str] | None = shared.keep_option()
    skip_bad: bool = shared.skip_bad_flag()
    share: Any = shared.share_option()  # a Share
    tokenizer: str | None = TOKENS.common(
        "--tokenizer NAME|PATH",
        "Use bytes (one id per byte), a tokenizer.json, a folder that holds one, or a model's: shipped, or ORG/NAME on "
        "the hub.",
        absent="bytes",
    )
    update: bool = shared.update_flag()
    train_vocab: int | None = TOKENS.size(
        "--train-vocab SIZE",
        "First train a byte-level BPE tokenizer of this many ids on the inputs.",
        common=True,
    )
    eos: str | None = TOKENS.common(
        "--eos [TOKEN|ID]",
        "End documents with this token, or with the tokenizer's own if you name none. (default: nothing is appended)",
    )
    quiet: bool = shared.quiet_flag()


def tokenize(options: TokenizeCommand) -> None:
    """Turn text into token ids once, to read them many times.

    Example: longnet tokenize docs/*.md -o tokens --train-vocab 2k

    Every command also reads text. If you read the same data often, tokenize it once.
    """
    from longnet_cli.data.documents.input_documents import Inputs
    from longnet_cli.data.documents.tokenizer import Tokenizer
    from longnet_cli.data.outputs.output_paths import refuse_overwriting
    from longnet_cli.jobs.tokenizing import tokenizer_beside

    output = options.output
    if options.update:
        ask_hub(None, options.tokenizer)
    beside = tokenizer_beside(output)
    if options.share:
        refuse_read_once(options.inputs)
    names = options.column, options.id_column, tuple(options.keep or ())
    data = Inputs(options.inputs, None, *names, skip_bad=options.skip_bad, share=options.share)
    tokenizer = options.tokenizer and Tokenizer.find(options.tokenizer)
    refuse_overwriting("-o", [output, beside or output], data.all_files, [tokenizer])
    where_to = "token ids are binary, stdout is a terminal: name a folder or a file (-o tokens), or pipe them"
    earlier = check_output(output, where_to, given_names(options), resume=options.resume)
    _write(options, data, earlier)


def _write(options: TokenizeCommand, data: Inputs, earlier: Manifest | None) -> None:
    """Write the tokens, and say how many."""
    from longnet_cli.data.outputs.output_paths import name_of_output
    from longnet_cli.jobs.tokenizing import SHARD_TOKENS
    from longnet_cli.jobs.tokenizing import tokenize as run

    done = earlier.totals["bytes"] if earlier else 0
    left_out = count_left_out(options.skip_bad)
    with progress("tokenizing", total=data.num_bytes(), unit="B", start=done) as advance:
        result = run(
            data,
            options.output,
            tokenizer=options.tokenizer,
            train_vocab=options.train_vocab,
            shard_tokens=options.shard_tokens or SHARD_TOKENS,
            shard_format=options.shard_format,
            eos=bare_or(options.eos, True),
            resume=options.resume,
            events=Events(progress=advance, note=note, left_out=left_out),
        )
    place = name_of_output(options.output)
    place += f" ({len(result.shards)} shards)" if len(result.shards) > 1 else ""
    tell(f"{_counts(result)} -> {place}")
    say_left_out(left_out)


def _counts(result: TokenizeResult) -> str:
    counts = [
        count_of(result.documents, "document"),
        f"{format_count(result.tokens)} token{'s' * (result.tokens != 1)}",
        f"{result.bytes / result.tokens:.2f} bytes per token"
        if result.tokens
        else "all of them empty",
        f"vocabulary {result.tokenizer.vocab_size}",
    ]
    return ", ".join(counts)
