"""The windows in which `score` reads a document, for one or several contexts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longnet_cli.data.documents import Document
from longnet_cli.errors import ConfigError
from longnet_cli.model.net import Net
from longnet_cli.model.sequence import Bos, InputSequence, bos_ids
from longnet_cli.sizes import format_size


@dataclass(frozen=True)
class Cut:
    """The cut of documents into windows. The ids of `bos` come before each document."""

    bos: tuple[int, ...]
    contexts: Sequence[int | None]
    stride: int | None
    last: int | None

    @classmethod
    def of(cls, model: Net, bos: Bos, context: int | Sequence[int] | None, stride: int | None, last: int | None) -> Cut:
        """Return the cut that `score` makes. Raises ConfigError as `score` does for the model and these options."""
        if not model.config.causal:
            raise ConfigError("a bidirectional model sees the tokens it would have to predict: it cannot score")
        if not model.config.vocab_size:
            raise ConfigError("this model has no vocabulary (vocab_size 0): it cannot score tokens")
        contexts: Sequence[int | None] = [context] if context is None or isinstance(context, int) else list(context)
        given = [*(("context", each) for each in contexts), ("stride", stride), ("last", last)]
        for name, value in given:
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, not {value}")
        if not contexts or len(set(contexts)) < len(contexts):
            raise ConfigError(f"each context may be given once: {', '.join(map(str, contexts))}")
        if stride and (small := [each for each in contexts if each is None or each < stride]):
            raise ConfigError(
                f"a stride of {stride} tokens needs a context"
                + (f" of {stride} or more, not {small[0]}" if small[0] else "")
            )
        return cls(bos_ids(bos), contexts, stride, last)

    @property
    def first(self) -> int:
        """The first target of a document: token 0, or token 1 if nothing precedes the document."""
        return 0 if self.bos else 1

    def sequence(self, model: Net, document: Document) -> InputSequence[Document]:
        """Return a document as the model reads it. Raises TooLongError for a window that is too long for the model."""
        sequence = model.sequence(document, self.bos)
        more = max(0, sequence.first - 1)  # ids before the one that predicts the first target
        fits = max(1, (sequence.limit or 0) - more)
        instead = f"score it in windows (--context {format_size(fits)} --stride {format_size(-(-fits // 2))})"
        return sequence.check(instead, self.longest(len(document)) + more)

    @property
    def nothing(self) -> str:
        """The error text for documents without a token to score."""
        if self.last:
            return f"no token could be scored: no document has {self.least} tokens or more"
        if self.bos:
            return "no token could be scored: every document is empty or left out"
        return "no token could be scored: no document has two tokens, and no end-of-text id can precede the first"

    def inputs(self, tokens: int, context: int | None) -> Iterator[tuple[int, int, int]]:
        """Yield (start, stop, wanted) for each window: it reads [start, stop), and targets count from `wanted` on."""
        before = len(self.bos) - 1  # from a target to its input
        for start, stop, counted in self.windows(tokens, context):
            yield start + before if start > self.first else 0, stop + before, counted + before

    def windows(self, tokens: int, context: int | None) -> Iterator[tuple[int, int, int]]:
        """Yield (start, stop, counted) for each window: at most `context` targets, which count from `counted` on.

        The counted targets of all windows make up the document, or its `last` tokens.
        """
        size = context or max(1, tokens - self.first)
        step = self.stride or size
        look_back = self.stride is not None or self.last is not None
        for counted in range(tokens - self.last if self.last else self.first, tokens, step):
            stop = min(counted + step, tokens)
            yield max(self.first, stop - size) if look_back else counted, stop, counted

    def longest(self, tokens: int) -> int:
        """Return the number of targets in the longest window of a document of `tokens` tokens, 0 if it is left out."""
        if self.last and tokens < self.least:
            return 0
        return max(0, min(tokens - self.first, max(each or tokens for each in self.contexts)))

    @property
    def least(self) -> int:
        """The fewest tokens of a document whose `last` tokens all get windows as long as every context."""
        last = self.last or 0
        return self.first + max(
            last if size is None else size + last - min(self.stride or size, last) for size in self.contexts
        )
