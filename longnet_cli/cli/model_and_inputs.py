"""The model and the documents of `score` and `encode`: found by every process, then opened by each rank.

The state of a document with chosen blocks: where it is kept (`--spill`), and the line that says how much.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from longnet_cli.basics.errors import ConfigError
from longnet_cli.basics.sizes import format_bytes
from longnet_cli.cli.dry_run import room
from longnet_cli.cli.options import read_pattern
from longnet_cli.cli.output import tell
from longnet_cli.cli.starting import ask_hub, freeze_imports, launch

if TYPE_CHECKING:
    from longnet_cli.data.inputs import Inputs
    from longnet_cli.jobs.estimating.reading_job import Room
    from longnet_cli.models.folder import Loaded
    from longnet_cli.nets.net import Net
    from longnet_cli.running.ranks.ranks import Ranks


def check_spill(spill: str | None, net: Net | None = None) -> None:
    """Raise ConfigError for a --spill that is no folder, and for a `net` that would keep nothing there."""
    if spill and not os.path.isdir(spill):
        raise ConfigError(f"--spill {spill}: no such folder")
    if spill and net and net.config.causal and not net.config.pattern.chosen:
        raise ConfigError("--spill is for keys and values of chosen blocks, and the pattern has none: leave it out")


def say_state(
    documents: Iterable[Any],
    *,
    stored: Iterable[Any],
    net: Net,
    chunk: int | None,
    dtype: str,
    spill: str | None,
    contexts: Sequence[int] | None = None,
    more: int = 0,
    quiet: bool,
) -> Iterator[Any]:
    """Yield the documents, and say on stderr what the longest one keeps, if it is read in chunks with chosen blocks.

    Lengths of `stored` documents are known before the first one; otherwise, one that is twice as long as those before
    has a line of its own. `more` tokens follow each document. The other arguments are as in `running.reader.Reader`.
    """
    from longnet_cli.running.chunk_size import chunk_of, default_chunk
    from longnet_cli.running.device import DTYPES, resolve_dtype

    config, device = net.config, next(net.parameters()).device
    said = chunk_of(chunk, default_chunk(config, device)) / 2
    itemsize = DTYPES[resolve_dtype(dtype, device)].itemsize

    def say(tokens: int) -> None:
        nonlocal said
        if (tokens := min(tokens, max(contexts or (tokens,))) + more) <= 2 * said:
            return
        said = tokens
        size, blocks = config.cache_bytes(tokens, itemsize), config.spilled_bytes(tokens, itemsize)
        where = f"{format_bytes(size - blocks)} of memory and {format_bytes(blocks)} in {spill}"
        tell(f"{tokens:,} tokens keep {where if spill else f'{format_bytes(size)} of memory'} for chosen blocks", quiet)

    if config.pattern.chosen and not quiet:
        say(max(map(len, stored), default=0))
    for document in documents:
        if config.pattern.chosen and not quiet:
            say(len(document))
        yield document


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
    replace one of `others`, which the command reads as well. The model is to make vectors if it `embeds`. Raises
    ConfigError and CheckpointError for a model or a tokenizer that is missing.
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
        *,
        embeds: bool = False,
    ) -> None:
        from longnet_cli.data.inputs import Inputs
        from longnet_cli.data.manifest import read_manifest
        from longnet_cli.data.tokenizer import Tokenizer
        from longnet_cli.hub.model_names import as_stored
        from longnet_cli.models.folder import ModelFolder

        if update:
            ask_hub(model, tokenizer)
        if earlier and (manifest := read_manifest(earlier)):
            model = as_stored(model, [manifest.settings.get("model_name")])
        self.names, self.tokenizer, self.folder = names, tokenizer, ModelFolder.find(model, gguf=True, embeds=embeds)
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
        embeds: bool = False,
    ) -> Opened:
        """Start the ranks, and load the model on each of them.

        It is to make vectors if it `embeds`; otherwise a model that reads vectors is refused.
        """
        launch(nproc, self.names, self.folder, sp=sp, dp=dp)
        from longnet_cli.data.tokenizer import end_of_text
        from longnet_cli.running.ranks.ranks import join

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
            vectors=embeds,
            embeds=embeds,
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
