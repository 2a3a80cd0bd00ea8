"""`longnet ask`: answers to questions from the passages of any texts that have their words."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from longnet_cli.basics.errors import ConfigError, LongNetError, one_line
from longnet_cli.basics.events import Events
from longnet_cli.basics.sizes import count_of
from longnet_cli.cli import options as shared
from longnet_cli.cli.command import TOP_P, check_pairs
from longnet_cli.cli.options import (
    INPUT,
    MISSING,
    MODEL,
    OUTPUT,
    SAMPLING,
    Computing,
    Format,
    Sampling,
)
from longnet_cli.cli.output import emit_json, emit_jsonl, tell, write_text
from longnet_cli.cli.progress import progress
from longnet_cli.cli.starting import ModelAndInputs, refuse_torchrun

if TYPE_CHECKING:
    from longnet_cli.jobs.asking import Answer

FIRST_WORDS = 60  # characters of a source


@dataclass(frozen=True, kw_only=True)
class AskCommand:
    """The options of `ask`."""

    words: list[str] = shared.argument(
        "INPUT... QUESTION",
        "Read the text of files, folders, globs, URIs (s3://...), @list or - for stdin, or a column of Arrow, Parquet "
        "or JSON Lines. The last word is the question, in quotes.",
    )
    questions: str | None = INPUT.option(
        "--questions FILE", "Ask each `question` of this file, not QUESTION.", common=True
    )
    column: str | None = INPUT.option(
        "--column NAME", "Read this column, or a field of a struct. (default: text)", common=True
    )
    id_column: str | None = shared.id_column_option()
    skip_bad: bool = shared.skip_bad_flag()
    index: str | None = INPUT.option(
        "--index FILE", "Keep the index here. Inputs that stay are read once.", common=True
    )
    model: str = shared.model_option(default=MISSING)
    update: bool = shared.update_flag()
    passages: int = MODEL.option(
        "--passages N", "Let the model read the N best passages at most.", default=3, common=True
    )
    max_tokens: int = SAMPLING.option(
        "--max-tokens -n N", "Generate at most this many tokens.", default=256, common=True
    )
    sampling: Sampling
    format: Format = OUTPUT.option(
        "--format text|json", "Print the answer as it comes, or JSON.", default="text", common=True
    )
    computing: Computing


def ask(options: AskCommand) -> None:
    """Answer a question from texts of any length: search them, and let a model read the best passages.

    The passages are those that have the words of the question (BM25), of some 200 tokens each; stderr names them.
    If there are none, nothing is answered, and the exit code is 1.
    """
    check_pairs([TOP_P], options)
    refuse_torchrun("ask")
    names, questions = _inputs_and_questions(options)
    documents = shared.Documents(
        names, column=options.column, id_column=options.id_column, skip_bad=options.skip_bad
    )
    named = ModelAndInputs(documents, shared.ModelChoice(options.model, options.update))
    opened = named.open(shared.Mesh(), options.computing, dry_run=False, chat=None)
    from longnet_cli.data.outputs import refuse_overwriting
    from longnet_cli.data.passages import open_index
    from longnet_cli.jobs.asking import answer

    inputs, quiet = opened.inputs(None), opened.quiet
    if options.index:
        refuse_overwriting("--index", [options.index], opened.sources, [options.questions])
    with open_index(options.index) as index:
        with progress("indexing", inputs.num_bytes(), "B", quiet=quiet) as advance:
            index.update(inputs, Events(progress=advance, left_out=opened.left_out))
        found = [index.find(question, options.passages) for _, question in questions]
    several, without = options.questions is not None, sum(not passages for passages in found)
    streams, how = options.format == "text" and not several, options.sampling.arguments()
    how |= {name: getattr(options.computing, name) for name in ("chunk", "dtype", "spill")}
    write = write_text if streams else lambda text: None
    for number, ((name, question), passages) in enumerate(zip(questions, found, strict=True)):
        if not passages and not several:
            break
        answered = answer(
            opened.loaded,
            question,
            passages,
            write,
            max_tokens=options.max_tokens,
            number=number,
            **how,
        )
        if streams:
            write_text("\n")
            _tell_sources(
                answered, f", seed {how['seed']}" * bool(options.sampling.temperature), quiet
            )
        elif several:
            emit_jsonl({"id": name} | answered.row())
        else:
            emit_json(answered.row())
    if without:
        what = f"{without} of {count_of(len(questions), 'question')}"
        raise LongNetError(
            f"no passage has a word of {what}, which nothing answers: ask in words that the text has"
        )
    opened.end()


def _inputs_and_questions(options: AskCommand) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the names of the inputs, and the questions with their ids.

    Raises ConfigError for a question that is missing, is a file, or is not UTF-8.
    """
    from longnet_cli.data.passages import check_question

    if options.questions is None:
        *names, question = options.words
        questions = [("", question)]
        if not names or os.path.exists(question):
            raise ConfigError(
                f"{question}: name files, folders or -, and write the question last, in quotes"
            )
    else:
        names, questions = options.words, [*_read_questions(options.questions)]
    for _, question in questions:
        check_question(question)
    return names, questions


def _read_questions(file: str) -> Iterator[tuple[str, str]]:
    """Yield the id and the text of each row of a file. Neighbours of one id are not joined."""
    from longnet_cli.data.inputs import DocumentPass, Inputs
    from longnet_cli.data.tables import Table, Text

    inputs = Inputs([file], column="question")

    def read(opened: Text | Table, types: object) -> Iterable[Any]:
        apart = replace(opened, rows_alone=True) if isinstance(opened, Table) else opened
        return inputs.items(apart, form="text")

    for row in DocumentPass(inputs, read):
        yield row.doc_id, "".join(row.parts)


def _tell_sources(answered: Answer, drawn: str, quiet: bool) -> None:
    for number, source in enumerate(answered.sources, 1):
        where = f"{source.doc_id}, characters {source.char_start:,} to {source.char_end:,}"
        tell(f"source {number}: {where}: {one_line(source.text)[:FIRST_WORDS]} ...", quiet)
    read = count_of(answered.n_prompt, "token")
    tell(f"{read} read, {answered.n_tokens} generated ({answered.finish_reason}{drawn})", quiet)
