"""The model and the documents of `score` and `encode`: found by every process, then opened by each rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from longnet_cli.basics.errors import ConfigError
from longnet_cli.basics.sizes import format_count
from longnet_cli.cli.options import Computing, Documents, Mesh, ModelChoice, Running, read_pattern
from longnet_cli.cli.output import check_output, say_what_is_kept, tell
from longnet_cli.cli.progress import ExpectedTokens, progress
from longnet_cli.cli.starting import StateTeller, ask_hub, check_spill, freeze_imports, launch, room

if TYPE_CHECKING:
    from longnet_cli.data.documents import Document
    from longnet_cli.data.inputs import Inputs
    from longnet_cli.data.manifest import LeftOut, Manifest
    from longnet_cli.data.tokenizer import Tokenizer
    from longnet_cli.jobs.estimating.estimate import Room
    from longnet_cli.jobs.row_jobs import RowJob
    from longnet_cli.models.folder import Loaded
    from longnet_cli.running.ranks.ranks import Ranks


class Opened(NamedTuple):
    """A model, and the ranks that share what it reads.

    `room` is the memory before the model was loaded, of a dry run. `quiet` is true for all ranks except the first.
    """

    loaded: Loaded
    ranks: Ranks
    room: Room | None
    quiet: bool

    def write(
        self,
        inputs: Inputs,
        make_job: Callable[..., RowJob],
        output: str | None,
        computing: Computing,
        earlier: Manifest | None,
        *,
        doing: str,
        unit: str,
        left_out: LeftOut,
        contexts: Sequence[int] | None = None,
        last: int | None = None,
        **how: Any,
    ) -> None:
        """Write the rows of a job as `write_rows` does, with progress on stderr, and say how many rows there are.

        `doing` names the job, `unit` is a format for a number of rows. Each token is read at each of `contexts`, or the
        `last` ones of each document. Without an `output`, the sink in `how` prints.
        """
        from longnet_cli.jobs.row_jobs import write_rows

        net, quiet, times = self.loaded.net, self.quiet, len(contexts or (None,))
        expected = ExpectedTokens()
        tell_state = StateTeller(net, computing, contexts=contexts, sp=self.ranks.sp, quiet=quiet)

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
                output or "-",
                left_out=left_out,
                on_stored=tell_state,
                on_document=on_document,
                ranks=self.ranks,
                chunk=computing.chunk,
                dtype=computing.dtype,
                spill=computing.spill,
                on_progress=advance,
                **how,
            )
        if written is not None and output is not None:
            counts = f"{unit.format(written['rows'])}{'s' * (written['rows'] != 1)}"
            place = "stdout" if output == "-" else output
            tell(f"{counts} of {format_count(written['tokens'])} tokens -> {place}", quiet)


class ModelAndInputs:
    """The model and the documents that a command names.

    A run that continues the one in the folder `earlier` takes the same commit of a model on a hub. The model is to make
    vectors if it `embeds`; otherwise a model that reads vectors is refused. Raises ConfigError and CheckpointError for
    a model or a tokenizer that is missing.
    """

    def __init__(
        self,
        documents: Documents,
        choice: ModelChoice,
        earlier: str | None,
        *,
        embeds: bool = False,
    ) -> None:
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
        self.documents, self.choice, self.embeds = documents, choice, embeds
        self.folder = ModelFolder.find(model, gguf=True, embeds=embeds)
        self._files = [self.folder.path, Tokenizer.find(tokenizer) if tokenizer else None]
        self.sources = Sources(documents.inputs, skip_bad=documents.skip_bad)

    def check_outputs(
        self, outputs: Mapping[str, str | None], where_to: str, for_folder: Mapping[str, Any], running: Running
    ) -> Manifest | None:
        """Return the manifest of the earlier run that `-o` continues, if any. Of it, see `output.check_output`.

        `outputs` are paths by the options that name them. Raises ConfigError for one that is, or holds, a file that the
        command reads, for one place of two of them, and for a name with the ending of another kind of file.
        """
        from longnet_cli.data.outputs import refuse_one_place, refuse_other_suffix, refuse_overwriting

        for option, path in outputs.items():
            if path is not None:
                refuse_other_suffix(option, path)
                refuse_overwriting(option, [path], self.sources, self._files)
        refuse_one_place(outputs)
        if (output := outputs["-o"]) is None:
            return None
        return check_output(output, where_to, for_folder, resume=running.resume, dry_run=running.dry_run)

    def open(self, mesh: Mesh, computing: Computing, *, dry_run: bool) -> Opened:
        """Start the ranks, and load the model on each of them."""
        check_spill(computing.spill)
        launch(mesh.nproc, self.documents.inputs, self.folder, sp=mesh.sp, dp=mesh.dp)
        from longnet_cli.running.ranks.ranks import join

        freeze_imports()
        given = self.documents
        ranks, where = join(computing.device, sp=mesh.sp, dp=mesh.dp)
        quiet = computing.quiet or not ranks.first
        memory = room(self.folder, computing.dtype, where) if dry_run else None  # before the model is loaded
        loaded = self.folder.load(
            device=where,
            dtype=computing.dtype,
            tokenizer=given.tokenizer,
            tokenizer_differs=given.tokenizer_differs,
            pattern=read_pattern(self.choice.pattern),
            bos=given.bos,
            vectors=self.embeds,
            on_note=partial(tell, quiet=quiet),
        )
        check_spill(computing.spill, loaded.net)
        return Opened(loaded, ranks, memory, quiet)

    def inputs(self, loaded: Loaded, words: Tokenizer | None) -> Inputs:
        """Return the documents as the model reads them, texts by the tokenizer `words`."""
        from longnet_cli.data.inputs import Inputs
        from longnet_cli.data.tokenizer import end_of_text

        given, net = self.documents, loaded.net
        of_tokens = {
            "--tokenizer": given.tokenizer,
            "--tokenizer-differs": given.tokenizer_differs,
            "--eos": given.eos,
            "--bos": given.bos,
        }
        reads_vectors = net.row_size is not None
        if reads_vectors and (unread := [name for name, value in of_tokens.items() if value]):
            raise ConfigError(f"{self.folder.name} reads vectors, which have no tokens: leave out {', '.join(unread)}")
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
