"""The `pattern` job: a description and a drawing of a pattern, to read before you train with it. Loads no torch.

PatternCosts come from the operator's own plan. The keys that a query sees are computed from the definition, position by
position, for a drawing in characters, with one sign per level:

    level i covers the keys [lo_i, hi_i) of a query; a head sees the covered keys that the level keeps for it
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from longnet_cli.attention import Pattern
from longnet_cli.attention.branches import level_flops
from longnet_cli.attention.notation import (
    format_levels,
    format_pattern,
    from_fields,
    is_pattern,
    parse_pattern,
)
from longnet_cli.basics.errors import ConfigError
from longnet_cli.hub.model_names import list_models, preset_dir
from longnet_cli.models.folder import ModelFolder

if TYPE_CHECKING:
    from longnet_cli.nets.config import NetConfig

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

    `cache_rows` is None for bidirectional attention, which keeps no cache.
    """

    name: str
    pattern: str
    levels: list[LevelCosts]
    apart: PatternCosts
    total: PatternCosts
    dense: PatternCosts
    seq: int
    heads: int
    head_dim: int
    causal: bool


@dataclass(frozen=True)
class Subject:
    """A pattern to describe, with the shape of its recipe or model if it has one, and how it is used."""

    name: str
    pattern: Pattern
    heads: int = 12
    head_dim: int = 64
    causal: bool = True


def find_subject(text: str) -> Subject:
    """Return the pattern that `text` spells out, or the pattern of the recipe or the model that it names.

    Raises ConfigError of one line, CheckpointError for a model that cannot be read.
    """
    models = {*list_models()}
    recipes = {path.stem for path in preset_dir().glob("*.toml")} - models
    is_recipe = text in recipes or text.endswith((".toml", ".json"))
    is_spelt = is_pattern(text)
    if is_spelt or not (is_recipe or text in models or "/" in text):
        try:
            return Subject(text, parse_pattern(text))
        except ValueError as error:
            shipped = ", ".join(sorted(recipes | models))
            advice = f"{error}; or name a recipe or a model; these are shipped: {shipped}"
            raise ConfigError(f"{text}: {error}" if is_spelt else advice) from None
    if is_recipe:
        # any tokenizer: a pattern has no vocabulary
        from longnet_cli.jobs.training.recipe import load_recipe

        return _of_config(text, load_recipe(text, {"data.tokenizer": "bytes"}).model)
    folder = ModelFolder.find(text)
    if not folder.of_transformers:
        return _of_config(text, folder.net_config())
    data = folder.config
    try:
        heads = int(data["num_attention_heads"])
        head_dim = int(data.get("head_dim") or data["hidden_size"] // heads)
        return Subject(text, from_fields(data["dilated_attention"]), heads, head_dim)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder.path}/config.json: no pattern (dilated_attention) that can be read: {error}"
        ) from None


def _of_config(name: str, config: NetConfig) -> Subject:
    return Subject(name, config.pattern, config.num_heads, config.head_dim, config.causal)


def describe(subject: Subject, seq: int) -> Description:
    """Describe a pattern for sequences of `seq` tokens. Raises ConfigError for one that cannot be used this way."""
    pattern = subject.pattern
    causal = subject.causal
    if refusal := pattern.refusal(causal, "exact"):
        raise ConfigError(f"{subject.name}: {refusal}")
    _refuse_the_boundless(pattern, seq)
    half = 2 if causal else 1
    written = format_levels(pattern)
    dense = Pattern((seq,), (1,))
    if pattern == Pattern.dense():
        pattern = dense  # the part of its one segment that the sequence fills
    shape = (subject.heads, subject.head_dim, seq, causal)

    def kept(rows: int) -> int | None:
        """Return the rows that a cache keeps; there is none in bidirectional attention."""
        return rows if causal else None

    *flops, of_others = level_flops(pattern, *shape)
    total = sum(flops) + of_others
    levels = [
        LevelCosts(
            segment_length=w,
            dilation_rate=r,
            look_back=pattern.look_backs[level],
            keys_per_query=pattern.level_keys(level) / half,
            flops=flops[level],
            flops_share=flops[level] / max(total, 1),
            cache_rows=kept(pattern.level_rows(level)),
        )
        for level, (w, r) in enumerate(pattern.levels)
    ]
    keys = sum(level.keys_per_query for level in levels) + pattern.apart_keys
    rows_apart = pattern.apart_rows(seq)
    rows = pattern.cache_rows - pattern.sinks + rows_apart
    return Description(
        subject.name,
        written,
        levels,
        PatternCosts(pattern.apart_keys, of_others, kept(rows_apart)),
        PatternCosts(keys, total, kept(rows)),
        PatternCosts(seq / half, sum(level_flops(dense, *shape)), kept(seq)),
        seq,
        subject.heads,
        subject.head_dim,
        causal,
    )


