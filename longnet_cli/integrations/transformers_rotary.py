"""How the models of transformers turn their keys by position, which sinks need (`attention.sinks`).

Nothing says where a model rotates, or which numbers of a head make a pair; so it is tried. One token attends to itself
alone: its hidden states depend on no position but through a table of learned ones, and its keys at two positions
differ by exactly one turn, in every layer. A layer whose keys are not turned (SmolLM3 has some) keeps its sinks as
they are, which is exact, and so do all layers of a model with learned positions. What fits nothing is refused.

B batch, S segments, n sinks, K key heads, D head_dim.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from longnet_cli.attention.sinks import Turn
from longnet_cli.errors import ConfigError

# frequencies that depend on the longest sequence of a batch: a document's numbers would depend on its company
ROPE_OF_LENGTH = ("dynamic", "longrope")

_PROBE, _KEYS = "dilated_probe", "_dilated_probe_keys"
_POSITION, _DISTANCE = 3, 61  # of the tried keys: small, as phases are float32 in transformers
_LEARNED = ("position_embeddings", "embed_positions", "wpe")  # what models call their tables


@dataclass(frozen=True)
class Rotation:
    """A `Turn`: the first 2 P numbers of a head are P pairs, and pair j turns by `frequencies[j]` per position.

    `axis` -2 pairs number j with j + P (Llama, GPT-NeoX), -1 with its neighbour (GPT-J, GLM). A factor on the rotated
    keys (yarn) stays as it is. Phases are float64, the product float32 or wider; the keys keep their type.
    """

    frequencies: Tensor  # (P,) float64 on the CPU
    axis: int

    def __call__(self, keys: Tensor, distances: Tensor) -> Tensor:
        """(B, S, n, K, D), (S,) -> (B, S, n, K, D)."""
        phase = distances.double()[:, None] * self.frequencies.to(keys.device)
        phase = phase.remainder(2 * math.pi)[:, None, None, :]  # (S, 1, 1, P)
        wide = keys if keys.dtype is torch.float64 else keys.float()
        cos, sin = phase.cos().to(wide.dtype), phase.sin().to(wide.dtype)
        pairs, rest = wide.split([2 * phase.shape[-1], wide.shape[-1] - 2 * phase.shape[-1]], -1)
        x, y = pairs.unflatten(-1, (2, -1) if self.axis == -2 else (-1, 2)).unbind(self.axis)
        turned = torch.stack([x * cos - y * sin, x * sin + y * cos], self.axis).flatten(-2)
        return torch.cat([turned, rest], -1).to(keys.dtype)


def turns(model: PreTrainedModel) -> dict[nn.Module, Turn | None]:
    """Return what turns the keys of each attention that looks at all tokens; None where nothing does.

    Runs `model` on a few tokens, twice. Raises ConfigError for positions that cannot be followed, by name.
    """
    name = type(model).__name__
    ropes = rope_parameters(model.config)
    if any(rope.get("mrope_section") for rope in ropes):
        raise ConfigError(f"{name} has positions in several dimensions (mrope), in which sinks cannot be moved")
    if changing := {rope.get("rope_type") for rope in ropes} & {*ROPE_OF_LENGTH}:
        raise ConfigError(f"{name} has positions that depend on the sequence's length (rope_type {changing.pop()})")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(f"{name} has no weights yet: a pattern with sinks is tried on its keys")
    frequencies = [x for key, x in model.base_model.named_buffers() if key.endswith("inv_freq")]
    tables = [
        m for key, m in model.base_model.named_modules() if key.endswith(_LEARNED) and isinstance(m, nn.Embedding)
    ]
    if tables and not frequencies:
        return dict.fromkeys(_keys(model))
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise ConfigError(f"{name} takes no position_ids: how it turns its keys, which sinks need, cannot be tried")
    before, after = (_keys(model, position) for position in (_POSITION, _POSITION + _DISTANCE))
    found: dict[nn.Module, Turn | None] = {}
    for layer, k in before.items():
        size = k.shape[-1]
        fitting = [x for x in frequencies if x.dim() == 1 and 2 * len(x) <= size]
        candidates = [Rotation(x.detach().double().cpu(), axis) for x in fitting for axis in (-2, -1)]
        for turn in (*candidates, None):
            if _equal(_moved(k, turn), after[layer]):
                found[layer] = turn
                break
        else:
            raise ConfigError(
                f"{name} turns its keys by position in a way of its own (layer {getattr(layer, 'layer_idx', '?')}): "
                "sinks cannot be moved with it"
            )
    return found


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The tables in `config.rope_parameters`: one, or one for each type of layer."""
    table = getattr(config, "rope_parameters", None) or {}
    return [table, *(x for x in table.values() if isinstance(x, dict))]


def _moved(k: Tensor, turn: Turn | None) -> Tensor:
    """Keys (B, K, 1, D), `_DISTANCE` positions further on."""
    if turn is None:
        return k
    distances = torch.tensor([_DISTANCE], device=k.device)
    return turn(k.transpose(1, 2)[:, None], distances)[:, 0].transpose(1, 2)


def _equal(found: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    found, expected = found.double(), expected.double()
    return bool((found - expected).norm() <= tolerance * expected.norm())


@torch.no_grad()
def _keys(model: PreTrainedModel, position: int | None = None) -> dict[nn.Module, Tensor]:
    """The rotated keys (B, K, 1, D) of every attention that looks at all tokens, of a few sequences of one token."""
    table = model.get_input_embeddings().weight
    options: dict[str, Any] = {"input_ids": torch.linspace(0, len(table) - 1, 8, device=table.device).long()[:, None]}
    if position is not None:
        options["position_ids"] = torch.full((8, 1), position, device=table.device)
    if "use_cache" in inspect.signature(model.base_model.forward).parameters:
        options["use_cache"] = False
    modes = [(module, module.training) for module in model.modules()]
    implementation = model.config._attn_implementation
    model.set_attn_implementation(_PROBE)
    try:
        model.eval().base_model(**options)
    finally:
        model.set_attn_implementation(implementation)
        for module, mode in modes:
            module.training = mode
    return {module: module.__dict__.pop(_KEYS) for module, _ in modes if _KEYS in module.__dict__}


def _probe(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers for sequences of one token, which sees its own value alone."""
    if options.get("sliding_window") is None:
        module.__dict__[_KEYS] = key
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None


AttentionInterface.register(_PROBE, _probe)
AttentionMaskInterface.register(_PROBE, sdpa_mask)
