"""Checkpoints of a run: everything it needs to continue as if nothing had happened, whole or not there at all.

    RUN/checkpoints/step-00000200/
        state.json            step, position in the data, recipe, versions; size and SHA-256 of every other file
        shard-*.safetensors   weights, optimizer state and random numbers; of several ranks, a file of each

state.json is written last: a folder without it is no checkpoint. One process writes tensor by tensor. Of several ranks,
each writes the tensors that it holds, by torch.distributed.checkpoint, which also reads: any number of ranks can read a
checkpoint, each the parts that it needs. There is no pickle: the tensors are safetensors, the rest is JSON.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longnet_cli.basics import sealed_manifests as sealed
from longnet_cli.basics.atomic import remove_leftovers
from longnet_cli.basics.errors import CheckpointError, LongNetError
from longnet_cli.nets.weights import sort_metadata, tensor_digest, write_tensors
from longnet_cli.running.device import random_state, set_random_state
from longnet_cli.running.ranks.ranks import Ranks

STATE = "state.json"
CHECKPOINT_VERSION = 2
CHECKPOINT_NAME = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The checkpoints in a folder, of which the newest `keep` stay. Training waits while one is written."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self.folder = folder
        self.ranks = ranks
        self.keep = keep
        self.saved: int | None = None  # step of the newest checkpoint on the disk

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step, if there is none of it. Raises LongNetError if it cannot be written."""
        if step == self.saved:
            return
        final = self.folder / f"step-{step:08d}"
        failure = None
        try:
            self._write(final, tensors, facts)
        except Exception as error:
            cause = error.__cause__ or error
            reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
            failure = LongNetError(
                f"{final}: cannot write the checkpoint: {reason}; the one before it is kept"
            )
        self.ranks.barrier()  # rank 0 writes longest, and GPUs do not wait as long as hosts
        if failure:
            raise failure
        self.saved = step

    def _write(self, final: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        if self.ranks.writes:
            # If the folder exists, its checkpoint is damaged, perhaps its list of files, too: a whole one is never
            # written again.
            _remove(final, [STATE, *_shards_in(final)])
            final.mkdir(parents=True, exist_ok=True)
        self.ranks.barrier()
        try:
            save_tensors(final, tensors)
            if self.ranks.writes:
                sealed.write_sealed(final / STATE, CHECKPOINT_VERSION, facts, _shards_in(final))
                self._remove_older(final)
        finally:
            if self.ranks.writes:
                self._remove_partial()

    def _remove_older(self, final: Path) -> None:
        """Remove all checkpoints before `final` but for those that are kept beside it."""
        saved = checkpoints_in(self.folder)
        older = saved[saved.index(final) + self.keep :]  # later ones are damaged: not counted
        for old in older:
            with suppress(CheckpointError, OSError):  # not a checkpoint of ours, which stays
                _remove(old, [STATE, *read_checkpoint(old)["files"]])

    def _remove_partial(self) -> None:
        """Remove the shards of checkpoints that nobody has written to their end."""
        for folder in self.folder.glob("step-*"):
            if folder.is_dir() and not (folder / STATE).exists():
                remove_leftovers(folder)
                _remove(folder, _shards_in(folder))


def _shards_in(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("shard-*-of-*.safetensors")]


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files of a checkpoint, and its folder unless there is anything else in it."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder that were written to their end, newest first; some may be damaged since."""
    ended = (file.parent for file in folder.glob(f"step-*/{STATE}"))
    named = [path for path in ended if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest_whole(folder: Path, ranks: Ranks, note: Callable[[str], None]) -> Path | None:
    """Return the newest undamaged checkpoint in a folder; None where none was ever written.

    `note` gets a message about each damaged checkpoint that is skipped. Rank 0 looks, for all ranks. Raises
    CheckpointError when there are checkpoints and all are damaged.
    """
    newest_first = checkpoints_in(folder)
    number_damaged = 0
    for checkpoint in newest_first if ranks.writes else ():
        damage = find_damage(checkpoint)
        if not damage:
            break
        note(f"{checkpoint} is damaged ({damage}); the one before it is used")
        number_damaged += 1
    number_damaged = ranks.from_first(number_damaged)
    if number_damaged < len(newest_first):
        return newest_first[number_damaged]
    if newest_first:
        what = f"all {len(newest_first)} checkpoints are damaged"
        raise CheckpointError(f"{folder}: {what}; start again with -o and another folder")
    return None


def find_damage(checkpoint: Path) -> str | None:
    """Compare all files of a checkpoint with their sizes and SHA-256; return what is wrong, or None."""
    return sealed.find_mismatch(checkpoint / STATE, CHECKPOINT_VERSION)


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Read state.json. Raises CheckpointError for other content than was written, OSError for a missing file."""
    return sealed.read_sealed(checkpoint / STATE, CHECKPOINT_VERSION)


def tensor_names(checkpoint: Path) -> set[str]:
    """Return the names of the tensors of a checkpoint."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return set(HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata)


def load_tensors(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, in place, with the checkpoint's tensors of the same names. A sharded tensor gets its shard.

    Raises CheckpointError where the checkpoint lacks a name or has another shape.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns of a single process
            reader = HuggingFaceStorageReader(str(checkpoint))
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        raise CheckpointError(f"{checkpoint}: {_cause(error)}") from None


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors files: equal tensors give equal bytes. One process makes no copy of them. Raises OSError."""
    if not dist.is_initialized():
        with (folder / "shard-00001-model-00001-of-00001.safetensors").open("wb") as file:
            write_tensors(file, tensors, {"format": "pt"})
        return
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    try:
        dcp.save(
            dict(tensors),
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        )
        if dist.get_rank() == 0:  # all ranks have written, or rank 0 would still wait
            for path in folder.glob("*.safetensors"):
                sort_metadata(path)
    except dcp.CheckpointException as error:
        cause = _cause(error)
        raise cause if isinstance(cause, OSError) else OSError(str(cause)) from None


def _cause(error: Any) -> BaseException:
    """Return the failure of the first rank that has one: torch.distributed.checkpoint wraps all in one exception."""
    return min(error.failures.items())[1][0]


def run_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    random: Sequence[Tensor],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Return the tensors to save: `model.NAME` and `optimizer.NAME.KEY` of trained weights, `random.RANK.INDEX`."""
    tensors = {}
    states = _states(optimizer)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in states[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
    for index, state in enumerate(random):
        tensors[f"random.{ranks.rank}.{index}"] = state
    return tensors


def frozen_digest(model: nn.Module) -> str | None:
    """Return a digest of the numbers that are not trained, and so in no checkpoint; None if all are trained."""
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return tensor_digest(frozen, torch.float32) if frozen else None


def restore(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Load a checkpoint's tensors into a net, its fresh optimizer and the random number generators.

    A rank that the checkpoint does not have, because there were fewer, keeps its own random numbers. Raises
    CheckpointError for a checkpoint of another net.
    """
    names = tensor_names(checkpoint)
    parameters = {f"optimizer.{name}": p for name, p in model.named_parameters()}
    states = _states(optimizer)
    for name in names:
        owner, _, key = name.rpartition(".")
        parameter = parameters.get(owner)
        if parameter in states:
            empty = torch.zeros_like(parameter.detach())
            if key == "step":
                empty = torch.zeros((), device=parameter.device)
            states[parameter][key] = empty
    random = random_state(device)
    has_random = all(f"random.{ranks.rank}.{index}" in names for index in range(len(random)))
    load_tensors(checkpoint, run_tensors(model, optimizer, random if has_random else (), ranks))
    set_random_state(random, device)


def _states(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """Return the state of each trained parameter: the dicts of the optimizer, which are empty before the first step."""
    states = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            states[parameter] = optimizer.state[parameter]
    return states
