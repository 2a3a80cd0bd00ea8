"""Causal sequences longer than memory, read chunk by chunk: each layer's KVCache carries on what later chunks see.

Every way to cut a sequence gives the same numbers, up to rounding. `running/chunked_backward.py` goes back the same
way. Bidirectional nets are in `running/layerwise.py`. The state of a net that has read is its LayerCaches: each layer's
KVCache, the ids, and the texts of rows that began together. `CausalStream` is one, with its net; a `LongNetCache` has
one for each group of rows that start at the same column.

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
from longnet_cli.attention.notation import parse_pattern
from longnet_cli.attention.past import Seen
from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.nets.named_blocks import NamedBlocks, ReadText, named_blocks
from longnet_cli.nets.net import Net
from longnet_cli.running.memory_maps import BlockFile, SpillFile, mapped_empty
from longnet_cli.running.ranks.exchange import Exchange
from longnet_cli.running.saved_state import dtype_name, read_state, reader_facts, write_state

C = TypeVar("C", bound="LayerCaches")
OnChoice = Callable[[int, Seen], None]  # layer, and what it sees


class LayerCaches:
    """The KV caches of a net's layers, by layer; each is made with the layer's first keys.

    `keep` and `allocate` go to KVCache; for chosen blocks, memory is in maps by default, and with `spill` all keys and
    values go to one file in that folder. With chosen blocks, `ids` has the token ids that were read, (B, n) int32 each,
    and `texts` those of the rows, unless there were vectors among them.
    """

    def __init__(
        self,
        pattern: Pattern,
        *,
        keep: int = 0,
        allocate: Callable[..., Tensor] | None = None,
        spill: str | Path | None = None,
    ) -> None:
        self.pattern, self.keep = pattern, keep
        self.file = SpillFile(spill) if spill and pattern.chosen else None
        self.allocate = allocate or (mapped_empty if pattern.chosen else torch.empty)
        self.by_layer: dict[int, KVCache] = {}
        self.ids: list[Tensor] = []
        self.texts: list[ReadText] = []
        self.on_choice: OnChoice | None = None
        self._late: Callable[[], None] | None = None  # stores the keys of the layer before

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

    def name_blocks(self, tokens: Tensor | None) -> NamedBlocks | None:
        """Return the blocks that the next tokens (B, n), None for vectors, name. Call it before layers see them."""
        if not self.pattern.chosen:
            return None
        if tokens is None or tokens.is_floating_point():
            self.texts = []
            return None
        self.ids.append(tokens.int())
        if not self.by_layer:
            self.texts = [ReadText() for _ in tokens]
        for text, row in zip(self.texts, tokens, strict=bool(self.texts)):
            text.append(row)
        return named_blocks(self.pattern, tokens, self.texts) if self.texts else None

    def of_layer(self, layer: int, q: Tensor, k: Tensor) -> KVCache:
        """Return the cache of a layer, to which queries q (B, n, H, D) and keys k (B, n, K, D) come."""
        if layer in self.by_layer:
            return self.by_layer[layer]
        blocks = BlockFile(self.file) if self.file else None
        options: dict[str, Any] = {
            "kv_heads": k.shape[-2],
            "dtype": k.dtype,
            "device": k.device,
            "layer": layer,
        }
        options |= {"keep": self.keep, "allocate": self.allocate, "blocks": blocks}
        cache = self.by_layer[layer] = KVCache(self.pattern, len(k), *q.shape[-2:], **options)
        if cache.past and self.on_choice:
            cache.past.on_choice = partial(self.on_choice, layer)
        return cache

    def provide(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, exchange: Exchange | None = None
    ) -> Outside:
        """Return what the next tokens see of the past, as a `FarProvider` does; cached rows come to their device.

        Their keys are stored when the next layer asks, or in `store`. With an `exchange`, they are a rank's shard.
        """
        self.store()  # only now: this may overwrite far keys that the layer before has just read
        cache = self.of_layer(layer, q, k)
        near, others = exchange.run(k, v) if exchange else ([], [])
        place: dict[str, Any] = (
            {"start": exchange.start, "stop": exchange.edges[-1]} if exchange else {}
        )
        self._late = partial(
            cache.append, k, v, q=q if cache.past else None, others=others, **place
        )
        kept = cache.far() if exchange else cache.far(k, v)
        return Outside([*(_on(k.device, keys) for keys in kept.keys), *near], cache.past)

    def store(self) -> None:
        """Store the keys of the last layer that `provide` was called for."""
        if self._late:
            self._late()
        self._late = None

    def watch(self, on_choice: OnChoice) -> None:
        """Call `on_choice` from now on with what each layer sees of chosen blocks."""
        self.on_choice = on_choice
        for layer, cache in self.by_layer.items():
            if cache.past:
                cache.past.on_choice = partial(on_choice, layer)

    def select(self, rows: Sequence[int]) -> None:
        """Reorder the batch: row i becomes what row `rows[i]` was."""
        for cache in self.caches:
            cache.select(rows)
        self.ids = [torch.cat(self.ids, 1)[rows]] if self.ids else []
        self.texts = [self.texts[row].fork() for row in rows] if self.texts else []

    def fork(self: C) -> C:
        """Return another one that has read the same tokens: what one reads from now on is not in the other.

        Blocks of the past are shared; other rows are copied.
        """
        new = copy.copy(self)
        new.by_layer, new.ids = (
            {layer: cache.fork() for layer, cache in self.by_layer.items()},
            [*self.ids],
        )
        new.texts = [text.fork() for text in self.texts]
        return new


def _on(device: torch.device, keys: FarKeys) -> FarKeys:
    return (
        keys if keys.k.device == device else replace(keys, k=keys.k.to(device), v=keys.v.to(device))
    )


def open_stream(net: Net, spill: str | Path | None = None) -> Callable[..., Tensor]:
    """Return a function that reads a causal sequence in chunks (B, n) and returns each chunk's hidden states.

    With `spill`, keys and values of chosen blocks are kept in a file in that folder. Raises ConfigError for a net that
    has a cache of its own, in memory.
    """
    own = net.stream()
    if own and spill and net.config.pattern.chosen:
        raise ConfigError("this model keeps a cache of its own, in memory: leave out --spill")
    return own or CausalStream(net, spill=spill)


class CausalStream(LayerCaches):
    """A causal net that reads one sequence, or a batch of them, in chunks of any size, single tokens included.

        stream = CausalStream(model)
        for tokens in chunks:          # (B, n) ids each, the same B
            hidden = stream(tokens)    # (B, n, dim), as one pass over the whole sequence gives

    It computes no gradients. Its state is one KVCache per layer, `cache_bytes` in all, bounded whatever the `position`,
    except with chosen blocks, which need all keys. The ranks of a group may share chunks: each passes its own shard and
    the chunk's `exchange`, and holds the whole state. Cached rows on another device than the net's are copied for each
    chunk. `options` are those of `LayerCaches`. `last_hidden` (B, dim) is the last token's hidden state, from which the
    next token can be drawn; None if ranks have shared the chunk. Raises ConfigError for a bidirectional net, and what
    `mapped.SpillFile` raises.

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
        named, far = self.name_blocks(tokens), partial(self.provide, exchange=exchange)
        start = exchange.start if exchange else self.position
        hidden = self.model(tokens, embeddings=embeddings, start=start, far=far, named=named)
        self.store()
        if exchange:
            self.last_hidden = self.last_tokens = None
        elif hidden.shape[1]:
            self.last_hidden, self.last_tokens = (
                _last(hidden),
                None if tokens is None else _last(tokens),
            )
        return hidden

    def far(self) -> list[Outside]:
        """Return what the next chunk sees of the past, layer by layer."""
        return [cache.far() for cache in self.caches] or [Outside()] * self.model.config.num_layers

    def save(
        self, folder: str | Path, *, name: str | None = None, tokenizer_sha256: str | None = None
    ) -> int:
        """Save what was read in a folder, for `load`, in place of the state that it holds; return the bytes.

        `name` is the model's, for messages. All ranks of a group call this; the first one writes, and returns the
        bytes. Raises ConfigError if there is nothing to save, and as `write_state` does, as it raises LongNetError.
        """
        if self.last_hidden is None:
            raise ConfigError(f"{folder}: a stream is saved after it has read something")
        facts: dict[str, Any] = dict(reader_facts(self.model, name, tokenizer_sha256))
        facts |= {"dtype": dtype_name(self.caches[0].dtype), "tokens": self.position}
        facts["last_tokens"] = None if self.last_tokens is None else self.last_tokens.tolist()
        facts["as_trained"] = getattr(
            self.model.config, "as_trained", False
        )  # then --state takes no pattern
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
        given = {
            **reader_facts(model, None, tokenizer_sha256),
            "dtype": dtype and dtype_name(dtype),
        }
        facts, saved = read_state(place, given)
        stream = cls(model, **options)
        try:
            stream._restore_last(facts, saved)
            stream._restore_caches(facts, saved)
        except ValueError as error:
            raise DataError(f"{place}: a damaged state: {error}") from None
        return stream

    @property
    def batch(self) -> int:
        """The number of sequences that it reads at once; 0 before the first token."""
        return 0 if self.last_hidden is None else len(self.last_hidden)

    def _restore_last(self, facts: Mapping[str, Any], saved: Mapping[str, Tensor]) -> None:
        """Take the last token and its hidden state. Raises ValueError for what no stream has saved."""
        config, device = self.model.config, next(self.model.parameters()).device
        hidden, last, ids = saved.get("last_hidden"), facts.get("last_tokens"), saved.get("ids")
        types = next(self.model.parameters()).dtype, getattr(torch, facts["dtype"])
        if (
            hidden is None
            or hidden.dim() != 2
            or hidden.shape[1] != config.dim
            or hidden.dtype not in types
        ):
            raise ValueError("it has no last hidden state of this model")
        self.last_hidden = hidden.to(device, copy=True)
        if last is not None:
            if (
                not isinstance(last, list)
                or len(last) != len(hidden)
                or not all(type(x) is int for x in last)
            ):
                raise ValueError(f"{last!r:.40} are not its last tokens")
            self.last_tokens = torch.tensor(last, device=device)
        if ids is None and self.pattern.chosen and last is not None:
            raise ValueError("ids is missing")
        known = [x for x in (self.last_tokens, ids) if x is not None and x.numel()]
        if any(not 0 <= int(bound) < config.vocab_size for x in known for bound in x.aminmax()):
            raise ValueError("it has ids that the model does not know")

    def _restore_caches(self, facts: Mapping[str, Any], saved: Mapping[str, Tensor]) -> None:
        """Take the caches and the ids. Raises ValueError for what is no state of this model."""
        config, device, tokens = (
            self.model.config,
            next(self.model.parameters()).device,
            facts["tokens"],
        )
        ids, like = saved.get("ids"), {"dtype": getattr(torch, facts["dtype"]), "device": device}
        if ids is not None:
            if (
                ids.dtype != torch.int32
                or ids.dim() != 2
                or len(ids) != self.batch
                or ids.shape[1] > tokens
            ):
                raise ValueError(
                    f"ids has shape {tuple(ids.shape)}, for {self.batch} x {tokens} tokens"
                )
            self.ids = [ids.to(device)]
            self.texts = [ReadText([row]) for row in ids] if ids.shape[1] == tokens else []
        heads = config.num_heads, config.kv_heads
        q, k = (torch.empty(self.batch, 0, number, config.head_dim, **like) for number in heads)
        for layer in range(config.num_layers):
            begin, cache = f"{layer}.", self.of_layer(layer, q, k)
            own = {
                name.removeprefix(begin): x.to(device)
                for name, x in saved.items()
                if name.startswith(begin)
            }
            cache.restore(tokens, own)
            if cache.past:
                cache.past.convert_counts(parse_pattern(facts["longnet.pattern"]).chosen_every)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all that `load` needs beside the facts, by name: tensors that are valid until more is read."""
        assert self.last_hidden is not None
        yield "last_hidden", self.last_hidden
        if self.ids:
            yield "ids", torch.cat(self.ids, 1)
        for layer, cache in self.by_layer.items():
            for name, tensor in cache.state():
                yield f"{layer}.{name}", tensor


def _last(x: Tensor) -> Tensor:
    """Return a copy of the last of x (B, n, ..)."""
    return x[:, -1].clone()
