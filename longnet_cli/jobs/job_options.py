"""The options of jobs, each checked as far as options alone can be wrong: before torch is loaded, and a model read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from longnet_cli.basics.errors import ConfigError

# of a text, and about as many tokens of prose
UNITS = {"sentence": 25, "paragraph": 100, "passage": 150}
POOLS = ("cls", "max", "mean", "sqrt", "weighted", "last", "first")
ONE_STATE = {"cls", "first", "last"}  # poolings that take one state of a sequence
NO_PREFIX = "none"
EmbeddingDtype = Literal["float32", "float16"]


def _refuse_below_one(**sizes: object) -> None:
    """Raise ConfigError for a size below 1, by its name. What is not a number is not looked at."""
    for name, size in sizes.items():
        if isinstance(size, int) and size < 1:
            raise ConfigError(f"{name} must be 1 or more, not {size}")


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """The common part of the options of `score` and `encode`: which documents have a row."""

    def fewest_tokens(self, first_target: int) -> int:
        """Return the fewest tokens of a document that has a row; `first_target` is the first that can be scored.

        `RowJob.admit` counts a document with fewer. At the end, the command says how many there were:
        `3 documents too short, and left out`, or `3 documents empty`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class EncodeOptions(RowOptions):
    """The options of `encode`: of the command, of the function and of `encode_batches`.

    None takes the model's own pooling, prompt, scaling and windows.

    `pool` takes the mean of the hidden states of a document's tokens, the hidden state of the last or first token, the
    hidden state of the CLS that a slide encoder puts before them, or another of `POOLS`, or several, joined by
    `+`. The text `prefix` is read before each document, and pooled with its first span; NO_PREFIX is an empty one.
    `normalize` scales a vector to length 1, after the first `dims` numbers of it are kept. With `span`, a document has
    a row for every `span` tokens, or for each of the `UNITS` of its text. `tile_size` is the
    side of a tile in the pixels of its coordinates. It overrides the document's and model's values.

    An embedding model reads windows of `context` rows or fewer, and one begins every `stride` tokens of the document
    (None: no overlap). Without `context`, the model reads a document in one piece. Where the pooling takes one state of
    a window, the document's vector is the mean of those of its windows, by tokens, and each of its spans is a window.
    """

    pool: str | None = None
    prefix: str | None = None
    dims: int | None = None
    span: int | str | None = None
    context: int | None = None
    stride: int | None = None
    normalize: bool | None = None
    tile_size: int | None = None
    embedding_dtype: EmbeddingDtype = "float32"

    def __post_init__(self) -> None:
        _refuse_below_one(span=self.span, stride=self.stride)
        if isinstance(self.span, str) and self.span not in UNITS:
            raise ConfigError(
                f"span must be a size, or one of {', '.join(UNITS)}, not {self.span!r}"
            )
        for pool in self.pools:
            if pool not in POOLS:
                raise ConfigError(
                    f"there is no pooling {pool!r}: choose from {', '.join(POOLS)}, joined by +"
                )

    def fewest_tokens(self, first_target: int) -> int:
        """Return 1: an empty document has no vector."""
        return 1

    def completed(self, **own: Any) -> EncodeOptions:
        """Return the options with a model's own where none is given."""
        missing = {name: value for name, value in own.items() if getattr(self, name) is None}
        return replace(self, **missing)

    @property
    def text_before(self) -> str:
        """The text that `prefix` puts before each document."""
        return "" if self.prefix in (None, NO_PREFIX) else self.prefix

    @property
    def pools(self) -> list[str]:
        """The names in `pool`."""
        return [] if self.pool is None else self.pool.split("+")

    @property
    def span_tokens(self) -> int | None:
        """The tokens of a span, about as many for a unit of a text."""
        return UNITS[self.span] if isinstance(self.span, str) else self.span


@dataclass(frozen=True)
class ScoreOptions(RowOptions):
    """The options of `score`: of the command, of the function and of `score_batches`.

    Without `context`, a document is one causal pass. With it, a token sees at most `context` tokens before it: the
    document is cut into disjoint windows of that many targets. Each window starts again at position 0, and its first
    input is the token before its first target. At several contexts, the same tokens are scored, and the rows have
    columns for the gain of the longest context over the shortest. For it, 4 bytes per token of a document are kept, in
    a file in $TMPDIR if they are many.

    With a `stride`, windows overlap. Each has `context` targets, of which only the last `stride` count, so a counted
    token has seen more than `context - stride` tokens before it, if its document has them. With `last`, only this many
    tokens at the end of each document are scored, also from windows as long as the context. Documents too short for
    that are left out.
    """

    context: tuple[int, ...] | None = None
    stride: int | None = None
    last: int | None = None

    @property
    def contexts(self) -> Sequence[int | None]:
        """The contexts; None is the whole document."""
        return self.context or (None,)

    def fewest_tokens(self, first_target: int) -> int:
        """Return the fewest tokens with which each of the `last` tokens has a full window at every context."""
        if self.last is None:
            return 0
        longest = max(self.context or (0,))
        last_step = min(self.stride or longest, self.last)
        return first_target + longest + self.last - last_step

    def __post_init__(self) -> None:
        shortest = min(self.context or (1,))
        _refuse_below_one(context=shortest, stride=self.stride, last=self.last)
        if len(set(self.contexts)) < len(self.contexts):
            raise ConfigError(
                f"each context may be given once: {', '.join(map(str, self.contexts))}"
            )
        if self.stride:
            if not self.context:
                raise ConfigError(f"a stride of {self.stride} tokens needs a context")
            if shortest < self.stride:
                raise ConfigError(
                    f"a stride of {self.stride} tokens needs a context of {self.stride} or more, not {shortest}"
                )


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise ConfigError for numbers with which `generate` cannot draw tokens."""
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be more than 0 and at most 1, not {top_p}")
