"""Dilated attention for the models of Hugging Face transformers, under the name "dilated".

    from longnet_cli.integrations.transformers import use_dilated_attention
    use_dilated_attention(model, Pattern.paper())

Importing `longnet_cli.integrations.transformers` registers the name. That also lets the Auto classes open folders that
are saved with a pattern (`pretrained_folder`) and the folders of a LongNet (`auto_longnet`). A new model needs its
pattern and the name:

    write_pattern(config, Pattern.paper())
    model = AutoModelForCausalLM.from_config(config, attn_implementation="dilated")

The model keeps its projections, positions and heads; only its attention over queries, keys and values is replaced.
Causal decoders, bidirectional encoders and grouped-query heads are supported. A batch may be padded on either side.
Generation is exact, with a DynamicCache, or with a LongNetCache in bounded memory. With chosen blocks, only a
LongNetCache will do: it keeps the token ids that name them. Layers that the model itself limits to
a sliding window stay as they are, on torch's sdpa.

A query sees the sinks right before its window (`attention.sinks`). Sinks and chosen blocks are moved by the model's own
rotations (`rotary`), which a config does not describe. With them, a model that is not loaded by AutoModel,
AutoModelForCausalLM or AutoModelForMaskedLM therefore needs `use_dilated_attention` after loading, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from longnet_cli.attention import Outside, Pattern, dilated_attention, far_keys
from longnet_cli.attention.notation import from_fields
from longnet_cli.attention.sinks import Turn
from longnet_cli.attention.spans import far_spans
from longnet_cli.basics.errors import ConfigError, one_line
from longnet_cli.models.hf.auto_longnet import LongNetPreTrainedModel  # registers its classes
from longnet_cli.models.hf.longnet_cache import (
    CACHE,
    AlignedRows,
    LongNetCache,
    by_rows,
    columns_of,
)
from longnet_cli.models.hf.pretrained_folder import ATTENTION_NAME, mark, register, unmark
from longnet_cli.models.hf.rotary import make_phases_exact, turns
from longnet_cli.models.hf.trying import body, hidden_states, layer_kinds, why_not
from longnet_cli.nets.named_blocks import whole_text
from longnet_cli.nets.net import FarProvider, product_dtype

_TURN = "_dilated_turn"  # attribute of an attention module: the `Turn` of its sinks and chosen blocks, or None
_PATTERN = "_dilated_pattern"  # attribute of an attention module: its config, what that says, and the `Pattern`
_CURRENT = "_dilated_pass"  # attribute of a model and of its attention modules: the `_CurrentPass` of all of them

_NO_LAYER = (
    "every layer of this model has a sliding window: there is no global attention to replace"
)
# settings of a config that dilated attention does not support
_REFUSED_CONFIG = {
    "is_encoder_decoder": "an encoder-decoder",
    "add_cross_attention": "cross-attention",
    "attention_chunk_size": "chunked attention",
}
# unsupported options of a layer: they go beyond a plain softmax of scaled scores
_REFUSED_OPTIONS = {"softcap", "s_aux", "position_bias", "head_mask", "output_attentions"}


def use_dilated_attention(
    model: PreTrainedModel, pattern: Pattern | None = None
) -> PreTrainedModel:
    """Make all global attention layers of a model dilated, in place. Its weights stay the same.

    `pattern` goes into `model.config.dilated_attention`, where `save_pretrained` keeps it. None takes the pattern that
    is already there. With sinks or chosen blocks, the model runs on a few tokens, to find out how it rotates its keys,
    and a hook notes the token ids that it reads, which name blocks. Rotary phases become exact at any position, where
    possible (`rotary.make_phases_exact`). Returns the model. It is tried first, once, on a few tokens (`trying`).
    Raises ConfigError for a model that has no pattern, no layer with global attention, attention of another kind, or
    positions by which sinks and chosen blocks cannot be moved.
    """
    config = model.config
    if isinstance(model, LongNetPreTrainedModel):
        raise ConfigError(
            "a LongNet has dilated attention of its own: its config says what a query sees"
        )
    if pattern is not None:
        write_pattern(config, pattern)
    mark(config)
    # by the configuration: a trial of few tokens sees no long window
    if layer_kinds(config) == {"sliding_attention"}:
        raise ConfigError(_NO_LAYER)
    earlier = config._attn_implementation
    turn_of = _tried(model, pattern_of(config), earlier)
    if not hasattr(model, _CURRENT):
        own = "sdpa" if earlier == ATTENTION_NAME else earlier
        setattr(model, _CURRENT, _CurrentPass(model, own))
    for module, turn in turn_of.items():
        setattr(module, _TURN, turn)
        setattr(module, _CURRENT, getattr(model, _CURRENT))
    make_phases_exact(model)
    return model


def _tried(
    model: PreTrainedModel,
    pattern: Pattern,
    earlier: str,
) -> Mapping[nn.Module, Turn | None]:
    """Give a model dilated attention, and return the `turns` of its layers if the pattern moves keys.

    Raises ConfigError, and gives it the `earlier` attention again, if the two do not go together.
    """
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        # transformers only warns, and keeps the old attention
        if model.config._attn_implementation != ATTENTION_NAME:
            raise ConfigError(
                f"{type(model).__name__} does not pick its attention by name: it cannot be made dilated"
            )
        if wrong := why_not(model, "with a pattern", partial(_seeing_all, model)):
            raise ConfigError(wrong)
        return turns(model) if pattern.moves_keys else {}
    except Exception as error:
        with suppress(ValueError):
            model.set_attn_implementation(earlier)
        # transformers refuses an attention that the model does not support
        if isinstance(error, ValueError):
            raise ConfigError(one_line(error)) from None
        raise


class _CurrentPass:
    """The forward pass that a model is in: its token ids, and what these name.

    `own` is the name of the model's own attention.
    """

    def __init__(self, model: PreTrainedModel, own: str) -> None:
        self.own = own
        self.ids: Tensor | None = None  # (B, columns); None for vectors
        self._providers: dict[int, FarProvider] = {}  # of rows, by their first column
        # layers that reuse the keys of others (Gemma 4) need a query for each new key, as attention does
        reuses = "logits_to_keep" in inspect.signature(body(model).forward).parameters
        self._options = {"logits_to_keep": None} if reuses else {}
        self.hook = body(model).register_forward_pre_hook(self._begin, with_kwargs=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Note what a model is called with, before its forward pass, and return what it is to be called with."""
        self.ids = options.get("input_ids", args[0] if args else None)
        self._providers = {}
        return args, options | self._options

    def provider(
        self,
        rows: AlignedRows,
        first: int,
        provider_of: Callable[[Tensor | None], FarProvider],
    ) -> FarProvider:
        """Return what gives each layer what some rows see: `provider_of` their ids from the column `first` on."""
        if rows.column not in self._providers:
            ids = None if self.ids is None else rows.of(self.ids)[:, first:]
            self._providers[rows.column] = provider_of(ids)
        return self._providers[rows.column]


