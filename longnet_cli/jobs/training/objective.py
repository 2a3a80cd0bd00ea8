"""The objectives of training: the inputs and targets of a batch, their gradient, and the loss on held-out documents.

The causal objective: predict the next token. The masked objective (BERT, arXiv 1810.04805, section 3.1): predict hidden
tokens from both sides. Windows of any length, cut into documents, have their gradient in bounded memory. Token ids of a
batch are read, and sent to the device, only when they are needed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate, chain, pairwise
from operator import add
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longnet_cli.basics.errors import DataError
from longnet_cli.basics.events import Events
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.jobs.job_options import ScoreOptions
from longnet_cli.jobs.row_jobs import ModelFacts
from longnet_cli.jobs.scoring.measures import Score
from longnet_cli.jobs.scoring.scoring import score
from longnet_cli.nets.net import IGNORED, FarProvider, Net
from longnet_cli.running.chunked_backward import Tokens, backward_in_chunks
from longnet_cli.running.device import precision, to_device
from longnet_cli.running.ranks.exchange import Exchange
from longnet_cli.running.ranks.fsdp import final_backward
from longnet_cli.running.ranks.ranks import ALONE, Ranks
from longnet_cli.running.reader import Reader, Window, batches_by_length

from .recipe import Recipe, Stage
from .training_data import TrainingData
from .windows import Batch


@dataclass(frozen=True)
class LazyTokens:
    """`running.chunked_backward.Tokens` that are read when they are indexed.

    `read(row, start, stop)` returns the ids [start, stop) of a row, (stop - start,) int64.
    """

    shape: tuple[int, int]
    device: torch.device
    read: Callable[[int, int, int], Tensor]

    def __getitem__(self, index: tuple[int | slice, slice], /) -> Tensor:
        row, columns = index
        start, stop, _ = columns.indices(self.shape[1])
        if isinstance(row, int):
            return self.read(row, start, stop)
        rows = range(*row.indices(self.shape[0]))
        return torch.stack([self.read(index, start, stop) for index in rows])


def stored_tokens(batch: Batch, offset: int, tokens: int, device: torch.device) -> LazyTokens:
    """Return the ids of a batch's windows: `tokens` of each window, from its token `offset` on."""

    def read(row: int, start: int, stop: int) -> Tensor:
        return to_device(torch.from_numpy(batch.read(row, offset + start, offset + stop)), device)

    return LazyTokens((batch.shape[0], tokens), device, read)


def answers_alone(batch: Batch, nexts: LazyTokens) -> LazyTokens:
    """Return the next tokens of a batch's windows as targets: IGNORED where no assistant is to write them."""

    def read(row: int, start: int, stop: int) -> Tensor:
        is_answer = torch.from_numpy(batch.is_answer(row, start + 1, stop + 1))
        return nexts.read(row, start, stop).masked_fill(
            ~to_device(is_answer, nexts.device), IGNORED
        )

    return LazyTokens(nexts.shape, nexts.device, read)


IdRange = tuple[int, int, int]  # ids [start, stop) of a row, as (row, start, stop)


def regrouped(tokens: Tokens, rows: list[list[IdRange]]) -> LazyTokens:
    """Return ids (B, N) grouped into new rows (b, n): each is a list of runs in order."""

    def read(row: int, start: int, stop: int) -> Tensor:
        parts = list[Tensor]()
        offset = 0
        for source, begin, end in rows[row]:
            inside = max(begin, begin + start - offset), min(end, begin + stop - offset)
            if inside[0] < inside[1]:
                parts.append(tokens[source, slice(*inside)])
            offset += end - begin
        return torch.cat(parts) if parts else tokens[0, 0:0]

    return LazyTokens(
        (len(rows), sum(stop - start for _, start, stop in rows[0])),
        tokens.device,
        read,
    )


def backward(
    model: Net,
    tokens: Tokens,
    targets: Tokens,
    *,
    chunk: int,
    scale: float = 1.0,
    dtype: str = "fp32",
    starts: Sequence[Sequence[int]] | None = None,
    ranks: Ranks = ALONE,
    allocate: Callable[..., Tensor] = torch.empty,
    on_chunk: Callable[[], None] = lambda: None,
) -> Tensor:
    """Add the gradients of `scale * sum of nll` to the parameters' `.grad`; return the sum, in nats, float64.

    tokens, targets: (B, N) as for `Net.nll`, tensors or `LazyTokens`; targets may be on the host. Activations of
    at most `chunk` tokens exist at one time. `starts` has the positions at which documents start in each row, 0 first
    (`Batch.document_starts`). No token attends to another document, and positions count from the start of the document,
    or of the window where that is later. Without `starts`, a row is one document.

    The `ranks` of a group get the same tokens and share every sequence, `chunk` tokens each. Each rank reads its slice,
    and adds and returns its part; the whole is the sum over the ranks. `allocate` is as in `backward_in_chunks`.
    `on_chunk` is called after each chunk. With sharded weights (`running.ranks.fsdp`), one call is one step: its last
    backward pass sums the gradients over all ranks.
    """
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    chunk *= ranks.sp
    in_chunks = partial(
        backward_in_chunks,
        scale=scale,
        dtype=dtype,
        ranks=ranks,
        allocate=allocate,
        on_chunk=on_chunk,
    )
    forwards = list(plan_forwards(starts or [[0]] * tokens.shape[0], tokens.shape[1], chunk))
    for index, forward in enumerate(forwards, 1):
        final = index == len(forwards)
        ids = regrouped(tokens, forward.rows)
        wanted = regrouped(targets, forward.rows)
        if ids.shape[1] > chunk:
            total += in_chunks(model, ids, wanted, chunk, final=final)
            continue
        loss = _nll(model, ids, wanted, forward.documents, ranks, dtype)
        final_backward(model, final)
        (loss * scale).backward()
        total += loss.detach()
        del loss
        on_chunk()
    return total


