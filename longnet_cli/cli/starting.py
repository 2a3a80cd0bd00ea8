"""The start of a command: its processes, its model and its documents, and what these will keep.

Every process finds the model and the documents, and each rank opens them. What is imported stays, so the garbage
collector is kept away from it.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from longnet_cli.basics.errors import ConfigError, MemoryLimitError
from longnet_cli.basics.sizes import format_bytes, format_count
from longnet_cli.cli.options import Computing, Documents, Mesh, ModelChoice, Running, read_pattern
from longnet_cli.cli.output import check_output, count_left_out, end, say_what_is_kept, tell
from longnet_cli.cli.progress import ExpectedTokens, progress
from longnet_cli.running.ranks.launch import check_shared, start_ranks, started_by_torchrun, under_torchrun

if TYPE_CHECKING:
    from longnet_cli.attention import Pattern
    from longnet_cli.data.documents import Document
    from longnet_cli.data.inputs import Inputs
    from longnet_cli.data.manifest import LeftOut, Manifest
    from longnet_cli.data.tokenizer import Tokenizer
    from longnet_cli.jobs.estimating.estimate import Room
    from longnet_cli.jobs.row_jobs import RowJob
    from longnet_cli.models.folder import Loaded, ModelFolder
    from longnet_cli.nets.net import Net
    from longnet_cli.running.ranks.ranks import Ranks


def freeze_imports() -> None:
    """Leave all objects out of later collections. Call it after the imports: torch's objects take 0.2 s each time."""
    gc.freeze()
    # triton's bindings report what the last collection cannot free
    atexit.register(lambda: gc.unfreeze() if "triton" in sys.modules else None)


def launch(mesh: Mesh, inputs: Sequence[str] = (), *, dry_run: bool = False) -> int | None:
    """Run this command as `nproc` processes, or as `dp` groups of `sp` processes, and exit with their exit code.

    A `dry_run` starts none: return the number of processes that it plans for. Without any of these options, or without
    `nproc` under torchrun, return: the command goes on in this process. Raises ConfigError for `nproc` under torchrun;
    with several processes, for stdin or a pipe, which they cannot share.
    """
    world = _processes(mesh)
    if world > 1 and (read_once := [item for item in inputs if _is_read_once(item)]):
        name = "stdin" if read_once[0] in ("-", "@-") else read_once[0]
        raise ConfigError(f"{name} can be read by one process: save it to a file, which every rank reads for itself")
    if (nproc := _asked(mesh)) is not None:
        start_ranks(nproc, dry_run=dry_run)
    return nproc


def _asked(mesh: Mesh) -> int | None:
    """Return the number of processes that the options ask for; None for none."""
    needed = (mesh.dp or 1) * (mesh.sp or 1)
    return needed if mesh.nproc is None and needed > 1 and not started_by_torchrun() else mesh.nproc


def _processes(mesh: Mesh) -> int:
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else _asked(mesh) or 1


def refuse_sharing(mesh: Mesh, pattern: Callable[[], Pattern], folder: ModelFolder | None = None) -> None:
    """Raise ConfigError if processes are to share a sequence, and a Hugging Face model or a `pattern` cannot.

    Call it before any rank is started.
    """
    sp = mesh.sp or _processes(mesh) // (mesh.dp or 1)
    if sp > 1 and folder and folder.of_transformers:
        raise ConfigError(
            f"{folder.name}: a Hugging Face model reads a document in one process: give every process its own "
            f"documents (--dp {_processes(mesh)})"
        )
    if sp > 1:
        check_shared(pattern(), sp)


def ask_hub(model: str | None, tokenizer: str | None) -> None:
    """Do what --update says: download what is new of a model or a tokenizer on a hub, before any rank is started.

    Raises ConfigError under torchrun, and as `hub.model_names.refresh` does.
    """
    from longnet_cli.hub.model_names import refresh

    if under_torchrun():
        raise ConfigError("--update is for one process, and torchrun starts several: update first, then start them")
    refresh(model, tokenizer)


def _is_read_once(item: str) -> bool:
    """Return whether an input is a stream, which only one process can read."""
    stream = item.startswith("/dev/") or (os.path.exists(item) and not (os.path.isfile(item) or os.path.isdir(item)))
    return item in ("-", "@-") or stream


def check_spill(spill: str | None, net: Net | None = None) -> None:
    """Raise ConfigError for a --spill that is no folder, and for a `net` that would keep nothing there."""
    if spill and not os.path.isdir(spill):
        raise ConfigError(f"--spill {spill}: no such folder")
    if spill and net and net.config.causal and not net.config.pattern.chosen:
        raise ConfigError("--spill is for keys and values of chosen blocks, and the pattern has none: leave it out")


