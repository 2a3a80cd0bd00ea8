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
from longnet_cli.models.hf.trying import attending, body, hidden_states

# frequencies that depend on the longest sequence of a batch: a document's numbers would depend on the other rows
_ROPE_OF_LENGTH = ("dynamic", "longrope")

_PROBE, _KEYS = "dilated_probe", "_dilated_probe_keys"
_POSITION, _DISTANCE = 3, 61  # of the tried keys: small, as transformers' phases are float32
_LEARNED = ("position_embeddings", "embed_positions", "wpe")  # names of learned tables


FLOAT32_POSITIONS = (
    1 << 20
)  # up to here, float32 phases are better than noise; the limit if ours do not fit

_EXACT = "_exact_phases"  # attribute of a module that already has them


def make_phases_exact(model: PreTrainedModel) -> bool:
    """Make a model's modules compute rotary phases in float64 beyond its trained length, in place.

    Up to `max_position_embeddings`, the phases stay the same. Returns True if this works for all rotations of the
    model, or it has none; False for rotations in several dimensions, in complex numbers, or that depend on the length.
    """
    makers = [
        m
        for m in model.modules()
        if any(name.endswith("inv_freq") for name, _ in m.named_buffers(recurse=False))
    ]
    ropes = rope_parameters(model.config)
    if not makers or {rope.get("rope_type") for rope in ropes} & {*_ROPE_OF_LENGTH}:
        return not ropes[0]
    trained = getattr(model.config, "max_position_embeddings", None) or FLOAT32_POSITIONS
    for maker in makers:
        if getattr(maker, _EXACT, False):
            continue
        phases = _ExactPhases.of(
            maker, trained, getattr(model.config, "layer_types", None) or [None]
        )
        if phases is None:
            return False
        maker.register_forward_hook(phases, with_kwargs=True)
        setattr(maker, _EXACT, True)
    return True


