"""The `pattern` job: a description and a drawing of a pattern, to read before you train with it. Loads no torch.

PatternCosts come from the operator's own plan. The keys that a query sees are computed from the definition, position by
position:

    level i covers the keys [lo_i, hi_i) of a query; a head sees the covered keys that the level keeps for it

A drawing, in characters or as a picture, has the keys that each query sees, one colour per level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longnet_cli.attention import Pattern
from longnet_cli.attention.branches import level_flops
from longnet_cli.attention.groups import comparisons
from longnet_cli.attention.notation import format_levels, format_pattern, is_pattern, parse_pattern
from longnet_cli.basics.errors import ConfigError
from longnet_cli.basics.sizes import format_size
from longnet_cli.hub.model_names import list_models, preset_dir
from longnet_cli.jobs.plotting import new_figure, save_figure
from longnet_cli.jobs.plotting.drawing import colored
from longnet_cli.models.folder import ModelFolder

if TYPE_CHECKING:
    from longnet_cli.nets.config import NetConfig

NEAREST = 64  # tokens up to and including a query
LONGEST_REACH = 1 << 16  # tokens of the longest sequence whose links are followed
_CELLS = 1 << 21  # queries x keys, when links are followed
_QUERIES = 1 << 11  # queries whose nearest tokens are counted
LONGEST = 1 << 60  # tokens
MOST_PARTS = 1 << 16
NOTHING = -1  # a cell of a picture that no level shows


@dataclass(frozen=True)
class LevelCosts:
    """The costs of a level: `flops` of one layer's forward pass over the sequence, `cache_rows` of one head."""

    segment_length: int
    dilation_rate: int
    look_back: int
    keys_per_query: float
    flops: int
    flops_share: float
    cache_rows: int | None


@dataclass(frozen=True)
class PatternCosts:
    """The average keys per query, far from the ends; FLOPs of one layer's forward pass; cache rows of one head."""

    keys_per_query: float
    flops: int
    cache_rows: int | None


@dataclass(frozen=True)
class Description:
    """A description of a pattern for sequences of `seq` tokens.

    `cache_rows` is None for bidirectional attention, which keeps no cache. `nearest_least` and `nearest_mean` count
    the tokens that a head sees among the 64 up to and including a query: at least, and on average. `reach` maps a
    number of layers to the share of tokens that are linked to a query through any heads within that many layers. The
    share is of the tokens up to and including the query (bidirectional: of all tokens), and leaves out queries in the
    first quarter. `reach` is None for sequences of more than 64Ki tokens, and for chosen blocks, which any content may
    link. With them, `compared` counts the mean keys that each voter is compared with at the end of the sequence, and
    `read_bytes` the bytes, in float32, that a query there reads of them and of blocks, per layer and key head. A group
    of queries reads them once.
    """

    name: str
    pattern: str
    levels: list[LevelCosts]
    sinks: PatternCosts
    chosen: PatternCosts
    compared: int
    read_bytes: int
    total: PatternCosts
    dense: PatternCosts
    seq: int
    heads: int
    head_dim: int
    causal: bool
    nearest_least: int
    nearest_mean: float
    reach: dict[int, float] | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """A pattern to describe, with the shape of its recipe or model if it has one."""

    name: str
    pattern: Pattern
    heads: int = 12
    head_dim: int = 64
    layers: int | None = None
    causal: bool | None = None


