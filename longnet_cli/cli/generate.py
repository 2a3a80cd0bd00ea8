"""`longnet generate`: texts that a model continues, token by token."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from longnet_cli.basics.errors import ConfigError, is_utf8
from longnet_cli.basics.events import Events
from longnet_cli.basics.sizes import DTYPES_OF_TORCH, count_of, format_bytes, format_duration

from . import options as shared
from .command import TOP_P, Excludes, check_pairs
from .dry_run import show_reading
from .options import (
    INPUT,
    OUTPUT,
    SAMPLING,
    Computing,
    Documents,
    Mesh,
    ModelChoice,
    Sampling,
)
from .output import emit_jsonl, note, printable, tell, write_text
from .progress import progress
from .starting import ModelAndInputs, Opened

if TYPE_CHECKING:
    from longnet_cli.data.documents.chat import ChatTemplate
    from longnet_cli.data.documents.input_documents import Inputs
    from longnet_cli.data.documents.token_documents import Document
    from longnet_cli.jobs.estimating import Room
    from longnet_cli.jobs.generating import Step
    from longnet_cli.models.folder import Loaded
    from longnet_cli.running.causal_stream import CausalStream
    from longnet_cli.running.reader import Reader

Format = Literal["text", "jsonl"]
MAX_TOKENS = 256
ORIGIN = ("model", "model_sha256", "tokenizer_sha256", "pattern")  # keys of a line of JSON


PAIRS = (
    TOP_P,
    Excludes("--dry-run", "--format", "prints a table"),
    Excludes("--dry-run", "--state", "estimates what reading a whole prompt takes"),
)


@dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """The options of `generate`."""

    prompt: str | None = shared.argument(
        "PROMPT",
        "Continue this text, after each document of --input. If it is -, or if you give neither PROMPT nor --input nor "
        "--state, read stdin.",
        default=None,
    )
    inputs: list[str] | None = INPUT.common(
        "--input -i INPUT",
        "Continue each document of files, folders, globs, @list or - (stdin), with a newline and PROMPT, if you give "
        "one. Repeat it for more.",
    )
    state: str | None = INPUT.common(
        "--state DIR",
        "Continue after what --save-state has saved in this folder, with its model, pattern and dtype. It stays as it "
        "is.",
    )
    chat: bool = INPUT.flag(
        "--chat",
        "Put each prompt into the tokenizer's chat template, as a user's message.",
        common=True,
    )
    tokenizer: str | None = shared.tokenizer_option()
    tokenizer_differs: bool = shared.differs_flag()
    column: str | None = shared.column_option()
    eos: str | None = shared.eos_option()
    bos: str | None = shared.bos_option()
    choice: ModelChoice
    max_tokens: int | None = SAMPLING.size(
        "--max-tokens -n SIZE",
        f"Generate at most this many tokens. (default: {MAX_TOKENS}, or 0 with --save-state)",
        common=True,
    )
    sampling: Sampling
    format: Format = OUTPUT.common(
        "--format text|jsonl",
        "Stream the text, or print one line of JSON per prompt.",
        default="text",
    )
    save_state: str | None = OUTPUT.common(
        "--save-state DIR",
        "Save in this folder what was read and generated, for --state. One prompt only.",
    )
    dry_run: bool = OUTPUT.flag(
        "--dry-run",
        "Read the prompts, print tokens, FLOPs, memory and time, and stop. The exit code is 5 if it does not fit.",
    )
    computing: Computing

    @property
    def text(self) -> str:
        """PROMPT, empty if it is not given."""
        return self.prompt or ""


def generate(options: GenerateCommand) -> None:
    """Continue texts of any length with a model, token by token; only the new text goes to stdout.

    Example: longnet generate "def mean(values):"

    The likeliest token is taken each time, unless you give --temperature.
    A text ends at the model's end-of-text token, at a --stop text, or after --max-tokens.
    With a window, a token costs the same time and memory at any position.
    """
    check_pairs(PAIRS, options)
    if options.state:
        options = _as_saved(options, options.state)
    save_state = options.save_state
    options = _with_stdin(options)
    opened, inputs = _open(options)
    loaded = opened.loaded
    job = _TextGenerator(options, loaded)
    documents, several = _documents(options, inputs, loaded.chat)
    if opened.room:
        _estimate(job, documents, opened.reader(), opened.room)
        return
    stream = _stream(options, loaded)
    for index, document in enumerate(documents):
        forked = stream.fork() if stream and options.inputs and not save_state else stream
        job.run(document, forked, index, named=several)
    if stream and save_state:
        size = stream.save(save_state, name=loaded.origin, tokenizer_sha256=loaded.tokenizer_sha256)
        after = f"the state after {count_of(stream.position, 'token')}, {format_bytes(size)}"
        tell(f"{save_state}: {after}")


def _as_saved(options: GenerateCommand, state: str) -> GenerateCommand:
    """Return the options with the model, pattern and dtype of a saved state where none is given. Loads no model.

    Raises ConfigError for a pattern that is not the state's.
    """
    from longnet_cli.attention.notation import format_pattern, parse_pattern
    from longnet_cli.basics.configuration import parse, read_text

    choice = options.choice
    computing = options.computing
    asked = shared.read_pattern(choice.pattern)
    try:
        manifest = parse(read_text(Path(state) / "manifest.json"))
        saved = parse_pattern(manifest["longnet.pattern"])
        model = manifest.get("longnet.model")
        dtype = DTYPES_OF_TORCH.get(manifest.get("dtype"), "auto")
    except (OSError, ValueError, KeyError, TypeError):
        return options  # reading the state says what is wrong with it
    if not asked:
        if not manifest.get("as_trained"):
            choice = replace(choice, pattern=manifest["longnet.pattern"])
    # a model may have its own offsets
    elif replace(asked, head_offsets=saved.head_offsets) != saved:
        raise ConfigError(
            f"{state}: it was saved with the pattern {format_pattern(saved)}, and this is {choice.pattern}: leave out "
            "--pattern"
        )
    if computing.dtype == "auto":
        computing = replace(computing, dtype=dtype)
    choice = replace(choice, model=choice.model or model)
    return replace(options, choice=choice, computing=computing)


def _with_stdin(options: GenerateCommand) -> GenerateCommand:
    """Return the options with stdin in their inputs if it is to be read. Otherwise PROMPT or a state is continued.

    Raises ConfigError for no text, for stdin beside inputs, and for text that is not UTF-8.
    """
    text = options.text
    if not (text or options.inputs or options.state):
        if sys.stdin is None or sys.stdin.isatty():
            raise ConfigError(
                "there is nothing to continue: give a text, --input FILE, or a text on stdin"
            )
        text = "-"
    if text == "-":
        if options.inputs:
            raise ConfigError(
                "PROMPT - is stdin, and --input is given: write the question, or leave out one of them"
            )
        return replace(options, prompt=None, inputs=["-"])
    if not is_utf8(text):
        raise ConfigError("PROMPT is not UTF-8: save it as a UTF-8 file and give that with --input")
    if os.path.exists(text):
        note(f"{text} is continued as text; --input reads the file")
    return options


def _open(options: GenerateCommand) -> tuple[Opened, Inputs]:
    """Return the model, if it can do what the options ask for, and the inputs. Raises as `launch` does."""
    documents = Documents(
        options.inputs or [],
        options.tokenizer,
        options.tokenizer_differs,
        options.column,
        eos=options.eos,
        bos=options.bos,
    )
    named = ModelAndInputs(documents, options.choice)
    opened = named.open(Mesh(), options.computing, dry_run=options.dry_run, chat=options.chat)
    tokenizer = opened.loaded.tokenizer
    has_text = options.prompt or not options.inputs
    if tokenizer is None and (options.format == "text" or options.sampling.stop or has_text):
        raise ConfigError(
            f"{options.choice.name}: there is no tokenizer: give --tokenizer, or token ids with --input and --format "
            "jsonl"
        )
    return opened, opened.inputs(tokenizer)


def _estimate(
    job: _TextGenerator,
    documents: Iterable[Document],
    reader: Reader,
    free: Room,
) -> None:
    """Print what reading the prompts and generating the most tokens would take. Raises as `show_reading`."""
    from longnet_cli.jobs.estimating import estimate_reading
    from longnet_cli.jobs.generating import plan_generation, seconds_of_new_token, trial_of

    net = job.loaded.net
    save_state = job.options.save_state
    plan = plan_generation(net, documents, job.bos_ids, job.max_tokens, reader.chunk)
    seconds = seconds_of_new_token(job.loaded, reader.dtype)
    plan.seconds += plan.new * seconds
    meaning = f"at most of each, {format_duration(seconds)} a token (measured after a short prompt)"
    meaning += f"; the state goes to {save_state}" if save_state else ""
    new_tokens = "new tokens", f"{job.max_tokens:,}", meaning
    estimate = estimate_reading(reader, plan, trial_of(job.loaded, job.bos_ids), room=free)
    show_reading(estimate, "text", "generating", new_tokens)


class _TextGenerator:
    """The generation of texts by one model, and what is printed of them."""

    def __init__(self, options: GenerateCommand, loaded: Loaded) -> None:
        self.options = options
        self.loaded = loaded
        default = 0 if options.save_state else MAX_TOKENS
        self.max_tokens = default if options.max_tokens is None else options.max_tokens
        # a template has its own start ids
        begun = options.chat or options.state
        self.bos_ids = None if begun and options.bos is None else loaded.bos
        self.sampling = options.sampling.arguments()

    @cached_property
    def _origin(self) -> dict[str, str | None]:
        """The facts of the model that a line of JSON has."""
        from longnet_cli.nets.weights import model_origin

        loaded = self.loaded
        origin = model_origin(loaded.net, loaded.origin, loaded.tokenizer_sha256)
        return {name: origin.get(f"longnet.{name}") for name in ORIGIN}

    def run(
        self,
        document: Document,
        stream: CausalStream | None,
        number: int,
        *,
        named: bool,
    ) -> None:
        """Continue a document, the prompt of this `number`, after what the `stream` has read, and print it.

        Its name is printed before the text if it is to be `named`.
        """
        from longnet_cli.jobs.generating import generate as run

        computing = self.options.computing
        with progress("reading the prompt", total=len(document)) as advance:
            steps = run(
                self.loaded,
                document,
                bos=self.bos_ids,
                max_tokens=self.max_tokens,
                number=number,
                **self.sampling,
                chunk=computing.chunk,
                dtype=computing.dtype,
                stream=stream,
                events=Events(progress=advance),
            )
            first = [*islice(steps, 1)]
        if first and named:
            blank = "\n" if number else ""
            print(f"{blank}==> {printable(document.doc_id)} <==", flush=True)
        self._print(document, chain(first, steps))

    def _print(self, document: Document, steps: Iterable[Step]) -> None:
        """Print the new text as it comes, or one line of JSON at the end; counts and speed go to stderr."""
        as_json = self.options.format == "jsonl"
        # of the line of JSON
        tokens = list[int]()
        logprobs = list[float]()
        texts = list[str]()
        n_tokens = 0
        reason: str | None = "length"
        last_text = ""
        began = time.monotonic()
        for step in steps:
            n_tokens += 1
            reason = step.finish_reason  # of the last one, which has one
            if as_json:
                tokens.append(step.id)
                logprobs.append(step.logprob)
                texts.append(step.text)
            elif step.text:
                last_text = step.text
                write_text(last_text)
            if reason and not self.options.save_state:
                break  # to save a state, the last token is read
        if as_json:
            emit_jsonl(
                {
                    "kind": "generation",
                    "doc_id": document.doc_id,
                    "n_prompt": len(document),
                    "n_tokens": n_tokens,
                    "text": "".join(texts),
                    "tokens": tokens,
                    "logprobs": logprobs,
                    "finish_reason": reason,
                    "seed": self.sampling["seed"] if self.options.sampling.temperature else None,
                    **self._origin,
                }
            )
        elif n_tokens and not last_text.endswith("\n"):
            print(flush=True)
        line = f"{count_of(len(document), 'token')} read"
        if n_tokens:
            seconds = (time.monotonic() - began) / max(1, n_tokens - 1)
            drawn = self.options.sampling.seed_in_words(self.sampling["seed"])
            line += f", {n_tokens} generated, {format_duration(seconds)} each ({reason}{drawn})"
        tell(line)


def _documents(
    options: GenerateCommand,
    inputs: Inputs,
    template: ChatTemplate | None,
) -> tuple[Iterator[Document], bool]:
    """Return the documents to continue, and whether they are several texts to print, which get their names.

    Raises ConfigError for several that are to be one state.
    """
    documents = _each_document(options, inputs, template)
    # the first line of a pipe waits for none
    is_pipe = options.inputs == ["-"]
    if not options.save_state and (is_pipe or options.format == "jsonl"):
        return documents, False
    first_two = [*islice(documents, 2)]
    several = len(first_two) > 1
    if several and options.save_state:
        raise ConfigError("--save-state saves one prompt, and there are several: give one")
    return chain(first_two, documents), several


def _each_document(
    options: GenerateCommand,
    inputs: Inputs,
    template: ChatTemplate | None,
) -> Iterator[Document]:
    """Yield each document of the inputs, with PROMPT after it; without inputs, PROMPT, empty after a state."""
    import numpy as np

    from longnet_cli.data.documents.token_documents import Document

    text = options.text
    question = f"\n{text}" if text else ""
    tokenizer = inputs.tokenizer
    if not options.inputs:
        assert tokenizer  # `_open` has checked
        words = template if template and text else tokenizer
        yield Document("prompt", words.encode(text), None, "PROMPT")
    elif template:
        for read in inputs.texts():
            ids = template.encode("".join([*read.parts, question]))
            yield Document(read.doc_id, ids, None, read.where, limit=template.tokenizer.vocab_size)
    elif question:
        assert tokenizer
        asked = tokenizer.encode(question)
        for document in inputs.documents():
            yield Document(
                document.doc_id,
                np.concatenate([document.tokens, asked]),
                None,
                document.where,
            )
    else:
        yield from inputs.documents()


def _stream(options: GenerateCommand, loaded: Loaded) -> CausalStream | None:
    """Return a stream that has read --state, or a new one for --save-state; otherwise None. Raises as `load` does."""
    from longnet_cli.running.causal_stream import CausalStream
    from longnet_cli.running.device import DTYPES, resolve_dtype
    from longnet_cli.running.saved_state import check_place

    net = loaded.net
    state = options.state
    save_state = options.save_state
    if not state and not save_state:
        return None
    if net.stream():
        raise ConfigError(
            "this model keeps a cache of its own, which is not saved: leave out --state and --save-state"
        )
    if save_state:
        check_place(Path(save_state))
    if not state:
        return CausalStream(net)
    dtype = DTYPES[resolve_dtype(options.computing.dtype, next(net.parameters()).device)]
    stream = CausalStream.load(net, state, tokenizer_sha256=loaded.tokenizer_sha256, dtype=dtype)
    if stream.batch != 1:
        raise ConfigError(
            f"{state}: it was saved after a batch of {stream.batch} documents: name one of a document"
        )
    return stream
