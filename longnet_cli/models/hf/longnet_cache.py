"""A cache for `generate()` of transformers that keeps only what a pattern can still see.

    model.generate(**inputs, past_key_values=LongNetCache(model.config))

What was read can be saved, loaded and forked: read once, ask often.

    cache.save("book.state", model)
    cache = LongNetCache.load("book.state", model)
    model.generate(book_and_question, past_key_values=cache.fork())

`update` returns only a layer's new keys, with the cache itself attached. Dilated attention takes its far keys from the
memory of the layer, and then adds the new keys to it. A layer that reuses the keys of an earlier one remembers them,
too. Rows of a left-padded batch start at different columns, so they are at different positions. Rows that start at the
same column share a KVCache.

B batch, N new tokens, L columns (the new tokens and all before them).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from longnet_cli.attention import KVCache, Outside, Pattern
from longnet_cli.attention.notation import format_pattern, parse_pattern
from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.nets.config import NetConfig
from longnet_cli.nets.named_blocks import NamedBlocks, ReadText, named_blocks
from longnet_cli.nets.net import FarProvider, Net
from longnet_cli.nets.weights import digest_of
from longnet_cli.running.mapped import mapped_empty
from longnet_cli.running.saved_state import (
    READER,
    layer_tensors,
    of_layer,
    read_state,
    reader_facts,
    restoring,
    write_state,
)

_SIZES = ("batch", "num_heads", "head_dim")  # of a cache, in a saved state


class AlignedRows(NamedTuple):
    """Rows of a batch that start at column `first`, and so are at the same position.

    `members` None means all rows. `skip` new columns come before their first new token, which is at position `start`.
    `lengths` is the number of real tokens of each row in this call; None means all.
    """

    members: list[int] | None
    first: int
    skip: int
    start: int
    lengths: Sequence[int] | Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """Return these rows of a tensor (B, ...)."""
        return x if self.members is None else x[self.members]


def by_rows(
    columns: Tensor | None, before: int, shape: Sequence[int], compute: Callable[[AlignedRows], Tensor]
) -> Tensor | None:
    """Return `compute` of all groups of rows, (rows, N - skip, ...), put together: (B, N, ...), with zeros elsewhere.

    `shape` begins with (B, N): new tokens after `before` columns. `columns` is the result of `columns_of`. Rows without
    a token yet are left out. Returns None if no row has a token.
    """
    if columns is None:
        return compute(AlignedRows(None, 0, 0, before, None))
    if torch.compiler.is_compiling():  # values are unknown there: padding must be on the right
        stops = columns[:, 1]
        return compute(AlignedRows(None, 0, 0, before, stops.where(stops < 0, (stops - before).clamp(min=0))))
    groups: dict[int, list[int]] = {}
    spans = columns.tolist()
    for row, (first, stop) in enumerate(spans):
        if first < stop:
            groups.setdefault(first, []).append(row)
    out = None
    for first, members in groups.items():
        begin = max(first, before)
        lengths = [max(0, spans[row][1] - begin) for row in members]
        known = None if all(n == before + shape[1] - begin for n in lengths) else lengths
        if len(members) == shape[0] and begin == before:
            return compute(AlignedRows(None, first, 0, before - first, known))
        computed = compute(AlignedRows(members, first, begin - before, begin - first, known))
        out = computed.new_zeros(*shape[:2], *computed.shape[2:]) if out is None else out
        out[members, begin - before :] = computed
    return out


def columns_of(tokens: Tensor) -> Tensor | None:
    """Return columns [first, stop) of each row's tokens, (B, 2), from a mask (B, L) that is True at tokens.

    Returns None if all are tokens. A row without a token starts at L. In a compiled graph, `stop` is -1 for padding
    that is not on the right, which the attention call refuses. Otherwise, padding between tokens raises ValueError.
    """
    counts, columns = tokens.sum(-1), torch.arange(tokens.shape[-1], device=tokens.device)
    if torch.compiler.is_compiling():
        right = (tokens == (columns < counts[:, None])).all(-1)
        return torch.stack([torch.zeros_like(counts), counts.where(right, -1)], -1)
    first = tokens.int().argmax(-1).where(counts > 0, tokens.shape[-1])
    stop = first + counts
    whole = (tokens == ((columns >= first[:, None]) & (columns < stop[:, None]))).all(-1)
    spans = torch.stack([first, stop, whole], -1).cpu()
    if not spans[:, 2].all():
        row = int(spans[:, 2].logical_not().nonzero()[0])
        raise ValueError(
            f"row {row} has padding between its tokens: pad on the left or on the right, and prompts of generate() on "
            'the left (tokenizer.padding_side = "left")'
        )
    return None if counts.numel() and bool((spans[:, 1] - spans[:, 0] == tokens.shape[-1]).all()) else spans[:, :2]


CACHE = "_longnet_cache"  # attribute of the keys that `update` returns: the `LongNetCache` with all earlier keys


class LongNetCache(hf.DynamicCache):
    """The cache of a causal model with dilated attention, for a batch; `config` is the model's.

    It takes chunks of any size, down to one token. Its memory is `nbytes`, whatever the length; with chosen blocks, it
    keeps the whole past, and grows. Layers with a sliding window, or without attention, keep what a DynamicCache keeps
    for them. Rows can be reordered and repeated, as beam search needs. The cache cannot be cropped, as assisted
    generation would need. Gradients do not flow into it.
    """

    def __init__(self, config: hf.PretrainedConfig) -> None:
        own = copy.copy(config.get_text_config(decoder=True))
        own.num_kv_shared_layers = 0  # transformers has no cache for a layer that reuses another's keys
        super().__init__(config=own)
        self.layers: list[Any] = [
            Memory(number) if type(layer) is DynamicLayer else layer for number, layer in enumerate(self.layers)
        ]
        self._last: Any = None  # the layer whose `update` was called last
        self._ids: list[Tensor] | None = []  # all columns so far, (B, n) each; None after vectors
        self._texts: dict[int, ReadText] = {}  # of the rows that chosen blocks were named for

    @property
    def nbytes(self) -> int:
        """The bytes of the layers with dilated attention."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, Memory))

    def fork(self) -> LongNetCache:
        """Return another cache that has read the same tokens: what one reads from now on is not in the other.

        Blocks of the past are shared; other rows are copied.
        """
        new = copy.copy(self)
        new.layers = [layer.fork() if isinstance(layer, Memory) else copy.copy(layer) for layer in self.layers]
        new._ids = self._ids and [*self._ids]
        new._texts = {row: text.fork() for row, text in self._texts.items()}
        return new

    def read(self, ids: Tensor | None) -> None:
        """Note the ids (B, N) of new columns, before the layers get their keys; None for vectors."""
        if ids is None or self._ids is None:
            self._ids, self._texts = None, {}
            return
        self._ids.append(ids)
        for row, text in self._texts.items():
            text.append(ids[row])

    def named(self, rows: AlignedRows, tokens: Tensor, pattern: Pattern) -> NamedBlocks | None:
        """Return what the new tokens (rows, n) of some rows name, for chosen blocks; None where ids are unknown."""
        if self._ids is None or not pattern.chosen:
            return None
        members = range(len(tokens)) if rows.members is None else rows.members
        for row in members:
            if row not in self._texts:
                self._texts[row] = ReadText([torch.cat([ids[row] for ids in self._ids])[rows.first :]])
        return named_blocks(pattern, tokens, [self._texts[row] for row in members])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._ids:
            self._select([row for row in range(len(self._ids[0])) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self._ids:
            self._select(torch.arange(len(self._ids[0]))[indices.cpu()].tolist())

    def reset(self) -> None:
        super().reset()
        self._ids, self._texts = [], {}

    def _select(self, rows: list[int]) -> None:
        """Replace row i of the texts with row `rows[i]`."""
        if self._ids:
            self._ids = [torch.cat(self._ids, 1)[rows]]
            self._texts = {new: self._texts[row].fork() for new, row in enumerate(rows) if row in self._texts}

    def save(self, folder: str | Path, model: hf.PreTrainedModel) -> int:
        """Save what was read in a folder, for `load`, in place of the state that it holds; return the bytes.

        Raises ConfigError for layers that are not dilated, for a padded batch, if nothing was read, and as
        `running.saved_state.write_state` does, as it raises LongNetError.
        """
        caches = [layer.whole() if isinstance(layer, Memory) else None for layer in self.layers]
        known = [cache for cache in caches if cache]
        if not known or len(known) < len(caches):
            raise ConfigError(f"{folder}: a cache is saved after it has read rows without padding, in dilated layers")
        cache = known[0]
        facts: dict[str, Any] = {
            **_origin(model, cache.pattern),
            "dtype": str(cache.dtype).removeprefix("torch."),
            "tokens": cache.position,
            "sizes": {name: getattr(cache, name) for name in _SIZES},
            "kv_heads": cache.kv_heads,
        }
        ids = [("ids", torch.cat(self._ids, 1).int())] if self._ids and cache.pattern.chosen else []
        return write_state(Path(folder), facts, chain(ids, layer_tensors(known)))

    @classmethod
    def load(cls, folder: str | Path, model: hf.PreTrainedModel) -> LongNetCache:
        """Return a cache that has read what `save` has saved; it never changes the folder.

        Chosen blocks are mapped from there. Raises ConfigError for a state of another model or pattern, DataError for a
        damaged one.
        """
        given = _origin(model)
        facts, saved = read_state(Path(folder), given)
        sizes = facts["sizes"] if isinstance(facts.get("sizes"), dict) else {}
        numbers = [facts.get("kv_heads"), *(sizes.get(name) for name in _SIZES)]
        if not all(type(number) is int and 0 < number < 1 << 16 for number in numbers):
            raise DataError(f"{folder}: not a state that LongNetCache.save has written")
        new, pattern = cls(model.config), parse_pattern(given.get("longnet.pattern", facts["longnet.pattern"]))
        options = {"kv_heads": facts["kv_heads"], "dtype": getattr(torch, facts["dtype"]), "device": model.device}
        with restoring(Path(folder)):
            for number, layer in enumerate(new.layers):
                cache = _new_cache(pattern, **facts["sizes"], **options, layer=number)
                cache.restore(facts["tokens"], of_layer(saved, number, model.device))
                layer.adopt(cache)
            ids = saved.get("ids")
            if ids is not None and ids.shape != (facts["sizes"]["batch"], facts["tokens"]):
                raise ValueError(f"ids has shape {tuple(ids.shape)}")
            new._ids = None if ids is None else [ids.to(model.device)]
        return new

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values for a layer's attention. Raises ValueError if an earlier layer was not dilated."""
        if isinstance(self._last, Memory) and self._last.waits:
            raise ValueError(
                "a LongNetCache is for dilated attention: call use_dilated_attention(model, pattern) before"
            )
        self._last = self.layers[layer_idx]
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(self._last, Memory):
            setattr(keys, CACHE, self)
        return keys, values

    def memory(self, layer: int, batch: int) -> Memory:
        """Return the memory for an attention with keys of `update`; of `layer` itself if it reuses them."""
        if not getattr(self._last, "waits", False):  # the layer that made them has added them
            self._last = self.layers[layer]
            self._last.expect(batch)
        return self._last


class _CachedRows(NamedTuple):
    """The rows of a batch that start at one column, and their cache."""

    rows: list[int]
    cache: KVCache


class Memory(CacheLayerMixin):
    """The cache of layer `number`, with a KVCache for each first column of rows. `position` counts the columns so far.

    `waits` is True from the time new keys are handed out until an attention has added them.
    """

    is_sliding = False

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.reset()

    def reset(self) -> None:
        self.position, self.waits = 0, False
        self._batch = 0
        self._parts: dict[int, _CachedRows] = {}

    @property
    def nbytes(self) -> int:
        return sum(part.cache.nbytes for part in self._parts.values())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.expect(key_states.shape[0])
        return key_states, value_states

    def expect(self, batch: int) -> None:
        """Announce new keys, of `batch` rows, which an attention is about to add."""
        self.waits, self._batch = True, batch

    def cache(self, rows: AlignedRows, pattern: Pattern, num_heads: int, k: Tensor) -> KVCache:
        """Return the cache of some rows, whose new keys are k (rows, n, K, D).

        Raises ValueError if other rows started there, or if the cache does not hold all their earlier columns.
        """
        first, batch = rows.first, k.shape[0]
        if first not in self._parts:
            options: dict[str, Any] = {"kv_heads": k.shape[2], "dtype": k.dtype, "device": k.device}
            options["layer"] = self.number
            members = [*range(batch)] if rows.members is None else rows.members
            self._parts[first] = _CachedRows(members, _new_cache(pattern, batch, num_heads, k.shape[3], **options))
        part = self._parts[first]
        if (
            len(part.rows) != batch
            or rows.members not in (None, part.rows)
            or part.cache.position != max(0, self.position - first)
        ):
            raise ValueError("the padding of a batch changed while it was cached: pass the whole attention_mask")
        return part.cache

    def whole(self) -> KVCache | None:
        """Return the cache of all rows, if all start at the first column."""
        return self._parts[0].cache if [*self._parts] == [0] else None

    def adopt(self, cache: KVCache) -> None:
        """Become, if new, the memory of all rows of a cache."""
        self.position, self._batch = cache.position, cache.batch
        self._parts[0] = _CachedRows([*range(cache.batch)], cache)

    def fork(self) -> Memory:
        """Return another memory, with the same rows so far."""
        new = copy.copy(self)
        new._parts = {first: part._replace(cache=part.cache.fork()) for first, part in self._parts.items()}
        return new

    def step(self, tokens: int) -> None:
        """Count new columns, after all of them were added to the caches."""
        self.position += tokens
        self.waits = False

    def get_seq_length(self) -> int:
        return self.position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.position + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its older name

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the caches are made with the first keys."""

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError unless there is nothing to remove: rows that no later token can see are gone."""
        if tokens_to_remove:
            raise ValueError("a LongNetCache cannot be cropped: take a DynamicCache for assisted generation")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(self._batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(self._batch)[indices.cpu()].tolist())

    def _select(self, rows: list[int]) -> None:
        """Replace row i of the batch with row `rows[i]`."""
        if not self._parts:
            return
        for first, part in list(self._parts.items()):
            places = {row: place for place, row in enumerate(part.rows)}
            mine = [i for i, row in enumerate(rows) if row in places]
            if mine:
                part.cache.select([places[rows[i]] for i in mine])
                self._parts[first] = _CachedRows(mine, part.cache)
            else:
                del self._parts[first]
        self._batch = len(rows)


def _new_cache(pattern: Pattern, batch: int, num_heads: int, head_dim: int, **options: Any) -> KVCache:
    if pattern.chosen:
        options["allocate"] = mapped_empty
    return KVCache(pattern, batch, num_heads, head_dim, **options)


def _origin(model: hf.PreTrainedModel, pattern: Pattern | None = None) -> dict[str, str]:
    """Return digest and pattern of a model, in the keys of `reader_facts`; by default, the pattern of its config."""
    if isinstance(net := getattr(model, "net", None), Net):
        return reader_facts(net)
    settings = json.loads(model.config.to_json_string(use_diff=False))
    written = settings.pop("dilated_attention", None)
    if pattern is None and written:
        pattern = Pattern(**written)
    for name in ("transformers_version", "_name_or_path"):  # not of the model
        settings.pop(name, None)
    known = {READER: digest_of(json.dumps(settings, sort_keys=True), model.state_dict())}
    return known | ({"longnet.pattern": format_pattern(pattern)} if pattern else {})


class Memories:
    """The layers of a `LongNetCache`, for a batch whose new tokens go through a net one group of rows at a time."""

    def __init__(self, cache: Any, batch: int, config: NetConfig) -> None:
        layers = getattr(cache, "layers", [])
        if len(layers) != config.num_layers or not all(isinstance(layer, Memory) for layer in layers):
            raise ValueError("a LongNet remembers in a LongNetCache(model.config): it takes no other cache")
        self.layers: Sequence[Memory] = layers
        self.config = config
        self._pending: list[Callable[[], None]] = []
        for layer in self.layers:
            layer.expect(batch)

    def of(self, rows: AlignedRows) -> FarProvider:
        """Return the function that gives these rows their far keys."""

        def far(index: int, q: Tensor, k: Tensor, v: Tensor) -> Outside:
            self.append()  # only now: it may overwrite far keys that the previous layer has just read
            cache = self.layers[index].cache(rows, self.config.pattern, self.config.num_heads, k)
            self._pending.append(lambda: cache.append(k, v, q=q))
            return cache.far(k, v)

        return far

    def append(self) -> None:
        """Add the pending keys to their caches."""
        while self._pending:
            self._pending.pop()()

    def step(self, tokens: int) -> None:
        for layer in self.layers:
            layer.step(tokens)
