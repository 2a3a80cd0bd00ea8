"""The contrast objective: the vectors of two texts of a pair are alike, those of texts of other pairs are not.

    texts --read without a gradient--> vectors --of all ranks--> loss --> gradient of each vector
    gradient of a vector --its share of each token--> gradient of hidden states --chunk by chunk--> gradient of weights

So no more than a chunk's activations exist at a time, however long and many the texts are. P pairs of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longnet_cli.jobs.training.windows import PairBatch, PairText
from longnet_cli.nets.net import Net
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.chunked_backward import backward_in_chunks
from longnet_cli.running.device import precision, random_state, set_random_state, to_device
from longnet_cli.running.ranks.fsdp import final_backward
from longnet_cli.running.ranks.ranks import ALONE, Ranks
from longnet_cli.running.reader import batches_by_length

from .recipe import ContrastRecipe


@dataclass(frozen=True, eq=False)
class _TextRows:
    """Texts (B) that share forward passes. A text's vector is the sum of `shares` (B, N) times hidden states.

    `indices` are their places among all texts, `ids` (B, N) are padded on the right to the longest of `lengths`.
    `random` is the state that dropout draws from.
    """

    indices: list[int]
    lengths: list[int]
    ids: Tensor
    shares: Tensor
    random: list[Tensor]


@dataclass(eq=False)
class TextReader:
    """Reads texts into vectors, chunk by chunk, and goes the same way back with the vectors' gradients.

    The `ranks` of a group get the same texts and share every chunk, `chunk` tokens each. A bidirectional net reads each
    text in one forward pass, without a group. Dropout draws the same masks each time.
    """

    model: Net
    pool: str
    chunk: int
    dtype: str
    ranks: Ranks = ALONE
    on_chunk: Callable[[], None] | None = None
    rows: list[_TextRows] = field(default_factory=list)

    def vectors(self, texts: Sequence[PairText]) -> Tensor:
        """Return vectors (texts, dim) float64, not scaled; in a group, the rank's part of a sum over the ranks."""
        device = next(self.model.parameters()).device
        out = torch.zeros(len(texts), self.model.config.dim, dtype=torch.float64, device=device)
        chunk = self.chunk * self.ranks.sp
        self.rows = []
        for indices in batches_by_length([len(text.ids) for text in texts], chunk):
            rows = self._rows([texts[i] for i in indices], indices, device)
            self.rows.append(rows)
            if not self.model.config.causal:
                with torch.no_grad():
                    out[indices] = torch.einsum("bn,bnd->bd", rows.shares, self._whole(rows).double())
                continue
            stream = CausalStream(self.model, ranks=self.ranks)
            for start in range(0, rows.ids.shape[1], chunk):
                stop = min(start + chunk, rows.ids.shape[1])
                edges = self.ranks.edges(start, stop - start)
                mine = self.ranks.shard(edges)
                with precision(self.dtype, device):
                    hidden = stream(rows.ids[:, mine], edges=edges if self.ranks.sp > 1 else None)
                out[indices] += torch.einsum("bn,bnd->bd", rows.shares[:, mine], hidden.double())
                if self.on_chunk:
                    self.on_chunk()
        return out

    def backward(self, gradient: Tensor, allocate: Callable[..., Tensor] = torch.empty) -> None:
        """Add the gradients of the weights to `.grad`, given that of the last `vectors` (texts, dim)."""
        device = gradient.device
        after = random_state(device)
        for index, rows in enumerate(self.rows, 1):
            wanted = gradient[rows.indices][:, None]  # (B, 1, dim)

            def loss(hidden: Tensor, mine: slice, rows: _TextRows = rows, wanted: Tensor = wanted) -> Tensor:
                wide = hidden if hidden.dtype == torch.float64 else hidden.float()
                return (wide * (rows.shares[:, mine, None] * wanted).to(wide.dtype)).sum(dtype=torch.float64)

            set_random_state(rows.random, device)
            final = index == len(self.rows)
            if not self.model.config.causal:
                final_backward(self.model, final)
                loss(self._whole(rows), slice(None)).backward()
                continue
            backward_in_chunks(
                self.model,
                rows.ids,
                loss,
                self.chunk * self.ranks.sp,
                dtype=self.dtype,
                ranks=self.ranks,
                final=final,
                allocate=allocate,
                on_chunk=self.on_chunk,
            )
        set_random_state(after, device)

    def _whole(self, rows: _TextRows) -> Tensor:
        """Return the hidden states (B, N, dim) of one forward pass."""
        with precision(self.dtype, rows.ids.device):
            hidden = self.model(rows.ids, lengths=rows.lengths)
        if self.on_chunk:
            self.on_chunk()
        return hidden

    def _rows(self, texts: Sequence[PairText], indices: list[int], device: torch.device) -> _TextRows:
        ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(text.ids) for text in texts], batch_first=True)
        shares = torch.zeros(ids.shape, dtype=torch.float64)
        for share, (read, first) in zip(shares, texts, strict=True):
            first = first if self.pool == "mean" else len(read) - 1
            share[first : len(read)] = 1 / (len(read) - first)
        lengths = [len(read) for read, _ in texts]
        return _TextRows(indices, lengths, to_device(ids, device), to_device(shares, device), random_state(device))


