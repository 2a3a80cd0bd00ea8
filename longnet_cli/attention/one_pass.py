"""All parts of a sum in one pass: two Triton kernels in place of torch's operators, for CUDA.

`merge_parts` reads the outputs of all branches of a query once and writes the merged out and log-sum-exp; `add_parts`
reads all parts of a gradient once and writes their sum. Both compute in fp32, in registers, and write the dtype of the
inputs, so no buffer of the whole shard is wider than the inputs. Kernels compute the places of a part's rows, so a part
stays where its attention kernel has put it, and a launch takes any number of parts.

The rows of a call are one strided view of the shard. With tokens counted over the whole batch, row `row` of its head
`j` and segment `m` is token `first + m * segment_step + j * skew + row * row_step`, head `first_head + j * head_step`:
see `_ViewRows`. Kernels find the row that holds a given token and head by division.

B batch, N tokens of the shard, H heads (key heads, for keys), D head_dim; parts (segments, heads, rows, D).
"""

from __future__ import annotations

import struct
from functools import lru_cache
from math import inf, log
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .branches import Branch
from .packing import Pack, PackedRows
from .spans import Rows

# Triton compiles functions without annotations
# mypy: allow-untyped-defs


_TILE = 4096  # numbers per program: 32 fp32 registers per thread
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
_PENDING = 16 << 20  # bytes of parts that may always wait for their sum

