"""Causal sequences longer than memory: chunk by chunk through all layers, exact in outputs and in gradients.

    forward    chunk 0 -> chunk 1 -> chunk 2      each layer's KVCache carries the rows of the open segments along
    backward   chunk 0 <- chunk 1 <- chunk 2      each chunk computed again, with its far rows as leaves whose
                                                  gradients are handed to the chunk that made them

Every way to cut a sequence gives the same numbers, up to rounding. Bidirectional nets are in `running/layerwise.py`.

B batch, N tokens, n tokens of a shard, H heads, K key heads, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention import FarKeys, KVCache, Outside, Past
from longnet_cli.attention.groups import GroupedPart
from longnet_cli.attention.merging import accumulator, strided_view
from longnet_cli.attention.notation import parse_pattern
from longnet_cli.attention.spans import common_span, lanes, level_of, open_spans, rows_before, segment_rows, span_views
from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets.net import Net, NetConfig
from longnet_cli.running.device import free_memory, precision, random_state, set_random_state
from longnet_cli.running.mapped import BlockFile, SpillFile, mapped_empty
from longnet_cli.running.ranks.exchange import Exchange, even_edges
from longnet_cli.running.ranks.fsdp import final_backward
from longnet_cli.running.ranks.ranks import Ranks
from longnet_cli.running.saved_state import (
    dtype_name,
    layer_tensors,
    of_layer,
    read_state,
    reader_facts,
    restoring,
    write_state,
)

Key = tuple[int, int, int]  # layer, level, start of the segment


class FarGradients:
    """The gradients of far rows in one sequence of `tokens`, whose chunks come from last to first.

    There is one sum per layer, level and segment, (k and v, B, rows, lanes, D), packed as in KVCache, in fp32 (fp64 for
    fp64). With chosen blocks, there is one more per layer, for all tokens before the last chunk. `allocate` makes its
    memory, as torch.empty does. In a group, each rank sums the gradients of its own shards. These sums are reduced over
    the ranks when the chunk that made the rows asks for them.
    """

    def __init__(
        self, config: NetConfig, tokens: int, group: dist.ProcessGroup | None, allocate: Callable[..., Tensor]
    ) -> None:
        self.pattern, self.num_heads, self.tokens = config.pattern, config.num_heads, tokens
        self.group, self.allocate = group, allocate
        self.sums: dict[Key, Tensor] = {}
        self.of_pasts: dict[int, Tensor] = {}  # by layer: (k and v, B, tokens, K, D)

    def leaves(self, layer: int, keys: FarKeys, device: torch.device) -> FarKeys:
        """Return far keys of a chunk on `device`, as leaves of its graph.

        Each gradient is added to its sum and freed as soon as it is known: only one layer's exist beside the sums.
        """
        k, v = (x.to(device).detach().requires_grad_() for x in (keys.k, keys.v))
        for index, x in enumerate((k, v)):
            x.register_post_accumulate_grad_hook(partial(self._take, (layer, keys.level, keys.start), index))
        return replace(keys, k=k, v=v)

    def past(self, layer: int, past: Past, start: int, k: Tensor) -> Past:
        """Return the past of the shard at `start`, which adds the gradients of its rows to their sum.

        `past` is that of a later shard or of this one; k (B, n, K, D) is the shard's.
        """
        if start and layer not in self.of_pasts:
            size, last = self.pattern.chosen_block, start if self.group is None else self.tokens
            shape = (2, k.shape[0], -(-last // size) * size, *k.shape[2:])
            self.of_pasts[layer] = self.allocate(shape, dtype=accumulator(k.dtype), device=k.device).zero_()
        return past.before(start, self.of_pasts.get(layer))

    def _take(self, key: Key, index: int, leaf: Tensor) -> None:
        """Add the gradient of k or v (`index` 0 or 1), (B, rows, lanes, D), to its sum, and free it."""
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        if key not in self.sums:  # the first chunk to come here, the last of the sequence, has the most rows
            batch, _, held, head_dim = leaf.shape
            shape = (2, batch, segment_rows(self.pattern, key[1], self.tokens), held, head_dim)
            self.sums[key] = self.allocate(shape, dtype=accumulator(leaf.dtype), device=leaf.device)
            self.sums[key][:, :, : leaf.shape[1]] = 0
        rows = self.sums[key][index, :, : leaf.shape[1]]
        rows.add_(gradient.to(rows.device))

    def of_shard(self, layer: int, start: int, stop: int, begin: int, k: Tensor) -> Tensor | None:
        """Return what later chunks add to the gradients of one shard's k and v: (k and v, B, n, K, D), or None.

        The shard starts at `begin`, in the chunk [start, stop), and has the shape and the device of `k` (B, n, K, D).
        """
        total, sizes = None, (self.num_heads, k.shape[2])
        if layer in self.of_pasts:
            rows = self.of_pasts[layer][:, :, start:stop]
            if self.group is not None:
                of_chunk = rows.to(k.device).contiguous()
                dist.all_reduce(of_chunk, group=self.group)
                rows.zero_()  # what this chunk's own shards add comes apart (`Exchange.run`)
                rows = of_chunk
            rows = rows[:, :, begin - start : begin - start + k.shape[1]]
            total = torch.zeros(2, *k.shape, dtype=rows.dtype, device=k.device)
            total[:, :, : rows.shape[2]] = rows
        for span in open_spans(self.pattern, stop):
            key = (layer, span.level, span.start)
            if key not in self.sums or span.stop <= start:
                continue
            rows = self.sums[key] if span.start < start else self.sums.pop(key)  # no earlier chunk has rows of it
            if self.group is not None:
                _, r = level_of(self.pattern, span.level)
                offsets = lanes(self.pattern, span.level, *sizes).offsets
                first = min(rows_before(max(start - span.start, 0), offset, r) for offset in offsets)
                last = max(rows_before(span.stop - span.start, offset, r) for offset in offsets)
                of_chunk = rows[:, :, first:last].to(k.device).contiguous()
                dist.all_reduce(of_chunk, group=self.group)
                rows[:, :, first:last] = of_chunk
            if total is None:
                total = torch.zeros(2, *k.shape, dtype=rows.dtype, device=k.device)
            mine = common_span(self.pattern, span.level, span.start, begin, begin + k.shape[1])
            for views in span_views(self.pattern, mine, self.num_heads, begin, k.shape[2]):
                for into, out in zip(total, rows, strict=True):
                    strided_view(into, views.shard).add_(strided_view(out, views.segment).to(k.device))
            if self.group is not None and dist.get_rank(self.group):
                # some of these rows may belong to the chunk before: its all-reduce must add this sum once, from rank 0
                rows[:, :, first:last] = 0
        return total


CHUNK_BYTES = 256 << 20  # for one chunk's activations; a GPU takes an eighth of its free memory if that is more
SHORTEST_CHUNK = 256  # below it, the calls cost more than the computation
# Other jobs have a number of tokens, on a CPU and on a GPU. A recipe trains with the same chunk on every CPU, and with
# the longest that fits on a GPU: beyond GPU_TRAINING_CHUNK, none keeps it busier. The rows of `bench` compare models
# and patterns, at the same chunk; with a shorter one, a GPU waits for the CPU.
TRAINING_CHUNK, GPU_TRAINING_CHUNK = 1 << 14, 1 << 17
BENCH_CHUNK, GPU_BENCH_CHUNK = 1 << 16, 1 << 20


OnChoice = Callable[[int, GroupedPart, list[Tensor]], None]  # layer, and as `Past.on_choice`


class Tokens(Protocol):
    """Token ids (B, N) that can be sliced: a tensor, or ids that are read when they are indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def device(self) -> torch.device: ...
    def __getitem__(self, index: tuple[int | slice, slice], /) -> Tensor: ...  # (n,), or (b, n) for a slice of rows