def _nll(
    model: Net,
    tokens: Tokens,
    wanted: Tokens,
    documents: Sequence[int] | None,
    ranks: Ranks,
    dtype: str,
) -> Tensor:
    """Return the sum of nll of one forward pass over `tokens`, or over this rank's shard of them.

    In a bidirectional net, only tokens with a target get logits.
    """
    config = model.config
    shard = slice(None)
    start = 0
    far: FarProvider | None = None
    if ranks.sp > 1:
        cuts = list(accumulate(documents or ()))
        far = exchange = Exchange(
            config,
            ranks.edges(0, tokens.shape[1]),
            group=ranks.group,
            cuts=cuts,
        )
        shard = slice(*exchange.mine)
        start = exchange.start
        documents = exchange.documents
    ids, targets = tokens[:, shard], wanted[:, shard]
    with precision(dtype, ids.device):
        # before the forward pass: for targets on a GPU, this waits for all queued work. A causal net predicts all.
        chosen = None if config.causal else (targets != IGNORED).nonzero(as_tuple=True)
        hidden = model(ids, start=start, documents=documents, far=far)
        if chosen:
            hidden = hidden[tuple(to_device(index, ids.device) for index in chosen)]
            targets = targets[chosen]
        return model.nll(hidden, to_device(targets, ids.device)).sum(dtype=torch.float64)


class _Forward(NamedTuple):
    """The tokens of one forward pass, as `regrouped` takes them from the batch.

    `documents` has the lengths of the documents where a row has several.
    """

    rows: list[list[IdRange]]
    documents: list[int] | None


def plan_forwards(starts: Sequence[Sequence[int]], length: int, chunk: int) -> Iterator[_Forward]:
    """Cut windows of `length` tokens into forward passes of at most `chunk` tokens, unless one document is longer.

    Windows of one document go side by side, as rows, by the rule of reading. The documents of other windows go one
    after the other, in a row.
    """
    whole = [row for row, of_row in enumerate(starts) if len(of_row) == 1]
    for batch in batches_by_length([length] * len(whole), chunk):
        yield _Forward([[(whole[index], 0, length)] for index in batch], None)
    # the rule of reading sorts by length and pads: here, neighbours stay one run of ids, and nothing is padded
    runs = list[IdRange]()
    lengths = list[int]()
    room = chunk
    for row, begins in enumerate(starts):
        for start, stop in pairwise([*begins, length]) if len(begins) > 1 else ():
            if lengths and stop - start > room:
                yield _Forward([runs], lengths)
                runs = []
                lengths = []
                room = chunk
            begin = start
            if runs and runs[-1][0] == row:  # documents of one window are one run
                _, begin, _ = runs.pop()
            runs.append((row, begin, stop))
            lengths.append(stop - start)
            room -= stop - start
    if lengths:
        yield _Forward([runs], lengths)


# shares of the chosen tokens that become the mask, or a random token; the rest stay, and are predicted too
MASKED = 0.8
RANDOM = 0.1


