"""A cache for `generate()` of transformers that keeps only what a pattern can still see.

    model.generate(**inputs, past_key_values=LongNetCache(model.config))

What was read can be forked: read once, ask often.

    model.generate(book_and_question, past_key_values=cache.fork())

`update` returns only a layer's new keys, with the cache itself attached. Dilated attention takes its far keys from the
caches of its rows, and then adds the new keys to them. A layer that reuses the keys of an earlier one remembers them,
too. Rows of a left-padded batch start at different columns, so they are at different positions. Rows that start at the
same column share a `LayerCaches`.

B batch, N new tokens, L columns (the new tokens and all before them).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from longnet_cli.attention import KVCache, Pattern
from longnet_cli.running.causal_stream import LayerCaches


class AlignedRows(NamedTuple):
    """Rows of a batch, its `members` in order, that start at `column`, and so are at the same position.

    `skip` new columns come before their first new token, which is at position `start`.
    `lengths` is the number of real tokens of each row in this call.
    """

    members: list[int]
    column: int
    skip: int
    start: int
    lengths: Sequence[int]

    def of(self, x: Tensor) -> Tensor:
        """Return these rows of a tensor (B, ...)."""
        return x if len(self.members) == len(x) else x[self.members]


def by_rows(
    columns: Tensor | None,
    before: int,
    shape: Sequence[int],
    compute: Callable[[AlignedRows], Tensor],
    zeros: Callable[[], Tensor],
) -> Tensor:
    """Return `compute` of all groups of rows, (rows, N - skip, ...), put together: (B, N, ...), with zeros elsewhere.

    `shape` begins with (B, N): new tokens after `before` columns. `columns` is the result of `columns_of`. Rows without
    a token yet are left out. If no row has a token, returns `zeros()`, which have a gradient, of zeros.
    """
    batch, new = shape[:2]
    out = None
    spans = [[0, before + new]] * batch if columns is None else columns.tolist()
    members_of: dict[int, list[int]] = {}
    for row, (column, stop) in enumerate(spans):
        if column < stop:
            members_of.setdefault(column, []).append(row)
    for column, members in members_of.items():
        skip = max(column - before, 0)
        lengths = [max(0, spans[row][1] - before - skip) for row in members]
        computed = compute(
            AlignedRows(
                members=members,
                column=column,
                skip=skip,
                start=before + skip - column,
                lengths=lengths,
            )
        )
        if computed.shape[:2] == (batch, new):
            return computed
        out = computed.new_zeros(batch, new, *computed.shape[2:]) if out is None else out
        out[members, skip:] = computed
    return zeros() if out is None else out


def columns_of(mask: Tensor | None) -> Tensor | None:
    """Return columns [first, stop) of each row's tokens, (B, 2), from a mask (B, L) that is not 0 at tokens.

    Returns None if all are tokens, as they are without a mask. A row without a token starts at L. Padding between
    tokens raises ValueError.
    """
    if mask is None:
        return None
    tokens = mask.bool().cpu()
    counts = tokens.sum(-1)
    columns = torch.arange(tokens.shape[-1])
    first = tokens.int().argmax(-1).where(counts > 0, len(columns))
    stop = first + counts
    inside = (columns >= first[:, None]) & (columns < stop[:, None])
    odd_rows = (tokens != inside).any(-1).nonzero()
    if len(odd_rows):
        raise ValueError(
            f"row {int(odd_rows[0])} has padding between its tokens: pad on the left or on the right, and prompts of "
            'generate() on the left (tokenizer.padding_side = "left")'
        )
    if (counts == len(columns)).all():
        return None
    return torch.stack([first, stop], -1)


_CHANGED = "the padding of a batch changed while it was cached: pass the whole attention_mask"
# the name of a cache in arguments and outputs of transformers: `cache` in newer versions
ARGUMENT = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
CACHE = "_longnet_cache"  # attribute of the keys that `update` returns: the `LongNetCache` with all earlier keys


class _RowCaches(LayerCaches):
    """The state of the `rows` of a batch that start at one column. Their new tokens come at position `start`."""

    def __init__(self, pattern: Pattern, rows: list[int]) -> None:
        super().__init__(pattern)
        self.rows = rows
        self.start = 0

    def of_layer(self, layer: int, q: Tensor, k: Tensor) -> KVCache:
        """Return the cache of a layer. Raises ValueError if it does not hold all earlier columns."""
        cache = super().of_layer(layer, q, k)
        if cache.position != self.start:
            raise ValueError(_CHANGED)
        return cache


class LongNetCache(hf.DynamicCache):
    """The cache of a causal model with dilated attention, for a batch; `config` is the model's.

    It takes chunks of any size, down to one token. Its memory is `nbytes`, whatever the length; with chosen blocks, it
    keeps the whole past, and grows. Layers with a sliding window, or without attention, keep what a DynamicCache keeps
    for them. Rows can be reordered and repeated, as beam search needs. The cache cannot be cropped, as assisted
    generation would need. Gradients do not flow into it.
    """

    def __init__(self, config: hf.PretrainedConfig) -> None:
        of_text = copy.copy(config.get_text_config(decoder=True))
        # Layers that reuse the keys of others get a cache too. Older versions cut as many layers off the end.
        newer = hasattr(of_text, "kv_sharing_modes")
        of_text.num_kv_shared_layers = 0 if newer else -of_text.num_hidden_layers
        super().__init__(config=of_text)
        self.layers: list[Any] = [
            Memory(number) if type(layer) is DynamicLayer else layer
            for number, layer in enumerate(self.layers)
        ]
        self._last: Any = None  # the layer whose `update` was called last
        self._batch = 0
        self._parts: dict[int, _RowCaches] = {}  # by the first column

    @property
    def nbytes(self) -> int:
        """The bytes of the layers with dilated attention."""
        return sum(part.cache_bytes for part in self._parts.values())

    def fork(self) -> LongNetCache:
        """Return another cache that has read the same tokens: what one reads from now on is not in the other."""
        new = copy.copy(self)
        new.layers = [copy.copy(layer) for layer in self.layers]
        new._last = None
        new._parts = {column: part.fork() for column, part in self._parts.items()}
        return new

    def part(self, rows: AlignedRows, pattern: Pattern) -> LayerCaches:
        """Return what was read of some rows, to which new tokens come. Raises ValueError if others started there."""
        part = self._parts.setdefault(rows.column, _RowCaches(pattern, rows.members))
        if part.rows != rows.members:
            raise ValueError(_CHANGED)
        part.start = rows.start
        return part

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i of the batch with row `beam_idx[i]`."""
        super().reorder_cache(beam_idx)
        rows = beam_idx.tolist()
        self._batch = len(rows)
        for column, part in [*self._parts.items()]:
            new_rows = [new for new, row in enumerate(rows) if row in part.rows]
            if new_rows:
                part.select([part.rows.index(rows[new]) for new in new_rows])
                part.rows = new_rows
            else:
                del self._parts[column]

    def reset(self) -> None:
        super().reset()
        self._parts = {}

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values for a layer's attention. Raises ValueError if an earlier layer was not dilated."""
        if isinstance(self._last, Memory) and self._last.waits:
            raise ValueError(
                "a LongNetCache is for dilated attention: call use_dilated_attention(model, pattern) before"
            )
        self._last = self.layers[layer_idx]
        self._batch = len(key_states)
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(self._last, Memory):
            setattr(keys, CACHE, self)
        return keys, values

    def memory(self, layer: int) -> Memory:
        """Return the memory that an attention with keys of `update` adds to; of `layer` itself if it reuses them."""
        if not getattr(self._last, "waits", False):  # the layer that made them has added them
            self._last = self.layers[layer]
        return self._last

    def expect(self, batch: int) -> None:
        """Announce new tokens of `batch` rows, for a model that calls no `update`."""
        self._batch = batch

    def advance(self, tokens: int) -> None:
        """Count new columns in all layers, for such a model."""
        for layer in self.layers:
            layer.advance(tokens)


class Memory(CacheLayerMixin):
    """The view that transformers has of the dilated layer `number`: the columns so far are its `position`.

    `waits` is True from the time new keys are handed out until an attention has added them.
    """

    is_sliding = False

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.reset()

    def reset(self) -> None:
        self.position = 0
        self.waits = False

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        self.waits = True
        return key_states, value_states

    def advance(self, tokens: int) -> None:
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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Do nothing: the LongNetCache reorders the rows of all its caches."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the caches are made with the first keys."""

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError unless there is nothing to remove: rows that no later token can see are gone."""
        if tokens_to_remove:
            raise ValueError(
                "a LongNetCache cannot be cropped: take a DynamicCache for assisted generation"
            )
