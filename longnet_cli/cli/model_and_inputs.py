"""The model and the documents of `score` and `encode`: found by every process, then opened by each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from longnet_cli.cli.dry_run import room
from longnet_cli.cli.garbage import freeze_imports
from longnet_cli.cli.nproc import ask_hub, launch
from longnet_cli.cli.options import read_pattern
from longnet_cli.cli.output import tell
from longnet_cli.errors import ConfigError

if TYPE_CHECKING:
    from longnet_cli.data.inputs import Inputs
    from longnet_cli.estimating.reading_job import Room
    from longnet_cli.model_folder import Loaded
    from longnet_cli.runtime.ranks import Ranks


class Opened(NamedTuple):
    """A model, the documents that it reads, and the ranks that share them.

    `room` is the memory before the model was loaded, of a dry run. `quiet` is true for all ranks except the first.
    """

    loaded: Loaded
    inputs: Inputs
    ranks: Ranks
    room: Room | None
    quiet: bool


class ModelAndInputs:
    """The model and the inputs that a command names. The arguments are options of the same names.

    A run that continues the one in the folder `earlier` takes the same commit of a model on a hub. No output may
    replace one of `others`, which the command reads as well. Raises ConfigError and CheckpointError for a model or a
    tokenizer that is missing.
    """

    def __init__(
        self,
        names: Sequence[str],
        model: str,
        tokenizer: str | None,
        column: str | None,
        id_column: str | None,
        keep: Sequence[str] | None,
        skip_bad: bool,
        update: bool,
        earlier: str | None,
        others: Sequence[str] = (),
    ) -> None:
        from longnet_cli.data.inputs import Inputs
        from longnet_cli.data.manifest import read_manifest
        from longnet_cli.data.tokenizer import Tokenizer
        from longnet_cli.hub import as_stored
        from longnet_cli.model_folder import ModelFolder

        if update:
            ask_hub(model, tokenizer)
        if earlier and (manifest := read_manifest(earlier)):
            model = as_stored(model, [manifest.settings.get("model_name")])
        self.names, self.tokenizer, self.folder = names, tokenizer, ModelFolder.find(model, gguf=True)
        self._files = [self.folder.path, Tokenizer.find(tokenizer) if tokenizer else None, *others]
        self.inputs = Inputs(names, column=column, id_column=id_column, keep=tuple(keep or ()), skip_bad=skip_bad)

    def refuse_overwriting(self, option: str, output: str | None) -> None:
        """Raise ConfigError if the `output` that `option` names is, or holds, a file that the command reads.

        Also for a name with the ending of another kind of file.
        """
        from longnet_cli.data.outputs import refuse_other_suffix
        from longnet_cli.data.overwriting import refuse_overwriting

        if output is not None:
            refuse_other_suffix(option, output)
            refuse_overwriting(option, [output], self.inputs, self._files)

    def open(
        self,
        *,
        nproc: int | None,
        sp: int | None,
        dp: int | None,
        device: str,
        dtype: str,
        tokenizer_differs: bool,
        pattern: str | None,
        bos: str | None,
        eos: str | None,
        dry_run: bool,
        quiet: bool,
        vectors: bool = False,
    ) -> Opened:
        """Start the ranks, and load the model on each of them. Without `vectors`, refuse a model that reads vectors."""
        launch(nproc, self.names, self.folder, sp=sp, dp=dp)
        from longnet_cli.data.special_tokens import end_of_text
        from longnet_cli.runtime.ranks import join

        freeze_imports()
        ranks, where = join(device, sp=sp, dp=dp)
        quiet = quiet or not ranks.first
        memory = room(self.folder, dtype, where) if dry_run else None  # before the model is loaded
        loaded = self.folder.load(
            device=where,
            dtype=dtype,
            tokenizer=self.tokenizer,
            tokenizer_differs=tokenizer_differs,
            pattern=read_pattern(pattern),
            bos=bos,
            vectors=vectors,
            on_note=partial(tell, quiet=quiet),
        )
        net, reads_vectors = loaded.net, loaded.net.row_size is not None
        of_tokens = {
            "--tokenizer": self.tokenizer,
            "--tokenizer-differs": tokenizer_differs,
            "--eos": eos,
            "--bos": bos,
        }
        if reads_vectors and (given := [name for name, value in of_tokens.items() if value]):
            raise ConfigError(f"{self.folder.name} reads vectors, which have no tokens: leave out {', '.join(given)}")
        inputs = replace(
            self.inputs,
            tokenizer=loaded.tokenizer,
            vocab_size=net.config.vocab_size,
            eos_id=end_of_text(eos, loaded.tokenizer),
            vectors=reads_vectors,
            coords=net.has_grid,
        )
        return Opened(loaded, inputs, ranks, memory, quiet)
