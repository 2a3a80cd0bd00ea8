"""The rotations of keys by position in Hugging Face models, for sinks, chosen blocks and far positions.

No setting says where a model rotates its keys, or which numbers of a head make a pair, so the model is run on a few
tokens to find out. A single token attends only to itself. Without a table of learned positions, its hidden states do
not depend on its position, so its keys at two positions differ by exactly one rotation, in every layer. A layer that
does not rotate its keys (SmolLM3 has some) keeps its sinks as they are, which is exact. A model with learned positions
keeps the sinks of all layers as they are. So it is with chosen blocks. A model that fits no known rotation is refused.

Phases of transformers are float32: at position 10^6 the fastest pair is off by 0.06, at 10^8 it is noise. Beyond the
length that a model was trained on, `make_phases_exact` takes float64 phases, modulo 2 pi, as a LongNet does.

B batch, S segments, n sinks, K key heads, D head_dim.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from longnet_cli.attention.sinks import Turn
from longnet_cli.basics.errors import ConfigError
from longnet_cli.models.hf.trying import attending, body, hidden_states, layer_kinds

# frequencies that depend on the longest sequence of a batch: a document's numbers would depend on the other rows
_ROPE_OF_LENGTH = {"dynamic", "longrope"}

_PROBE = "dilated_probe"
_KEYS = "_dilated_probe_keys"
_TRIED = 8  # tokens, each alone
# of the tried keys: small, as transformers' phases are float32
_POSITION = 3
_DISTANCE = 61
_LEARNED = ("position_embeddings", "embed_positions", "wpe")  # names of learned tables


# up to here, float32 phases are better than noise; the limit if ours do not fit
FLOAT32_POSITIONS = 1 << 20

_EXACT = "_exact_phases"  # attribute of a module that already has them


def make_phases_exact(model: PreTrainedModel) -> bool:
    """Make a model's modules compute rotary phases in float64 beyond its trained length, in place.

    Up to `max_position_embeddings`, the phases stay the same. Returns True if this works for all rotations of the
    model, or it has none; False for rotations in several dimensions, in complex numbers, or that depend on the length.
    """
    ropes = rope_parameters(model.config)
    makers = [module for module in model.modules() if _rates(module)]
    if not makers or _changing(ropes):
        return not ropes[0]
    trained = getattr(model.config, "max_position_embeddings", None) or FLOAT32_POSITIONS
    for maker in makers:
        if not hasattr(maker, _EXACT):
            try:
                phases = _ExactPhases.of(maker, trained, layer_kinds(model.config))
            except _UnknownPhasesError:
                return False
            maker.register_forward_hook(phases, with_kwargs=True)
            setattr(maker, _EXACT, True)
    return True


def _rates(module: nn.Module, *, recurse: bool = False) -> list[Tensor]:
    """Return a module's own buffers of rotary frequencies, or with `recurse` those of all modules in it."""
    buffers = module.named_buffers(recurse=recurse)
    return [buffer for name, buffer in buffers if name.endswith("inv_freq")]


class _UnknownPhasesError(Exception):
    """A module whose phases are not products of positions and its frequencies."""


