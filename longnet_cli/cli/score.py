"""`longnet score`: perplexity and bits per byte of documents under a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from longnet_cli.basics.errors import ConfigError, one_line
from longnet_cli.basics.finite_json import to_json
from longnet_cli.basics.sizes import count_of

from . import options as shared
from .command import Excludes, Needs, check_pairs
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
from .output import emit_json, emit_jsonl, printable, tell
from .starting import Opened, open_command

if TYPE_CHECKING:
    import pyarrow as pa


MEASURE = HelpPanel("What to measure")
ROW_KEYS = {"kind", "doc_id", "n_tokens", "n_bytes"}

PRINTED = "is for scores that are printed, and -o writes rows"
PAIRS: tuple[Needs | Excludes, ...] = (
    Needs(
        "--keep",
        "-o|--format|--dry-run",
        "carries columns to rows",
        "-o, or --format jsonl or json",
    ),
    Excludes("--token-logprobs", "--dp", "is written by one group of ranks"),
    Needs(
        "--top",
        "--token-logprobs",
        "adds to a file of log-probabilities",
        "--token-logprobs FILE",
    ),
    *(
        Needs(name, "-o", "is for a folder of rows", "-o FOLDER")
        for name in ("--resume", "--shard-tokens", "--shard-format")
    ),
    Excludes("--token-logprobs", "-o", PRINTED),
    Excludes("--by", "-o", PRINTED),
)


@dataclass(frozen=True, kw_only=True)
class ScoreCommand:
    """The options of `score`."""

    documents: Documents
    choice: ModelChoice
    ppl: bool = MEASURE.option(
        "--ppl",
        "Measure perplexity and bits per byte. This is the default.",
        default=True,
    )
    context: Sequence[int] | None = MEASURE.common(
        "--context SIZE,...",
        "Score the text in separate windows of this length. Several lengths are compared on the same tokens. "
        "(default: the whole document)",
    )
    stride: int | None = MEASURE.size(
        "--stride SIZE",
        "Let windows overlap: score this many tokens at the end of each. (default: the context)",
    )
    last: int | None = MEASURE.size(
        "--last SIZE",
        "Score only this many tokens at the end of each document. Documents too short for the longest context are "
        "left out. (default: all tokens)",
        common=True,
    )
    by: str | None = MEASURE.option(
        "--by COLUMN",
        "Also sum the scores of the documents that have the same value in this column, such as a source or a language.",
    )
    format: Literal["text", "json", "jsonl"] = OUTPUT.common(
        "--format text|json|jsonl",
        "Print a table, one JSON value, or one line of JSON per document.",
        default="text",
    )
    token_logprobs: str | None = OUTPUT.common(
        "--token-logprobs FILE",
        "Write the log-probability of every token, in nats, to an .arrow or .parquet file. An existing file is "
        "replaced when the new one is whole.",
    )
    top: Literal["1"] | None = OUTPUT.option(
        "--top 1",
        "Add the most likely token in each place, and its log-probability, to --token-logprobs.",
    )
    output: str | None = OUTPUT.common(
        "--output -o PATH",
        "Write a row per document instead, with what it gains from the longest context: to a new folder of shards, "
        "one .arrow or .parquet file, one .jsonl file (which ends with the totals), or - for an Arrow stream on "
        "stdout. (default: print the scores)",
    )
    shard_tokens: int | None = OUTPUT.size(
        "--shard-tokens SIZE", "Start a new shard after this many tokens. (default: 4Mi)"
    )
    shard_format: Literal["arrow", "parquet"] = shared.shard_format_option()
    running: Running
    mesh: Mesh
    computing: Computing


def score(options: ScoreCommand) -> None:
    """Measure how well a model predicts text: perplexity (ppl) and bits per byte (bpb), lower is better.

    Example: longnet score examples --context 512,2Ki

    Every token is scored once. Across tokenizers, compare bpb, not ppl.
    Memory grows with a document where a pattern chooses blocks (finding); with a window or levels, it does not.
    Without --pattern, a Hugging Face model is dense and reads no more tokens than it was trained on.
    """
    from longnet_cli.jobs.job_options import ScoreOptions

    output = options.output
    context = tuple(options.context) if options.context else None
    asked = ScoreOptions(
        context,
        stride=options.stride,
        last=options.last,
    )
    _check(options, asked.contexts)
    documents = options.documents
    rows = output is not None or options.format != "text"
    # so that rows join their input by the name and the type of the column of names, too
    carried = [(rows and documents.id_column) or None, options.by]
    for name in filter(None, carried):
        if name not in {*ROW_KEYS, *documents.kept}:
            documents = replace(documents, keep=[name, *documents.kept])
    where_to = (
        "the rows are binary, stdout is a terminal: name a file (-o gains.parquet) or pipe them"
    )
    also = {"--token-logprobs": options.token_logprobs}
    opened = open_command(replace(options, documents=documents), where_to, also=also)
    from longnet_cli.jobs.row_jobs import Output
    from longnet_cli.jobs.scoring.scoring import Scorer

    tokenizer = opened.loaded.tokenizer
    job = Scorer.of_model(opened.reader(), asked, opened.loaded, bool(options.top))
    if options.choice.pattern:
        tell(f"pattern {job.facts.pattern}")
    inputs = opened.inputs(
        tokenizer.for_documents() if tokenizer and options.token_logprobs else tokenizer
    )
    if options.running.dry_run:
        show_job(opened, job, inputs, options.format)
        return
    sink = None
    if output is None or output.endswith(".jsonl"):
        sink = _printing(options, asked.contexts, opened)
    running = options.running
    to = Output(output or "-", options.shard_tokens, options.shard_format, running.resume, sink)
    with _token_logprobs(options, opened) as logprobs:
        opened.run(job, inputs, to, logprobs)
    opened.end()


def _check(options: ScoreCommand, contexts: Sequence[int | None]) -> None:
    """Raise ConfigError for options that do not go together."""
    dry_run = options.running.dry_run
    if dry_run and options.format == "jsonl":
        raise ConfigError("--dry-run prints one value: give --format text or json")
    check_pairs(PAIRS if dry_run else (*PAIRS, Excludes("--format", "-o", PRINTED)), options)
    if options.token_logprobs and len(contexts) > 1:
        raise ConfigError("log-probabilities of tokens need one context: give only one")
    if options.by in {*ROW_KEYS, "doc_id"}:
        raise ConfigError(f"--by {options.by}: the output has a column of this name")
    if "kind" in options.documents.kept:
        raise ConfigError("--keep kind: the output has a column of this name")
    if options.token_logprobs == "-":
        raise ConfigError("--token-logprobs needs a file: stdout carries the scores")


def _token_logprobs(
    options: ScoreCommand, opened: Opened
) -> AbstractContextManager[Callable[..., None] | None]:
    """Return what opens the file of --token-logprobs, on the rank that writes it."""
    from longnet_cli.jobs.scoring.token_logprobs import write_token_logprobs

    if not options.token_logprobs or not opened.ranks.writes:
        return nullcontext()
    return write_token_logprobs(options.token_logprobs, _origin(opened), bool(options.top))


def _origin(opened: Opened) -> dict[str, str]:
    from longnet_cli.nets.weights import model_origin

    return model_origin(opened.loaded.net, opened.loaded.origin, opened.loaded.tokenizer_sha256)


@contextmanager
def _printing(
    options: ScoreCommand,
    contexts: Sequence[int | None],
    opened: Opened,
) -> Iterator[_Printed]:
    """Yield the sink that prints scores; JSON Lines go to the file of -o, if one is given, whole or not at all."""
    from longnet_cli.basics.atomic import atomic_write
    from longnet_cli.nets.net import bos_ids

    facts: dict[str, Any] = {
        key.removeprefix("longnet."): value for key, value in _origin(opened).items()
    }
    if share := options.documents.share:
        facts["share"] = str(share)
    with ExitStack() as stack:
        printed = _PRINTED[options.format](contexts, options.by)
        if options.output:
            file = stack.enter_context(atomic_write(options.output))
            printed = _Lines(contexts, emit=lambda row: file.write(f"{to_json(row)}\n".encode()))
        yield printed
        facts |= {"bos": bos_ids(opened.loaded.bos), "n_skipped": opened.left_out.skipped}
        printed.end(facts)


class _Printed:
    """A printer of each document's row as soon as it is scored, and then of the totals of each context."""

    def __init__(self, contexts: Sequence[int | None], by: str | None = None) -> None:
        from longnet_cli.jobs.scoring.measures import GroupTotals, Total

        self.contexts = contexts
        self.several = len(contexts) > 1
        self.total = Total(contexts)
        self.groups = GroupTotals(contexts, by) if by else None

    def write(self, batch: pa.RecordBatch) -> None:
        for row in batch.to_pylist():
            self.total.add(row)
            if self.groups:
                self.groups.add(row)
            self.add(row)

    def end(self, facts: dict[str, Any]) -> None:
        """Print the totals of groups, and then those of all documents, each with these facts."""
        if self.groups:
            self.print_groups(self.groups.as_dicts())
        self.print_totals([{**values, **facts} for values in self.total.as_dicts()])

    def add(self, row: dict[str, Any]) -> None:
        raise NotImplementedError

    def print_groups(self, groups: list[dict[str, Any]]) -> None:
        raise NotImplementedError

    def print_totals(self, totals: list[dict[str, Any]]) -> None:
        raise NotImplementedError