def _refuse_the_boundless(pattern: Pattern, seq: int) -> None:
    """Raise ConfigError for positions past 2^60, near the end of int64, and for a plan with too many parts."""
    parts = 0
    inner = pattern.segment_lengths[0]
    for (w, r), back in zip(pattern.levels, pattern.look_backs, strict=True):
        if max(seq, (back + 2) * w, r) > LONGEST:
            raise ConfigError(
                f"{format_pattern(pattern)}, {seq} tokens: nothing is described beyond 2^60 tokens"
            )
        parts += (w // inner if pattern.overlap == "once" else 1) * (1 + back)
        inner = w
    if parts > MOST_PARTS:
        raise ConfigError(
            f"{format_pattern(pattern)}: its segments see each other in {parts} parts, too many to describe"
        )


def default_length(pattern: Pattern) -> int:
    """Return the length of a sequence that shows a pattern: its longest segment, at least 32Ki tokens."""
    return 1 << 15 if pattern == Pattern.dense() else max(1 << 15, *pattern.segment_lengths)


def _covered(
    pattern: Pattern,
    level: int,
    queries: np.ndarray,
    seq: int,
    causal: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the interval [low, high) of keys that a level covers for queries at these positions."""
    width = pattern.segment_lengths[level]
    back = pattern.look_backs[level]
    segments = queries // width
    low = np.maximum((segments - back) * width, pattern.sinks if level else 0)
    return low, queries + 1 if causal else np.minimum((segments + back + 1) * width, seq)


def keys_seen(
    pattern: Pattern,
    level: int,
    queries: np.ndarray,
    seq: int,
    causal: bool,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the intervals [low, high) of keys, one or two, that a level adds for queries at these positions."""
    low, high = _covered(pattern, level, queries, seq, causal)
    if not level or pattern.overlap != "once":
        return [(low, high)]
    # the level before covers the middle
    begin, end = _covered(pattern, level - 1, queries, seq, causal)
    return [(low, np.maximum(low, begin)), (np.maximum(low, end), high)]


def picture(
    pattern: Pattern,
    seq: int,
    size: int,
    heads: int,
    causal: bool = True,
) -> np.ndarray:
    """Return a picture of a sequence, (n, n) with n at most `size`: rows are queries, columns are keys.

    Its numbers are those of `cells_between`.
    """
    size = min(size, seq)
    edges = np.array([seq * i // size for i in range(size + 1)])
    return cells_between(edges, edges, pattern, seq, heads, causal)


def cells_between(
    queries: np.ndarray,
    keys: np.ndarray,
    pattern: Pattern,
    seq: int,
    heads: int,
    causal: bool,
) -> np.ndarray:
    """Return the level by which queries see keys, in cells between these (n + 1,) edges of both: (n, n).

    A cell stands for neighbouring queries and neighbouring keys. It holds the first level by which some head of one of
    the queries sees one of the keys. If only sinks are seen, it holds the number of levels, and also if the text may
    name the key; if nothing is seen, NOTHING.
    """
    low, high = queries[:-1], queries[1:]
    drawn = np.full((len(low), len(low)), NOTHING)
    for level, (w, r) in enumerate(pattern.levels):
        offsets = {*pattern.offsets(level, heads)}
        if int((high - low).min()) >= 2 * r:  # every cell has rows of every offset
            offsets = {0}
        for offset in offsets:
            asking = low if pattern.queries == "all" else _next_kept(low, w, r, offset)
            for begin, end in keys_seen(pattern, level, asking[:, None], seq, causal):
                if causal and (level == 0 or pattern.overlap == "repeat"):
                    # the cell's last query
                    end = np.maximum(end, np.where(asking < high, high, 0)[:, None])
                key = _next_kept(np.maximum(keys[None, :-1], begin), w, r, offset)
                sees = (asking < high)[:, None] & (key < np.minimum(keys[None, 1:], end))
                drawn[sees & (drawn == NOTHING)] = level
    if pattern.apart:  # seen by queries whose first level covers none of them
        asks = low[:, None] // pattern.segment_lengths[0] > pattern.look_backs[0]
        among = np.array([pattern.apart_rows(int(position)) for position in low])
        sees = asks & (keys[None, :-1] < among[:, None])
        drawn[sees & (drawn == NOTHING)] = len(pattern.levels)
    return drawn


def _next_kept(positions: np.ndarray, w: int, r: int, offset: int) -> np.ndarray:
    """Return, for each position, the first position at or after it that a level keeps for a head."""
    inside = positions % w
    start = positions - inside
    following = start + offset - (offset - inside) // r * r
    return np.where(following < start + w, following, start + w + offset)


# rows and columns
_TEXT_SIZE = 32
_LEVEL_SIGNS = "0123456789abcdefghijklmnopqrtuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def draw_text(subject: Subject, seq: int) -> Iterator[str]:
    """Yield the keys that queries see as lines: queries down, keys across, each cell with its first level; a legend.

    Each level is a digit or a letter, and sinks are s.
    """
    cells = picture(subject.pattern, seq, _TEXT_SIZE, subject.heads, subject.causal)
    levels = len(subject.pattern.levels)
    signs = [*_LEVEL_SIGNS[:levels].ljust(levels, "Z"), "s", " "]  # the last one is of NOTHING
    for row in np.array(signs)[cells]:
        yield "".join(row).rstrip()
    names = [f"level {level}" for level in range(levels)]
    if subject.pattern.apart:
        names.append(subject.pattern.apart)
    yield "  ".join(f"{sign} {name}" for sign, name in zip(signs, names, strict=False))