def state_teller(
    net: Net, computing: Computing, *, contexts: Sequence[int] | None = None, more: int = 0, quiet: bool
) -> Callable[[int], None]:
    """Return a function of the tokens of a document, which says on stderr what it will keep for chosen blocks.

    The longest document so far has a line, and later one that is twice as long. `more` tokens follow each document.
    Each is read whole, or at the longest of `contexts`. The function raises MemoryLimitError if the part in the folder
    of --spill is larger than what was free there at first.
    """
    from longnet_cli.jobs.estimating.memory import cache_bytes, itemsize_of
    from longnet_cli.running.chunk_size import chunk_of, default_chunk

    config, device, spill = net.config, next(net.parameters()).device, computing.spill
    free = shutil.disk_usage(spill).free if spill else 0
    chunk = chunk_of(computing.chunk, default_chunk(config, device))
    said = chunk / 2

    def tell_state(tokens: int) -> None:
        nonlocal said
        if not config.pattern.chosen:
            return
        tokens = min(tokens, max(contexts or (tokens,))) + more
        kept = cache_bytes(config, tokens, itemsize_of(computing.dtype, device))
        size, blocks = sum(kept), kept.blocks
        if spill and blocks > free and tokens > chunk:
            raise MemoryLimitError(
                f"--spill {spill}: {tokens:,} tokens keep {format_bytes(blocks)} there, and {format_bytes(free)} are "
                "free"
            )
        if tokens <= 2 * said:
            return
        said = tokens
        where = f"{format_bytes(size)} of memory"
        if spill:
            where = f"{format_bytes(size - blocks)} of memory and {format_bytes(blocks)} in {spill}"
        tell(f"{tokens:,} tokens keep {where} for chosen blocks", quiet)

    return tell_state


class Opened(NamedTuple):
    """A model, and the ranks that share what it reads.

    `room` is the memory before the model was loaded, of a dry run. `quiet` is true for all ranks except the first.
    `left_out` counts the documents that get no row.
    """

    loaded: Loaded
    ranks: Ranks
    room: Room | None
    quiet: bool
    left_out: LeftOut

    def write(
        self,
        inputs: Inputs,
        make_job: Callable[..., RowJob],
        options: Any,
        earlier: Manifest | None,
        *,
        doing: str,
        unit: str,
        contexts: Sequence[int] | None = None,
        last: int | None = None,
        **how: Any,
    ) -> None:
        """Write the rows of a job as the `options` of a command say, with progress, and say how many there are.

        `doing` names the job, `unit` is a format for a number of rows. Each token is read at each of `contexts`, or the
        `last` ones of each document. `how` are arguments of `row_jobs.Output`: without an `output`, its sink prints.
        """
        from longnet_cli.jobs.row_jobs import Output, write_rows

        net, quiet, times = self.loaded.net, self.quiet, len(contexts or (None,))
        output, computing, expected = options.output, options.computing, ExpectedTokens()
        tell_state = state_teller(net, computing, contexts=contexts, quiet=quiet)

        def on_document(document: Document, share: float | None) -> None:
            expected.count(times * min(len(document), last or len(document)), share)
            tell_state(len(document))

        known = times * (inputs.num_tokens() or 0) if last is None else 0
        done = times * earlier.totals["tokens"] if earlier else 0
        with (
            say_what_is_kept(output or "-", quiet),
            progress(doing, total=known or expected.total, start=done, quiet=quiet) as advance,
        ):
            written = write_rows(
                make_job,
                net,
                inputs,
                Output(output or "-", resume=options.running.resume, **how),
                left_out=self.left_out,
                on_stored=tell_state,
                on_document=on_document,
                ranks=self.ranks,
                chunk=computing.chunk,
                dtype=computing.dtype,
                spill=computing.spill,
                on_progress=advance,
            )
        if written is not None and output is not None:
            counts = f"{unit.format(written['rows'])}{'s' * (written['rows'] != 1)}"
            place = "stdout" if output == "-" else output
            tokens = f"{format_count(written['tokens'])} token{'s' * (written['tokens'] != 1)}"
            tell(f"{counts} of {tokens} -> {place}", quiet)

    def end(self) -> None:
        """Leave the ranks, and say what is left out. If documents are, the first rank exits with code 6."""
        from longnet_cli.running.ranks.ranks import leave

        leave()
        end(self.left_out, first=self.ranks.writes, quiet=self.quiet)


