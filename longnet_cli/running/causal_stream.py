"""Causal sequences longer than memory, read chunk by chunk: each layer's KVCache carries on what later chunks see.

Every way to cut a sequence gives the same numbers, up to rounding. `running/chunked_backward.py` goes back the same
way. Bidirectional nets are in `running/layerwise.py`. The state of a net that has read is its LayerCaches: each layer's
KVCache, and for chosen blocks the texts of rows that began together. `CausalStream` is one, with its net; a
`LongNetCache` has one for each group of rows that start at the same column.

B batch, n tokens of a chunk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from longnet_cli.attention import FarKeys, KVCache, Outside, Pattern
from longnet_cli.attention.chosen import ChosenCall
from longnet_cli.basics.errors import ConfigError, DataError, one_line
from longnet_cli.nets.named_blocks import ReadText, named_calls
from longnet_cli.nets.net import FarProvider, Net
from longnet_cli.running.ranks.exchange import Exchange
from longnet_cli.running.saved_state import dtype_name, read_state, reader_facts, write_state

C = TypeVar("C", bound="LayerCaches")


class LayerCaches:
    """The KV caches of a net's layers, by layer; each is made with the layer's first keys.

    `keep` and `allocate` go to KVCache. With chosen blocks, `texts` has the token ids of each row.
    """

    def __init__(
        self,
        pattern: Pattern,
        *,
        keep: int = 0,
        allocate: Callable[..., Tensor] = torch.empty,
    ) -> None:
        self.pattern = pattern
        self.keep = keep
        self.allocate = allocate
        self.by_layer: dict[int, KVCache] = {}
        self.texts: list[ReadText] = []
        self._named: Sequence[ChosenCall] = ()

    @property
    def caches(self) -> list[KVCache]:
        return [*self.by_layer.values()]

    @property
    def position(self) -> int:
        """The number of tokens so far."""
        return next((cache.position for cache in self.by_layer.values()), 0)

    @property
    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    def of_layer(self, layer: int, q: Tensor, k: Tensor) -> KVCache:
        """Return the cache of a layer, to which queries q (B, n, H, D) and keys k (B, n, K, D) come."""
        if layer in self.by_layer:
            return self.by_layer[layer]
        cache = KVCache(
            self.pattern,
            len(k),
            *q.shape[-2:],
            kv_heads=k.shape[-2],
            dtype=k.dtype,
            device=k.device,
            keep=self.keep,
            allocate=self.allocate,
        )
        self.by_layer[layer] = cache
        return cache

    def provider(self, tokens: Tensor | None, exchange: Exchange | None = None) -> FarProvider:
        """Return what gives each layer all that the next tokens (B, n), None for vectors, see of the past.

        Their keys are stored as each layer asks. With an `exchange`, they are a rank's shard.
        Raises ConfigError for chosen blocks with vectors or with an exchange.
        """
        if self.pattern.chosen:
            if exchange:
                raise ConfigError(
                    "a pattern with chosen blocks is read by one process: give each rank documents of its own (--dp)"
                )
            self._named = named_calls(self.pattern, tokens, self.texts, self.position)
        return partial(self._provide, exchange)

    def _provide(
        self,
        exchange: Exchange | None,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Outside:
        """Store the next tokens' keys of a layer, and return what these tokens see of the past, on their device."""
        cache = self.of_layer(layer, q, k)
        if exchange is None:
            past = cache.append(k, v, named=self._named)
            return past._replace(keys=[_on(k.device, keys) for keys in past.keys])
        near = exchange.send(k, v, cache.store)
        past = cache.append(k, v, start=exchange.start, stop=exchange.edges[-1])
        return Outside([*(_on(k.device, keys) for keys in past.keys), *near])

    def select(self, rows: Sequence[int]) -> None:
        """Reorder the batch: row i becomes what row `rows[i]` was."""
        for cache in self.caches:
            cache.select(rows)
        self.texts = [self.texts[row].fork() for row in rows] if self.texts else []

    def fork(self: C) -> C:
        """Return another one that has read the same tokens: what one reads from now on is not in the other."""
        new = copy.copy(self)
        new.by_layer = {layer: cache.fork() for layer, cache in self.by_layer.items()}
        new.texts = [text.fork() for text in self.texts]
        return new


def _on(device: torch.device, keys: FarKeys) -> FarKeys:
    if keys.k.device == device:
        return keys
    return replace(keys, k=keys.k.to(device), v=keys.v.to(device))


def open_stream(net: Net) -> Callable[..., Tensor]:
    """Return a function that reads a causal sequence in chunks (B, n) and returns each chunk's hidden states."""
    return net.stream() or CausalStream(net)