def backward_pairs(
    model: Net,
    batch: PairBatch,
    settings: ContrastRecipe,
    ranks: Ranks,
    *,
    chunk: int,
    dtype: str = "fp32",
    allocate: Callable[..., Tensor] = torch.empty,
    on_chunk: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add this rank's part of the gradient of the loss to the parameters' `.grad`; the whole is the sum over the ranks.

    Every group of ranks has as many pairs, and its ranks have the same. Return the loss over the pairs of all ranks, in
    nats, its derivative by the logarithm of the temperature, and the tokens of all texts.
    """
    reader = TextReader(model, settings.pool, chunk, dtype, ranks, on_chunk)
    place = slice(ranks.dp_rank, len(batch.keys) * ranks.dp, ranks.dp)
    vectors, facts = read_pairs(reader, batch, place, len(batch.keys) * ranks.dp, ranks)
    with torch.enable_grad():
        logarithm = vectors.new_tensor(math.log(settings.divisor)).requires_grad_()
        loss = contrast_loss(vectors.requires_grad_(), facts[:, :-1], logarithm.exp(), settings.dims)
        gradient, slope = torch.autograd.grad(loss, (vectors, logarithm))
    reader.backward(gradient[:, place].flatten(0, 1), allocate)
    return loss.detach(), slope, facts[:, -1].sum()


def read_pairs(reader: TextReader, batch: PairBatch, place: slice, pairs: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Read this rank's `batch`, which takes the places `place` among all `pairs`; return what all ranks have read.

    Vectors are (2, pairs, dim) float64, or (3, pairs, dim) with hard negatives; facts (pairs, n + 1) int64 are the n
    keys of each pair, and the tokens of its texts.
    """
    own_vectors = reader.vectors(batch.texts).unflatten(0, batch.shape)
    vectors = own_vectors.new_zeros(len(own_vectors), pairs, own_vectors.shape[2])
    facts = torch.zeros(pairs, batch.keys.shape[1] + 1, dtype=torch.int64, device=own_vectors.device)
    vectors[:, place] = own_vectors
    if ranks.rank % ranks.sp == 0:
        tokens = np.reshape([len(text.ids) for text in batch.texts], batch.shape).sum(0)
        facts[place] = torch.from_numpy(np.column_stack((batch.keys, tokens))).to(facts.device)
    ranks.sum(vectors, facts)
    return vectors, facts


def contrast_loss(vectors: Tensor, keys: Tensor, temperature: float | Tensor, dims: Sequence[int] = ()) -> Tensor:
    """Return the mean InfoNCE loss of vectors (2, P, dim), both ways: each text finds its partner among all others.

    Pairs with a key (P, 3) in common are not each other's negatives. With `dims`, the mean over these prefixes of the
    vectors and the whole. Third vectors, with a fourth key, are hard negatives: first texts find their partners among
    them too.
    """
    wanted = torch.arange(len(keys), device=keys.device)
    losses = []
    for width in (*dims, vectors.shape[2]):
        scores, hard = _scores(vectors[..., :width], keys, temperature)
        losses += [F.cross_entropy(torch.cat([scores, hard], 1), wanted), F.cross_entropy(scores.T, wanted)]
    return torch.stack(losses).mean()


def ranking(vectors: Tensor, keys: Tensor) -> dict[str, float]:
    """Return how well first texts find their partners among P: recall at 1 and 10, and the mean reciprocal rank."""
    scores, _ = _scores(vectors, keys)
    places = (scores >= scores.diagonal()[:, None]).sum(1).double()  # equal vectors find nothing
    recalls = {f"held_out_recall_{most}": (places <= most).double().mean().item() for most in (1, 10)}
    return recalls | {"held_out_mrr": (1 / places).mean().item()}


def _scores(vectors: Tensor, keys: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Return cosines (P, P) of first and second texts, and of first texts and hard negatives, (P, P) or (P, 0).

    They are divided by the temperature, and -inf where a text is not a negative of the other.
    """
    first, second, *third = F.normalize(vectors, dim=-1)
    alike = [_alike(keys[:, :3], keys[:, :3]).fill_diagonal_(False), _alike(keys[:, :3], keys[:, 3:])]
    similarities = [first @ second.T, first @ third[0].T if third else first[:, :0]]
    scores, hard = (  # divided before they are masked: the derivative of -inf by the temperature is no number
        (x / temperature).masked_fill(mask[:, : x.shape[1]], float("-inf"))
        for x, mask in zip(similarities, alike, strict=True)
    )
    return scores, hard


def _alike(keys: Tensor, others: Tensor) -> Tensor:
    """Return which of keys (P, n) have one in common with others (P, m), (P, P)."""
    return (keys[:, None, :, None] == others[None, :, None, :]).flatten(2).any(2)
