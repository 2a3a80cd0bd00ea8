"""Attention to chosen blocks: gathered keys, in batches of groups of queries that see the same ones.

All heads see the same blocks, so a block is one piece of memory. The m blocks that a group sees stand right before its
near keys, at n, without gaps: block j as if its first key stood at n - (m - j) B. The shift is one per block, and
`turn` turns its keys.

The choice (`choosing`) is a constant in the backward pass. Everything else is a branch like any other. A call that is
computed again for a backward pass does not choose again, if its `Past` keeps the choice.

N tokens, H query heads, K key heads, D head_dim, B tokens of a block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .branches import Branch
from .choosing import (
    Choice,
    LayerChoices,
    Unrotated,
    Voting,
    choose,
    group_starts,
    slots_of,
    votes_by_keys,
)
from .groups import GroupedPart, Groups, limits_of, slot_of
from .merging import GradientSum, Merge
from .past import GroupBlocks, Means, Past, Seen, unrotated
from .pattern import VOTERS, Pattern
from .plain_call import Kernel
from .sinks import Turn
from .spans import Rows
from .views import accumulator, strided_view


class Chosen:
    """The chosen blocks of one call of `dilated_attention`, for all `parts` of its batch.

    `choose` comes first; `merge` and `gradients` attend to what was chosen. `blocks` holds the choice for each part
    and row: (groups, m) int32, ascending. `past` holds the tokens before the shard, if there are any. `choices` is what
    the layers of a net choose; without it, the call chooses for itself.
    """

    def __init__(
        self,
        pattern: Pattern,
        parts: Sequence[GroupedPart],
        turn: Turn | None,
        past: Past | None = None,
        choices: LayerChoices | None = None,
    ) -> None:
        self.pattern, self.turn, self.past, self.choices = pattern, turn, past, choices
        self.kind = pattern.kind(choices.layer if choices else None)
        self.parts = (
            [self._together(part) for part in parts] if self.kind == "sees_block_0" else parts
        )
        self.blocks: GroupBlocks = []

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Choose blocks for queries q (B, N, H, D) among the keys k (B, N, K, D) and those of the past."""
        past, kept = self.past, None
        if past:
            past.settle(self.turn)
            kept = past.choices
        known = kept.get(past.position) if past and kept is not None else None
        if known is not None:
            self.blocks = known
        elif self.kind == "follows":
            assert self.choices
            self.blocks = self.choices.followed()
        else:
            self.blocks = self._chosen(q, k, scale)
        if self.choices and self.kind == "chooses":
            self.choices.leave(self.blocks)
        if not past or known is not None:
            return
        if kept is not None:
            kept[past.position] = self.blocks
        if self.kind != "sees_block_0":
            self._tell(past, q, k, scale)

    def merge(
        self, kernel: Kernel, scale: float, q: Tensor, k: Tensor, v: Tensor, merge: Merge
    ) -> None:
        """Attend from q to the chosen rows of k and v, and merge the results."""
        for run in self._runs(q):
            q_, *places = (run.queries(x) for x in (q, *merge.places))
            parts = [call.attend(kernel, scale, q_, (k, v)) for call in run.calls(kernel, k)]
            part, lse = (_joined(of_calls) for of_calls in zip(*parts, strict=True))
            del parts
            merge.add(run.branch, places, part.reshape(q_.shape), lse.reshape(q_.shape[:-1]))

    def gradients(
        self,
        kernel: Kernel,
        scale: float,
        tensors: Sequence[Tensor],
        keys: Sequence[Tensor],
        of_q: GradientSum,
    ) -> list[Tensor]:
        """Return the gradients of the chosen rows of k and v, in fp32 or fp64, and add those of q to `of_q`.

        `tensors` are dout, q, and the merged out and lse (B, N, H, 1); `keys` are k and v. Gradients of the past are
        added to `past.gradients`.
        """
        _, q, _, _ = tensors
        gradients = [
            torch.zeros(x.shape, dtype=accumulator(x.dtype), device=x.device) for x in keys
        ]
        for run in self._runs(q):
            place, *queries = (run.queries(x) for x in (of_q.place, *tensors))
            calls = run.calls(kernel, keys[0])
            parts = [call.gradients(kernel, scale, queries, keys, gradients) for call in calls]
            of_q.add(
                place, _joined(parts).reshape(queries[1].shape), run.branch.queries, fresh=False
            )
        return gradients

    def _tell(self, past: Past, q: Tensor, k: Tensor, scale: float) -> None:
        """Tell what was chosen to those who count it."""
        counted: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, part in enumerate(self.parts):
            chooses = part.groups.near > self.pattern.chosen_keys and not part.columns.start
            if chooses and group_starts(self.pattern, part)[0] >= part.start:  # each group once
                counted[part.rows.start, part.rows.stop].append(index)
            if past.on_choice:
                past.on_choice(
                    Seen(part, self.blocks[index], partial(self._votes, index, q, k, scale))
                )
        for rows, indices in counted.items():
            of_rows = [
                _joined(some)
                for some in zip(*(self.blocks[index] for index in indices), strict=True)
            ]
            past.count(
                slice(*rows),
                max(self.parts[index].groups.near for index in indices),
                of_rows,
                len(q),
            )

    @torch.no_grad()
    def _votes(self, index: int, q: Tensor, k: Tensor, scale: float, groups: slice) -> list[Tensor]:
        """Return `Seen.votes`."""
        part = self.parts[index]
        rows = zip(range(part.rows.start, part.rows.stop), self.blocks[index], strict=True)
        return [
            votes_by_keys(
                self.pattern, part, self._document(part, row, q, k, scale), groups, blocks[groups]
            )
            for row, blocks in rows
        ]

    def _chosen(self, q: Tensor, k: Tensor, scale: float) -> GroupBlocks:
        """Return the blocks (groups, m) that each part's rows see."""
        blocks = [self._known(part, q) for part in self.parts]
        voting = [[number] for number, known in enumerate(blocks) if known is None]
        if limits_of(
            q
        ).whole:  # neighbouring parts of a document together, which have the same rows and columns
            documents = groupby(chain(*voting), key=lambda number: self.parts[number][:2])
            voting = [[*numbers] for _, numbers in documents]
        means: dict[tuple[int, int], Means] = {}  # by first row and first token of a document
        for numbers in voting:
            of_document = self._means_of(numbers, k, means)
            choices = [
                choose(of_document, voting) for voting in self._votings(numbers, q, k, scale)
            ]
            self._keep(numbers, choices, q, blocks)
        return [some for some in blocks if some is not None]

    def _keep(
        self,
        numbers: Sequence[int],
        choices: Sequence[Choice],
        q: Tensor,
        blocks: list[list[Tensor] | None],
    ) -> None:
        """Take the choices of each row of neighbouring parts apart to `blocks`, by part."""
        parts = [self.parts[number] for number in numbers]
        if past := self._keeper(parts[0], q):
            last, near = group_starts(self.pattern, parts[-1])[-1], parts[-1].groups.near
            past.held = last, [choice.blocks[-1:] for choice in choices]
            past.scanned = (
                slot_of(self.pattern, near, last),
                [choice.candidates for choice in choices],
            )
        sizes = [part.groups.number for part in parts]
        of_rows = [choice.blocks.split(sizes) for choice in choices]
        for number, *of_part in zip(numbers, *of_rows, strict=True):
            blocks[number] = of_part

    def _known(self, part: GroupedPart, q: Tensor) -> list[Tensor] | None:
        """Return the blocks (groups, m) that a part's rows see, if nobody needs to vote."""
        pattern, past = self.pattern, self._keeper(part, q)
        rows, number = (
            range(part.rows.start, part.rows.stop),
            part.groups.near // pattern.chosen_block,
        )
        if number <= pattern.chosen or self.kind == "sees_block_0":
            seen = torch.arange(
                number if number <= pattern.chosen else 1, dtype=torch.int32, device=q.device
            )
            return [seen[None]] * len(rows)
        group, held = group_starts(pattern, part)[0], past.held if past else None
        return held[1] if held and held[0] == group and group < part.start else None

    def _keeper(self, part: GroupedPart, q: Tensor) -> Past | None:
        """Return the past that keeps what is chosen for a part, if it has all rows of the batch and of the document."""
        return (
            self.past
            if not part.columns.start and part.rows.stop - part.rows.start == len(q)
            else None
        )

    def _means_of(
        self, numbers: Sequence[int], k: Tensor, means: dict[tuple[int, int], Means]
    ) -> Means:
        """Return the means of the document of neighbouring parts; `means` has those of other parts."""
        part = self.parts[numbers[0]]
        place = part.rows.start, part.columns.start
        if place not in means:
            last = max(
                x.groups.near for x in self.parts if (x.rows.start, x.columns.start) == place
            )
            keys, past = k[part.rows, part.columns], self._past(part)
            if past:
                means[place] = past.means_before(last, part, keys)
            else:
                means[place] = Means(self.pattern, keys, last // self.pattern.chosen_block)
                means[place].write(slice(None), 0, keys[:, :last], self.turn)
        return means[place]

    def _votings(self, numbers: Sequence[int], q: Tensor, k: Tensor, scale: float) -> list[Voting]:
        """Return the votings of each row of neighbouring parts."""
        parts = [self.parts[number] for number in numbers]
        slots, rows, past = slots_of(self.pattern, parts), parts[0].rows, self._keeper(parts[0], q)
        known: Sequence[Tensor | None] = [None] * (rows.stop - rows.start)
        if past and past.scanned and past.scanned[0] == slots[0].start:
            known = past.scanned[1]

        def of_parts(found: Iterable[Tensor | None]) -> Tensor | None:
            some = [x for x in found if x is not None]
            return _joined(some) if some else None

        choices = self.choices
        return [
            Voting(
                pattern=self.pattern,
                slots=slots,
                row=row if self._past(parts[0]) else row - rows.start,
                heads=q.shape[2],
                document=self._document(parts[0], row, q, k, scale),
                scanned=scanned,
                named=of_parts(choices.named(row, part) for part in parts) if choices else None,
                earlier=of_parts(choices.earlier(n, row - rows.start) for n in numbers)
                if choices
                else None,
            )
            for row, scanned in enumerate(known, rows.start)
        ]

    def _document(
        self, part: GroupedPart, row: int, q: Tensor, k: Tensor, scale: float
    ) -> Unrotated:
        stored = self._stored(part, row)
        size, _, past, *_ = stored

        def voters(starts: range, step: int) -> Tensor:
            positions = torch.arange(starts.start, starts.stop, starts.step, device=q.device)[
                :, None
            ]
            positions = positions + torch.arange(step - VOTERS, 1, step, device=q.device)
            rows, begin = q[row, part.columns], part.start
            if past and starts[0] + step - VOTERS < begin:
                assert past.queries is not None
                rows = torch.cat([past.queries[row], rows[: max(0, starts[-1] + 1 - begin)]])
                begin -= past.queries.shape[1]
            voting = rows[(positions - begin).clamp(min=0).flatten()]
            return (
                unrotated(voting[None], positions.flatten(), self.turn)[0].unflatten(
                    0, positions.shape
                )
                * scale
            )

        def keys(blocks: Tensor) -> Tensor:
            rows = stored.gathered(stored.taken(blocks), k, k)[0].flatten(0, 1)
            positions = (
                blocks.flatten()[:, None] * size + torch.arange(size, device=blocks.device)
            ).flatten()
            of_groups = unrotated(rows[None], positions, self.turn)[0].unflatten(
                0, (*blocks.shape, size)
            )
            return of_groups.permute(0, 3, 1, 2, 4)

        return Unrotated(voters, keys, size * k.shape[2:].numel())

    def _stored(self, part: GroupedPart, row: int) -> _Stored:
        return _Stored(self.pattern.chosen_block, part, self._past(part), row, self.turn)

    def _past(self, part: GroupedPart) -> Past | None:
        """Return the past of the document of a part; only the first document of a shard has any."""
        return self.past if part.start else None

    def _together(self, part: GroupedPart) -> GroupedPart:
        """Return the part as one group, if its groups see the first block alone."""
        start, number, queries, near = part.groups
        if near <= self.pattern.chosen_keys:
            return part
        return part._replace(groups=Groups(start, 1, number * queries, near))

    def _runs(self, q: Tensor) -> Iterator[_GroupRun]:
        """Yield the groups of each part and row; on a GPU, those of neighbouring parts that are alike together."""
        whole, together = limits_of(q).whole, list[tuple[GroupedPart, list[list[Tensor]]]]()
        for part, of_rows in zip(self.parts, self.blocks, strict=True):
            moved = (
                together and together[-1][0].groups.near > self.pattern.chosen_keys
            )  # not where all is seen
            if whole and moved and _follows(*together[-1], part, of_rows):
                together[-1][1].append(of_rows)
            else:
                together.append((part, [of_rows]))
        for part, of_parts in together:
            for row, blocks in enumerate(zip(*of_parts, strict=True), part.rows.start):
                yield _GroupRun.of(
                    self.pattern, self._stored(part, row), _joined(blocks).long(), q.shape[2]
                )


def _follows(
    first: GroupedPart, so_far: list[list[Tensor]], part: GroupedPart, blocks: list[Tensor]
) -> bool:
    """Return whether a part's groups are as those of the parts before it, the `first` of which is given, and next."""
    number = sum(len(of_rows[0]) for of_rows in so_far)
    same = (first.rows, first.columns, first.groups.queries) == (
        part.rows,
        part.columns,
        part.groups.queries,
    )
    next_one = part.groups.start == first.groups.start + number * first.groups.queries
    return same and next_one and blocks[0].shape[1] == so_far[0][0].shape[1]


class _Stored(NamedTuple):
    """The blocks of a document, of `size` tokens, in one row of a batch: in the shard and in the past before it."""

    size: int
    part: GroupedPart
    past: Past | None
    row: int
    turn: Turn | None

    @property
    def first_block(self) -> int:
        """The first block of which the shard has all tokens."""
        return -(-self.part.start // self.size)

    def own(self, x: Tensor) -> Tensor:
        """View the whole blocks of a shard's x (B, N, K, D) as (blocks, tokens of a block, K, D)."""
        rows = x[self.row, self.part.columns][self.first_block * self.size - self.part.start :]
        number = len(rows) // self.size
        return rows[: number * self.size].unflatten(0, (number, self.size))

    def taken(self, groups: Tensor) -> _TakenBlocks:
        """Find the blocks (groups, m), ascending in each group."""
        blocks, inverse, past = groups.flatten(), None, self.past
        if not past:
            return _TakenBlocks(blocks, None, 0, 0)
        if len(groups) > 1:
            blocks, inverse = blocks.unique(return_inverse=True)
        edges = blocks.new_tensor([past.blocks.number, self.first_block])
        return _TakenBlocks(blocks, inverse, *torch.searchsorted(blocks, edges).tolist())

    def gathered(
        self, taken: _TakenBlocks, k: Tensor, v: Tensor, room: Tensor | None = None
    ) -> Tensor:
        """Gather blocks of k and v (B, N, K, D) and of the past: (k and v, groups * m, tokens, K, D), in `room`."""
        blocks, inverse, before, inside = taken
        gathered = (
            k.new_empty(2, len(blocks), self.size, *k.shape[2:])
            if room is None
            else room[:, : len(blocks)]
        )
        if self.past and before:
            self.past.blocks.take(self.row, blocks[:before], gathered[:, :before])
        if self.past and before < inside:
            for into, of_past, x in zip(gathered, self.past.waiting, (k, v), strict=True):
                ends = x[self.row, self.part.columns][: self.size - of_past.shape[1]]
                torch.cat([of_past[self.row], ends], out=into[before])
        if inside < len(blocks):
            own = blocks[inside:] - self.first_block
            for into, x in zip(gathered, (k, v), strict=True):
                torch.index_select(self.own(x), 0, own, out=into[inside:])
        return gathered if inverse is None else gathered.index_select(1, inverse)

    def add(self, into: Tensor, d: Tensor, taken: _TakenBlocks, index: int) -> None:
        """Add gradients (groups * m, tokens, K, D) of gathered rows to those of the shard's rows (B, N, K, D).

        Gradients of k (`index` 0) or v (1) of the past go to its sum.
        """
        d, past, (blocks, inverse, before, inside) = d.to(into.dtype), self.past, taken
        if inverse is not None:
            d = d.new_zeros(len(blocks), *d.shape[1:]).index_add_(0, inverse, d)
        self.own(into).index_add_(0, blocks[inside:] - self.first_block, d[inside:])
        if past and before < inside:
            held = past.waiting.shape[2]
            into[self.row, self.part.columns][: self.size - held] += d[before, held:]
            d[before, held:] = 0  # given to the shard: the past gets the others
        if past:
            past.add_gradients(self.row, index, blocks[:inside], d[:inside])


class _TakenBlocks(NamedTuple):
    """The distinct blocks (n,) that some groups see, ascending, and the place of each group's blocks among them.

    inverse: (groups * m,), or None if the blocks are the groups' own. The first `before` blocks are whole in the past,
    those from `inside` on in the shard. The shard's start cuts the one between.
    """

    blocks: Tensor
    inverse: Tensor | None
    before: int
    inside: int


class _GroupRun(NamedTuple):
    """Neighbouring groups of one row of a batch, which see the tokens of equally many `blocks` (groups, m).

    distances (groups, m): positions by which each block's keys are moved; None if they stay.
    """

    stored: _Stored
    branch: Branch
    blocks: Tensor
    distances: Tensor | None

    @classmethod
    def of(cls, pattern: Pattern, stored: _Stored, blocks: Tensor, heads: int) -> _GroupRun:
        """Return the run of a part's groups, with these blocks (groups, m)."""
        part, size, (groups, m) = stored.part, stored.size, blocks.shape
        start, _, queries, near = part.groups
        rows = Rows(groups, queries, heads, 0, 1, queries, 1, start - part.start, 0)
        distances = None
        if near > m * size:
            (w,), (back,) = pattern.segment_lengths, pattern.look_backs
            segments = (
                torch.arange(start, start + groups * queries, queries, device=blocks.device) // w
            )
            places = torch.arange(-m * size, 0, size, device=blocks.device)
            distances = (segments[:, None] - back) * w + places - blocks * size
        return cls(stored, Branch(rows, rows, causal=False), blocks, distances)

    def calls(self, kernel: Kernel, k: Tensor) -> Iterator[_GroupCall]:
        """Yield the calls for keys k (B, N, K, D): as many groups at a time as the kernel and memory allow."""
        (kv_heads, head_dim), rows = k.shape[2:], self.branch.queries
        keys = self.blocks.shape[1] * self.stored.size
        most = kernel.max_batch(kv_heads, max(rows.heads // kv_heads * rows.rows, keys), head_dim)
        step = max(
            1, min(most, limits_of(k).gathered // (keys * kv_heads * head_dim * k.element_size()))
        )
        # kept from call to call: memory that a CPU gives back and gets again comes as zeros, page by page
        room = k.new_empty(
            2, min(step, len(self.blocks)) * self.blocks.shape[1], self.stored.size, *k.shape[2:]
        )
        for start in range(0, len(self.blocks), step):
            groups = slice(start, start + step)
            blocks = self.blocks[groups]
            distances = None if self.distances is None else self.distances[groups].flatten()
            yield _GroupCall(
                self.stored, groups, blocks, self.stored.taken(blocks), distances, room
            )

    def queries(self, x: Tensor) -> Tensor:
        """View the run's rows of x (B, N, H, D) as (groups, H, rows, D)."""
        row = self.stored.row
        return strided_view(x[row : row + 1, self.stored.part.columns], self.branch.queries)[0]


class _GroupCall(NamedTuple):
    """One call of attention: some `groups` of a run, the tokens of their `blocks` (groups, m), and where these are."""

    stored: _Stored
    groups: slice
    blocks: Tensor
    taken: _TakenBlocks
    distances: Tensor | None
    room: Tensor  # for the blocks of one call at a time

    def attend(
        self, kernel: Kernel, scale: float, q: Tensor, keys: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return out and LSE of the groups of q (groups, H, rows, D), folded; keys are k and v (B, N, K, D).

        Calls are functions: what one has gathered is free before the next gathers.
        """
        k_, v_ = self.stored.gathered(self.taken, keys[0], keys[1], self.room)
        return kernel.forward(
            _folded(q[self.groups], keys[0]), self.turned(k_), self.in_groups(v_), False, scale
        )

    def gradients(
        self,
        kernel: Kernel,
        scale: float,
        tensors: Sequence[Tensor],
        keys: Sequence[Tensor],
        into: Sequence[Tensor],
    ) -> Tensor:
        """Return the gradient of queries, folded, and add those of gathered rows to `into` (B, N, K, D).

        tensors: dout, q, out and lse (groups, H, rows, D or 1).
        """
        dout, q, out, lse = (_folded(x[self.groups], keys[0]) for x in tensors)
        k_, v_ = self.stored.gathered(self.taken, keys[0], keys[1], self.room)
        k_ = self.turned(k_)
        dq, dk, dv = kernel.backward(
            (dout, q, k_, self.in_groups(v_), out, lse[..., 0]), False, scale
        )
        del k_, v_
        self.stored.add(into[1], self.in_blocks(dv), self.taken, 1)
        del dv
        self.stored.add(into[0], self.turned_back(dk), self.taken, 0)
        return dq

    def in_groups(self, x: Tensor) -> Tensor:
        """Return gathered rows (blocks, tokens, K, D) as (groups, K, keys, D)."""
        return x.unflatten(0, self.blocks.shape).flatten(1, 2).transpose(1, 2)

    def in_blocks(self, x: Tensor) -> Tensor:
        """Return rows (groups, K, keys, D) as (blocks, tokens, K, D)."""
        return x.transpose(1, 2).flatten(0, 1).unflatten(0, (-1, self.stored.size))

    def turned(self, k: Tensor) -> Tensor:
        """Return gathered keys (blocks, tokens, K, D), moved to where the groups see them, as (groups, K, keys, D)."""
        if self.stored.turn and self.distances is not None:
            k = self.stored.turn(k[None], self.distances)[0].to(k.dtype)
        return self.in_groups(k)

    def turned_back(self, dk: Tensor) -> Tensor:
        """Return the gradient of the argument of `turned`, given that of its result; `turn` is linear."""
        if self.stored.turn is None or self.distances is None:
            return self.in_blocks(dk)
        with torch.enable_grad():
            leaf = self.in_blocks(dk).detach().contiguous().requires_grad_()
            return torch.autograd.grad(self.turned(leaf), leaf, dk)[0]


def _folded(x: Tensor, k: Tensor) -> Tensor:
    """Return x (groups, H, rows, D) as (groups, K, H / K * rows, D): heads that share a key head are rows of it."""
    return x.reshape(len(x), k.shape[2], -1, x.shape[-1])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])
