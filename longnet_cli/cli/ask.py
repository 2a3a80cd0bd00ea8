"""`longnet ask`: the passages of any texts that have a question's words, and a model's answer from them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from longnet_cli.basics.errors import ConfigError, LongNetError
from longnet_cli.basics.events import Events
from longnet_cli.basics.sizes import count_of, format_count

from . import options as shared
from .command import TOP_P, Needs, check_pairs
from .options import (
    INPUT,
    MODEL,
    OUTPUT,
    SAMPLING,
    Computing,
    Format,
    Sampling,
)
from .output import (
    count_left_out,
    emit_json,
    emit_jsonl,
    note,
    say_left_out,
    tell,
    write_text,
)
from .progress import progress
from .starting import ModelAndInputs

if TYPE_CHECKING:
    from longnet_cli.basics.events import LeftOut
    from longnet_cli.data.documents.passages import Passage
    from longnet_cli.data.files.input_files import InputFiles
    from longnet_cli.jobs.asking import Answer
    from longnet_cli.models.folder import Loaded

EXCERPT = 60  # characters of a source
SMALL = 10**9  # parameters, below which a model is often wrong
# measured by docs/measurements/answers.py
RIGHT_BY_SMALL = "SmolLM2-135M answered 18 of 40 questions about Python right"
OF_A_MODEL = "--update --system --max-tokens --temperature --top-p --seed --stop --device --dtype --chunk --spill"
PAIRS = [
    *(Needs(name, "--model", "is for a model's answer") for name in OF_A_MODEL.split()),
    TOP_P,
]


@dataclass(frozen=True, kw_only=True)
class AskCommand:
    """The options of `ask`."""

    words: list[str] = shared.argument(
        "INPUT... QUESTION",
        "Read the text of files, folders, globs, URIs (s3://...), @list or - for stdin, or a column of Arrow, Parquet "
        "or JSON Lines. The last word is the question, in quotes.",
    )
    questions: str | None = INPUT.common(
        "--questions FILE",
        "Ask the `question` of each row of this file (JSON Lines, Arrow or Parquet), not QUESTION.",
    )
    column: str | None = INPUT.common(
        "--column NAME", "Read this column, or a field of a struct. (default: text)"
    )
    id_column: str | None = shared.id_column_option()
    skip_bad: bool = shared.skip_bad_flag()
    index: str | None = INPUT.common(
        "--index FILE", "Keep the index here. Inputs that stay are read once."
    )
    passages: int = INPUT.common(
        "--passages N",
        "Print, or let the model read, the N best passages at most.",
        default=3,
    )
    vectors: str | None = INPUT.common(
        "--vectors FILE",
        "Search by meaning too: in the vectors that `encode --span passage` made of the same inputs.",
    )
    model: str | None = shared.model_option(absent="none, the passages are printed")
    update: bool = shared.update_flag()
    system: str | None = MODEL.option(
        "--system TEXT",
        "Tell the model this before the passages. (default: to answer from them, in one sentence)",
    )
    max_tokens: int = SAMPLING.common(
        "--max-tokens -n N",
        "Generate at most this many tokens.",
        default=256,
    )
    sampling: Sampling
    format: Format = OUTPUT.common(
        "--format text|json",
        "Print text as it comes, or JSON.",
        default="text",
    )
    computing: Computing


def ask(options: AskCommand) -> None:
    """Find the passages of any texts that answer a question, and let a model answer from them.

    Example: longnet ask docs/*.md "How does a stopped run go on?"

    The passages are those that have the words of the question (BM25), of 100 to 200 tokens each.
    Without --model, they are printed, the best first. With it, the answer is, and stderr names them.
    If there are none, the exit code is 1.
    """
    check_pairs(PAIRS, options)
    names, questions = _inputs_and_questions(options)
    loaded = _load(options, names) if options.model else None
    from longnet_cli.data.files.input_files import InputFiles

    left_out = count_left_out(options.skip_bad)
    sources = InputFiles(names, skip_bad=options.skip_bad)
    best = _search(options, sources, questions, left_out)
    for number, ((name, question), passages) in enumerate(zip(questions, best, strict=True)):
        answered = _answer(options, loaded, question, passages, number)
        if options.questions is not None:
            emit_jsonl({"id": name} | answered.row())
        elif passages and options.format == "json":
            emit_json(answered.row())
    if without := best.count([]):
        what = "the question" if len(questions) == 1 else f"{without} of {len(questions)} questions"
        raise LongNetError(f"no passage has any word of {what}: ask in words that the texts have")
    say_left_out(left_out)


def _load(options: AskCommand, names: list[str]) -> Loaded:
    """Return the model, which is found before any text is read. Raises as `ModelAndInputs` does."""
    choice = shared.ModelChoice(options.model, options.update)
    named = ModelAndInputs(shared.Documents(names, skip_bad=options.skip_bad), choice)
    loaded = named.open(shared.Mesh(), options.computing, dry_run=False, chat=None).loaded
    parameters = sum(weight.numel() for weight in loaded.net.parameters())
    if parameters < SMALL:
        size = f"{loaded.origin} has {format_count(parameters)} parameters"
        note(f"{size}: {RIGHT_BY_SMALL}: read the sources")
    return loaded


def _search(
    options: AskCommand,
    sources: InputFiles,
    questions: list[tuple[str, str]],
    left_out: LeftOut,
) -> list[list[Passage]]:
    """Return the best passages for each question."""
    from longnet_cli.data.documents.input_documents import Inputs
    from longnet_cli.data.documents.passages import open_index
    from longnet_cli.data.outputs.output_paths import refuse_overwriting
    from longnet_cli.jobs.asking import finder

    inputs = Inputs(
        sources,
        column=options.column,
        id_column=options.id_column,
        skip_bad=options.skip_bad,
    )
    if options.index:
        refuse_overwriting(
            "--index",
            [options.index],
            sources,
            [options.questions, options.vectors],
        )
    size = inputs.num_bytes()
    with open_index(options.index) as index:
        with progress("indexing", size, "B") as advance:
            index.update(inputs, Events(progress=advance, left_out=left_out))
        find = finder(index, options.vectors)
        return [find(question, options.passages) for _, question in questions]


def _answer(
    options: AskCommand,
    loaded: Loaded | None,
    question: str,
    passages: list[Passage],
    number: int,
) -> Answer:
    """Return what answers the `number`th question. One question's answer is printed as it comes, unless as JSON."""
    from longnet_cli.jobs.asking import answer, found_alone

    prints = passages and options.format == "text" and options.questions is None
    if loaded is None:
        answered = found_alone(question, passages)
        if prints:
            sources = (f"{_place(source)}:\n{source.text}\n" for source in answered.sources)
            write_text("\n".join(sources))
        return answered
    sampling = options.sampling.arguments()
    answered = answer(
        loaded,
        question,
        passages,
        write_text if prints else lambda text: None,
        system=options.system,
        max_tokens=options.max_tokens,
        number=number,
        chunk=options.computing.chunk,
        dtype=options.computing.dtype,
        **sampling,
    )
    if prints:
        write_text("\n")
        _tell_sources(answered, options.sampling.seed_in_words(sampling["seed"]))
    return answered


def _inputs_and_questions(options: AskCommand) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the names of the inputs, and the questions with their ids.

    Raises ConfigError for a question that is missing, is a file, or is not UTF-8.
    """
    from longnet_cli.data.documents.passages import check_question

    if options.questions is None:
        *names, question = options.words
        questions = [("", question)]
        if not names or os.path.exists(question):
            raise ConfigError(
                f"{question}: name files, folders or -, and write the question last, in quotes"
            )
    else:
        names = options.words
        questions = [*_read_questions(options.questions)]
    for _, question in questions:
        check_question(question)
    return names, questions


def _read_questions(file: str) -> Iterator[tuple[str, str]]:
    """Yield the id and the text of each row of a file. Neighbours of one id are not joined."""
    from longnet_cli.data.documents.input_documents import DocumentPass, Inputs
    from longnet_cli.data.files.column_choice import TokenTypes
    from longnet_cli.data.files.opened_inputs import Table, Text

    inputs = Inputs([file], column="question")

    def read(opened: Text | Table, types: TokenTypes) -> Iterable[Any]:
        apart = replace(opened, rows_alone=True) if isinstance(opened, Table) else opened
        return inputs.items(apart, types, form="text")

    for row in DocumentPass(inputs, read):
        yield row.doc_id, "".join(row.parts)


def _place(passage: Passage) -> str:
    return f"{passage.doc_id}, characters {passage.char_start:,} to {passage.char_end:,}"


def _tell_sources(answered: Answer, drawn: str) -> None:
    from longnet_cli.data.documents.passages import excerpt

    for number, source in enumerate(answered.sources, 1):
        shown = excerpt(source.text, answered.question, EXCERPT)
        tell(f"source {number}: {_place(source)}: {shown} ...")
    read = count_of(answered.n_prompt, "token")
    tell(f"{read} read, {answered.n_tokens} generated ({answered.finish_reason}{drawn})")
