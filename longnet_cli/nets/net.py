"""The interface of nets for jobs: hidden states of a chunk, the loss of tokens, and a few facts.

`LongNet` and `models.hf.pretrained_net.TransformersNet` are such nets. An `InputSequence` is a document as a net
reads it: the rows that come first, then the document's own. It refuses one that is too long.

B batch, N tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longnet_cli.attention import Outside
from longnet_cli.basics.errors import ConfigError, DataError, TooLongError
from longnet_cli.nets.config import NetConfig

# What a model reads before each document: nothing, one id, or several, as in some tokenizers' templates
Bos = int | Sequence[int] | None


def bos_ids(bos: Bos) -> tuple[int, ...]:
    """Return the ids of a `Bos`, in order."""
    return () if bos is None else (bos,) if isinstance(bos, int) else tuple(bos)


class Readable(Protocol):
    """Token ids, or vectors that a net reads in their place. Any slice can be read."""

    # Returns (stop - start,) int64, or (stop - start, n) float32
    def read(self, start: int, stop: int, /) -> np.ndarray: ...


class DocumentLike(Readable, Protocol):
    """A document, as `data.documents.token_documents.Document` and `data.documents.vectors.Vectors` are."""

    where: str
    has_vectors: bool  # in place of token ids

    @property
    def width(self) -> int: ...  # the numbers of a vector
    def __len__(self) -> int: ...


D = TypeVar("D", bound=DocumentLike)


@dataclass(frozen=True, eq=False)
class InputSequence(Generic[D]):
    """The rows that a net reads for a document: `start_rows`, from index `own_start` on the document's own, `end_rows`.

    `limit` is the most rows that the net reads, None for no limit; `alternatives` is as in `Net`. `cells`
    (len(document), 2) float32 are read after each vector of the document. The document's own rows are those of
    [start, stop): all of them, but for a `window`.
    """

    document: D
    start_rows: np.ndarray
    limit: int | None
    alternatives: str
    stop: int
    start: int = 0
    end_rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    cells: np.ndarray | None = None

    @property
    def own_start(self) -> int:
        return len(self.start_rows)

    @property
    def _last(self) -> int:
        """The index of the first one of `end_rows`."""
        return self.own_start + self.stop - self.start

    def __len__(self) -> int:
        return self._last + len(self.end_rows)

    def window(self, start: int, stop: int) -> InputSequence[D]:
        """Return the sequence with the document's own rows [start, stop) alone."""
        if start == self.start and stop == self.stop:
            return self
        return replace(self, start=start, stop=stop)

    def read(self, start: int, stop: int, /) -> np.ndarray:
        """Return the rows [start, stop), (stop - start,) int64 or (stop - start, n) float32."""
        first = self._in_document(start)
        end = self._in_document(stop)
        rows = self.document.read(first, end)
        if self.cells is not None:
            rows = np.concatenate((rows, self.cells[first:end]), 1)
        before = self.start_rows[start:stop]
        after = self.end_rows[max(0, start - self._last) : max(0, stop - self._last)]
        if len(before) == len(after) == 0:
            return rows
        return np.concatenate((before, rows, after))

    def _in_document(self, row: int) -> int:
        """Return the index in the document of a row: `start` for rows before its own, `stop` for rows after them."""
        return self.start + min(max(self.own_start, row), self._last) - self.own_start

    def check(
        self,
        instead: str,
        tokens: int | None = None,
        *,
        skips: bool = True,
    ) -> InputSequence[D]:
        """Return this sequence. Raises TooLongError if the net cannot read it, or `tokens` of its rows at once.

        `instead` says what to do then; with `skips`, the message mentions --skip-bad as well.
        """
        tokens = len(self) if tokens is None else tokens
        if self.limit is not None and tokens > self.limit:
            has = f"has {self.limit} positions"
            if self.alternatives:
                has = f"was trained on {self.limit}"
                instead += f", or give {self.alternatives}"
            if skips:
                instead += "; --skip-bad leaves such documents out"
            raise TooLongError(
                f"{self.document.where}: {tokens} tokens, and the model {has}", instead
            )
        return self


# Called once per layer with (layer index, q, k, v): this shard's queries and keys, rotated, and values, (B, N, H, D)
# each, in the autograd graph. Returns what the shard attends to in that layer besides its own keys. It may keep
# k and v for later shards.
FarProvider = Callable[[int, Tensor, Tensor, Tensor], Outside]


def positions_of(documents: Sequence[int], start: int, device: torch.device) -> Tensor:
    """Return the int64 positions of the tokens of documents that follow each other, the first from `start` on."""
    positions = torch.cat([torch.arange(size, device=device) for size in documents])
    positions[: documents[0]] += start
    return positions


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which matrix products take x: that of autocast if it is on, otherwise its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


LOGITS_LIMIT = 1 << 26  # elements of logits that `nll` holds at a time: 256 MiB in float32
IGNORED = -100  # a target without loss


