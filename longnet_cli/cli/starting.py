"""The start of a command: its processes, its model and its documents, and what these will keep.

Every process finds the model and the documents, and each rank opens them. What is imported stays, so the garbage
collector is kept away from it.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longnet_cli.basics.errors import ConfigError
from longnet_cli.basics.events import Events, LeftOut
from longnet_cli.basics.sizes import count_of, format_count
from longnet_cli.running.ranks.launch import (
    start_ranks,
    started_by_torchrun,
    under_torchrun,
)

from .command import given_names
from .options import (
    DEFAULT_MODEL,
    KNOWS,
    Computing,
    Documents,
    Mesh,
    ModelChoice,
    read_pattern,
)
from .output import (
    be_quiet,
    check_output,
    count_left_out,
    note,
    say_left_out,
    say_what_is_kept,
    tell,
)
from .progress import ExpectedTokens, progress

if TYPE_CHECKING:
    import torch

    from longnet_cli.data.documents.input_documents import Inputs
    from longnet_cli.data.documents.token_documents import Document
    from longnet_cli.data.documents.tokenizer import Tokenizer
    from longnet_cli.data.files.machine_shares import Share
    from longnet_cli.data.files.manifest import Manifest
    from longnet_cli.jobs.estimating import Room
    from longnet_cli.jobs.row_jobs import Output, RowJob
    from longnet_cli.models.folder import Loaded, ModelFolder
    from longnet_cli.nets.net import Net
    from longnet_cli.running.ranks.ranks import Ranks
    from longnet_cli.running.reader import Reader


STDIN = {"-": "stdin", "@-": "stdin"}  # inputs that are read from it
OF_TOKENS = ("--tokenizer", "--tokenizer-differs", "--eos", "--bos")  # of no use for vectors


def freeze_imports() -> None:
    """Leave all objects out of later collections. Call it after the imports: torch's objects take 0.2 s each time."""
    gc.freeze()
    # triton's bindings report what the last collection cannot free
    atexit.register(lambda: gc.unfreeze() if "triton" in sys.modules else None)


def launch(
    mesh: Mesh,
    inputs: Sequence[str] = (),
    *,
    share: Share | None = None,
    dry_run: bool = False,
) -> int | None:
    """Run this command as `nproc` processes, or as `dp` groups of `sp` processes, and exit with their exit code.

    A `dry_run` starts none: return the number of processes that it plans for. Without any of these options, or without
    `nproc` under torchrun, return: the command goes on in this process. Raises ConfigError for `nproc` under torchrun;
    with several processes or a `share`, for stdin or a pipe, which they cannot share; for a share with several.
    """
    several = processes(mesh) > 1
    if several or share:
        refuse_read_once(inputs)
    if several and share:
        raise ConfigError("--share is for one process: leave out --dp, --sp and --nproc")
    if (nproc := _asked(mesh)) is not None:
        start_ranks(nproc, dry_run=dry_run)
    return nproc


def join_ranks(
    device: str,
    sp: int | None,
    dp: int | None,
    planned: int | None,
) -> tuple[Ranks, torch.device]:
    """Connect this process with the other ranks, as `ranks.join` does. All but the first are quiet from then on."""
    from longnet_cli.running.ranks.ranks import join

    freeze_imports()
    ranks, where = join(device, sp=sp, dp=dp, planned=planned)
    if not ranks.writes:
        be_quiet(True)
    return ranks, where


def _asked(mesh: Mesh) -> int | None:
    """Return the number of processes that the options ask for; None for none."""
    needed = mesh.groups * (mesh.sp or 1)
    if mesh.nproc is None and needed > 1 and not started_by_torchrun():
        return needed
    return mesh.nproc


