"""`longnet score`: perplexity and bits per byte of documents under a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

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
    QuietOption,
    SegmentLengthsOption,
    TokenizerOption,
    read_pattern,
    size_option,
)
from longnet_cli.cli.output import emit_json, emit_jsonl
from longnet_cli.cli.progress import progress

if TYPE_CHECKING:
    from longnet_cli.attention import Pattern
    from longnet_cli.data.tokenizer import Tokenizer
    from longnet_cli.model.net import Net
    from longnet_cli.scoring import DocumentScore, Score

Format = Literal["text", "json", "jsonl"]


def score(
    inputs: Inputs,
    model: ModelOption = DEFAULT_MODEL,
    ppl: Annotated[
        bool,
        typer.Option(
            "--ppl",
            help="Perplexity and bits per byte: the default, as nothing else is measured yet.",
            show_default=False,
        ),
    ] = True,
    context: Annotated[
        int | None,
        size_option(
            "--context",
            help="Tokens that a token may look back at: the text is scored in separate windows of this length.",
            show_default="the whole document",
        ),
    ] = None,
    token_logprobs: Annotated[
        str | None,
        typer.Option(
            "--token-logprobs",
            metavar="PATH",
            help="Also write the log-probability of every token, in nats: NAME.arrow or NAME.parquet.",
        ),
    ] = None,
    chunk: ChunkOption = None,
    tokenizer: TokenizerOption = None,
    column: ColumnOption = None,
    eos: EosOption = None,
    format: Annotated[
        Format, typer.Option("--format", help="A table to read, one JSON value, or a line of JSON a document.")
    ] = "text",
    attention: AttentionOption = "dilated",
    segment_lengths: SegmentLengthsOption = None,
    dilation_rates: DilationRatesOption = None,
    nproc: NprocOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Measure how well a model predicts text: perplexity (ppl) and bits per byte (bpb), lower is better.

    Every token is scored once. Across tokenizers, compare bpb, not ppl. A document of any length takes the same memory.
    """
    start_ranks(nproc, inputs, model)
    from longnet_cli.data.sources import read_documents
    from longnet_cli.errors import ConfigError

    if token_logprobs == "-":
        raise ConfigError("--token-logprobs needs a file: stdout carries the scores")
    net, words, bos = load_model(
        model, tokenizer, device, dtype, attention, read_pattern(segment_lengths, dilation_rates), quiet
    )
    from longnet_cli.runtime.launch import join, leave
    from longnet_cli.scoring import score as run
    from longnet_cli.scoring import write_token_logprobs

    documents = read_documents(inputs, words, column=column, vocab_size=net.config.vocab_size, eos_id=eos)
    ranks, where = join(device)
    quiet = quiet or not ranks.first
    tokens = write_token_logprobs(token_logprobs) if token_logprobs and ranks.first else nullcontext()
    with progress("scoring", total=None, quiet=quiet) as advance, tokens as on_tokens:
        scores = run(
            net,
            documents,
            bos=bos,
            context=context,
            chunk=chunk,
            dtype=dtype,
            device=where,
            ranks=ranks,
            on_tokens=on_tokens,
            on_progress=advance,
        )
        if ranks.first:
            _print(scores, format)
        else:
            for _ in scores:
                pass
    leave()


def start_ranks(nproc: int | None, inputs: list[str], model: str) -> None:
    """What --nproc asks for; several processes cannot share one stdin, nor a model of transformers."""
    if nproc is None and "RANK" not in os.environ:
        return
    from longnet_cli.errors import ConfigError
    from longnet_cli.presets import find_model, is_of_transformers
    from longnet_cli.runtime.launch import start_ranks, under_torchrun

    several = under_torchrun() or (nproc or 1) > 1
    if several and is_of_transformers(find_model(model)):
        raise ConfigError(f"{model}: a model of transformers runs in one process, without --nproc or torchrun")
    if "-" in inputs and several:
        raise ConfigError("stdin can be read by one process: save it to a file, which every rank reads for itself")
    if nproc is not None:
        start_ranks(nproc)


class Loaded(NamedTuple):
    """A model, its tokenizer, and the id that it reads before each document; None for what there is not."""

    net: Net
    words: Tokenizer | None
    bos: int | None


def load_model(
    name: str,
    tokenizer: str | None,
    device: str,
    dtype: str,
    attention: Literal["dilated", "dense"] = "dilated",
    pattern: Pattern | None = None,
    quiet: bool = False,
) -> Loaded:
    """The model that --model names, in float32 on --device, and --tokenizer or else its own.

    Says on stderr, unless `quiet`, what the user should know of how it reads documents.
    Raises ConfigError for a tokenizer with ids that the model does not have, a model that reads no tokens, or an
    attention kernel that cannot run in `dtype`.
    """
    from longnet_cli.data.tokenizer import Tokenizer
    from longnet_cli.errors import ConfigError
    from longnet_cli.presets import find_model, is_of_transformers

    folder = find_model(name)
    own = folder / "tokenizer.json"
    chosen = tokenizer or (own if own.exists() else None)
    words = Tokenizer.load(chosen) if chosen else None

    # torch takes a second: a wrong name has been told by now
    from longnet_cli.integrations.loading import load_net
    from longnet_cli.runtime.device import check_kernel, select_device

    where = select_device(device)
    net = load_net(folder, attention=attention, pattern=pattern, device=where)
    check_kernel(where, dtype, net.config.head_dim)
    if not net.config.vocab_size:
        raise ConfigError(f"{name}: this model has no vocabulary: it reads vectors, not tokens")
    if words and words.vocab_size > net.config.vocab_size:
        raise ConfigError(
            f"{chosen}: the tokenizer has {words.vocab_size} ids and the model {net.config.vocab_size}: "
            "they do not belong together"
        )
    if net.note and not quiet and sys.stderr:
        print(f"{name}: {net.note}", file=sys.stderr)
    foreign = is_of_transformers(folder)
    return Loaded(net, words, (words.bos_id if foreign else words.eos_id) if words else None)


def _print(scores: Iterator[DocumentScore], format: Format) -> None:
    """Each document as soon as it is scored (except in the one value of json), and the total at last."""
    from longnet_cli.scoring import Score

    total = Score(0.0, 0, 0)
    rows = []
    for index, document in enumerate(scores):
        total += document.score
        if format == "text":
            _print_row(document.doc_id, document.score, header=index == 0)
        elif format == "jsonl":
            emit_jsonl({"kind": "document", "doc_id": document.doc_id, **document.score.as_dict()})
        else:
            rows.append({"doc_id": document.doc_id, **document.score.as_dict()})
    if format == "text":
        _print_row("total", total)
    elif format == "jsonl":
        emit_jsonl({"kind": "total", **total.as_dict()})
    else:
        emit_json({"total": total.as_dict(), "documents": rows})


def _print_row(name: str, score: Score, *, header: bool = False) -> None:
    """The numbers stand first, as in `wc`: so columns are straight whatever the names, and no name need be cut."""
    if header:
        print(f"{'tokens':>12} {'ppl':>12} {'bpb':>8}  document")
    numbers = f"{score.n_tokens:>12} {_number(score.ppl):>12} {_number(score.bpb):>8}"
    print(f"{numbers}  {' '.join(name.split())}", flush=True)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 1e6 else f"{value:.2e}"