class _ExactPhases:
    """A forward hook on a module `(x, position_ids, ...) -> (cos, sin)`, each (B, N, columns): makes both exact."""

    def __init__(
        self, names: inspect.Signature, trained: int, tables: dict[Any, tuple[Tensor, float]]
    ) -> None:
        self.names, self.trained, self.tables = names, trained, tables

    @classmethod
    @torch.no_grad()
    def of(
        cls, maker: nn.Module, trained: int, layer_types: Sequence[str | None]
    ) -> _ExactPhases | None:
        """Find the frequency of each column, for each type of layer, by trying a few positions; None if none fit."""
        names = inspect.signature(maker.forward)
        if not {"x", "position_ids"} <= names.parameters.keys():
            return None
        rates = [
            x
            for name, x in maker.named_buffers(recurse=False)
            if name.endswith("inv_freq") and x.dim() == 1
        ]
        by_type = "layer_type" in names.parameters
        tables = {}
        for kind in {*layer_types} if by_type else {None}:
            places = (
                torch.tensor([[0, 1, _POSITION, _DISTANCE]], device=rates[0].device)
                if rates
                else None
            )
            if places is None or places.is_meta:
                return None
            more = {"layer_type": kind} if by_type else {}
            try:
                made = maker.forward(
                    x=rates[0].new_zeros(1, 1, 1, dtype=torch.float32), position_ids=places, **more
                )
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
                return None  # it takes another kind of positions
            if not (
                isinstance(made, tuple) and len(made) == 2 and made[0].shape[:2] == places.shape
            ):
                return None
            scale = made[0][0, 0, 0].item()
            layouts = [y for x in rates for y in (torch.cat([x, x]), x.repeat_interleave(2), x)]
            for columns in (y.double() for y in layouts if len(y) == made[0].shape[-1]):
                phase = places[0].double()[:, None] * columns
                if all(
                    _equal(x[0], scale * y)
                    for x, y in zip(made, (phase.cos(), phase.sin()), strict=True)
                ):
                    tables[kind] = columns.cpu(), scale
                    break
            else:
                return None
        return cls(names, trained, tables)

    def __call__(
        self,
        maker: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        given = self.names.bind(*args, **kwargs).arguments
        positions = given["position_ids"]
        if (
            positions.dim() == made[0].dim()
        ):  # of several dimensions (mrope): they are the same for text
            positions = positions[0]
        columns, scale = self.tables[given.get("layer_type")]
        phase = positions.double()[..., None] * columns.to(positions.device)
        phase = phase.remainder(2 * math.pi)
        own = (positions < self.trained)[..., None]
        cos, sin = (scale * x for x in (phase.cos(), phase.sin()))
        return torch.where(own, made[0], cos.to(made[0].dtype)), torch.where(
            own, made[1], sin.to(made[1].dtype)
        )


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
        phase = distances.double()[:, None] * self.frequencies.to(keys.device)
        phase = phase.remainder(2 * math.pi)[:, None, None, :]  # (S, 1, 1, P)
        wide = keys if keys.dtype is torch.float64 else keys.float()
        cos, sin = phase.cos().to(wide.dtype), phase.sin().to(wide.dtype)
        pairs, rest = wide.split([2 * phase.shape[-1], wide.shape[-1] - 2 * phase.shape[-1]], -1)
        pairs = pairs.unflatten(-1, (2, -1) if self.axis == -2 else (-1, 2))
        turned = pairs * cos.unsqueeze(self.axis)
        turned.select(self.axis, 0).addcmul_(pairs.select(self.axis, 1), sin, value=-1)
        turned.select(self.axis, 1).addcmul_(pairs.select(self.axis, 0), sin)
        turned = turned.flatten(-2)
        return (torch.cat([turned, rest], -1) if rest.shape[-1] else turned).to(keys.dtype)


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
    frequencies = [x for key, x in body(model).named_buffers() if key.endswith("inv_freq")]
    tables = [
        m
        for key, m in body(model).named_modules()
        if key.endswith(_LEARNED) and isinstance(m, nn.Embedding)
    ]
    if tables and not frequencies:
        return dict.fromkeys(_keys(model))
    if "position_ids" not in inspect.signature(body(model).forward).parameters:
        raise ConfigError(f"{name} takes no position_ids: how it turns its keys cannot be tried")
    before, after = (_keys(model, position) for position in (_POSITION, _POSITION + _DISTANCE))
    turn_of: dict[nn.Module, Turn | None] = {}
    for layer, k in before.items():
        size = k.shape[-1]
        fitting = [x for x in frequencies if x.dim() == 1 and 2 * len(x) <= size]
        candidates = [
            Rotation(x.detach().double().cpu(), axis) for x in fitting for axis in (-2, -1)
        ]
        for turn in (*candidates, None):
            if _equal(_moved(k, turn), after[layer]):
                turn_of[layer] = turn
                break
        else:
            raise ConfigError(
                f"{name} turns its keys by position in a way of its own (layer {getattr(layer, 'layer_idx', '?')}): "
                "its keys cannot be moved with it"
            )
    return turn_of


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return `config.rope_parameters`, followed by the tables for each type of layer in it, if any."""
    table = getattr(config, "rope_parameters", None) or {}
    return [table, *(x for x in table.values() if isinstance(x, dict))]


def check_ropes(model: PreTrainedModel) -> None:
    """Raise ConfigError for positions that depend on the length of the sequence."""
    if changing := {rope.get("rope_type") for rope in rope_parameters(model.config)} & {
        *_ROPE_OF_LENGTH
    }:
        what = f"has positions that depend on the sequence's length (rope_type {changing.pop()})"
        raise ConfigError(f"{type(model).__name__} {what}")


def _moved(k: Tensor, turn: Turn | None) -> Tensor:
    """Return keys (B, K, 1, D), turned to `_DISTANCE` positions further on."""
    if turn is None:
        return k
    distances = torch.tensor([_DISTANCE], device=k.device)
    return turn(k.transpose(1, 2)[:, None], distances)[:, 0].transpose(1, 2)


def _equal(actual: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    actual, expected = actual.double(), expected.double()
    return bool((actual - expected).norm() <= tolerance * expected.norm())


@torch.no_grad()
def _keys(model: PreTrainedModel, position: int | None = None) -> dict[nn.Module, Tensor]:
    """Return the rotated keys (B, K, 1, D) of each attention that looks at all tokens, for a few single tokens."""
    table = model.get_input_embeddings().weight
    ids = torch.linspace(0, len(table) - 1, 8, device=table.device).long()[:, None]
    place = (
        {}
        if position is None
        else {"position_ids": torch.full((8, 1), position, device=table.device)}
    )
    with attending(model, _PROBE):
        hidden_states(model, ids, **place)
    return {
        module: module.__dict__.pop(_KEYS) for module in model.modules() if _KEYS in module.__dict__
    }


def _probe(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any
) -> tuple[Tensor, None]:
    """Store the keys and return the token's own value: an attention function for sequences of one token."""
    if options.get("sliding_window") is None:
        module.__dict__[_KEYS] = key
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None


AttentionInterface.register(_PROBE, _probe)
AttentionMaskInterface.register(_PROBE, sdpa_mask)
