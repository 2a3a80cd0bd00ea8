"""The pattern of dilated attention: which keys a query sees at which levels (arXiv 2307.02486, Eq. 3-8, 11-15).

A level (w, r) cuts the sequence into segments of w positions. In each segment, head h keeps every r-th position,
starting at the head's offset. With w = 8, r = 2 and four heads, one segment looks like this:

    position   0 1 2 3 4 5 6 7
    head 0     x . x . x . x .      offset 0
    head 1     . x . x . x . x      offset 1
    head 2     x . x . x . x .      offset 2 mod 2 = 0
    head 3     . x . x . x . x

In the paper, queries are sampled exactly as keys are, and the kept rows of a segment attend to each other. Other
options of `Pattern` let a level look back over earlier segments, count each key once, let every row query, and let
every query see the first tokens of a document (attention sinks) or, beyond a window, the blocks of tokens that the text
names (`chosen`).

The rest of the geometry is in `spans` (the rows that one strided view shows, and rows that lie outside a shard) and in
`branches` (the attention calls of a shard). It is pure integer arithmetic.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

HeadOffsets = Literal["modulo", "grouped"]
Overlap = Literal["repeat", "once"]
Queries = Literal["dilated", "all"]
Padding = Literal["exact", "zero_key"]
MAX_LEVELS = 64  # enough to double from 1 to 2^63; every layer computes every level


def ceil_div(number: int, divisor: int) -> int:
    """Return number / divisor, rounded up."""
    return -(-number // divisor)


class Level(NamedTuple):
    """One (segment length, dilation rate) pair, both in tokens."""

    segment_length: int
    dilation_rate: int


@dataclass(frozen=True)
class Pattern:
    """The levels of dilated attention, and the keys that a query sees at each. The defaults are the paper's.

    `longnet_cli.attention.notation.parse_pattern` reads a pattern from a text, `"window:1Ki,sinks=4"`.

    head_offsets: "modulo" is the paper's (h mod r, Eq. 13-15); "grouped" is torchscale's (h // ceil(H / r)) and belongs
        to weights trained with it.
    look_back: number of segments before its own that a query sees; in bidirectional attention, as many after it too.
        One number, or one per level.
    overlap: with "repeat", a key counts once for every level that has it. With "once", a level leaves out the positions
        that the previous level covers for the same query: the levels tile the past, each more sparsely.
    queries: with "dilated", only the rows that a level keeps query its keys; with "all", every row does.
    sinks: number of first tokens of a document that every query sees, once. A query sees them at the first level if
        that covers them, otherwise in a call of their own. Other levels leave them out.
    chosen: number of blocks of `chosen_block` tokens that every query sees before its window, at most: the first block
        of the document, and those that the text names (`longnet_cli.nets.named_blocks`). All layers and heads see the
        same ones, and so do the queries of a group of `chosen_every` tokens. Causal attention with one level at rate 1
        only, for reading: nothing is trained through the choice.

    Raises ValueError for levels that no attention can have, and for options that do not go together.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: HeadOffsets = "modulo"
    look_back: int | tuple[int, ...] = 0  # stored as one number per level
    overlap: Overlap = "repeat"
    queries: Queries = "dilated"
    sinks: int = 0
    chosen: int = 0
    chosen_block: int = 32
    chosen_every: int = 16

    def __post_init__(self) -> None:
        for name in ("segment_lengths", "dilation_rates"):
            self._set(name, whole_numbers(name, getattr(self, name)))
        if not self.segment_lengths or len(self.segment_lengths) != len(self.dilation_rates):
            raise ValueError(
                "segment_lengths and dilation_rates need one entry per level, "
                f"got {len(self.segment_lengths)} and {len(self.dilation_rates)}"
            )
        if len(self.segment_lengths) > MAX_LEVELS:
            raise ValueError(
                f"a pattern has at most {MAX_LEVELS} levels, got {len(self.segment_lengths)}"
            )
        if min(*self.segment_lengths, *self.dilation_rates) < 1:
            raise ValueError(
                "segment lengths and dilation rates must be at least 1, "
                f"got {self.segment_lengths} and {self.dilation_rates}"
            )
        for name, literal in (
            ("head_offsets", HeadOffsets),
            ("overlap", Overlap),
            ("queries", Queries),
        ):
            if getattr(self, name) not in get_args(literal):
                allowed = " or ".join(f'"{choice}"' for choice in get_args(literal))
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")
        levels = len(self.segment_lengths)
        back = (self.look_back,) * levels if isinstance(self.look_back, int) else self.look_back
        self._set("look_back", whole_numbers("look_back", back))
        if len(self.look_backs) != levels or min(self.look_backs) < 0:
            raise ValueError(
                f"look_back needs one number from 0, or {levels}, one per level, got {self.look_backs}"
            )
        self._set("sinks", *whole_numbers("sinks", [self.sinks]))
        self._check_order()
        self._check_chosen()

    @classmethod
    def paper(cls) -> Pattern:
        """Return the pattern of the paper's language models (section 4.1)."""
        return cls((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))

    @classmethod
    def geometric(cls, length: int, base: int = 2048, ratio: int = 2) -> Pattern:
        """Return levels that grow by `ratio` in length and rate, from (base, 1) until a segment covers `length`."""
        if length < 1 or base < 1 or ratio < 2:
            raise ValueError(
                f"need length >= 1, base >= 1, ratio >= 2, got {length}, {base}, {ratio}"
            )
        levels = [Level(base, 1)]
        while levels[-1].segment_length < length:
            levels.append(
                Level(levels[-1].segment_length * ratio, levels[-1].dilation_rate * ratio)
            )
        lengths, rates = zip(*levels, strict=True)
        return cls(lengths, rates)

    @classmethod
    def window(cls, width: int, look_back: int = 1, sinks: int = 0) -> Pattern:
        """Return a window: all keys of the query's own segment of `width` tokens and of `look_back` segments before it.

        The window moves in steps of `width`. Depending on its place in its segment, a causal query sees more than
        width * look_back tokens and at most width * (1 + look_back). Mistral's sliding window has no such steps: there,
        every query sees W tokens.
        """
        return cls((width,), (1,), look_back=look_back, sinks=sinks)

    @classmethod
    def pretrained(cls, width: int = 1704, sinks: int = 4) -> Pattern:
        """Return a pattern for models trained with dense attention: a window, and the sinks without which they fail.

        A query sees 1.5 * width keys and the sinks on average (2,560 by default), and 2 * width keys and the sinks at
        most. This must not exceed the length that the model was trained on. docs/your-model.md compares other patterns
        of the same cost.
        """
        return cls.window(width, sinks=sinks)

    @classmethod
    def finding(cls, width: int = 1024, chosen: int = 32, **options: Any) -> Pattern:
        """Return a window and chosen blocks: what a pretrained model can find again in all of the past.

        A query sees 1.5 * width + chosen_block * chosen keys on average (2,560 by default) where the text names so many
        blocks, and half a width more at most. This must not exceed the length that the model was trained on. The keys
        of the whole document are kept.
        docs/finding.md says what is found, and what it costs. `options` are those of the blocks, by their names.
        """
        return cls((width,), (1,), look_back=1, chosen=chosen, **options)

    @classmethod
    def dense(cls) -> Pattern:
        """Return dense attention: one segment at rate 1, longer than any sequence. Its cache grows without end."""
        return cls((1 << 40,), (1,))

    @property
    def levels(self) -> tuple[Level, ...]:
        return tuple(map(Level, self.segment_lengths, self.dilation_rates))

    @property
    def look_backs(self) -> tuple[int, ...]:
        """`look_back`, one number per level."""
        return self.look_back  # type: ignore[return-value]

    @property
    def keys_per_query(self) -> float:
        """The mean number of keys of a bidirectional query, far from the ends: sum of w / r^2 (4267) for the paper.

        A causal query has half as many keys, and all of the sinks and chosen blocks.
        """
        return sum(map(self.level_keys, range(len(self.segment_lengths)))) + self.apart_keys

    @property
    def chosen_keys(self) -> int:
        """The number of keys in the chosen blocks of a query."""
        return self.chosen * self.chosen_block

    @property
    def apart_keys(self) -> int:
        """The most keys that a query sees apart from its levels: sinks or chosen blocks."""
        return self.sinks + self.chosen_keys

    @property
    def apart(self) -> str:
        """The kind of these keys, as a text; empty if there are none."""
        return "blocks by name" if self.chosen else "sinks" if self.sinks else ""

    def apart_rows(self, tokens: int) -> int:
        """Return the rows among which these keys are, in `tokens` before a query: the sinks, or all of them."""
        return tokens if self.chosen else self.sinks

    @property
    def moves_keys(self) -> bool:
        """True if some keys are seen at another distance than their own: those of sinks and of chosen blocks."""
        return self.apart_keys > 0

    @property
    def cache_rows(self) -> int:
        """The rows of keys that a decoder must keep for one head: sum of (1 + look_back) ceil(w / r), plus the sinks.

        11,606 for the paper. With `chosen` blocks, a decoder keeps all rows of the document besides.
        """
        return sum(map(self.level_rows, range(len(self.segment_lengths)))) + self.sinks

    def leaves_out(self, level: int) -> bool:
        """Return whether a level leaves out the positions that the previous level covers for the same query."""
        return self.overlap == "once" and level > 0

    def first_key(self, level: int) -> int:
        """Return the position of the first key that a level may show: all but the first level begin after the sinks."""
        return self.sinks if level else 0

    def level_keys(self, level: int) -> float:
        """Return the share of one level in `keys_per_query`."""
        covered = self._covered(level)
        if self.leaves_out(level):
            covered -= self._covered(level - 1)
        rate = self.dilation_rates[level]
        return covered / rate / (rate if self.queries == "dilated" else 1)

    def level_rows(self, level: int) -> int:
        """Return the share of one level in `cache_rows`."""
        w, r = self.levels[level]
        return (1 + self.look_backs[level]) * ceil_div(w, r)

    def offsets(self, level: int, num_heads: int) -> tuple[int, ...]:
        """Return the offset of each head in a level, all below its dilation rate."""
        r = self.dilation_rates[level]
        heads_of_offset = ceil_div(num_heads, r)
        return tuple(
            h % r if self.head_offsets == "modulo" else h // heads_of_offset
            for h in range(num_heads)
        )

    def farthest(self, layers: int) -> int | None:
        """Return a distance in tokens that no link through so many layers exceeds; None if content or sinks choose."""
        if self.moves_keys:
            return None
        if not any(self.look_backs):
            return max(self.segment_lengths)  # shorter segments lie within longer ones
        return layers * max(
            w * (1 + back) for w, back in zip(self.segment_lengths, self.look_backs, strict=True)
        )

    def refusal(self, causal: bool, padding: Padding) -> str | None:
        """Return one line that says why attention cannot have this pattern with these options, or None if it can."""
        if (
            causal
            and self.queries == "all"
            and self.overlap == "repeat"
            and max(self.dilation_rates) > 1
        ):
            return 'queries="all" needs overlap="once" in causal attention'
        if self.chosen and not causal:
            return f"chosen={self.chosen} is for causal attention: later tokens name nothing"
        if padding == "zero_key":
            plain = Pattern(self.segment_lengths, self.dilation_rates, self.head_offsets)
            if self != plain:
                return 'padding="zero_key" goes with no look_back, overlap, queries or sinks but the paper\'s'
        return None

    def _covered(self, level: int) -> int:
        """Return the number of positions that a level covers for a bidirectional query far from the ends."""
        return (1 + 2 * self.look_backs[level]) * self.segment_lengths[level]

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_order(self) -> None:
        """Raise ValueError if, with levels in this order, some part of attention is no rectangle of rows and keys."""
        lengths = self.segment_lengths
        backs = self.look_backs
        changed = [
            f"{name}={getattr(self, name)!r}"
            for name in ("overlap", "queries", "sinks")
            if getattr(self, name) != getattr(Pattern, name)
        ]
        ascending = [*lengths] == sorted(lengths)
        if changed and not (ascending and self.dilation_rates[0] == 1):
            raise ValueError(
                f"{', '.join(changed)} needs levels in ascending segment length, the first at rate 1, "
                f"got {lengths} at {self.dilation_rates}"
            )
        if not 0 <= self.sinks <= lengths[0]:
            raise ValueError(
                f"sinks must be from 0 to the first segment length, {lengths[0]}, got {self.sinks}"
            )
        if self.overlap == "repeat":
            return
        for (inner, b), (outer, c) in pairwise(zip(lengths, backs, strict=True)):
            if outer % inner:
                raise ValueError(
                    f'overlap="once" needs segments that nest, and {inner} does not divide {outer}'
                )
            if c * outer < b * inner:
                raise ValueError(
                    f'overlap="once" needs levels that look back at least as far as the one before: '
                    f"{c} segments of {outer} are less than {b} of {inner}"
                )

    def _check_chosen(self) -> None:
        names = ("chosen", "chosen_block", "chosen_every")
        for name in names:
            self._set(name, *whole_numbers(name, [getattr(self, name)]))
        w = self.segment_lengths[0]
        block = self.chosen_block
        every = self.chosen_every
        if not self.chosen:
            for name in names[1:]:
                if getattr(self, name) != getattr(Pattern, name):
                    raise ValueError(f"{name} is of chosen blocks: give their number, chosen")
            return
        if self.chosen < 0:
            raise ValueError(f"chosen must be 0 or more blocks, got {self.chosen}")
        if self.levels != (Level(w, 1),) or not self.look_backs[0]:
            raise ValueError(
                f"chosen={self.chosen} needs a window: one level at rate 1 that looks back, got "
                f"{self.segment_lengths} at {self.dilation_rates} with look_back {self.look_backs}"
            )
        if self.sinks:
            raise ValueError(
                f"chosen={self.chosen} excludes sinks: the first block, which is always seen, holds them"
            )
        if block < 1 or w % block:
            raise ValueError(f"chosen_block must divide the segment length {w}, got {block}")
        if every < 1 or block % every:
            raise ValueError(f"chosen_every must divide chosen_block, {block}, got {every}")


def whole_numbers(name: str, numbers: object) -> tuple[int, ...]:
    """Return numbers as whole ones. Raises ValueError, with their `name`, for any that are none."""
    try:
        return tuple(map(operator.index, numbers))  # type: ignore[call-overload]
    except TypeError:
        raise ValueError(f"{name} needs whole numbers, got {numbers!r}") from None