def processes(mesh: Mesh) -> int:
    """Return the number of processes that there are, or that the options ask for."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else _asked(mesh) or 1


def refuse_sharing(mesh: Mesh, folder: ModelFolder) -> None:
    """Raise ConfigError if processes are to share a sequence, and a Hugging Face model cannot.

    Call it before any rank is started.
    """
    sp = mesh.sp or processes(mesh) // mesh.groups
    if sp > 1 and folder.of_transformers:
        raise ConfigError(
            f"{folder.name}: a Hugging Face model reads a document in one process: give every process its own "
            f"documents (--dp {processes(mesh)})"
        )


def ask_hub(model: str | None, tokenizer: str | None) -> None:
    """Do what --update says: download what is new of a model or a tokenizer on a hub, before any rank is started.

    Raises ConfigError under torchrun, and as `hub.model_names.refresh` does.
    """
    from longnet_cli.hub.model_names import refresh

    if under_torchrun():
        raise ConfigError(
            "--update is for one process, and torchrun starts several: update first, then start them"
        )
    refresh(model, tokenizer)


def refuse_read_once(inputs: Sequence[str]) -> None:
    """Raise ConfigError for an input that is a stream, which only one process can read."""
    for item in inputs:
        is_plain = os.path.isfile(item) or os.path.isdir(item) or not os.path.exists(item)
        if item in STDIN or not is_plain or item.startswith("/dev/"):
            raise ConfigError(
                f"{STDIN.get(item, item)} can be read by one process: save it to a file, which every process reads "
                "for itself"
            )


def check_spill(spill: str | None, net: Net | None = None) -> None:
    """Raise ConfigError for a --spill that is no folder, and for a `net` that would keep nothing there."""
    if spill and not os.path.isdir(spill):
        raise ConfigError(f"--spill {spill}: no such folder")
    if spill and net and net.config.causal:
        raise ConfigError(
            "--spill is for hidden states of bidirectional models, and this one is causal: leave it out"
        )


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The model that a command has `found`, opened, with the documents, and the ranks that share what is read.

    Of a dry run, `room` is the memory before the model was loaded. `left_out` counts the documents that get no row.
    """

    found: ModelAndInputs
    loaded: Loaded
    computing: Computing
    ranks: Ranks
    left_out: LeftOut
    room: Room | None

    def reader(self) -> Reader:
        """Return what reads documents with the model, in chunks as the earlier run did."""
        from longnet_cli.running.reader import Reader

        return Reader(
            self.loaded.net,
            chunk=self.computing.chunk,
            earlier_chunk=self.found.earlier.settings.get("chunk", 0),
            dtype=self.computing.dtype,
            spill=self.computing.spill,
            ranks=self.ranks,
        )

    def inputs(self, tokenizer: Tokenizer | None) -> Inputs:
        """Return the documents as the model reads them, texts by `tokenizer`."""
        from longnet_cli.data.documents.input_documents import Inputs
        from longnet_cli.data.documents.tokenizer import end_of_text

        documents = self.found.documents
        net = self.loaded.net
        reads_vectors = net.row_size is not None
        names = given_names(documents)
        unread = [name for name in OF_TOKENS if name in names]
        if reads_vectors and unread:
            raise ConfigError(
                f"{self.found.folder.name} reads vectors, which have no tokens: leave out {', '.join(unread)}"
            )
        return Inputs(
            self.found.input_files,
            tokenizer,
            documents.column,
            documents.id_column,
            documents.kept,
            vocab_size=net.config.vocab_size,
            eos_id=end_of_text(documents.eos, self.loaded.tokenizer),
            skip_bad=documents.skip_bad,
            vectors=reads_vectors,
            coords=net.has_grid,
            share=documents.share,
        )

    def run(
        self,
        job: RowJob,
        inputs: Inputs,
        output: Output,
        logprobs: Callable[..., None] | None = None,
    ) -> None:
        """Write the rows of a job, with progress, and say how many there are. For `logprobs`, see `Events`."""
        from longnet_cli.data.outputs.output_paths import name_of_output
        from longnet_cli.jobs.row_jobs import write_rows

        found = self.found
        done = job.counted(found.done["tokens"], found.done["documents"])
        expected = ExpectedTokens(done)
        path = str(output.path)
        suffixes = {source.path.suffix for source in found.input_files.found if source.path}
        if not found.is_named and suffixes - {".py"}:
            note(f"{DEFAULT_MODEL}, the default model, {KNOWS}: for other text, give --model")

        def on_document(document: Document, fraction: float | None) -> None:
            expected.count(job.counted(len(document)), fraction)

        with (
            say_what_is_kept(path),
            progress(job.doing, total=expected.total, start=done) as advance,
        ):
            job.reader.events = Events(
                progress=advance,
                note=note,
                left_out=self.left_out,
                document=on_document,
                logprobs=logprobs,
            )
            written = write_rows(job, inputs, output)
        if path != "-" or not output.sink:
            counts = count_of(written["rows"], job.row_name)
            tokens = f"{format_count(written['tokens'])} token{'s' * (written['tokens'] != 1)}"
            tell(f"{counts} of {tokens} -> {name_of_output(path)}")

    def end(self) -> None:
        """Leave the ranks, and say what is left out. If documents are, the first rank exits with code 6."""
        from longnet_cli.running.ranks.ranks import leave

        leave()
        say_left_out(self.left_out, first=self.ranks.writes)