class _Lines(_Printed):
    """A line of JSON for each row."""

    def __init__(
        self,
        contexts: Sequence[int | None],
        by: str | None = None,
        emit: Callable[[dict[str, Any]], object] = emit_jsonl,
    ) -> None:
        super().__init__(contexts, by)
        self.emit = emit

    def add(self, row: dict[str, Any]) -> None:
        self.emit({"kind": "document", **row})

    def print_groups(self, groups: list[dict[str, Any]]) -> None:
        for values in groups:
            self.emit({"kind": "group", **values})

    def print_totals(self, totals: list[dict[str, Any]]) -> None:
        for values in totals:
            self.emit({"kind": "total", **values})


class _OneValue(_Printed):
    """One JSON value at the end."""

    def __init__(self, contexts: Sequence[int | None], by: str | None = None) -> None:
        super().__init__(contexts, by)
        self.rows: list[dict[str, Any]] = []
        self.shown: dict[str, Any] = {}

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def print_groups(self, groups: list[dict[str, Any]]) -> None:
        self.shown["groups"] = groups

    def print_totals(self, totals: list[dict[str, Any]]) -> None:
        shown: dict[str, Any] = {"total": max(totals, key=itemgetter("context"))}
        if self.several:
            shown["totals"] = totals
        emit_json(shown | self.shown | {"documents": self.rows})