def _seeing_all(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return hidden states of ids (B, N) with a dense pattern, which sees all that the model's own attention sees.

    Raises ConfigError if no layer takes it.
    """
    written = model.config.dilated_attention
    try:
        write_pattern(model.config, Pattern.dense())
        for module in model.modules():
            module.__dict__.pop(_PATTERN, None)
        hidden = hidden_states(model, ids)
    finally:
        model.config.dilated_attention = written
    check_taken(model)
    return hidden


def check_taken(model: PreTrainedModel) -> None:
    """Raise ConfigError if no layer of a model that has run takes a pattern."""
    if not any(_PATTERN in module.__dict__ for module in model.modules()):
        raise ConfigError(_NO_LAYER)


def use_own_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `use_dilated_attention`, in place: restore the earlier attention, and remove the pattern from the config."""
    current: _CurrentPass | None = model.__dict__.pop(_CURRENT, None)
    own = "sdpa"
    if current:
        current.hook.remove()
        own = current.own
    if model.config._attn_implementation == ATTENTION_NAME:
        model.set_attn_implementation(own)
    vars(model.config).pop("dilated_attention", None)
    unmark(model.config)
    return model


def write_pattern(config: Any, pattern: Pattern) -> None:
    """Put a pattern into a config, in place: `config.dilated_attention`, which `pattern_of` reads.

    A folder that is saved with it cannot be opened without this integration (`pretrained_folder`).
    """
    mark(config)
    config.dilated_attention = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(pattern).items()
        if pattern.chosen or not name.startswith("chosen")
    }


def pattern_of(config: Any) -> Pattern:
    """Return the pattern in `config.dilated_attention`, a mapping of `Pattern`'s arguments. Raises ConfigError."""
    for name, what in _REFUSED_CONFIG.items():
        if getattr(config, name, None):
            raise ConfigError(
                f"dilated attention does not serve {what} ({name} in the model's config)"
            )
    arguments = getattr(config, "dilated_attention", None)
    if not isinstance(arguments, Mapping):
        raise ConfigError(
            f"dilated_attention in the model's config: a table of levels is needed, got {arguments!r}: "
            '{"segment_lengths": [...], "dilation_rates": [...]}; call use_dilated_attention(model, pattern)'
        )
    try:
        return from_fields(arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"dilated_attention in the model's config: {error}") from None