def inputs_and_targets(
    batch: Batch,
    recipe: Recipe,
    device: torch.device,
    ranks: Ranks,
    *,
    eos_id: int,
    seed: int,
) -> tuple[Tokens, Tokens, int]:
    """Return ids and targets (rows, seq_len) of windows of seq_len + 1 tokens, and how many targets all ranks have.

    With the causal objective every token counts alike: the last one of a document predicts the next one's eos. With
    data.loss = "answers", the tokens of answers alone are targets. With the masked objective, tokens are hidden on the
    host, and their targets stay there: finding these then waits for no device.
    """
    rows, length = batch.shape
    if recipe.train.objective == "causal":
        ids, nexts = (stored_tokens(batch, offset, length - 1, device) for offset in (0, 1))
        if recipe.data.loss == "all":
            return ids, nexts, rows * (length - 1) * ranks.dp
        answers = [int(batch.is_answer(row, 1, length).sum()) for row in range(rows)]
        count = torch.tensor(sum(answers))
        ranks.sum(count)
        return ids, answers_alone(batch, nexts), max(1, int(count) // ranks.sp)
    masked, targets = mask_tokens(
        stored_tokens(batch, 0, length - 1, torch.device("cpu"))[:, :],
        recipe.train.mask_rate,
        mask_id=recipe.model.vocab_size - 1,
        eos_id=eos_id,
        seeds=[(seed, number) for number in batch.numbers],
    )
    count = (targets >= 0).sum()
    ranks.sum(count)
    # a group's ranks have the same tokens
    return to_device(masked, device), targets, max(1, int(count) // ranks.sp)


def mask_tokens(
    tokens: Tensor,
    rate: float,
    *,
    mask_id: int,
    eos_id: int,
    seeds: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """Return the ids that the net sees of `tokens` (B, N) int64, and its targets; both (B, N).

    Targets are the chosen tokens, and -100 elsewhere. Each token is chosen with probability `rate`, except the ends of
    documents, `eos_id`. The draw of a row depends only on its seed, N and `mask_id`, so a resumed run hides the same
    tokens, on any rank. Ids below `mask_id` are tokens.
    """
    draws = [_draw(seed, tokens.shape[1], mask_id) for seed in seeds]
    chance, kind, others = (
        torch.stack(drawn).to(tokens.device) for drawn in zip(*draws, strict=True)
    )
    chosen = (chance < rate) & (tokens != eos_id)
    # an `eos_id` inside a document would cut it
    others = torch.where(others == eos_id, tokens, others)
    shown = tokens.masked_fill(chosen & (kind < MASKED), mask_id)
    shown = torch.where(chosen & (kind >= MASKED) & (kind < MASKED + RANDOM), others, shown)
    return shown, tokens.masked_fill(~chosen, IGNORED)


def _draw(seed: Sequence[int], tokens: int, mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return two numbers in [0, 1) and an id below `mask_id` for each token of a row, (tokens,) each."""
    number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    draw = torch.Generator().manual_seed(number)
    return *torch.rand(2, tokens, generator=draw), torch.randint(mask_id, (tokens,), generator=draw)


@torch.no_grad()
def evaluate(
    model: Net,
    data: TrainingData,
    recipe: Recipe,
    stage: Stage,
    ranks: Ranks,
    on_part: Callable[[int], None],
) -> Score:
    """Return the score of held-out documents, whole or in windows of `train.held_out_context`, as of `longnet score`.

    With the masked objective, windows are by default as long as in this stage, and the same tokens are hidden every
    time. `on_part` gets the tokens of each forward pass, on all ranks. The net ends in training mode, and the
    random state stays as it was. Raises DataError where no token is hidden.
    """
    reading: dict[str, Any] = {
        "chunk": recipe.train.chunk,
        "dtype": recipe.train.dtype,
        "ranks": ranks.all_in_one(),
        "events": Events(progress=on_part),
    }
    model.eval()
    try:
        if recipe.train.objective == "masked":
            return _score_masked(Reader(model, **reading), _masked_windows(data, recipe, stage))
        context = recipe.train.held_out_context
        options = ScoreOptions((context,) if context else None)
        scored = score(model, data.held_out, options, ModelFacts(data.eos_id), **reading)
        rows = scored.read_all().to_pylist()
        return reduce(add, (Score(row["nll_sum"], row["n_tokens"], row["n_bytes"]) for row in rows))
    finally:
        model.train()


@dataclass(frozen=True)
class _MaskedWindow(Window):
    """A window in which some ids are hidden. `targets` has the hidden ids, and IGNORED everywhere else."""

    targets: Tensor


def _masked_windows(data: TrainingData, recipe: Recipe, stage: Stage) -> Iterator[_MaskedWindow]:
    length = recipe.train.held_out_context or stage.seq_len
    number = 0
    for document in data.held_out:
        for start in range(0, len(document), length):
            ids = torch.from_numpy(document.read(start, start + length))[None]
            masked, targets = mask_tokens(
                ids,
                recipe.train.mask_rate,
                mask_id=recipe.model.vocab_size - 1,
                eos_id=data.eos_id,
                seeds=[(number,)],
            )
            hidden = Document(document.doc_id, masked[0].numpy(), None, document.where)
            yield _MaskedWindow(hidden, 0, len(hidden), 0, len(hidden), targets[0])
            number += 1


def _score_masked(reader: Reader, windows: Iterator[_MaskedWindow]) -> Score:
    sums = torch.zeros(2, dtype=torch.float64, device=reader.device)  # nats, tokens
    for piece in chain.from_iterable(reader.read(windows)):
        if piece.hidden is None:
            continue
        # on the host: no wait for a GPU
        targets = piece.window.targets[piece.start : piece.stop]
        chosen = (targets != IGNORED).nonzero().flatten()
        hidden = piece.hidden[to_device(chosen, reader.device)]
        with precision(reader.dtype, reader.device):
            nll = reader.model.nll(hidden, to_device(targets[chosen], reader.device))
        sums[0] += nll.sum(dtype=torch.float64)
        sums[1] += len(chosen)
    reader.ranks.sum(sums)
    nats, tokens = sums.tolist()
    if not tokens:
        raise DataError(
            "none of the held-out tokens was drawn to be hidden: data.held_out needs more of them"
        )
    return Score(nats, int(tokens), None)