class ModelAndInputs:
    """The model and the documents that a command names: found by every process, then opened by each rank.

    A run that continues the one in the folder `earlier` takes the same commit of a model on a hub. The model is to make
    vectors if it `embeds`; otherwise a model that reads vectors is refused. Raises ConfigError and CheckpointError for
    a model or a tokenizer that is missing.
    """

    def __init__(self, documents: Documents, choice: ModelChoice, earlier: str | None, *, embeds: bool = False) -> None:
        from longnet_cli.data.manifest import read_manifest
        from longnet_cli.data.names import Sources
        from longnet_cli.data.tokenizer import Tokenizer
        from longnet_cli.hub.model_names import as_stored
        from longnet_cli.models.folder import ModelFolder

        model, tokenizer = choice.model, documents.tokenizer
        if choice.update:
            ask_hub(model, tokenizer)
        if earlier and (manifest := read_manifest(earlier)):
            model = as_stored(model, [manifest.settings.get("model_name")])
        self.documents, self.pattern, self.embeds = documents, read_pattern(choice.pattern), embeds
        self.folder = ModelFolder.find(model, gguf=True, embeds=embeds)
        self._files = [self.folder.path, Tokenizer.find(tokenizer) if tokenizer else None]
        self.sources = Sources(documents.inputs, skip_bad=documents.skip_bad)

    def check_outputs(
        self, outputs: Mapping[str, str | None], where_to: str, for_folder: Mapping[str, Any], running: Running
    ) -> Manifest | None:
        """Return the manifest of the earlier run that `-o` continues, if any. Of it, see `output.check_output`.

        `outputs` are paths by the options that name them. Raises ConfigError for one that is, or holds, a file that the
        command reads, and for a name with the ending of another kind of file.
        """
        from longnet_cli.data.outputs import refuse_other_suffix, refuse_overwriting

        for option, path in outputs.items():
            if path is not None:
                refuse_other_suffix(option, path)
                refuse_overwriting(option, [path], self.sources, self._files)
        if (output := outputs["-o"]) is None:
            return None
        return check_output(output, where_to, for_folder, resume=running.resume, dry_run=running.dry_run)

    def open(self, mesh: Mesh, computing: Computing, *, dry_run: bool, **how: Any) -> Opened:
        """Start the ranks, and load the model on each of them. `how` are more arguments of `ModelFolder.load`."""
        check_spill(computing.spill)
        refuse_sharing(mesh, lambda: self.folder.net_config(self.pattern).pattern, self.folder)
        planned = launch(mesh, self.documents.inputs, dry_run=dry_run)
        from longnet_cli.running.ranks.ranks import join

        freeze_imports()
        given = self.documents
        ranks, where = join(computing.device, sp=mesh.sp, dp=mesh.dp, planned=planned)
        quiet = computing.quiet or not ranks.writes
        before = None
        if dry_run:
            from longnet_cli.jobs.estimating.estimate import Room

            before = Room.now(where)
            self.folder.check_weights_fit(computing.dtype, where, before.free)
        loaded = self.folder.load(
            device=where,
            dtype=computing.dtype,
            tokenizer=given.tokenizer,
            tokenizer_differs=given.tokenizer_differs,
            pattern=self.pattern,
            bos=given.bos,
            vectors=self.embeds,
            on_note=partial(tell, quiet=quiet),
            **how,
        )
        check_spill(computing.spill, loaded.net)
        return Opened(loaded, ranks, before, quiet, count_left_out(given.skip_bad, quiet))

    def inputs(self, loaded: Loaded, words: Tokenizer | None) -> Inputs:
        """Return the documents as the model reads them, texts by the tokenizer `words`."""
        from longnet_cli.data.inputs import Inputs
        from longnet_cli.data.tokenizer import end_of_text

        given, net = self.documents, loaded.net
        reads_vectors = net.row_size is not None
        of_tokens = [name for name in ("tokenizer", "tokenizer_differs", "eos", "bos") if getattr(given, name)]
        if reads_vectors and of_tokens:
            unread = ", ".join(f"--{name.replace('_', '-')}" for name in of_tokens)
            raise ConfigError(f"{self.folder.name} reads vectors, which have no tokens: leave out {unread}")
        return Inputs(
            self.sources,
            words,
            given.column,
            given.id_column,
            tuple(given.keep or ()),
            vocab_size=net.config.vocab_size,
            eos_id=end_of_text(given.eos, loaded.tokenizer),
            skip_bad=given.skip_bad,
            vectors=reads_vectors,
            coords=net.has_grid,
        )