class _PlainTable(_Printed):
    """A table to read."""

    header = True

    def add(self, row: dict[str, Any]) -> None:
        from longnet_cli.jobs.scoring.measures import column

        for context in self.contexts:
            numbers = {name: row[column(name, context, self.contexts)] for name in ("ppl", "bpb")}
            numbers |= {"n_tokens": row["n_tokens"], "context": context}
            _print_row(row["doc_id"], numbers, self.several, header=self.header)
            self.header = False

    def print_groups(self, groups: list[dict[str, Any]]) -> None:
        for values in groups:
            _print_row(f"{values['by']} {values['group']}{_errors(values)}", values, self.several)

    def print_totals(self, totals: list[dict[str, Any]]) -> None:
        first = totals[0]
        name = f"total of share {first['share']}" if "share" in first else "total"
        for values in totals:
            _print_row(name, values, self.several)
        if self.several:
            _print_comparison(totals)
            documents = count_of(first["n_docs"], "document")
            print(f"+- is a standard error, clustered by document ({documents})")
        print(f"model {printable(first['model'])}")


_PRINTED: dict[str, type[_Printed]] = {"text": _PlainTable, "json": _OneValue, "jsonl": _Lines}


def _print_row(name: str, values: dict[str, Any], several: bool, *, header: bool = False) -> None:
    """Print one row. Numbers come first, as in `wc`, so that columns are aligned and no name is cut."""
    if header:
        print(
            f"{'tokens':>12} {'ppl':>12} {'bpb':>8}" + f"{'context':>10}" * several + "  document"
        )
    numbers = f"{values['n_tokens']:>12} {_number(values['ppl']):>12} {_number(values['bpb']):>8}"
    context = f" {values['context']:>9}" if several else ""
    print(f"{numbers}{context}  {printable(one_line(name))}", flush=True)


def _errors(total: dict[str, Any]) -> str:
    """Return the standard errors of a total, and of how many documents they are."""
    errors = f"ppl +- {_number(total['ppl_se'])}, bpb +- {_number(total['bpb_se'])}"
    return f" ({count_of(total['n_docs'], 'document')}, {errors})"


def _print_comparison(totals: list[dict[str, Any]]) -> None:
    """Print one line per context, each number with its standard error."""
    first = totals[0]["context"]
    print(
        f"\n{'context':>9} {'ppl':>12} {'+-':>8} {'bpb':>8} {'+-':>8} {f'ppl / {first}':>12} {'+-':>8}"
    )
    for row in totals:
        line = f"{row['context']:>9}"
        for key, width in (("ppl", 12), ("bpb", 8), ("ppl_ratio", 12)):
            line += f" {_number(row.get(key)):>{width}} {_number(row.get(f'{key}_se')):>8}"
        print(line)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 1e6 else f"{value:.2e}"
