"""A cache for `generate()` of transformers that keeps only what a pattern can still see.

    model.generate(**inputs, past_key_values=LongNetCache(model.config))

A layer's `update` returns only the new keys, with the layer itself attached as the memory of all earlier keys. Dilated
attention takes its far keys from this memory, and then adds the new keys to it. Rows of a left-padded batch start at
different columns, so they are at different positions. Rows that start at the same column share a KVCache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from longnet_cli.attention import FarKeys, KVCache, Past, Pattern
from longnet_cli.integrations.transformers_padding import AlignedRows
from longnet_cli.model.net import FarProvider, NetConfig
from longnet_cli.runtime.mapped import mapped_empty

MEMORY = "_longnet_memory"  # attribute of the keys that `update` returns: the `Memory` of all earlier keys


class LongNetCache(hf.DynamicCache):
    """The cache of a causal model with dilated attention, for a batch; `config` is the model's.

    It takes chunks of any size, down to one token. Its memory is `nbytes`, whatever the length; with chosen blocks, it
    keeps the whole past, and grows. Layers with a sliding
    window, or without attention, keep what a DynamicCache keeps for them. Rows can be reordered and repeated, as beam
    search needs. The cache cannot be cropped, as assisted generation would need. Gradients do not flow into it.
    """

    def __init__(self, config: hf.PretrainedConfig) -> None:
        super().__init__(config=config)
        self.layers: list[Any] = [Memory() if type(layer) is DynamicLayer else layer for layer in self.layers]
        self._last: Any = None  # the layer whose `update` was called last

    @property
    def nbytes(self) -> int:
        """The bytes of the layers with dilated attention."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, Memory))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values for a layer's attention. Raises ValueError if an earlier layer was not dilated."""
        if isinstance(self._last, Memory) and self._last.waits:
            raise ValueError(
                "a LongNetCache is for dilated attention: call use_dilated_attention(model, pattern) before"
            )
        self._last = self.layers[layer_idx]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class _CachedRows(NamedTuple):
    """The rows of a batch that start at one column, and their cache."""

    rows: list[int]
    cache: KVCache


class Memory(CacheLayerMixin):
    """The cache of one layer, with a KVCache for each first column of rows. `position` counts the columns so far.

    `waits` is True from the time new keys are handed out until an attention has added them.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.position, self.waits = 0, False
        self._batch = 0
        self._parts: dict[int, _CachedRows] = {}

    @property
    def nbytes(self) -> int:
        return sum(part.cache.nbytes for part in self._parts.values())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        setattr(key_states, MEMORY, self)
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
            if pattern.chosen:
                options["allocate"] = mapped_empty
            members = [*range(batch)] if rows.members is None else rows.members
            self._parts[first] = _CachedRows(members, KVCache(pattern, batch, num_heads, k.shape[3], **options))
        part = self._parts[first]
        if (
            len(part.rows) != batch
            or rows.members not in (None, part.rows)
            or part.cache.position != max(0, self.position - first)
        ):
            raise ValueError("the padding of a batch changed while it was cached: pass the whole attention_mask")
        return part.cache

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

        def far(index: int, q: Tensor, k: Tensor, v: Tensor) -> Sequence[FarKeys | Past]:
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