def _pattern_of(module: nn.Module) -> Pattern:
    """Return the pattern of an attention, which is made only once, because to read a config of transformers is slow."""
    config: Any = module.config
    of_config, written, pattern = module.__dict__.get(_PATTERN, (None, None, None))
    fields = object.__getattribute__(config, "__dict__")
    if of_config is not config or written != fields.get("dilated_attention"):
        pattern = pattern_of(config)
        module.__dict__[_PATTERN] = config, deepcopy(config.dilated_attention), pattern
        mark(config)  # even if the pattern came from elsewhere, the model is to be saved with it
    return pattern


def dilated_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers: query (B, H, N, D), key and value (B, H_kv, L, D) -> (B, N, H, D).

    `attention_mask` is the result of `dilated_mask`. If L > N, the first L - N keys are cached: they come before the N
    new tokens. Without a cache, a caller of the model may pass `start` and `far`, as for a LongNet, to run one shard of
    a longer sequence, and `documents`, the lengths of the documents in it. `empty` says that the shard has no token, so
    the given one is left out.
    Raises ConfigError for options that dilated attention does not support, ValueError for wrong masks and keys.
    """
    for name in _REFUSED_OPTIONS & options.keys():
        if options[name] is not None and options[name] is not False:
            raise ConfigError(f"dilated attention has no {name}")
    if options.get("sliding_window") is not None:
        options |= {"scaling": scaling, "dropout": dropout, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    pattern = _pattern_of(module)
    _check_call(module, pattern, query, attention_mask, dropout)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # as autocast gives them to sdpa: rotated q and k come in float32, v in the type of its projection
    q, k, v = (x.to(product_dtype(x)).transpose(1, 2) for x in (query, key, value))
    settings: dict[str, Any] = {
        "causal": causal,
        "scale": scaling,
        "turn": module.__dict__.get(_TURN),
    }
    current = module.__dict__.get(_CURRENT)
    call = _Call(getattr(module, "layer_idx", 0), pattern, q, k, v, settings, current)
    if options.get("far") or options.get("documents") is not None:
        return _of_shard(call, options), None
    cache: LongNetCache | None = getattr(key, CACHE, None)
    if cache is None:
        before = k.shape[1] - q.shape[1]
        return _by_rows(call, attention_mask, before, partial(_with_keys, call)), None
    memory = cache.memory(call.layer)
    attend = partial(_with_memory, call, cache, memory.number)
    out = _by_rows(call, attention_mask, memory.position, attend)
    memory.advance(q.shape[1])
    return out, None


def _by_rows(
    call: _Call,
    columns: Tensor | None,
    before: int,
    attend: Callable[[AlignedRows], Tensor],
) -> Tensor:
    """Return what all rows `attend` to (`by_rows`). Raises ValueError if keys cannot be `before` the new tokens."""
    q, k = call.q, call.k
    causal = call.settings["causal"]
    if before < 0 or (before and not causal):
        raise ValueError(
            f"dilated attention is self-attention: {q.shape[1]} queries cannot attend to {k.shape[1]} keys in a "
            f"{'causal' if causal else 'bidirectional'} layer"
        )
    return by_rows(columns, before, q.shape, attend, partial(_zeros, q))


def _zeros(q: Tensor) -> Tensor:
    """Return zeros in the shape of q, with a gradient of zeros to it."""
    everywhere = torch.ones((), dtype=torch.bool, device=q.device)
    return q.masked_fill(everywhere, 0)


class _Call(NamedTuple):
    """A call of a layer's attention: q (B, N, H, D), k and v (B, L, K, D), and settings for `dilated_attention`.

    `current` is the pass, which chosen blocks need.
    """

    layer: Any
    pattern: Pattern
    q: Tensor
    k: Tensor
    v: Tensor
    settings: dict[str, Any]
    current: Any  # a _CurrentPass

    def attend(
        self,
        rows: AlignedRows,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        far: Outside,
    ) -> Tensor:
        """Return attention (rows, n, H, D) of some rows' new tokens."""
        place: dict[str, Any] = {"start": rows.start, "far": far, "lengths": rows.lengths}
        return dilated_attention(q, k, v, self.pattern, **self.settings, **place)


