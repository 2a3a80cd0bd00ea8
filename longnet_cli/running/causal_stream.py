"""Causal sequences longer than memory, read chunk by chunk: each layer's KVCache carries on what later chunks see.

Every way to cut a sequence gives the same numbers, up to rounding. `running/chunked_backward.py` goes back the same
way. Bidirectional nets are in `running/layerwise.py`.

B batch, n tokens of a chunk.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention import FarKeys, KVCache, Outside
from longnet_cli.attention.notation import parse_pattern
from longnet_cli.attention.past import Blocks, Seen
from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets.named_blocks import ReadText, named_blocks
from longnet_cli.nets.net import Net
from longnet_cli.running.mapped import BlockFile, SpillFile, mapped_empty
from longnet_cli.running.ranks.blocks import RankPast
from longnet_cli.running.ranks.exchange import Exchange
from longnet_cli.running.ranks.ranks import ALONE, Ranks
from longnet_cli.running.saved_state import (
    dtype_name,
    layer_tensors,
    of_layer,
    read_state,
    reader_facts,
    restoring,
    write_state,
)

OnChoice = Callable[[int, Seen], None]  # layer, and what it sees


def open_stream(net: Net, ranks: Ranks = ALONE, spill: str | Path | None = None) -> Callable[..., Tensor]:
    """Return a function that reads a causal sequence in chunks (B, n) and returns each chunk's hidden states.

    With `spill`, keys and values of chosen blocks are kept in a file in that folder. Raises ConfigError for a net that
    has a cache of its own, in memory.
    """
    own = net.stream()
    if own and spill and net.config.pattern.chosen:
        raise ConfigError("this model keeps a cache of its own, in memory: leave out --spill")
    return own or CausalStream(net, ranks=ranks, spill=spill)


class CausalStream:
    """A causal net that reads one sequence, or a batch of them, in chunks of any size, single tokens included.

        stream = CausalStream(model)
        for tokens in chunks:          # (B, n) ids each, the same B
            hidden = stream(tokens)    # (B, n, dim), as one pass over the whole sequence gives

    It computes no gradients. Its state is one KVCache per layer, `cache_bytes` in all, bounded whatever the `position`,
    except with chosen blocks, which need all keys. The `ranks` of a group share every chunk: each passes its own
    shard and the chunk's `edges`, and holds the whole state, but for blocks of the past, which stay with the rank that
    has read them. `room` is the number of these for which a rank allocates memory at once. `keep` and `allocate` go to
    KVCache; for chosen blocks, memory is in maps by default. Cached rows on another device than the net's are copied
    for each chunk. With chosen blocks and `spill`, all keys and values go to one file in that folder, and only what
    chooses them is in memory. `last_hidden` (B, dim) is the last token's hidden state, from which the next token can be
    drawn. With chosen blocks, `ids` has the token ids that were read, (B, n) int32 each. Raises ConfigError for a
    bidirectional net, and what `mapped.SpillFile` raises.

        stream.save("book.state")
        stream = CausalStream.load(model, "book.state")
        answer = stream.fork()         # reads on, and `stream` stays as it is
    """

    def __init__(
        self,
        model: Net,
        *,
        ranks: Ranks = ALONE,
        keep: int = 0,
        room: int = 0,
        allocate: Callable[..., Tensor] | None = None,
        spill: str | Path | None = None,
    ) -> None:
        if not model.config.causal:
            raise ConfigError("a bidirectional model sees the whole sequence at once: it cannot be streamed")
        self.file = SpillFile(spill) if spill and model.config.pattern.chosen else None
        self.model, self.ranks, self.keep, self.room = model, ranks, keep, room
        self.allocate = allocate or (mapped_empty if model.config.pattern.chosen else torch.empty)
        self.position = 0
        self.last_hidden: Tensor | None = None
        self.last_tokens: Tensor | None = None  # (B,); None after vectors
        self.ids: list[Tensor] = []
        self.texts: list[ReadText] = []  # of the rows, for chosen blocks; none after vectors
        self.on_choice: OnChoice | None = None
        self.caches: list[KVCache] = []  # made with the first chunk, whose keys have the dtype and the device

    @property
    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    @torch.no_grad()
    def __call__(
        self, tokens: Tensor | None = None, *, embeddings: Tensor | None = None, edges: Sequence[int] | None = None
    ) -> Tensor:
        """Read the next tokens (B, n), or vectors (B, n, dim) in their place; return hidden (B, n, dim).

        `edges` are the edges of the ranks' shards, as in `exchange.Exchange`; the first one is `position`.
        Raises ValueError without them for chosen blocks over ranks.
        """
        if self.ranks.sp > 1 and self.model.config.pattern.chosen and not edges:
            raise ValueError("each rank has only its own chosen blocks: give the edges of all ranks' shards")
        exchange = Exchange(self.model.config, edges, group=self.ranks.group, cached=True) if edges else None
        start = edges[exchange.rank] if edges and exchange else self.position

        def store_last() -> None:
            """Store the keys of the layer before."""

        def far(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Outside:
            if layer == len(self.caches):
                self.caches.append(self._new_cache(k))
            nonlocal store_last
            store_last()  # only now: this may overwrite far keys that the layer before has just read
            cache = self.caches[layer]
            past = cache.past
            near, others = exchange.run(k, v) if exchange else ([], [])
            stop = edges[-1] if edges else None
            if exchange and isinstance(past, RankPast):
                past.enter(exchange, q, k, v)
            store_last = partial(cache.append, k, v, q=q, start=start, stop=stop, others=others)
            kept = cache.far() if exchange else cache.far(k, v)
            return Outside([*(_on(k.device, keys) for keys in kept.keys), *near], past)

        of_all = None
        if self.model.config.pattern.chosen:
            of_all = exchange.all_tokens(tokens) if exchange and tokens is not None else tokens
            self._read(of_all)
        named = named_blocks(self.model.config.pattern, tokens, self.texts) if self.texts else None
        hidden = self.model(tokens, embeddings=embeddings, start=start, far=far, named=named)
        store_last()
        self.position = edges[-1] if edges else self.position + hidden.shape[1]
        if edges[0] < edges[-1] if edges else hidden.shape[1]:
            last = partial(self._last_of_ranks, edges=edges) if edges else _last
            self.last_hidden, self.last_tokens = last(hidden), None if tokens is None else last(tokens)
        if of_all is not None and not self.keep:
            self.ids.append(of_all.int())
        return hidden

    def read(self, tokens: Tensor) -> Tensor:
        """Read the next tokens (B, n), which all ranks give; return the last one's hidden state (B, dim) to all."""
        if self.ranks.sp == 1:
            return _last(self(tokens))
        edges = self.ranks.edges(self.position, tokens.shape[1], self.model.config.pattern.edge_size)
        self(tokens[:, self.ranks.shard([edge - self.position for edge in edges])], edges=edges)
        assert self.last_hidden is not None
        return self.last_hidden

    def _last_of_ranks(self, x: Tensor, edges: Sequence[int]) -> Tensor:
        """Return the last of x (B, n, ..) to all ranks: that of the last shard, of those with these edges, with any."""
        last = x[:, -1:].sum(1)  # zeros, if this rank's shard is empty
        dist.broadcast(last, group=self.ranks.group, group_src=bisect_left(edges, edges[-1]) - 1)
        return last

    def watch(self, on_choice: OnChoice) -> None:
        """Call `on_choice` from now on with what each layer sees of chosen blocks."""
        self.on_choice = on_choice
        for layer, cache in enumerate(self.caches):
            if cache.past:
                cache.past.on_choice = partial(on_choice, layer)

    def _read(self, tokens: Tensor | None) -> None:
        """Add a chunk's tokens (B, n), of all ranks, to the texts, from which chosen blocks are named."""
        if tokens is None or tokens.is_floating_point():
            self.texts = []
        elif not self.position:
            self.texts = [ReadText([row]) for row in tokens]
        else:
            for text, row in zip(self.texts, tokens, strict=bool(self.texts)):
                text.append(row)

    def far(self) -> list[Outside]:
        """Return what the next chunk sees of the past, layer by layer."""
        return [cache.far() for cache in self.caches] or [Outside()] * self.model.config.num_layers

    def fork(self) -> CausalStream:
        """Return another stream that has read the same tokens: what one reads from now on is not in the other.

        Blocks of the past are shared; other rows are copied.
        """
        new = copy.copy(self)
        new.caches, new.ids = [cache.fork() for cache in self.caches], [*self.ids]
        new.texts = [text.fork() for text in self.texts]
        return new

    def save(self, folder: str | Path, *, name: str | None = None, tokenizer_sha256: str | None = None) -> int:
        """Save what was read in a folder, for `load`, in place of the state that it holds; return the bytes.

        `name` is the model's, for messages. All ranks of a group call this; the first one writes, and returns the
        bytes. Raises ConfigError if there is nothing to save, and as `write_state` does, as it raises LongNetError.
        """
        if self.last_hidden is None:
            raise ConfigError(f"{folder}: a stream is saved after it has read something")
        if self.ranks.sp_rank:
            deque(self._state(), maxlen=0)  # the first rank asks for what it writes
            return 0
        facts: dict[str, Any] = dict(reader_facts(self.model, name, tokenizer_sha256))
        facts |= {"dtype": dtype_name(self.caches[0].dtype), "tokens": self.position}
        facts["last_tokens"] = None if self.last_tokens is None else self.last_tokens.tolist()
        return write_state(Path(folder), facts, self._state())

    @classmethod
    def load(
        cls,
        model: Net,
        folder: str | Path,
        *,
        tokenizer_sha256: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> CausalStream:
        """Return a stream that has read what was saved in a folder; it never changes the folder.

        Chosen blocks are mapped from there, unless there is `spill`. `options` are those of a new stream. Raises
        ConfigError for a state of another model or pattern, or, if they are given, of another tokenizer or `dtype` of
        keys; DataError for a damaged one.
        """
        place = Path(folder)
        given = {**reader_facts(model, None, tokenizer_sha256), "dtype": dtype and dtype_name(dtype)}
        facts, saved = read_state(place, given)
        stream, config, device = cls(model, **options), model.config, next(model.parameters()).device
        with restoring(place):
            stream._restore(facts, saved)
            for layer in range(config.num_layers):
                shape = stream.batch, 0, config.kv_heads, config.head_dim
                cache = stream._new_cache(torch.empty(shape, dtype=getattr(torch, facts["dtype"]), device=device))
                cache.restore(stream.position, of_layer(saved, layer, device))
                if cache.past:
                    cache.past.convert_counts(parse_pattern(facts["longnet.pattern"]).chosen_every)
                stream.caches.append(cache)
        return stream

    @property
    def batch(self) -> int:
        """The number of sequences that it reads at once; 0 before the first token."""
        return 0 if self.last_hidden is None else len(self.last_hidden)

    def _restore(self, facts: Mapping[str, Any], saved: Mapping[str, Tensor]) -> None:
        """Take what a state holds besides the caches. Raises ValueError for what no stream has saved."""
        config, device = self.model.config, next(self.model.parameters()).device
        hidden, last, ids = saved.get("last_hidden"), facts.get("last_tokens"), saved.get("ids")
        types = next(self.model.parameters()).dtype, getattr(torch, facts["dtype"])
        if hidden is None or hidden.dim() != 2 or hidden.shape[1] != config.dim or hidden.dtype not in types:
            raise ValueError("it has no last hidden state of this model")
        self.position, self.last_hidden = facts["tokens"], hidden.to(device, copy=True)
        if last is not None:
            if not isinstance(last, list) or len(last) != len(hidden) or not all(type(x) is int for x in last):
                raise ValueError(f"{last!r:.40} are not its last tokens")
            self.last_tokens = torch.tensor(last, device=device)
        if ids is None and config.pattern.chosen and last is not None:
            raise ValueError("ids is missing")
        if ids is not None:
            if ids.dtype != torch.int32 or ids.dim() != 2 or len(ids) != len(hidden) or ids.shape[1] > self.position:
                raise ValueError(f"ids has shape {tuple(ids.shape)}, for {len(hidden)} x {self.position} tokens")
            self.ids = [ids]
            if ids.shape[1] == self.position:
                self.texts = [ReadText([row]) for row in ids]
        known = [x for x in (self.last_tokens, ids) if x is not None and x.numel()]
        if any(not 0 <= int(bound) < config.vocab_size for x in known for bound in x.aminmax()):
            raise ValueError("it has ids that the model does not know")

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        assert self.last_hidden is not None
        yield "last_hidden", self.last_hidden
        if self.ids:
            yield "ids", torch.cat(self.ids, 1)
        yield from layer_tensors(self.caches)

    def _new_cache(self, k: Tensor) -> KVCache:
        config, (batch, _, kv_heads, head_dim), layer = self.model.config, k.shape, len(self.caches)
        blocks = BlockFile(self.file) if self.file else None
        cache = KVCache(
            config.pattern,
            batch,
            config.num_heads,
            head_dim,
            kv_heads=kv_heads,
            dtype=k.dtype,
            device=k.device,
            keep=self.keep,
            allocate=self.allocate,
            blocks=blocks,
            layer=layer,
        )
        if cache.past and self.ranks.sp > 1:
            room = min(self.room, config.pattern.chosen) if cache.past.kind == "first" else self.room
            own = blocks or Blocks(self.allocate, room)
            allocate = torch.empty if self.keep else self.allocate  # as in a KVCache, for means
            cache.past = RankPast(
                config.pattern, self.ranks.group, own, allocate, self.keep, layer, allocate_sums=self.allocate
            )
        if cache.past and self.on_choice:
            cache.past.on_choice = partial(self.on_choice, layer)
        return cache


def _last(x: Tensor) -> Tensor:
    """Return a copy of the last of x (B, n, ..)."""
    return x[:, -1].clone()


def _on(device: torch.device, keys: FarKeys) -> FarKeys:
    return keys if keys.k.device == device else replace(keys, k=keys.k.to(device), v=keys.v.to(device))
