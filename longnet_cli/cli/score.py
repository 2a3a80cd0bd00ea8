"""`longnet score`: perplexity and bits per byte of documents under a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from longnet_cli.cli import options as shared
from longnet_cli.cli.dry_run import check_sample, estimate_reading
from longnet_cli.cli.model_and_inputs import ModelAndInputs, check_spill, say_state
from longnet_cli.cli.options import DEFAULT_MODEL, OUTPUT, Names, names_option, option, size_option, sizes_option
from longnet_cli.cli.output import check_output, count_left_out, emit_json, emit_jsonl, end, printable, tell
from longnet_cli.cli.progress import progress

if TYPE_CHECKING:
    from longnet_cli.data.left_out import LeftOut
    from longnet_cli.jobs.scoring.measures import DocumentScore, Score, Total

Format = Literal["text", "json", "jsonl"]
MEASURE = "What to measure"
ROW_KEYS = {"kind", "doc_id", "context", "nll_sum", "n_tokens", "n_bytes", "ppl", "bpb", "by_position", "by_recall"}
ROW_KEYS |= {"key_nll_sum", "key_n_tokens"}
GAIN_KEYS = {"gain", "gain_se", "gain_share"}  # of documents that are scored at several contexts


def score(
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
    ppl: Annotated[
        bool,
        option(MEASURE, "--ppl", None, "Measure perplexity and bits per byte. This is the default.", False),
    ] = True,
    context: Annotated[
        Sequence[int] | None,
        sizes_option(
            MEASURE,
            "--context",
            "Score the text in separate windows of this length. Several lengths are compared on the same tokens.",
            "the whole document",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        size_option(
            MEASURE,
            "--stride",
            "Let windows overlap: score this many tokens at the end of each.",
            "the context",
        ),
    ] = None,
    last: Annotated[
        int | None,
        size_option(
            MEASURE,
            "--last",
            "Score only this many tokens at the end of each document. Documents too short for the longest context "
            "are left out.",
            "all tokens",
        ),
    ] = None,
    by_position: Annotated[
        bool,
        option(
            MEASURE,
            "--by-position",
            None,
            "Group the loss by the number of earlier tokens, and by place in the shortest segment.",
        ),
    ] = False,
    by_recall: Annotated[
        bool,
        option(
            MEASURE,
            "--by-recall",
            None,
            "Group the loss by how many tokens ago the document last had the same two tokens in a row. Tokens without "
            "such a place are one more group.",
        ),
    ] = False,
    key_tokens: Annotated[
        Sequence[str] | None,
        names_option(
            MEASURE,
            "--key-tokens",
            "Also measure the tokens for which long context matters. Two files that a judge wrote with "
            "--token-logprobs show which: SHORT.arrow,LONG.arrow.",
            False,
        ),
    ] = None,
    format: Annotated[
        Format,
        option(
            OUTPUT, "--format", "text|json|jsonl", "Print a table, one JSON value, or one line of JSON per document."
        ),
    ] = "text",
    token_logprobs: Annotated[
        str | None,
        option(
            OUTPUT,
            "--token-logprobs",
            "FILE",
            "Write the log-probability of every token, in nats, to an .arrow or .parquet file. An existing file is "
            "replaced when the new one is whole.",
        ),
    ] = None,
    chosen: Annotated[
        str | None,
        option(
            OUTPUT,
            "--chosen",
            "FILE",
            "Write which chosen blocks each group of tokens sees in each layer, to an .arrow or .parquet file. The "
            "pattern must have chosen blocks.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        option(
            OUTPUT,
            "--output -o",
            "PATH",
            "Write a row per document instead, with what it gains from the longest context: to a new folder of shards, "
            "one .arrow, .parquet or .jsonl file, or - for an Arrow stream on stdout.",
            "print the scores",
        ),
    ] = None,
    shard_tokens: Annotated[
        int | None, size_option(OUTPUT, "--shard-tokens", "Start a new shard after this many tokens.", "4Mi")
    ] = None,
    resume: shared.ResumeOption = False,
    dry_run: shared.DryRunOption = False,
    sample: shared.SampleOption = None,
    nproc: shared.NprocOption = None,
    sp: shared.SpOption = None,
    dp: shared.DpOption = None,
    device: shared.DeviceOption = "auto",
    dtype: shared.DtypeOption = "auto",
    chunk: shared.ChunkOption = None,
    spill: shared.SpillOption = None,
    quiet: shared.QuietOption = False,
) -> None:
    """Measure how well a model predicts text: perplexity (ppl) and bits per byte (bpb), lower is better.

    Every token is scored once. Across tokenizers, compare bpb, not ppl.
    A LongNet needs no more memory for a long document than for a short one.
    Without --pattern, a Hugging Face model is dense and reads no more tokens than it was trained on.
    """
    from longnet_cli.basics.errors import ConfigError
    from longnet_cli.data.overwriting import refuse_one_place

    check_sample(sample, dry_run)
    if dry_run and format == "jsonl":
        raise ConfigError("--dry-run prints one value: give --format text or json")
    if keep and format == "text" and output is None and not dry_run:
        raise ConfigError("--keep carries columns to rows: give -o, or --format jsonl or json")
    keys = ROW_KEYS | (GAIN_KEYS if len(context or ()) > 1 else set())
    if keep and output is None and (taken := sorted({*keep} & keys)):
        raise ConfigError(f"--keep {taken[0]}: the output has a key of this name")
    for name, file in (("--token-logprobs", token_logprobs), ("--chosen", chosen)):
        if file == "-":
            raise ConfigError(f"{name} needs a file: stdout carries the scores")
        if file and (dp or 1) > 1:
            raise ConfigError(f"{name} is written by one group of ranks: leave out --dp")
    if key_tokens and len(key_tokens) != 2:
        raise ConfigError("--key-tokens needs two files, of a short and of a long context: SHORT.arrow,LONG.arrow")
    if key_tokens and (dp or 1) > 1:
        raise ConfigError("--key-tokens is for one group of ranks: leave out --dp")
    if chosen and context:
        raise ConfigError("--chosen is for whole documents: leave out --context")
    if output is not None and id_column and id_column not in {*keys, *(keep or ())}:
        keep = [id_column, *(keep or ())]  # so that rows join their input by the column's own name and type
    earlier_run = output if resume else None
    named = ModelAndInputs(
        inputs, model, tokenizer, column, id_column, keep, skip_bad, update, earlier_run, key_tokens or ()
    )
    outputs = {"--token-logprobs": token_logprobs, "--chosen": chosen, "-o": output}
    for its_option, path in outputs.items():
        named.refuse_overwriting(its_option, path)
    refuse_one_place(outputs)
    for_folder = {"--resume": resume, "--shard-tokens": shard_tokens}
    for_printing = {
        "--token-logprobs": token_logprobs,
        "--chosen": chosen,
        "--key-tokens": key_tokens,
        f"--format {format}": format != "text" and not dry_run,
    }
    if given := [name for name, value in (for_folder if output is None else for_printing).items() if value]:
        fits = "a folder of rows: name it (-o FOLDER)"
        if output is not None:
            fits = "scores that are printed, and -o writes rows: leave one out"
        raise ConfigError(f"{given[0]} is for {fits}")
    earlier = None
    if output is not None:
        where_to = "the rows are binary, stdout is a terminal: name a file (-o gains.parquet) or pipe them"
        earlier = check_output(output, where_to, for_folder, resume=resume, dry_run=dry_run)
    check_spill(spill)
    opened = named.open(
        nproc=nproc, sp=sp, dp=dp, device=device, dtype=dtype, tokenizer_differs=tokenizer_differs, pattern=pattern,
        bos=bos, eos=eos, dry_run=dry_run, quiet=quiet,
    )  # fmt: skip
    loaded, data, ranks, room, quiet = opened
    net = loaded.net
    check_spill(spill, net)
    from longnet_cli.attention.notation import format_pattern

    if pattern:
        tell(f"pattern {format_pattern(net.config.pattern)}", quiet)
    from longnet_cli.jobs.chosen_sources import write_chosen
    from longnet_cli.jobs.row_jobs import write_rows
    from longnet_cli.jobs.scoring.key_tokens import Judge
    from longnet_cli.jobs.scoring.measures import Total
    from longnet_cli.jobs.scoring.score_rows import RowScorer, ScoreOptions, write_token_logprobs
    from longnet_cli.jobs.scoring.scoring import score as run
    from longnet_cli.nets.weights import model_origin
    from longnet_cli.running.ranks.ranks import leave
    from longnet_cli.running.reader import check_choices

    check_choices(net, chosen is not None)
    if chosen and ranks.world > 1:
        raise ConfigError("--chosen is written by one process: leave out --nproc, --sp and --dp")
    running: dict[str, Any] = {"chunk": chunk, "dtype": dtype, "spill": spill}
    if room:
        from longnet_cli.jobs.scoring.scoring import Cut, Scorer

        job = partial(Scorer, cut=Cut.of(net, loaded.bos, context, stride, last), by_recall=by_recall)
        shown: Literal["json", "text"] = "json" if format == "json" else "text"
        estimate_reading(opened, job, "scoring", output, shown, sample=sample, resume=resume, **running)
        return
    judge = Judge(key_tokens, loaded.tokenizer_sha256) if key_tokens else None
    left_out = count_left_out(skip_bad, quiet)
    origin = model_origin(net, loaded.origin, loaded.tokenizer_sha256) if ranks.first and output is None else {}
    tokens = write_token_logprobs(token_logprobs, origin) if token_logprobs and ranks.first else nullcontext()
    choices = write_chosen(chosen, net.config.pattern, origin) if chosen and ranks.first else nullcontext()
    times = len(context or [None])  # how often each token is scored
    done = times * earlier.totals["tokens"] if earlier else 0
    total = times * (data.num_tokens() or 0) if last is None else 0
    measured: dict[str, Any] = {
        "bos": loaded.bos,
        "context": tuple(context) if context else None,
        "stride": stride,
        "last": last,
        "by_position": by_position,
        "by_recall": by_recall,
    }
    known = data.stored() if not skip_bad else ()
    telling: Callable[[Iterable[Any]], Iterator[Any]] = partial(
        say_state, stored=known, net=net, contexts=context, **running, quiet=quiet
    )
    running["ranks"] = ranks
    count_bytes = loaded.tokenizer.n_bytes if loaded.tokenizer else None
    shown_progress = progress("scoring", total=total or None, start=done, quiet=quiet)
    with shown_progress as advance, tokens as on_tokens, choices as on_choice:
        if output is not None:
            origins: dict[str, Any] = {"model_name": loaded.origin, "tokenizer_sha256": loaded.tokenizer_sha256}
            options = ScoreOptions(**measured, **origins, pattern=format_pattern(net.config.pattern))
            write_rows(
                partial(RowScorer, options=options, count_bytes=count_bytes),
                net,
                data,
                output,
                shard_size=shard_tokens,
                resume=resume,
                left_out=left_out,
                telling=telling,
                on_progress=advance,
                **running,
            )
        else:
            scores = run(
                net,
                telling(data.documents()),
                stored=data.stored() if net.config.max_tokens is not None else (),
                judge=judge,
                count_bytes=count_bytes,
                on_skip=left_out.skip,
                on_tokens=on_tokens,
                on_choice=on_choice,
                on_progress=advance,
                **measured,
                **running,
            )
            if ranks.first:
                _print(scores, format, Total(context or [None]), origin, left_out)
            else:
                for _ in scores:
                    pass
    leave()
    end(left_out, first=ranks.first, quiet=quiet)


def _print(
    scores: Iterator[DocumentScore], format: Format, total: Total, origin: dict[str, str], left_out: LeftOut
) -> None:
    """Print each document as soon as it is scored, then the total. The format json prints one value at the end."""
    several = len(total.contexts) > 1
    rows = []
    for index, document in enumerate(scores):
        total.add(document)
        values: dict[str, Any] = {"doc_id": document.doc_id, **document.score.as_dict()}
        if several:
            values["context"] = document.context
        if document.by_recall:
            values |= document.by_recall.as_dict()
        if document.gain:
            values |= document.gain._asdict()
        if document.key:
            values |= {"key_nll_sum": document.key.nll_sum, "key_n_tokens": document.key.n_tokens}
        values |= {name: value.as_py() for name, value in document.kept.items()}
        if format == "text":
            _print_row(document.doc_id, document.score, document.context if several else None, header=index == 0)
        elif format == "jsonl":
            emit_jsonl({"kind": "document", **values})
        else:
            rows.append(values)
    known = {key.removeprefix("longnet."): value for key, value in origin.items()}
    totals = [{**values, **known, "n_skipped": left_out.skipped} for values in total.as_dicts()]
    if format == "text":
        for score, context in zip(total.scores, total.contexts, strict=True):
            _print_row("total", score, context if several else None)
        if several:
            _print_comparison(totals)
        for values in totals:
            _print_losses(values, totals[0]["context"])
        if "key_tokens" in totals[0]:
            _print_key_tokens(totals)
        if several or totals[0].keys() & {"by_position", "by_recall", "key_tokens"}:
            print(f"+- is a standard error, clustered by document ({totals[0]['n_docs']} documents)")
    elif format == "jsonl":
        for values in totals:
            emit_jsonl({"kind": "total", **values})
    else:
        longest = max(totals, key=lambda values: values["context"] or 0)
        emit_json({"total": longest, **({"totals": totals} if several else {}), "documents": rows})


def _print_row(name: str, score: Score, context: int | None, *, header: bool = False) -> None:
    """Print one row. Numbers come first, as in `wc`, so that columns are aligned and no name is cut."""
    if header:
        print(f"{'tokens':>12} {'ppl':>12} {'bpb':>8}{' context':>10}"[: None if context else 34] + "  document")
    numbers = f"{score.n_tokens:>12} {_number(score.ppl):>12} {_number(score.bpb):>8}"
    print(numbers + (f" {context:>9}" if context else "") + f"  {printable(' '.join(name.split()))}", flush=True)


def _print_comparison(totals: list[dict[str, Any]]) -> None:
    """Print one line per context, each number with its standard error."""
    first = totals[0]["context"]
    print(f"\n{'context':>9} {'ppl':>12} {'+-':>8} {'bpb':>8} {'+-':>8} {f'ppl / {first}':>12} {'+-':>8}")
    for row in totals:
        keys = ("ppl", "ppl_se", "bpb", "bpb_se", "ppl_ratio", "ppl_ratio_se")
        numbers = [_number(row.get(key)).rjust(width) for key, width in zip(keys, (12, 8, 8, 8, 12, 8), strict=True)]
        print(f"{row['context']:>9} {' '.join(numbers)}")


def _print_key_tokens(totals: list[dict[str, Any]]) -> None:
    """Print one line per context: the key tokens, their share, their perplexity, and that of all tokens beside it."""
    context = totals[0]["context"]
    print(f"\n{'key tokens':>12} {'share':>8} {'ppl':>12} {'+-':>8} {'ppl of all':>12}" + "  context" * bool(context))
    for row in totals:
        found = row["key_tokens"]
        numbers = f"{_number(found['share']):>8} {_number(found['ppl']):>12} {_number(found['ppl_se']):>8}"
        end = f" {row['context']:>8}" if context else ""
        print(f"{found['n_tokens']:>12} {numbers} {_number(row['ppl']):>12}{end}")


def _print_losses(total: dict[str, Any], first: int | None) -> None:
    """Print the tables of `--by-position` and `--by-recall`: nats per token, and ppl relative to context `first`."""
    context = f", context {total['context']}" if total["context"] else ""
    tables = (("by_position", "tokens seen"), ("by_segment_position", "in segment"), ("by_recall", "said tokens ago"))
    columns = (("nll", "nats", 8), ("nll_se", "+-", 8), ("ppl_ratio", f"ppl / {first}", 12), ("ppl_ratio_se", "+-", 8))
    for key, title in tables:
        rows = total.get(key) or ()
        shown = [column for column in columns if any(column[0] in row for row in rows)]
        if rows:
            print(f"\n{title:>20} {'tokens':>12} {' '.join(name.rjust(width) for _, name, width in shown)}{context}")
        for row in rows:
            span = "new" if row["from"] is None else str(row["from"])
            if row["from"] != row["to"]:
                span += f" .. {row['to']}"
            numbers = " ".join(_number(row[name]).rjust(width) for name, _, width in shown)
            print(f"{span:>20} {row['n_tokens']:>12} {numbers}")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 1e6 else f"{value:.2e}"
