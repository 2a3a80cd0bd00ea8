"""Causal sequences longer than memory, read chunk by chunk: each layer's KVCache carries on what later chunks see.

Every way to cut a sequence gives the same numbers, up to rounding. `running/chunked_backward.py` goes back the same
way. Bidirectional nets are in `running/layerwise.py`.

B batch, n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longnet_cli.attention import Outside
from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets.net import Net
from longnet_cli.running.layer_caches import LayerCaches
from longnet_cli.running.ranks.exchange import Exchange
from longnet_cli.running.saved_state import dtype_name, read_state, reader_facts, restoring, write_state


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
            raise ConfigError("a bidirectional model sees the whole sequence at once: it cannot be streamed")
        super().__init__(model.config.pattern, **options)
        self.model = model
        self.last_hidden: Tensor | None = None
        self.last_tokens: Tensor | None = None  # (B,); None after vectors

    @torch.no_grad()
    def __call__(
        self, tokens: Tensor | None = None, *, embeddings: Tensor | None = None, exchange: Exchange | None = None
    ) -> Tensor:
        """Read the next tokens (B, n), or vectors (B, n, dim) in their place; return hidden (B, n, dim).

        With an `exchange`, whose first edge is `position`, they are this rank's shard of the chunk.
        """
        named, far = self.note(tokens), partial(self.provide, exchange=exchange)
        start = exchange.start if exchange else self.position
        hidden = self.model(tokens, embeddings=embeddings, start=start, far=far, named=named)
        self.store()
        if exchange:
            self.last_hidden = self.last_tokens = None
        elif hidden.shape[1]:
            self.last_hidden, self.last_tokens = _last(hidden), None if tokens is None else _last(tokens)
        return hidden

    def far(self) -> list[Outside]:
        """Return what the next chunk sees of the past, layer by layer."""
        return [cache.far() for cache in self.caches] or [Outside()] * self.model.config.num_layers

    def save(self, folder: str | Path, *, name: str | None = None, tokenizer_sha256: str | None = None) -> int:
        """Save what was read in a folder, for `load`, in place of the state that it holds; return the bytes.

        `name` is the model's, for messages. All ranks of a group call this; the first one writes, and returns the
        bytes. Raises ConfigError if there is nothing to save, and as `write_state` does, as it raises LongNetError.
        """
        if self.last_hidden is None:
            raise ConfigError(f"{folder}: a stream is saved after it has read something")
        facts = {**reader_facts(self.model, name, tokenizer_sha256), **self.facts}
        facts["last_tokens"] = None if self.last_tokens is None else self.last_tokens.tolist()
        facts["as_trained"] = getattr(self.model.config, "as_trained", False)  # then --state takes no pattern
        return write_state(Path(folder), facts, self.state())

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
        stream, config = cls(model, **options), model.config
        with restoring(place):
            stream._restore_last(facts, saved)
            sizes = stream.batch, config.num_heads, config.kv_heads, config.head_dim
            stream.restore(facts, saved, config.num_layers, sizes, next(model.parameters()).device)
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
        if hidden is None or hidden.dim() != 2 or hidden.shape[1] != config.dim or hidden.dtype not in types:
            raise ValueError("it has no last hidden state of this model")
        self.last_hidden = hidden.to(device, copy=True)
        if last is not None:
            if not isinstance(last, list) or len(last) != len(hidden) or not all(type(x) is int for x in last):
                raise ValueError(f"{last!r:.40} are not its last tokens")
            self.last_tokens = torch.tensor(last, device=device)
        if ids is None and self.pattern.chosen and last is not None:
            raise ValueError("ids is missing")
        known = [x for x in (self.last_tokens, ids) if x is not None and x.numel()]
        if any(not 0 <= int(bound) < config.vocab_size for x in known for bound in x.aminmax()):
            raise ValueError("it has ids that the model does not know")

    def state(self) -> Iterator[tuple[str, Tensor]]:
        assert self.last_hidden is not None
        yield "last_hidden", self.last_hidden
        yield from super().state()


def _last(x: Tensor) -> Tensor:
    """Return a copy of the last of x (B, n, ..)."""
    return x[:, -1].clone()