# A loss that is a sum over tokens: takes the hidden states (B, n, dim) of a slice of them and the slice, returns the
# sum, float64
HiddenLoss = Callable[[Tensor, slice], Tensor]


def chunk_of(named: int | None, default: int, earlier: int | None = None, ranks: Ranks | None = None) -> int:
    """Return the tokens of a chunk of any job, the same on all `ranks`.

    The chunk that the user `named` counts first, then the chunk of the `earlier` run that this one continues, which
    only rank 0 needs to know, then the smallest of the ranks' defaults. Raises ConfigError for a chunk below 1.
    """
    if named is not None:
        if named < 1:
            raise ConfigError(f"chunk must be 1 or more, not {named}")
        return named
    ranks = ranks or Ranks()
    smallest = int(ranks.smallest(earlier or default))
    return int(ranks.largest(earlier or 0)) or smallest


def default_chunk(config: NetConfig, device: torch.device) -> int:
    """Return the default for reading: a forward pass without gradients then takes a modest share of memory.

    A power of two, so that the edges of chunks and of segments mostly coincide.
    """
    return chunk_beside(config, (free_memory(device) or 0) if device.type == "cuda" else 0)


def chunk_beside(config: NetConfig, free: int) -> int:
    """Return the default chunk for reading on a GPU with so many bytes free; 0 for a CPU."""
    budget = max(CHUNK_BYTES, free // 8)
    return max(SHORTEST_CHUNK, 1 << (budget // config.forward_bytes(1)).bit_length() - 1)


def fitting_chunk(
    needed: Callable[[int], float], longest: int, free: float | None, shortest: int = SHORTEST_CHUNK
) -> int | None:
    """Return `longest`, or the longest power of two below it and at least `shortest`, whose `needed` bytes are free.

    Returns None if none fits.
    """
    chunk = longest
    while free is not None and needed(chunk) > free:
        chunk = (1 << (chunk - 1).bit_length()) >> 1  # the power of two below
        if chunk < shortest:
            return None
    return chunk


def open_stream(
    net: Net, group: dist.ProcessGroup | None = None, spill: str | Path | None = None
) -> Callable[..., Tensor]:
    """Return a function that reads a causal sequence in chunks (B, n) and returns each chunk's hidden states.

    With `spill`, keys and values of chosen blocks are kept in a file in that folder. Raises ConfigError for a net that
    has a cache of its own, in memory.
    """
    own = net.stream()
    if own and spill and net.config.pattern.chosen:
        raise ConfigError("this model keeps a cache of its own, in memory: leave out --spill")
    return own or CausalStream(net, group=group, spill=spill)


class CausalStream:
    """A causal net that reads one sequence, or a batch of them, in chunks of any size, single tokens included.

        stream = CausalStream(model)
        for tokens in chunks:          # (B, n) ids each, the same B
            hidden = stream(tokens)    # (B, n, dim), as one pass over the whole sequence gives

    It computes no gradients. Its state is one KVCache per layer, `cache_bytes` in all, bounded whatever the `position`,
    except with chosen blocks, which need all keys. The ranks of a `group` share every chunk: each passes its own shard
    and the chunk's `edges`, and holds the whole state. `keep` and `allocate` go to KVCache; for chosen blocks, memory
    is in maps by default. Cached rows on another device than the net's are copied for each chunk. With chosen blocks
    and `spill`, all keys and values go to one file in that folder, and only what chooses them is in memory.
    `last_hidden` (B, dim) is the last token's hidden state, from which the next token can be drawn. With chosen blocks,
    `ids` has the token ids that were read, (B, n) int32 each. Raises ConfigError for a bidirectional net, and what
    `mapped.SpillFile` raises.

        stream.save("book.state")
        stream = CausalStream.load(model, "book.state")
        answer = stream.fork()         # reads on, and `stream` stays as it is
    """

    def __init__(
        self,
        model: Net,
        *,
        group: dist.ProcessGroup | None = None,
        keep: int = 0,
        allocate: Callable[..., Tensor] | None = None,
        spill: str | Path | None = None,
    ) -> None:
        if not model.config.causal:
            raise ConfigError("a bidirectional model sees the whole sequence at once: it cannot be streamed")
        self.file = SpillFile(spill) if spill and model.config.pattern.chosen else None
        self.model, self.group, self.keep = model, group, keep
        self.allocate = allocate or (mapped_empty if model.config.pattern.chosen else torch.empty)
        self.position = 0
        self.last_hidden: Tensor | None = None
        self.last_tokens: Tensor | None = None  # (B,); None after vectors
        self.ids: list[Tensor] = []
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
        """
        exchange = Exchange(self.model.config, edges, group=self.group, cached=True) if edges else None
        start = edges[exchange.rank] if edges and exchange else self.position
        pending: list[Callable[[], None]] = []

        def far(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Outside:
            if layer == len(self.caches):
                self.caches.append(self._new_cache(k))
            if pending:  # only now: this may overwrite far keys that the layer before has just read
                pending.pop()()
            cache = self.caches[layer]
            past = cache.past
            near, others = exchange.run(k, v) if exchange else ([], [])
            stop = edges[-1] if edges else None
            earlier, later = exchange.other_shards(q, k, v) if exchange and past else ([], [])
            for shard in earlier:
                assert past
                past.append(*shard)

            def store() -> None:
                cache.append(k, v, q=q, start=start, stop=stop, others=others)
                for shard in later:
                    assert past
                    past.append(*shard)

            pending.append(store)
            kept = cache.far() if exchange else cache.far(k, v)
            return Outside([*(_on(k.device, keys) for keys in kept.keys), *near], past)

        hidden = self.model(tokens, embeddings=embeddings, start=start, far=far)
        pending.pop()()
        self.position = edges[-1] if edges else self.position + hidden.shape[1]
        if hidden.shape[1]:  # a rank's shard may be empty
            self.last_hidden = hidden[:, -1].clone()
            self.last_tokens = None if tokens is None else tokens[:, -1].clone()
        if self.model.config.pattern.chosen and tokens is not None and not self.keep:
            self.ids.append(tokens.int())
        return hidden

    def watch(self, on_choice: OnChoice) -> None:
        """Call `on_choice` from now on with what each layer sees of chosen blocks."""
        self.on_choice = on_choice
        for layer, cache in enumerate(self.caches):
            if cache.past:
                cache.past.on_choice = partial(on_choice, layer)

    def far(self) -> list[Outside]:
        """Return what the next chunk sees of the past, layer by layer."""
        return [cache.far() for cache in self.caches] or [Outside()] * self.model.config.num_layers

    def fork(self) -> CausalStream:
        """Return another stream that has read the same tokens: what one reads from now on is not in the other.

        Blocks of the past are shared; other rows are copied.
        """
        new = copy.copy(self)
        new.caches, new.ids = [cache.fork() for cache in self.caches], [*self.ids]
        return new

    def save(self, folder: str | Path, *, name: str | None = None, tokenizer_sha256: str | None = None) -> int:
        """Save what was read in a folder, for `load`, in place of the state that it holds; return the bytes.

        `name` is the model's, for messages. Raises ConfigError if there is nothing to save, for the stream of several
        ranks, and as `write_state` does, as it raises LongNetError.
        """
        if self.last_hidden is None or self.group is not None:
            raise ConfigError(f"{folder}: one process saves a state, after it has read something")
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
        config, (batch, _, kv_heads, head_dim) = self.model.config, k.shape
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
            blocks=BlockFile(self.file) if self.file else None,
        )
        if cache.past and self.on_choice:
            cache.past.on_choice = partial(self.on_choice, len(self.caches))
        return cache


def _on(device: torch.device, keys: FarKeys) -> FarKeys:
    return keys if keys.k.device == device else replace(keys, k=keys.k.to(device), v=keys.v.to(device))


def backward_in_chunks(
    model: Net,
    tokens: Tokens,
    targets: Tokens | HiddenLoss,
    chunk: int,
    *,
    scale: float = 1.0,
    dtype: str = "fp32",
    group: dist.ProcessGroup | None = None,
    final: bool = True,
    allocate: Callable[..., Tensor] = torch.empty,
    on_chunk: Callable[[], None] | None = None,
) -> Tensor:
    """Add the gradients of `scale * sum of nll` to the parameters' `.grad`; return the sum, in nats, float64.

    tokens, targets: (B, N) as for `Net.nll`, read one chunk at a time. Loss and gradients are the same as from one
    backward pass over all N tokens. Memory holds the activations of `chunk` tokens, and the far rows of the levels that
    chunks cut; the price is one more forward pass. Gradients of far rows are summed in fp32 (fp64 for fp64). `dtype` is
    as in `running.device`. `allocate` makes the memory of far rows and of these sums, as torch.empty does. That memory
    may be on the host while the net is on a GPU (`running.mapped`). With chosen blocks, keys and values of all tokens
    are kept, and the sums of their gradients; what a chunk has chosen is kept, and seen again.

    Another loss, a `HiddenLoss`, can stand in for `targets`: then it takes the place of nll.

    The ranks of a `group` share every chunk; each rank adds and returns its part. `final` says that no other backward
    pass of the step follows, which sharded weights need to know (`running.ranks.fsdp`). `on_chunk` is called after each
    chunk, forward and backward.
    """
    device = tokens.device
    on_chunk = on_chunk or (lambda: None)
    loss = targets if callable(targets) else _next_tokens(model, targets)
    stream = CausalStream(model, group=group, keep=tokens.shape[1], allocate=allocate)
    edges = [*range(0, tokens.shape[1], chunk), tokens.shape[1]]
    chunks = [_Chunk(model, start, stop, group) for start, stop in pairwise(edges)]
    tape = []  # per chunk: the random state that its dropout draws from, its far keys
    for index, part in enumerate(chunks):
        tape.append((random_state(device), [outside.keys for outside in stream.far()]))
        if index < len(chunks) - 1:  # the last one is only computed with its gradient
            with precision(dtype, device):
                stream(tokens[:, part.mine], edges=part.edges)
            on_chunk()
    pasts = [cache.past for cache in stream.caches if cache.past]
    if not pasts and group is None:  # in a group, the exchange of the only chunk makes them
        pasts = new_pasts(model.config)
    del stream
    total = torch.zeros((), dtype=torch.float64, device=device)
    gradients = FarGradients(model.config, tokens.shape[1], group, allocate)
    after: list[Tensor] = []
    while chunks:
        part, (state, far) = chunks.pop(), tape.pop()
        set_random_state(state, device)
        final_backward(model, final and not chunks)
        total += part.backward(tokens[:, part.mine], loss, far, pasts, gradients, scale, dtype)
        for past in pasts:
            past.means = None  # all has been chosen
        after = after or random_state(device)  # the state after the last chunk, as one forward pass leaves it
        on_chunk()
    set_random_state(after, device)
    return total


def new_pasts(config: NetConfig) -> list[Past]:
    """Return the past of a document's first tokens in each layer, which keeps what they choose; [] without a choice."""
    return [Past(config.pattern, keep=1) for _ in range(config.num_layers if config.pattern.chosen else 0)]


def _next_tokens(model: Net, targets: Tokens) -> HiddenLoss:
    return lambda hidden, mine: model.nll(hidden, targets[:, mine]).sum(dtype=torch.float64)


class _Chunk:
    """The positions [start, stop) of a sequence, or with a group this rank's shard of them."""

    def __init__(self, model: Net, start: int, stop: int, group: dist.ProcessGroup | None) -> None:
        self.model, self.start, self.stop = model, start, stop
        self.edges, self.exchange, self.mine = None, None, slice(start, stop)
        if group is not None:
            self.edges = even_edges(start, stop - start, dist.get_world_size(group))
            self.exchange = Exchange(model.config, self.edges, group=group, cached=True)
            self.mine = slice(self.edges[self.exchange.rank], self.edges[self.exchange.rank + 1])

    def backward(
        self,
        tokens: Tensor,
        loss: HiddenLoss,
        far: Sequence[Sequence[FarKeys]],
        pasts: list[Past],
        gradients: FarGradients,
        scale: float,
        dtype: str,
    ) -> Tensor:
        """Compute the chunk again with `far` as leaves, run its backward pass, and return its loss."""
        made: list[tuple[Tensor, Tensor]] = []  # keys and values, per layer
        leaves: list[Outside] = []

        def provide(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Outside:
            if layer == len(made):  # otherwise activation checkpointing computes it again
                made.append((k, v))
                keys, past = [gradients.leaves(layer, x, k.device) for x in far[layer]], None
                if pasts:
                    if self.exchange and pasts[layer].position == self.start:  # the last chunk: nothing is there yet
                        for shard in self.exchange.other_shards(q, k, v)[0]:
                            pasts[layer].append(*shard)
                    past = gradients.past(layer, pasts[layer], self.mine.start, k)
                leaves.append(Outside(keys, past))
            outside = leaves[layer]
            if not self.exchange:
                return outside
            if outside.past:
                return Outside([*outside.keys, *self.exchange.run(k, v, outside.past)[0]], outside.past)
            of_chunk = self.exchange(layer, q, k, v)
            return Outside([*outside.keys, *of_chunk.keys], of_chunk.past)

        with precision(dtype, tokens.device):
            hidden = self.model(tokens, start=self.mine.start, far=provide)
            total = loss(hidden, self.mine)
        roots, grads = [total], [torch.full_like(total, scale)]
        for layer, (k, v) in enumerate(made):
            found = gradients.of_shard(layer, self.start, self.stop, self.mine.start, k)
            if found is not None:
                for made_here, gradient in zip((k, v), found, strict=True):
                    if made_here.requires_grad:  # otherwise no trained weight made it
                        roots.append(made_here)
                        grads.append(gradient.to(made_here.dtype))
        torch.autograd.backward(roots, grads)
        return total.detach()
