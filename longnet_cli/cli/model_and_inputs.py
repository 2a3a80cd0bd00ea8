"""The model and the documents of `score` and `encode`: found by every process, then opened by each rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from longnet_cli.basics.errors import ConfigError
from longnet_cli.cli.dry_run import room
from longnet_cli.cli.options import Computing, Documents, Mesh, ModelChoice, Running, read_pattern
from longnet_cli.cli.output import check_output, tell
from longnet_cli.cli.starting import ask_hub, freeze_imports, launch
from longnet_cli.cli.state import check_spill, say_state

if TYPE_CHECKING:
    from longnet_cli.data.documents import Document
    from longnet_cli.data.inputs import Inputs
    from longnet_cli.data.manifest import Manifest
    from longnet_cli.jobs.estimating.estimate import Room
    from longnet_cli.models.folder import Loaded
    from longnet_cli.running.ranks.ranks import Ranks
    from longnet_cli.running.reader import OnWindows, Reader


class Opened(NamedTuple):
    """A model, the documents that it reads, and the ranks that share them.

    `room` is the memory before the model was loaded, of a dry run. `quiet` is true for all ranks except the first.
    Documents are passed through `counted` before they are read.
    """

    loaded: Loaded
    inputs: Inputs
    ranks: Ranks
    room: Room | None
    quiet: bool
    counted: Callable[[Iterable[Document]], Iterable[Document]] = iter

    def reader(
        self,
        computing: Computing,
        chunk: int | None = None,
        on_progress: Callable[[int], None] | None = None,
        on_choice: OnWindows | None = None,
    ) -> Reader:
        """Return a reader of the model, by default with this `chunk`. The callbacks are as in `running.reader`."""
        from longnet_cli.running.reader import share_reader

        return share_reader(
            self.loaded.net,
            chunk=computing.chunk or chunk,
            dtype=computing.dtype,
            spill=computing.spill,
            ranks=self.ranks,
            on_progress=on_progress,
            on_choice=on_choice,
        )

    def telling(
        self, computing: Computing, contexts: Sequence[int] | None = None
    ) -> Callable[[Iterable[Document]], Iterator[Document]]:
        """Return what passes documents on, and says what the longest one keeps (`state.say_state`)."""
        known = self.inputs.stored() if not self.inputs.skip_bad else ()
        net, quiet = self.loaded.net, self.quiet
        said = partial(say_state, stored=known, net=net, computing=computing, contexts=contexts, quiet=quiet)
        shared = partial(said, sp=self.ranks.sp)
        return lambda documents: shared(self.counted(documents))


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
        from longnet_cli.data.inputs import Inputs
        from longnet_cli.data.manifest import read_manifest
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
        self.inputs = Inputs(
            documents.inputs,
            column=documents.column,
            id_column=documents.id_column,
            keep=tuple(documents.keep or ()),
            skip_bad=documents.skip_bad,
        )

    def check_outputs(
        self, outputs: Mapping[str, str | None], where_to: str, for_folder: Mapping[str, Any], running: Running
    ) -> Manifest | None:
        """Return the manifest of the earlier run that `-o` continues, if any. Of it, see `output.check_output`.

        `outputs` are paths by the options that name them. Raises ConfigError for one that is, or holds, a file that the
        command reads, for one place of two of them, and for a name with the ending of another kind of file.
        """
        from longnet_cli.data.outputs import refuse_other_suffix
        from longnet_cli.data.overwriting import refuse_one_place, refuse_overwriting

        for option, path in outputs.items():
            if path is not None:
                refuse_other_suffix(option, path)
                refuse_overwriting(option, [path], self.inputs, self._files)
        refuse_one_place(outputs)
        if (output := outputs["-o"]) is None:
            return None
        return check_output(output, where_to, for_folder, resume=running.resume, dry_run=running.dry_run)

    def open(self, mesh: Mesh, computing: Computing, *, dry_run: bool) -> Opened:
        """Start the ranks, and load the model on each of them."""
        check_spill(computing.spill)
        launch(mesh.nproc, self.documents.inputs, self.folder, sp=mesh.sp, dp=mesh.dp)
        from longnet_cli.data.tokenizer import end_of_text
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
        net, reads_vectors = loaded.net, loaded.net.row_size is not None
        of_tokens = {
            "--tokenizer": given.tokenizer,
            "--tokenizer-differs": given.tokenizer_differs,
            "--eos": given.eos,
            "--bos": given.bos,
        }
        if reads_vectors and (unread := [name for name, value in of_tokens.items() if value]):
            raise ConfigError(f"{self.folder.name} reads vectors, which have no tokens: leave out {', '.join(unread)}")
        inputs = replace(
            self.inputs,
            tokenizer=loaded.tokenizer,
            vocab_size=net.config.vocab_size,
            eos_id=end_of_text(given.eos, loaded.tokenizer),
            vectors=reads_vectors,
            coords=net.has_grid,
        )
        check_spill(computing.spill, net)
        return Opened(loaded, inputs, ranks, memory, quiet)