# The facts that a kernel needs about a part, in one cache line: addresses and strides of the part and of its lse, the
# address of `inverse` for gathered rows (int64); `_ViewRows` (int32); the bias on the lse and the log of zero keys
# (fp32).
_PIECE = struct.Struct("<9q11i2f4x")
_WORDS = tl.constexpr(_PIECE.size // 4)
_FIRST, _LAST, _SEGMENTS, _SEGMENT_STEP, _ROWS, _ROW_STEP, _FIRST_HEAD, _HEADS, _HEAD_STEP, _SKEW, _AGAIN = (
    tl.constexpr(word) for word in range(18, 29)
)
_BIAS, _ZEROS = tl.constexpr(29), tl.constexpr(30)


class OnePassMerge:
    """The merge of all branches, computed when all are there: out (B, N, H, D), like q, and lse (B, N, H), in fp32."""

    def __init__(self, q: Tensor, covered: bool) -> None:
        """Start without parts. `covered` (the `first` branches reach every row) has no effect here."""
        self.q, self._pieces = q, _LaunchParts()
        self.places = (_places(q),)

    def add(self, branch: Branch, places: list[Tensor], part: Tensor, lse: Tensor) -> None:
        self._pieces.add(places[0], self.q.shape[2], part, lse, 0.0, branch.zero_keys)

    def add_rows(self, pack: Pack, queries: PackedRows, part: Tensor, lse: Tensor) -> None:
        """Take the part (rows, D) and lse (rows,) of gathered rows, all of them distinct."""
        batch, tokens, heads, _ = self.q.shape
        self._pieces.add_rows(queries, (batch * tokens, heads), part, lse, 0.0, pack.zero_keys)

    def result(self) -> tuple[Tensor, Tensor]:
        out = torch.empty(self.q.shape, dtype=self.q.dtype, device=self.q.device)
        lse = torch.empty(self.q.shape[:3], dtype=torch.float32, device=self.q.device)
        self._pieces.launch(merge_parts, out, lse)
        return out, lse


class OnePassGradientSum:
    """The sum (B, N, H, D) of all parts of a gradient, like `x`.

    Parts wait until they hold `pending` bytes, or `_PENDING` if that is more. Then they are added to the sum, which
    bounds memory. A part that has all of `x`, in the same layout, becomes the sum itself if there is none yet.
    """

    def __init__(self, x: Tensor, pending: int, written: bool) -> None:
        """Start without parts. `written` (fresh parts write every row) has no effect here."""
        self.place = _places(x)
        self._like, self._pieces = x, _LaunchParts()
        self._sum: Tensor | None = None
        self._limit = max(_PENDING, pending)

    def add(self, place: Tensor, part: Tensor, rows: Rows, fresh: bool) -> None:
        """Take the part of a call, to be added to `place`, its view of the sum; `fresh` has no effect here."""
        shape = self._like.shape
        if self._sum is None and part.dtype == self._like.dtype and _is_whole(place, part, shape):
            self._sum = part.as_strided(shape, (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1))
            return
        self._pieces.add(place, shape[2], part)
        if self._pieces.nbytes >= self._limit:
            self._flush()

    def add_rows(self, rows: PackedRows, part: Tensor, repeated: bool) -> None:
        """Take the part (rows, D) of gathered rows, which may be `repeated`."""
        batch, tokens, heads, head_dim = self._like.shape
        if repeated:  # `inverse` finds only one row for each place
            wide = self.result().float().view(-1, head_dim).index_add_(0, rows.places, part.float())
            self._sum = wide.to(self._like.dtype).view(self._like.shape)
            return
        self._pieces.add_rows(rows, (batch * tokens, heads), part)
        if self._pieces.nbytes >= self._limit:
            self._flush()

    def result(self) -> Tensor:
        if self._pieces.number or self._sum is None:
            self._flush()
        assert self._sum is not None
        return self._sum

    def _flush(self) -> None:
        fresh = self._sum is None
        if self._sum is None:
            self._sum = torch.empty(self._like.shape, dtype=self._like.dtype, device=self._like.device)
        self._pieces.launch(add_parts, self._sum, FRESH=fresh)
        self._pieces = _LaunchParts()


class _ViewRows(NamedTuple):
    """Rows of a shard that a strided view shows, tokens counted over the whole batch."""

    first: int
    last: int  # the last of all its tokens
    segments: int
    segment_step: int
    rows: int
    row_step: int
    first_head: int
    heads: int
    head_step: int
    skew: int
    again: int  # the number of segments that may hold one token

    @classmethod
    def of(cls, place: Tensor, heads: int) -> _ViewRows:
        """Return the rows that `place` (segments, heads, rows, 1), a view of `_places`, shows, from its strides."""
        return _view_rows(place.shape, place.stride(), int(place.storage_offset()), heads)


@lru_cache(maxsize=1 << 12)  # all layers of a step ask for the same
def _view_rows(shape: torch.Size, stride: tuple[int, ...], offset: int, heads: int) -> _ViewRows:
    segments, number, rows, _ = shape
    of_segment, of_head, of_row, _ = stride
    first, first_head = divmod(offset, heads)
    skew, head_step = divmod(of_head, heads) if number > 1 else (0, 1)
    segment_step = of_segment // heads if segments > 1 else 1
    row_step = of_row // heads if rows > 1 else 1
    again = ((rows - 1) * row_step // segment_step + 1) if segments > 1 else 1
    last = first + (segments - 1) * segment_step + (number - 1) * skew + (rows - 1) * row_step
    return _ViewRows(first, last, segments, segment_step, rows, row_step, first_head, number, head_step, skew, again)


class _LaunchParts:
    """Parts that one launch reads, in the order in which they came."""

    def __init__(self) -> None:
        self.number = self.nbytes = 0
        self._held: list[tuple[Tensor, Tensor | None, Tensor | None, _ViewRows, float, float]] = []

    def add(
        self, place: Tensor, heads: int, part: Tensor, lse: Tensor | None = None, bias: float = 0.0, zero_keys: int = 0
    ) -> None:
        if place.shape[2] > 1 and place.stride(2) < heads:  # rows that are heads of one token
            for i in range(place.shape[2]):
                row = slice(i, i + 1)
                of_row = None if lse is None else lse[:, :, row]
                self.add(place[:, :, row], heads, part[:, :, row], of_row, bias, zero_keys)
            return
        part = part if part.stride(-1) == 1 else part.contiguous()
        self._hold(part, lse, None, _ViewRows.of(place, heads), bias, zero_keys)

    def add_rows(
        self,
        packed: PackedRows,
        size: tuple[int, int],
        part: Tensor,
        lse: Tensor | None = None,
        bias: float = 0.0,
        zero_keys: int = 0,
    ) -> None:
        (total, heads), rows = size, len(packed.places)
        every = _ViewRows(0, total - 1, 1, 1, rows, 1, 0, heads, 1, 0, 1)
        # the same row for every head
        part = part.as_strided((1, 1, *part.shape), (0, 0, *part.stride()))
        lse = None if lse is None else lse.as_strided((1, 1, rows), (0, 0, *lse.stride()))
        self._hold(part, lse, packed.inverse(total * heads), every, bias, zero_keys)

    def _hold(
        self, part: Tensor, lse: Tensor | None, inverse: Tensor | None, rows: _ViewRows, bias: float, zero_keys: int
    ) -> None:
        assert not self._held or self._held[0][0].dtype == part.dtype
        self._held.append((part, lse, inverse, rows, bias, log(zero_keys) if zero_keys else -inf))
        self.number += 1
        self.nbytes += part.numel() * part.element_size()

    def launch(self, kernel: Any, out: Tensor, *more: Tensor, **options: Any) -> None:
        batch, tokens, heads, head_dim = out.shape
        if not out.numel():
            return
        dtype = self._held[0][0].dtype if self._held else out.dtype
        table, alignment = bytearray(), 16  # of every row, in bytes
        for part, part_lse, inverse, rows, bias, zeros in self._held:
            where = part.data_ptr(), *part.stride()[:3]
            where_lse = (0, 0, 0, 0) if part_lse is None else (part_lse.data_ptr(), *part_lse.stride())
            where_inverse = 0 if inverse is None else inverse.data_ptr()
            table += _PIECE.pack(*where, *where_lse, where_inverse, *rows, bias, zeros)
            for number in (where[0], *(stride * dtype.itemsize for stride in where[1:])):
                alignment = min(alignment, number & -number or 16)
        on_host = torch.frombuffer(table or bytearray(_PIECE.size), dtype=torch.int32)
        pieces = (on_host.pin_memory() if out.is_cuda else on_host).to(out.device, non_blocking=True)
        width = triton.next_power_of_2(head_dim)
        tile = max(16, _TILE // width)
        with torch.cuda.device_of(out):  # Triton launches on the current device
            kernel[(triton.cdiv(batch * tokens, tile) * heads,)](
                pieces.view(torch.int64), pieces, out, *more, self.number, batch * tokens, heads,
                HEAD_DIM=head_dim, WIDTH=width, TILE=tile, PART=getattr(tl, str(dtype).removeprefix("torch.")),
                VECTOR=max(1, alignment // dtype.itemsize), **_OPTIONS, **options,
            )  # fmt: skip


def _places(x: Tensor) -> Tensor:
    """Return a tensor (B, N, H, 1) without memory; the strides of its views tell which rows they show."""
    return torch.empty((*x.shape[:3], 1), device="meta")


def _is_whole(place: Tensor, part: Tensor, shape: torch.Size) -> bool:
    """Return True if a part has all of a tensor (B, N, H, D), in its order."""
    dims = zip(place.shape, place.stride(), part.stride(), strict=True)
    return part.numel() == shape.numel() and all(of_part == of * shape[3] for n, of, of_part in [*dims][:3] if n > 1)


@triton.jit
def _find(x, segments, segment_step, rows, row_step, again):
    """Return the segment and the row that hold each token, and whether there are any.

    Tokens count from the view's first. Of the segments that may hold a token, look at the one `again` before the last.
    """
    segment = tl.minimum(tl.maximum(x, 0) // segment_step, segments - 1) - again
    inside = x - segment * segment_step
    row = inside // row_step
    return segment, row, (x >= 0) & (segment >= 0) & (row * row_step == inside) & (row < rows)


@triton.jit
def _find_gathered(inverse, tokens, head, heads, total):
    row = tl.load(inverse.to(tl.pointer_type(tl.int32)) + tokens * heads + head, mask=tokens < total, other=-1)
    return row * 0, row, row >= 0


@triton.jit
def _load_rows(
    where, segment, row, j, held, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, VECTOR: tl.constexpr
):
    """Load rows (TILE, WIDTH) of a part, in fp32; 0 where `held` is false."""
    d = tl.arange(0, WIDTH)
    part = tl.multiple_of(tl.load(where).to(tl.pointer_type(PART)), VECTOR * (PART.primitive_bitwidth // 8))
    of_segment, of_head = tl.multiple_of(tl.load(where + 1), VECTOR), tl.multiple_of(tl.load(where + 2), VECTOR)
    of_row = tl.multiple_of(tl.load(where + 3), VECTOR)
    at = segment.to(tl.int64) * of_segment + j * of_head + row.to(tl.int64) * of_row
    mask = held[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(part + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["number", "total", "heads"])
def merge_parts(
    places, pieces, out, lse, number, total, heads,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Merge the parts of TILE tokens of one head by their log-sum-exp: out (total, heads, D), lse (total, heads).

    `places` and `pieces` are the same table, as int64 and as int32.
    """
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * TILE
    tokens = first + tl.arange(0, TILE)
    merged = tl.zeros((TILE, WIDTH), tl.float32)
    top = tl.full((TILE,), float("-inf"), tl.float32)  # largest lse so far
    share = tl.zeros((TILE,), tl.float32)  # sum of all weights so far, in units of exp(top)
    for i in range(number):
        where, piece = places + i * (_WORDS // 2), pieces + i * _WORDS
        beyond = head - tl.load(piece + _FIRST_HEAD)
        if (tl.load(piece + _FIRST) < first + TILE) & (tl.load(piece + _LAST) >= first) & (beyond >= 0):
            step = tl.load(piece + _HEAD_STEP)
            j = beyond // step
            if (j * step == beyond) & (j < tl.load(piece + _HEADS)):
                x = tokens - tl.load(piece + _FIRST) - j * tl.load(piece + _SKEW)
                segments, segment_step = tl.load(piece + _SEGMENTS), tl.load(piece + _SEGMENT_STEP)
                rows, row_step, inverse = tl.load(piece + _ROWS), tl.load(piece + _ROW_STEP), tl.load(where + 8)
                if inverse == 0:
                    segment, row, held = _find(x, segments, segment_step, rows, row_step, 0)
                else:
                    segment, row, held = _find_gathered(inverse, tokens, head, heads, total)
                if tl.max(held.to(tl.int32), 0) > 0:
                    part_lse = tl.load(where + 4).to(tl.pointer_type(tl.float32))
                    at = segment.to(tl.int64) * tl.load(where + 5) + j * tl.load(where + 6)
                    at += row.to(tl.int64) * tl.load(where + 7)
                    bias = tl.load(piece + _BIAS).to(tl.float32, bitcast=True)
                    zeros = tl.load(piece + _ZEROS).to(tl.float32, bitcast=True)
                    score = tl.load(part_lse + at, mask=held, other=float("-inf")) + bias
                    zeros = tl.where(held, zeros, float("-inf"))
                    highest = tl.maximum(top, tl.maximum(score, zeros))
                    reference = tl.where(highest == float("-inf"), 0.0, highest)
                    kept, weight = tl.exp(top - reference), tl.exp(score - reference)
                    part = _load_rows(where, segment, row, j, held, HEAD_DIM, WIDTH, PART, VECTOR)
                    merged = merged * kept[:, None] + part * weight[:, None]
                    share = share * kept + weight + tl.exp(zeros - reference)
                    top = highest
    d = tl.arange(0, WIDTH)
    there = tokens < total
    at = tokens.to(tl.int64) * heads + head
    share = tl.where(share == 0.0, 1.0, share)  # a row without keys gets out 0, lse -inf
    merged = merged / share[:, None]
    mask = there[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out + at[:, None] * HEAD_DIM + d[None, :], merged.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + at, top + tl.log(share), mask=there)


@triton.jit(do_not_specialize=["number", "total", "heads"])
def add_parts(
    places, pieces, out, number, total, heads,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, VECTOR: tl.constexpr,
    FRESH: tl.constexpr,
):  # fmt: skip
    """Add the parts of TILE tokens of one head to out (total, heads, D); FRESH: out holds nothing yet.

    If heads of a call read the same key head, or segments look back over each other, all of their parts count.
    """
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * TILE
    tokens = first + tl.arange(0, TILE)
    added = tl.zeros((TILE, WIDTH), tl.float32)
    touched = tl.zeros((TILE,), tl.int32)
    for i in range(number):
        where, piece = places + i * (_WORDS // 2), pieces + i * _WORDS
        beyond = head - tl.load(piece + _FIRST_HEAD)
        if (tl.load(piece + _FIRST) < first + TILE) & (tl.load(piece + _LAST) >= first) & (beyond >= 0):
            step, heads_of_piece = tl.load(piece + _HEAD_STEP), tl.load(piece + _HEADS)
            j = beyond // tl.maximum(step, 1)
            if j * step == beyond:
                x, skew = tokens - tl.load(piece + _FIRST), tl.load(piece + _SKEW)
                segments, segment_step = tl.load(piece + _SEGMENTS), tl.load(piece + _SEGMENT_STEP)
                rows, row_step, times = tl.load(piece + _ROWS), tl.load(piece + _ROW_STEP), tl.load(piece + _AGAIN)
                begin = tl.where(step == 0, 0, j)
                stop = tl.where(step == 0, heads_of_piece, tl.minimum(j + 1, heads_of_piece))
                inverse = tl.load(where + 8)
                for k in range(begin, stop):
                    for again in range(times):
                        if inverse == 0:
                            segment, row, held = _find(x - k * skew, segments, segment_step, rows, row_step, again)
                        else:
                            segment, row, held = _find_gathered(inverse, tokens, head, heads, total)
                        if tl.max(held.to(tl.int32), 0) > 0:
                            added += _load_rows(where, segment, row, k, held, HEAD_DIM, WIDTH, PART, VECTOR)
                            touched |= held.to(tl.int32)
    d = tl.arange(0, WIDTH)
    at = (tokens.to(tl.int64) * heads + head)[:, None] * HEAD_DIM + d[None, :]
    mask = (tokens < total)[:, None] & (d < HEAD_DIM)[None, :]
    if not FRESH:
        mask = mask & (touched > 0)[:, None]
        added += tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, added.to(out.dtype.element_ty), mask=mask)