class Net(nn.Module):
    """A net: `net(tokens, start=..., lengths=..., far=...)` returns hidden states like LongNet. `nll` uses `logits`."""

    config: NetConfig
    note: str = ""  # one line for users about how the net reads documents
    alternatives: str = ""  # options for users with too long a sequence, besides shorter ones
    dilated: bool = True  # whether its attention is ours
    has_cls: bool = False  # whether an extra row, CLS, comes before each sequence
    has_grid: bool = False  # whether the vectors that it reads lie in a grid
    digest: str | None = None  # of configuration and weights, where both stay as they are
    row_size: int | None = None  # the size of the vectors that the net reads in place of token ids
    # whether jobs can run its layers one by one, and see the states between them
    layer_by_layer: bool = False

    def start_rows(self, bos: Bos) -> np.ndarray:
        """Return the rows that the net reads before each document: the ids of `bos`, (n,) int64, if it is causal."""
        return np.array(bos_ids(bos) if self.config.causal else (), np.int64)

    def sequence(
        self,
        document: D,
        bos: Bos = None,
        tile_size: float | None = None,
        closing: Sequence[int] | None = None,
    ) -> InputSequence[D]:
        """Return a document as the net reads it, after `start_rows(bos)`; `tile_size` is for a net with a grid.

        With `closing`, any net reads it between the ids `bos` and these.

        Raises ConfigError for ids where the net reads vectors, or the reverse; DataError for vectors of another size.
        """
        if document.has_vectors != (self.row_size is not None):
            kinds = ("token ids", "vectors") if self.row_size is None else ("vectors", "token ids")
            raise ConfigError(
                f"{document.where}: the model reads {kinds[0]}, and this document holds {kinds[1]}"
            )
        if document.has_vectors and len(document) and document.width != self.row_size:
            raise DataError(
                f"{document.where}: its vectors have {document.width} numbers, and the model reads {self.row_size}"
            )
        start_rows = self.start_rows(bos) if closing is None else np.array(bos_ids(bos), np.int64)
        return InputSequence(
            document,
            start_rows,
            self.config.max_tokens,
            self.alternatives,
            stop=len(document),
            end_rows=np.array(closing or (), np.int64),
        )

    def inputs_like(self, shape: tuple[int, int]) -> Tensor:
        """Return inputs of the shape (B, N), on the net's device, to measure with: random ids, or vectors of zeros."""
        device = next(self.parameters()).device
        if self.row_size is None:
            return torch.randint(self.config.vocab_size, shape, device=device)
        return torch.zeros(*shape, self.row_size, device=device)

    def head(self, pooled: Tensor) -> Tensor:
        """Return pooled hidden states (..., dim) after the net's own last step, if it has one."""
        return pooled

    def vector_size(self, size: int) -> int:
        """Return the size of `head`'s vectors for pooled states (..., size). Raises ConfigError if it takes others."""
        return size

    def stream(self) -> Callable[..., Tensor] | None:
        """Return the net's own reader of a causal sequence in chunks, or None if a CausalStream can read it."""
        return None

    @property
    def layer_modules(self) -> Sequence[nn.Module]:
        """The layers, first to last: each maps hidden states (B, N, dim) to hidden states (B, N, dim)."""
        raise NotImplementedError

    def save(
        self,
        folder: Path,
        tokenizer_json: str,
        state: Mapping[str, Tensor],
        eos: str = "",
    ) -> None:
        """Write a model directory with the weights `state`, on the CPU; files get their names when they are complete.

        `eos` is the token of the tokenizer that ends documents, if it is not the one that the model came with.
        Raises LongNetError for a directory that cannot be written.
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., vocab_size) of hidden states (..., dim). Raises ConfigError for a net without logits."""
        raise NotImplementedError

    def nll(self, hidden: Tensor, targets: Tensor, *, limit: int = LOGITS_LIMIT) -> Tensor:
        """Return the negative log-likelihood, in nats, of shifted `targets` (B, N), given hidden states (B, N, dim).

        The result is (B, N) in float32, or in float64 for float64 hidden states; 0 where a target is -100. At most
        `limit` elements of logits exist at a time. The backward pass recomputes them chunk by chunk.
        """
        rows = hidden.flatten(0, -2)  # (B N, dim)
        wanted = targets.flatten()  # (B N,)
        size = max(1, limit // max(1, self.config.vocab_size))
        if len(rows) <= size:
            return self._nll(rows, wanted).view(targets.shape)
        of_chunk: Callable[[Tensor, Tensor], Tensor] = self._nll
        if torch.is_grad_enabled():
            of_chunk = partial(checkpoint, self._nll, use_reentrant=False, preserve_rng_state=False)
        chunks = map(of_chunk, rows.split(size), wanted.split(size))
        return torch.cat([*chunks]).view(targets.shape)

    def _nll(self, rows: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(rows)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="none")