def _of_shard(call: _Call, options: Mapping[str, Any]) -> Tensor:
    """Return attention (B, N, H, D) of a shard, to which a caller of the model gives what lies outside."""
    q, k, v = call.q, call.k, call.v
    is_empty = options.get("empty", False)
    if is_empty:
        q = q[:, :0]
        k = k[:, :0]
        v = v[:, :0]
    settings = call.settings | {"documents": options.get("documents")}
    provide: FarProvider | None = options.get("far")
    if provide:
        settings["start"] = options["start"]
        settings["far"] = provide(call.layer, q, k, v)
    attended = dilated_attention(q, k, v, call.pattern, **settings)
    return F.pad(attended, (0, 0, 0, 0, 0, 1)) if is_empty else attended


def _with_memory(call: _Call, cache: LongNetCache, layer: int, rows: AlignedRows) -> Tensor:
    """Return attention (rows, n, H, D) of rows whose earlier keys, those of `layer`, are in a LongNetCache."""
    new = slice(rows.skip, None)
    q, k, v = (rows.of(x)[:, new] for x in (call.q, call.k, call.v))
    provider_of = cache.part(rows, call.pattern).provider
    if call.pattern.chosen:
        provide = call.current.provider(rows, rows.skip, provider_of)
    else:
        provide = provider_of(None)
    return call.attend(rows, q, k, v, provide(layer, q, k, v))


def _with_keys(call: _Call, rows: AlignedRows) -> Tensor:
    """Return attention (rows, n, H, D) of rows whose earlier keys are given as well."""
    q = rows.of(call.q)[:, rows.skip :]
    k, v = (rows.of(x)[:, rows.column :] for x in (call.k, call.v))
    if call.pattern.chosen:
        if rows.start:
            raise ConfigError(
                f"chosen={call.pattern.chosen}: this cache has no token ids, which name blocks: pass "
                "past_key_values=LongNetCache(model.config), or use_cache=False"
            )
        provide = call.current.provider(rows, rows.column, partial(whole_text, call.pattern))
        far = provide(call.layer, q, k, v)
    else:
        place: dict[str, Any] = {"num_heads": q.shape[2], "queries": range(rows.start, k.shape[1])}
        spans = far_spans(call.pattern, rows.start, k.shape[1], True)
        far = Outside([far_keys(k, v, call.pattern, span, **place) for span in spans])
    k = k[:, rows.start :]
    v = v[:, rows.start :]
    return call.attend(rows, q, k, v, far)


def _check_call(
    module: nn.Module,
    pattern: Pattern,
    query: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
) -> None:
    """Raise ConfigError for what dilated attention does not support, ValueError for another mask than its own."""
    if dropout:
        raise ConfigError(
            f"dilated attention has no dropout of attention weights, and the model's config asks for {dropout}: set "
            "attention_dropout, attn_pdrop or attention_probs_dropout_prob to 0"
        )
    if attention_mask is not None and attention_mask.shape != (query.shape[0], 2):
        raise ValueError(
            f"dilated attention takes a padding mask (batch, tokens), not one of {tuple(attention_mask.shape)}"
        )
    if pattern.moves_keys and _TURN not in module.__dict__:
        what = "chosen blocks" if pattern.chosen else "sinks"
        raise ConfigError(
            f"{what} are moved by a model's own positions: call use_dilated_attention(model) after loading"
        )


def dilated_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **options: Any,
) -> Tensor | None:
    """Return columns [first, stop) of each row's tokens, (B, 2), or None: a mask for transformers that is never N x N.

    Columns count from the first cached token. The result is on the CPU. None means no
    padding. Sliding-window layers get their own mask, for sdpa. Raises ValueError for padding between tokens, for
    packed sequences and other masks of a model's own, and for caches that do not hold all keys so far.
    """
    if local_size is not None:
        shape = (batch_size, q_length, kv_length, q_offset, kv_offset)
        return sdpa_mask(*shape, mask_function, attention_mask, local_size, **options)
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            "dilated attention has no masks but causal, bidirectional and padding: give texts whose position_ids "
            "restart (packed sequences) a row each; torch.export and torch.jit.trace are not supported"
        )
    if kv_offset or q_offset + q_length != kv_length:
        raise ValueError(
            "dilated attention generates with a LongNetCache, with a DynamicCache, or without one (use_cache=False)"
        )
    return columns_of(attention_mask)


AttentionInterface.register(ATTENTION_NAME, dilated_attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, dilated_mask)
register(use_dilated_attention)