class CausalStream(LayerCaches):
    """A causal net that reads one sequence, or a batch of them, in chunks of any size, single tokens included.

        stream = CausalStream(model)
        for tokens in chunks:          # (B, n) ids each, the same B
            hidden = stream(tokens)    # (B, n, dim), as one pass over the whole sequence gives

    It computes no gradients. Its state is one KVCache per layer, `cache_bytes` in all, bounded whatever the `position`,
    except with chosen blocks, which need all keys. The ranks of a group may share chunks: each passes its own shard and
    the chunk's `exchange`, and holds the whole state. Cached rows on another device than the net's are copied for each
    chunk. `options` are those of `LayerCaches`. `last_hidden` (B, dim) is the last token's hidden state, from which the
    next token can be drawn; None if ranks have shared the chunk. Raises ConfigError for a bidirectional net.

        stream.save("book.state")
        stream = CausalStream.load(model, "book.state")
        answer = stream.fork()         # reads on, and `stream` stays as it is
    """

    def __init__(self, model: Net, **options: Any) -> None:
        if not model.config.causal:
            raise ConfigError(
                "a bidirectional model sees the whole sequence at once: it cannot be streamed"
            )
        super().__init__(model.config.pattern, **options)
        self.model = model
        self.last_hidden: Tensor | None = None
        self.last_tokens: Tensor | None = None  # (B,); None after vectors

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        exchange: Exchange | None = None,
    ) -> Tensor:
        """Read the next tokens (B, n), or vectors (B, n, dim) in their place; return hidden (B, n, dim).

        With an `exchange`, whose first edge is `position`, they are this rank's shard of the chunk.
        """
        start = exchange.start if exchange else self.position
        far = self.provider(tokens, exchange)
        hidden = self.model(tokens, embeddings=embeddings, start=start, far=far)
        if exchange:
            self.last_hidden = None
            self.last_tokens = None
        elif hidden.shape[1]:
            self.last_hidden = _last(hidden)
            self.last_tokens = None if tokens is None else _last(tokens)
        return hidden

    def far(self) -> list[Outside]:
        """Return what the next chunk sees of the past, layer by layer."""
        return [cache.far() for cache in self.caches] or [Outside()] * self.model.config.num_layers

    def save(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        tokenizer_sha256: str | None = None,
    ) -> int:
        """Save what was read in a folder, for `load`, in place of the state that it holds; return the bytes.

        `name` is the model's, for messages. All ranks of a group call this; the first one writes, and returns the
        bytes. Raises ConfigError if there is nothing to save, and what `write_state` raises.
        """
        if self.last_hidden is None:
            raise ConfigError(f"{folder}: a stream is saved after it has read something")
        facts: dict[str, Any] = dict(reader_facts(self.model, name, tokenizer_sha256))
        facts |= {"dtype": dtype_name(self.caches[0].dtype), "tokens": self.position}
        facts["last_tokens"] = None if self.last_tokens is None else self.last_tokens.tolist()
        # then --state takes no pattern
        facts["as_trained"] = getattr(self.model.config, "as_trained", False)
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

        `options` are those of a new stream. Raises ConfigError for a state of another model or pattern, or, if they are
        given, of another tokenizer or `dtype` of
        keys; DataError for a damaged one.
        """
        place = Path(folder)
        reader: dict[str, Any] = dict(reader_facts(model, None, tokenizer_sha256))
        reader["dtype"] = dtype and dtype_name(dtype)
        facts, saved = read_state(place, reader)
        stream = cls(model, **options)
        try:
            stream._restore(facts, saved)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # its digests are right, so somebody made it by other means
            raise DataError(f"{place}: no state of this model: {one_line(error)}") from None
        return stream

    @property
    def batch(self) -> int:
        """The number of sequences that it reads at once; 0 before the first token."""
        return 0 if self.last_hidden is None else len(self.last_hidden)

    def _restore(self, facts: Mapping[str, Any], saved: Mapping[str, Tensor]) -> None:
        """Take what `_state` has yielded."""
        config = self.model.config
        device = next(self.model.parameters()).device
        self.last_hidden = saved["last_hidden"].to(device, copy=True)
        if facts["last_tokens"] is not None:
            self.last_tokens = torch.tensor(facts["last_tokens"], device=device)
        for row in saved.get("ids", ()):  # with chosen blocks
            text = ReadText()
            text.put(0, row)
            self.texts.append(text)
        like: dict[str, Any] = {"dtype": getattr(torch, facts["dtype"]), "device": device}
        q = torch.empty(self.batch, 0, config.num_heads, config.head_dim, **like)
        k = torch.empty(self.batch, 0, config.kv_heads, config.head_dim, **like)
        for layer in range(config.num_layers):
            prefix = f"{layer}."
            of_layer = {
                name.removeprefix(prefix): tensor.to(device)
                for name, tensor in saved.items()
                if name.startswith(prefix)
            }
            self.of_layer(layer, q, k).restore(facts["tokens"], of_layer)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all that `load` needs beside the facts, by name: tensors that are valid until more is read."""
        assert self.last_hidden is not None
        yield "last_hidden", self.last_hidden
        if self.texts:
            yield "ids", torch.stack([text.ids for text in self.texts]).int()
        for layer, cache in self.by_layer.items():
            for name, tensor in cache.state():
                yield f"{layer}.{name}", tensor


def _last(x: Tensor) -> Tensor:
    """Return a copy of the last of x (B, n, ..)."""
    return x[:, -1].clone()