def find_subject(text: str) -> Subject:
    """Return the pattern that `text` spells out, or the pattern of the recipe or the model that it names.

    Raises ConfigError of one line, CheckpointError for a model that cannot be read.
    """
    if is_pattern(text):
        try:
            return Subject(text, parse_pattern(text))
        except ValueError as error:
            raise ConfigError(f"{text}: {error}") from None
    recipes = {path.stem for path in preset_dir().glob("*.toml")}
    path = "/" in text or text.endswith((".toml", ".json"))
    if not path and text not in {*recipes, *list_models()}:
        try:
            parse_pattern(text)
        except ValueError as error:
            shipped = ", ".join(sorted({*recipes, *list_models()}))
            raise ConfigError(f"{error}; or name a recipe or a model; these are shipped: {shipped}") from None
    if text.endswith((".toml", ".json")) or (not path and text not in list_models()):
        from longnet_cli.jobs.training.recipe import load_recipe  # any tokenizer: a pattern has no vocabulary

        return _of_config(text, load_recipe(text, {"data.tokenizer": "bytes"}).model)
    folder = ModelFolder.find(text)
    if not folder.of_transformers:
        return _of_config(text, folder.net_config())
    data = folder.config
    try:
        heads = int(data["num_attention_heads"])
        pattern, size = Pattern(**data["dilated_attention"]), int(data.get("head_dim") or data["hidden_size"] // heads)
        return Subject(text, pattern, heads, size, int(data["num_hidden_layers"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder.path}/config.json: no pattern (dilated_attention) that can be read: {error}"
        ) from None


def _of_config(name: str, config: NetConfig) -> Subject:
    return Subject(name, config.pattern, config.num_heads, config.head_dim, config.num_layers, config.causal)


def describe(
    pattern: Pattern,
    *,
    name: str | None = None,
    seq: int | None = None,
    heads: int = 12,
    head_dim: int = 64,
    layers: Sequence[int] = (1, 2, 4),
    causal: bool = True,
) -> Description:
    """Describe a pattern; `seq` None is `default_length`. Raises ConfigError for one that cannot be used this way."""
    if refusal := pattern.refusal(causal, "exact"):
        raise ConfigError(f"{name or format_pattern(pattern)}: {refusal}")
    seq = seq or default_length(pattern)
    _refuse_the_boundless(pattern, seq)
    half = 2 if causal else 1
    name, written = name or format_pattern(pattern), format_levels(pattern)
    if pattern == Pattern.dense():
        pattern = Pattern((seq,), (1,))  # the part of its one segment that the sequence fills
    *flops, of_others = level_flops(pattern, heads, head_dim, seq, causal)
    total = sum(flops) + of_others
    levels = [
        LevelCosts(
            segment_length=w,
            dilation_rate=r,
            look_back=pattern.look_backs[level],
            keys_per_query=pattern.level_keys(level) / half,
            flops=flops[level],
            flops_share=flops[level] / total if total else 0.0,
            cache_rows=pattern.level_rows(level) if causal else None,
        )
        for level, (w, r) in enumerate(pattern.levels)
    ]
    keys = sum(level.keys_per_query for level in levels) + pattern.sinks + pattern.chosen_keys
    kept = seq if pattern.chosen else 0
    dense = sum(level_flops(Pattern((seq,), (1,)), heads, head_dim, seq, causal))
    compared = _compared(pattern, seq) if pattern.chosen else 0
    least, mean = _nearest(pattern, seq, heads, causal)
    return Description(
        name=name,
        pattern=written,
        levels=levels,
        sinks=PatternCosts(pattern.sinks, 0 if pattern.chosen else of_others, pattern.sinks if causal else None),
        chosen=PatternCosts(pattern.chosen_keys, of_others if pattern.chosen else 0, kept if causal else None),
        compared=compared,
        read_bytes=4 * head_dim * (compared + 2 * pattern.chosen_keys) // pattern.chosen_every if compared else 0,
        total=PatternCosts(keys, total, pattern.cache_rows + kept if causal else None),
        dense=PatternCosts(seq / half, dense, seq if causal else None),
        seq=seq,
        heads=heads,
        head_dim=head_dim,
        causal=causal,
        nearest_least=least,
        nearest_mean=mean,
        reach=reach(pattern, seq, heads, causal, layers) if seq <= LONGEST_REACH and not pattern.chosen else None,
    )


def _compared(pattern: Pattern, seq: int) -> int:
    """Return how many mean keys the last group of a sequence compares, with its share of a scan."""
    (w,), (back,) = pattern.segment_lengths, pattern.look_backs
    scan, group = comparisons(pattern, ((seq - 1) // w - back) * w)
    return scan * pattern.chosen_every // pattern.scan_every + group


def _refuse_the_boundless(pattern: Pattern, seq: int) -> None:
    """Raise ConfigError for positions past 2^60, near the end of int64, and for a plan with too many parts."""
    parts, inner = 0, pattern.segment_lengths[0]
    for (w, r), back in zip(pattern.levels, pattern.look_backs, strict=True):
        if max(seq, (back + 2) * w, r) > LONGEST:
            raise ConfigError(f"{format_pattern(pattern)}, {seq} tokens: nothing is described beyond 2^60 tokens")
        parts += (w // inner if pattern.overlap == "once" else 1) * (1 + back)
        inner = w
    if parts > MOST_PARTS:
        raise ConfigError(
            f"{format_pattern(pattern)}: its segments see each other in {parts} parts, too many to describe"
        )


def default_length(pattern: Pattern) -> int:
    """Return the length of a sequence that shows a pattern: its longest segment, at least 32Ki tokens."""
    return 1 << 15 if pattern == Pattern.dense() else max(1 << 15, *pattern.segment_lengths)


def keys_seen(pattern: Pattern, level: int, queries: np.ndarray, seq: int, causal: bool) -> list[tuple[Any, Any]]:
    """Return the intervals [low, high) of keys, one or two, that a level adds for queries at these positions."""
    w, b = pattern.segment_lengths[level], pattern.look_backs[level]
    first = pattern.sinks if level else 0
    low = np.maximum((queries // w - b) * w, first)
    high = queries + 1 if causal else np.minimum((queries // w + b + 1) * w, seq)
    if level and pattern.overlap == "once":
        u, near = pattern.segment_lengths[level - 1], pattern.look_backs[level - 1]
        before = (low, np.maximum(low, (queries // u - near) * u))
        after = np.minimum(high, (queries // u + near + 1) * u)
        return [before] if causal else [before, (np.maximum(after, first), high)]
    return [(low, high)]


def _sees_sinks(pattern: Pattern, queries: np.ndarray) -> np.ndarray:
    """Return a mask of the queries that see the sinks separately, because their first level covers none."""
    return (queries // pattern.segment_lengths[0] > pattern.look_backs[0]) & (pattern.sinks > 0)


def keys_of_heads(
    pattern: Pattern, queries: np.ndarray, keys: np.ndarray, seq: int, causal: bool, heads: int, chosen: Sequence[int]
) -> np.ndarray:
    """Return a mask (chosen, queries, keys) of the keys that each of the `chosen` heads sees.

    `queries` (queries,) and `keys` (queries, keys) are positions.
    """
    q = queries[:, None]
    seen = np.zeros((len(chosen), *keys.shape), bool)
    for level, (w, r) in enumerate(pattern.levels):
        row, place = q % w % r, keys % w % r
        covered = np.zeros(keys.shape, bool)
        for low, high in keys_seen(pattern, level, q, seq, causal):
            covered |= (keys >= low) & (keys < high)
        offsets = pattern.offsets(level, heads)
        for mine, head in zip(seen, chosen, strict=True):
            asks = (pattern.queries == "all") | (row == offsets[head])
            mine |= asks & covered & (place == offsets[head])
    return seen | (_sees_sinks(pattern, q) & (keys >= 0) & (keys < pattern.sinks))


def _nearest(pattern: Pattern, seq: int, heads: int, causal: bool) -> tuple[int, float]:
    """Return the least and the mean number of the NEAREST tokens that a head's query sees.

    In a long sequence, the queries are a sample. The least number also covers the queries at the start of the last
    segments of each level.
    """
    start = min(NEAREST - 1, seq - 1)
    drawn = _sample(start, seq, _QUERIES)
    begins = [(seq - 1) // w * w - np.arange(4) * w for w in {*pattern.segment_lengths}]
    others = np.unique(np.concatenate(begins)[:, None] + np.arange(NEAREST))
    queries = np.concatenate([drawn, others[(others >= start) & (others < seq)]])
    keys = queries[:, None] - np.arange(min(NEAREST, seq))
    alike: dict[tuple[int, ...], list[int]] = {}  # heads that keep the same rows see the same keys
    for head, offsets in enumerate(zip(*(pattern.offsets(i, heads) for i in range(len(pattern.levels))), strict=True)):
        alike.setdefault(offsets, []).append(head)
    first, times = [group[0] for group in alike.values()], [len(group) for group in alike.values()]
    counts = np.concatenate(
        [
            keys_of_heads(pattern, queries, keys, seq, causal, heads, first[i : i + 16]).sum(2)
            for i in range(0, len(first), 16)
        ]
    )
    return int(counts.min()), float(np.average(counts[:, : len(drawn)].mean(1), weights=times))


def _sample(start: int, stop: int, number: int) -> np.ndarray:
    """Return at most `number` positions in [start, stop), one from each of `number` equal parts, with a fixed seed."""
    if stop - start <= number:
        return np.arange(start, stop)
    edges = start + (np.arange(number + 1, dtype=np.float64) * ((stop - start) / number)).astype(np.int64)
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])


def farthest(pattern: Pattern, num_layers: int) -> int | None:
    """Return a distance in tokens that no link through so many layers exceeds; None where content or sinks choose."""
    if pattern.chosen or pattern.sinks:
        return None
    if not any(pattern.look_backs):
        return max(pattern.segment_lengths)  # shorter segments lie within longer ones
    levels = zip(pattern.segment_lengths, pattern.look_backs, strict=True)
    return num_layers * max(w * (1 + back) for w, back in levels)


def reach(pattern: Pattern, seq: int, heads: int, causal: bool, layers: Sequence[int]) -> dict[int, float]:
    """Return, for each number of layers, the share of tokens that are linked to a query.

    The share is of the tokens up to and including the query; for bidirectional attention, of all tokens. In a long
    sequence, the queries are a sample.
    """
    queries = _sample(seq // 4, seq, max(16, _CELLS // seq))
    reached = np.zeros((seq, len(queries)), bool)
    reached[queries, np.arange(len(queries))] = True
    past = float((queries + 1).sum()) if causal else float(seq * len(queries))
    steps = list(_links(pattern, seq, heads, causal))
    shares: dict[int, float] = {}
    share = 0.0
    for layer in range(1, max(layers) + 1):
        if share < 1.0:
            reached = _one_layer(pattern, reached, steps)
            before, share = share, float(reached.sum()) / past
            if share == before:  # no new links, so none in later layers
                shares |= {number: share for number in layers if number >= layer}
                break
        if layer in layers:
            shares[layer] = share
    return shares


@dataclass(frozen=True)
class _Link:
    """Links to keys: of the queries `asking`, number first[i] to number last[i] - 1 see the key at keys[i]."""

    asking: np.ndarray | slice
    keys: np.ndarray
    first: np.ndarray
    last: np.ndarray


def _links(pattern: Pattern, seq: int, heads: int, causal: bool) -> Iterator[_Link]:
    """Yield the links of each level, for each offset that a head has.

    A query sees an interval of keys. Both its ends grow with the query, so the queries that see a key are neighbours in
    `asking`.
    """
    positions = np.arange(seq)
    for level, (w, r) in enumerate(pattern.levels):
        for offset in {*pattern.offsets(level, heads)}:
            kept = np.flatnonzero(positions % w % r == offset)
            asking = positions if pattern.queries == "all" else kept
            for low, high in keys_seen(pattern, level, asking, seq, causal):
                low = np.minimum(low, seq)
                first = np.searchsorted(np.maximum(high, low), kept, "right")
                last = np.searchsorted(low, kept, "right")
                yield _Link(slice(None) if pattern.queries == "all" else asking, kept, first, last)


def _one_layer(pattern: Pattern, reached: np.ndarray, steps: Sequence[_Link]) -> np.ndarray:
    linked = reached.copy()
    counted: dict[int, np.ndarray] = {}
    for link in steps:
        key = -1 if isinstance(link.asking, slice) else id(link.asking)
        if key not in counted:
            sums = np.zeros((len(reached[link.asking]) + 1, reached.shape[1]), np.uint16)
            np.cumsum(reached[link.asking], 0, out=sums[1:])  # 64Ki wraps to 0, but then all tokens are reached
            counted = {key: sums}
        sums = counted[key]
        linked[link.keys] |= sums[link.last] != sums[link.first]
    if pattern.sinks:
        linked[: pattern.sinks] |= reached[_sees_sinks(pattern, np.arange(len(reached)))].any(0)
    return linked


def picture(pattern: Pattern, seq: int, size: int, heads: int, causal: bool = True) -> np.ndarray:
    """Return a picture of the level by which each query sees each key: rows are queries, columns are keys.

    The picture is (n, n) with n at most `size`. A cell stands for neighbouring queries and neighbouring keys. It holds
    the first level by which some head of one of the queries sees one of the keys. If only sinks are seen, it holds the
    number of levels, and also if the key may be chosen; if nothing is seen, NOTHING.
    """
    size = min(size, seq)
    edges = np.array([seq * i // size for i in range(size + 1)])
    low, high = edges[:-1], edges[1:]
    drawn = np.full((size, size), NOTHING)
    for level, (w, r) in enumerate(pattern.levels):
        offsets = {*pattern.offsets(level, heads)}
        if int((high - low).min()) >= 2 * r:  # every cell has rows of every offset
            offsets = {0}
        for offset in offsets:
            asking = low if pattern.queries == "all" else _next_kept(low, w, r, offset)
            for begin, end in keys_seen(pattern, level, asking[:, None], seq, causal):
                if causal and (level == 0 or pattern.overlap == "repeat"):
                    end = np.maximum(end, np.where(asking < high, high, 0)[:, None])  # the cell's last query
                key = _next_kept(np.maximum(low[None], begin), w, r, offset)
                seen = (asking < high)[:, None] & (key < np.minimum(high[None], end))
                drawn[seen & (drawn == NOTHING)] = level
    if pattern.sinks or pattern.chosen:
        first = low[:, None] if pattern.chosen else pattern.sinks
        seen = (_sees_sinks(pattern, low) | (pattern.chosen > 0))[:, None] & (low[None] < first)
        drawn[seen & (drawn == NOTHING)] = len(pattern.levels)
    return drawn


def _next_kept(positions: np.ndarray, w: int, r: int, offset: int) -> np.ndarray:
    """Return, for each position, the first position at or after it that a level keeps for a head."""
    inside = positions % w
    start = positions - inside
    rows = np.maximum(0, -((offset - inside) // r))
    kept = start + offset + rows * r
    return np.where(kept < start + w, kept, start + w + offset)


_SIZE = 480  # rows and columns of a picture


def draw_text(
    subject: Subject, seq: int, *, causal: bool, size: int = 32, color: bool = False, blocks: bool = True
) -> str:
    """Return the keys that queries see as text: `size` queries down, keys across, each cell with its first level.

    With `color` and `blocks`, half blocks show two queries per line. Otherwise each level is a digit or a letter, and
    sinks are s.
    """
    cells = picture(subject.pattern, seq, size, subject.heads, causal).tolist()
    levels = len(subject.pattern.levels)
    if not (color and blocks):
        return "\n".join("".join(_letter(cell, levels) for cell in row).rstrip() for row in cells)
    return "\n".join(
        _half_blocks(*pair) for pair in zip_longest(cells[::2], cells[1::2], fillvalue=[NOTHING] * len(cells))
    )


def legend(subject: Subject, *, color: bool = False, blocks: bool = True) -> str:
    """Return a line that explains the marks of `draw_text`."""
    names = [f"level {i}" for i in range(len(subject.pattern.levels))]
    names += ["sinks"] * (subject.pattern.sinks > 0) + ["some, chosen"] * (subject.pattern.chosen > 0)
    levels = len(subject.pattern.levels)
    if color and blocks:
        return "  ".join(colored(i, "\u2588") + f" {name}" for i, name in enumerate(names))
    return "  ".join(f"{_letter(i, levels)} {name}" for i, name in enumerate(names))


def _letter(cell: int, levels: int) -> str:
    if cell == NOTHING:
        return " "
    if cell == levels:
        return "s"
    return "0123456789abcdefghijklmnopqrtuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"[min(cell, 60)]


def _half_blocks(above: Sequence[int], below: Sequence[int]) -> str:
    def cells() -> Iterator[str]:
        for top, bottom in zip(above, below, strict=True):
            if top == NOTHING and bottom == NOTHING:
                yield " "
            elif top == NOTHING:
                yield colored(bottom, "\u2584")
            else:
                yield colored(top, "\u2580", None if bottom == NOTHING else bottom)

    return "".join(cells()).rstrip()


def draw_picture(subjects: Sequence[Subject], seq: int, output: str | Path, *, causal: bool | None = None) -> None:
    """Write a picture with one panel per pattern, atomically.

    Raises what `plotting.new_figure` raises.
    """
    figure = new_figure(output, 4.2 * len(subjects), 4.6)
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, to_hex
    from matplotlib.patches import Patch

    for axes, subject in zip(figure.subplots(1, len(subjects), squeeze=False)[0], subjects, strict=True):
        looks_back = subject.causal is not False if causal is None else causal
        cells = picture(subject.pattern, seq, _SIZE, subject.heads, looks_back)
        levels = len(subject.pattern.levels)
        tones = [to_hex(colormaps["viridis"](i / max(1, levels))) for i in range(levels)]
        colors = ["white", *tones, "crimson"]
        extent = (0, seq, seq, 0)
        axes.imshow(cells, cmap=ListedColormap(colors), vmin=-1, vmax=levels, interpolation="nearest", extent=extent)
        rows = np.flatnonzero((cells == levels).any(1))
        if subject.pattern.sinks and len(rows):  # a few tokens wide: invisible as cells
            axes.vlines(0, rows[0] * seq / len(cells), seq, color="crimson", linewidth=5)
        axes.set_title(subject.name, fontsize=9)
        axes.set_xlabel("key")
        axes.set_ylabel("query")
        ticks = [seq * i // 4 for i in range(5)]
        names = [format_size(tick) if tick else "0" for tick in ticks]
        axes.set_xticks(ticks, names)
        axes.set_yticks(ticks, names)
        marks = [(f"{format_size(w)}, rate {r}", colors[i + 1]) for i, (w, r) in enumerate(subject.pattern.levels)]
        marks += [("sinks", "crimson")] if subject.pattern.sinks else []
        marks += [("some, chosen", "crimson")] if subject.pattern.chosen else []
        axes.legend(handles=[Patch(color=c, label=n) for n, c in marks], fontsize=7, loc="upper right", frameon=False)
    save_figure(figure, output, dpi=120)