@dataclass(eq=False)
class _ExactPhases:
    """A forward hook on a module `(x, position_ids, ...) -> (cos, sin)`, each (B, N, columns): makes both exact.

    `tables` has the frequency of each column, and the factor of both, for each type of layer.
    """

    signature: inspect.Signature  # of the module
    trained: int
    tables: dict[Any, tuple[Tensor, float]]

    @classmethod
    @torch.no_grad()
    def of(cls, maker: nn.Module, trained: int, kinds: set[str]) -> _ExactPhases:
        """Find the frequency of each column, for each type of layer. Raises _UnknownPhasesError if none fit."""
        signature = inspect.signature(maker.forward)
        if "layer_type" in signature.parameters:
            tables: dict[Any, Any] = {kind: _columns_of(maker, layer_type=kind) for kind in kinds}
        else:
            tables = {None: _columns_of(maker)}
        return cls(signature, trained, tables)

    def __call__(
        self,
        maker: nn.Module,
        args: tuple[Any, ...],
        options: dict[str, Any],
        phases: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        cos, sin = phases
        arguments = self.signature.bind(*args, **options).arguments
        positions = arguments["position_ids"]
        if positions.dim() == cos.dim():
            positions = positions[0]  # of several dimensions (mrope): they are the same for text
        columns, scale = self.tables[arguments.get("layer_type")]
        phase = positions.double()[..., None] * columns.to(positions.device)
        phase = phase.remainder(2 * math.pi)
        exact_cos = (scale * phase.cos()).to(cos.dtype)
        exact_sin = (scale * phase.sin()).to(sin.dtype)
        as_trained = (positions < self.trained)[..., None]
        return torch.where(as_trained, cos, exact_cos), torch.where(as_trained, sin, exact_sin)


def _columns_of(maker: nn.Module, **options: Any) -> tuple[Tensor, float]:
    """Return the frequencies of a module's columns, and the factor of its cos and sin, by trying a few positions.

    Raises _UnknownPhasesError if none fit.
    """
    rates = [rate for rate in _rates(maker) if rate.dim() == 1 and not rate.is_meta]
    if not rates:
        raise _UnknownPhasesError
    positions = torch.tensor([[0, 1, _POSITION, _DISTANCE]], device=rates[0].device)
    x = rates[0].new_zeros(1, 1, 1, dtype=torch.float32)
    try:
        cos, sin = maker.forward(x=x, position_ids=positions, **options)
        scale = cos[0, 0, 0].item()
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        # it takes another kind of positions, or makes something else
        raise _UnknownPhasesError from None
    for rate in rates:
        for columns in (torch.cat([rate, rate]), rate.repeat_interleave(2), rate):
            phase = positions[0].double()[:, None] * columns.double()
            if _equal(cos[0], scale * phase.cos()) and _equal(sin[0], scale * phase.sin()):
                return columns.double().cpu(), scale
    raise _UnknownPhasesError


@dataclass(frozen=True)
class Rotation:
    """A `Turn`: the first 2 P numbers of a head are P pairs, and pair j turns by `frequencies[j]` per position.

    With `axis` -2, number j and number j + P are a pair (Llama, GPT-NeoX); with -1, two neighbours are (GPT-J, GLM). A
    factor on the rotated keys (yarn) stays as it is. Phases are float64, products float32 or wider; the keys keep their
    type.
    """

    frequencies: Tensor  # (P,) float64 on the CPU
    axis: int

    def __call__(self, keys: Tensor, distances: Tensor) -> Tensor:
        """Return the keys (B, S, n, K, D), turned by distances (S,)."""
        frequencies = self.frequencies.to(keys.device)
        phase = (distances.double()[:, None] * frequencies).remainder(2 * math.pi)
        phase = phase[:, None, None, :]  # (S, 1, 1, P)
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        cos = phase.cos().to(wide.dtype)
        sin = phase.sin().to(wide.dtype)
        size = 2 * len(frequencies)
        turning = wide[..., :size]
        rest = wide[..., size:]
        two_by_two = (2, -1) if self.axis == -2 else (-1, 2)
        pairs = turning.unflatten(-1, two_by_two)
        first, second = pairs.unbind(self.axis)
        turned = pairs * cos.unsqueeze(self.axis)
        turned.select(self.axis, 0).addcmul_(second, sin, value=-1)
        turned.select(self.axis, 1).addcmul_(first, sin)
        turned = turned.flatten(-2)
        if rest.shape[-1]:
            turned = torch.cat([turned, rest], -1)
        return turned.to(keys.dtype)


def turns(model: PreTrainedModel) -> dict[nn.Module, Turn | None]:
    """Return, for each attention that looks at all tokens, the rotation of its keys; None if it does not rotate them.

    Runs `model` on a few tokens, once or twice. Raises ConfigError, with the model's name, for positions that it cannot
    follow.
    """
    name = type(model).__name__
    ropes = rope_parameters(model.config)
    if any(rope.get("mrope_section") for rope in ropes):
        raise ConfigError(
            f"{name} has positions in several dimensions (mrope), in which keys cannot be moved"
        )
    check_ropes(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(f"{name} has no weights yet: how it turns its keys cannot be tried")
    learned = any(
        path.endswith(_LEARNED) and isinstance(module, nn.Embedding)
        for path, module in body(model).named_modules()
    )
    frequencies = _rates(body(model), recurse=True)
    if learned and not frequencies:
        return dict.fromkeys(_keys(model))
    if "position_ids" not in inspect.signature(body(model).forward).parameters:
        raise ConfigError(f"{name} takes no position_ids: how it turns its keys cannot be tried")
    device = model.get_input_embeddings().weight.device
    positions = torch.full((_TRIED, 1), _POSITION, device=device)
    before = _keys(model, position_ids=positions)
    after = _keys(model, position_ids=positions + _DISTANCE)
    rates = [x.detach().double().cpu() for x in frequencies if x.dim() == 1]
    turn_of: dict[nn.Module, Turn | None] = {}
    for layer, k in before.items():
        size = k.shape[-1]
        rotations = [Rotation(x, axis) for x in rates for axis in (-2, -1) if 2 * len(x) <= size]
        fitting = [turn for turn in (*rotations, None) if _equal(_moved(k, turn), after[layer])]
        if not fitting:
            raise ConfigError(
                f"{name} turns its keys by position in a way of its own (layer {getattr(layer, 'layer_idx', '?')}): "
                "its keys cannot be moved with it"
            )
        turn_of[layer] = fitting[0]
    return turn_of


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return `config.rope_parameters`, followed by the tables for each type of layer in it, if any."""
    table = getattr(config, "rope_parameters", None) or {}
    return [table, *(x for x in table.values() if isinstance(x, dict))]


def check_ropes(model: PreTrainedModel) -> None:
    """Raise ConfigError for positions that depend on the length of the sequence."""
    if changing := _changing(rope_parameters(model.config)):
        raise ConfigError(
            f"{type(model).__name__} has positions that depend on the sequence's length (rope_type {changing.pop()})"
        )


def _changing(ropes: Sequence[dict[str, Any]]) -> set[str]:
    """Return the types of rotations among these that depend on the length of the sequence."""
    return {rope.get("rope_type", "") for rope in ropes} & _ROPE_OF_LENGTH


def _moved(k: Tensor, turn: Turn | None) -> Tensor:
    """Return keys (B, K, 1, D), turned to `_DISTANCE` positions further on."""
    if turn is None:
        return k
    distances = torch.tensor([_DISTANCE], device=k.device)
    return turn(k.transpose(1, 2)[:, None], distances)[:, 0].transpose(1, 2)


def _equal(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    actual = actual.double()
    expected = expected.double()
    return bool((actual - expected).norm() <= tolerance * expected.norm())


@torch.no_grad()
def _keys(model: PreTrainedModel, **place: Tensor) -> dict[nn.Module, Tensor]:
    """Return the rotated keys (B, K, 1, D) of each attention that looks at all tokens, for single tokens at a place."""
    table = model.get_input_embeddings().weight
    ids = torch.linspace(0, len(table) - 1, _TRIED, device=table.device).long()[:, None]
    with attending(model, _PROBE):
        hidden_states(model, ids, **place)
    return {
        module: module.__dict__.pop(_KEYS) for module in model.modules() if _KEYS in module.__dict__
    }


def _probe(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    **options: Any,
) -> tuple[Tensor, None]:
    """Store the keys and return the token's own value: an attention function for sequences of one token."""
    if options.get("sliding_window") is None:
        module.__dict__[_KEYS] = key
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None


AttentionInterface.register(_PROBE, _probe)
AttentionMaskInterface.register(_PROBE, sdpa_mask)