def open_command(
    options: Any,
    where_to: str,
    *,
    embeds: bool = False,
    also: Mapping[str, str | None] = {},
) -> Opened:
    """Return what a command, `score` or `encode`, has opened, each rank for itself.

    What is wrong without a model is refused before. For `where_to`, see `output.check_output`; `also` are other paths
    that are written, by the names of their options. For `embeds`, see `ModelAndInputs`.
    """
    from longnet_cli.basics.configuration import without_none
    from longnet_cli.data.outputs.output_paths import refuse_other_suffix, refuse_overwriting

    output = options.output
    running = options.running
    written = without_none({"-o": output, **also})
    for option, path in written.items():
        refuse_other_suffix(option, path, embeds)
    earlier = None
    if output is not None:
        resume = running.resume
        dry_run = running.dry_run
        names = given_names(options)
        earlier = check_output(output, where_to, names, resume=resume, dry_run=dry_run)
    named = ModelAndInputs(options.documents, options.choice, earlier, embeds=embeds)
    for option, path in written.items():
        refuse_overwriting(option, [path], named.input_files, named.files)
    return named.open(options.mesh, options.computing, dry_run=running.dry_run)


class ModelAndInputs:
    """The model and the documents that a command names: found by every process, then opened by each rank.

    A run that continues the `earlier` one takes the same commit of a model on a hub. The model is to make vectors if it
    `embeds`; otherwise a model that reads vectors is refused. Raises ConfigError and CheckpointError for a model or a
    tokenizer that is missing.
    """

    def __init__(
        self,
        documents: Documents,
        choice: ModelChoice,
        earlier: Manifest | None = None,
        *,
        embeds: bool = False,
    ) -> None:
        from longnet_cli.data.documents.tokenizer import Tokenizer
        from longnet_cli.data.files.input_files import InputFiles
        from longnet_cli.data.files.manifest import Manifest
        from longnet_cli.hub.model_names import as_stored
        from longnet_cli.models.folder import ModelFolder

        tokenizer = documents.tokenizer
        if choice.update:
            ask_hub(choice.name, tokenizer)
        self.earlier = earlier or Manifest({})
        model = as_stored(choice.name, [self.earlier.settings.get("model_name")])
        self.documents = documents
        self.pattern = read_pattern(choice.pattern)
        self.embeds = embeds
        self.done = self.earlier.totals
        self.is_named = choice.model is not None  # and not the default model
        self.folder = ModelFolder.find(model, gguf=True, embeds=embeds)
        self.files = [self.folder.path, Tokenizer.find(tokenizer) if tokenizer else None]
        self.input_files = InputFiles(documents.inputs, skip_bad=documents.skip_bad)

    def open(
        self,
        mesh: Mesh,
        computing: Computing,
        *,
        dry_run: bool,
        chat: bool | None = False,
    ) -> Opened:
        """Start the ranks, and load the model on each of them. For `chat`, see `ModelFolder.load`."""
        check_spill(computing.spill)
        refuse_sharing(mesh, self.folder)
        planned = launch(mesh, self.documents.inputs, share=self.documents.share, dry_run=dry_run)
        documents = self.documents
        ranks, where = join_ranks(computing.device, mesh.sp, mesh.dp, planned)
        room = None
        if dry_run:
            from longnet_cli.jobs.estimating import Room

            room = Room.now(where)
            self.folder.check_weights_fit(computing.dtype, where, room.free)
        loaded = self.folder.load(
            device=where,
            dtype=computing.dtype,
            tokenizer=documents.tokenizer,
            tokenizer_differs=documents.tokenizer_differs,
            pattern=self.pattern,
            bos=documents.bos,
            chat=chat,
            vectors=self.embeds,
            note=tell,
        )
        check_spill(computing.spill, loaded.net)
        if ranks.sp > 1 and loaded.net.config.pattern.chosen:
            raise ConfigError(
                "a pattern with chosen blocks is read by one process: give every process its own documents "
                f"(--dp {ranks.world})"
            )
        return Opened(
            found=self,
            loaded=loaded,
            computing=computing,
            ranks=ranks,
            left_out=count_left_out(documents.skip_bad),
            room=room,
        )
