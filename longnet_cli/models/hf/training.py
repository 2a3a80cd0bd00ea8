"""The training of a Hugging Face model: LoRA, and a model without weights on which memory is measured.

With LoRA (arXiv 2106.09685, by peft), only small matrices beside a model's own are trained. They are float32. The
model's own matrices stay in the type in which they are stored, and take part in float32, or in autocast's type.

An adapted matrix is `W + scale B A`. In the names of its weights, W is `X.base_layer.weight`, A and B are
`X.lora_A.default.weight` and `X.lora_B.default.weight`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from longnet_cli.attention import Pattern
from longnet_cli.basics.atomic import whole_folder
from longnet_cli.basics.errors import ConfigError, extra, one_line
from longnet_cli.models.hf.attention import ATTENTION_NAME, write_pattern
from longnet_cli.models.hf.pretrained_folder import with_infinities
from longnet_cli.models.hf.trying import layers_of
from longnet_cli.nets.net import product_dtype

_NAME = "default"  # peft's name for a model's first adapter
_BASE = ".base_layer"
_A = f".lora_A.{_NAME}.weight"
_B = f".lora_B.{_NAME}.weight"

_CONFIG = "adapter_config.json"

State = Mapping[str, Tensor]


def add_lora(
    model: hf.PreTrainedModel,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list[str] | None,
) -> Callable[[Path, State], None]:
    """Freeze a model and add LoRA matrices in place: to all of its layers, or only to `target_modules`.

    The frozen weights may be of any type (`_compute_wide`); the matrices do not depend on it. Returns a function that
    writes the adapter's folder for peft, given the folder and the model's state dict. Raises ConfigError if peft is
    missing, or the model has none of the modules.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"LoRA needs peft, which cannot be imported ({error}): {extra('lora')}"
        ) from None
    stored = [(p, p.data) for p in model.parameters()]
    for p, data in stored:  # peft draws matrices of the type of the weights beside them
        p.data = torch.zeros((), device=data.device).expand(data.shape)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft uses names that transformers has renamed
            config = peft.LoraConfig(
                r=rank,
                lora_alpha=alpha,
                lora_dropout=dropout,
                task_type="CAUSAL_LM",
                target_modules=target_modules or "all-linear",
            )
            adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora: {one_line(error)}") from None
    for p, data in stored:
        p.data = data
    _compute_wide(model)

    def save(folder: Path, state: State) -> None:
        named = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
        with whole_folder(folder, _CONFIG) as place:
            adapted.save_pretrained(place, state_dict=named, save_embedding_layers=False)
            settings = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
            # a set of peft's, in the order of its hashes
            if isinstance(settings["target_modules"], list):
                settings["target_modules"].sort()
            (place / _CONFIG).write_text(
                json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8"
            )

    return save


class _Product(torch.autograd.Function):
    """A product with a frozen matrix of any type, in the input's type or in autocast's.

    Both passes cast the matrix anew: no copy of it is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        dtype = product_dtype(x)
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        return (gradient @ weight.to(gradient.dtype)).to(ctx.dtype), None, None


class _FrozenLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input, self.weight, self.bias)


class _FrozenEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


_FROZEN = {nn.Linear: _FrozenLinear, nn.Embedding: _FrozenEmbedding}


def _compute_wide(model: hf.PreTrainedModel) -> None:
    """Let a model whose frozen weights have any type compute in float32, or in autocast's type, in place.

    Matrices of linear layers and of embeddings keep their type. All others, which other code computes with, and vectors
    become float32.
    """
    for module in model.modules():
        frozen_kind = _FROZEN.get(type(module))
        for p in module.parameters(recurse=False):
            if frozen_kind is None or p.dim() < 2:
                p.data = p.data.float()
        if frozen_kind and not module.weight.requires_grad:
            module.__class__ = frozen_kind


def merged(model: hf.PreTrainedModel, state: State) -> dict[str, Tensor]:
    """Return the weights of an equivalent model without LoRA in float32, given the whole `state` of this one.

    The model itself does not change: adding to a matrix and subtracting again would not restore the same numbers.
    """
    weights = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        stem, base, rest = name.rpartition(_BASE)
        # and added to in place, so that no third copy is made
        wide = tensor.to(torch.float32, copy=bool(base))
        if base and (a := state.get(stem + _A)) is not None and rest == ".weight":
            layer = model.get_submodule(stem)
            delta = layer.scaling[_NAME] * (state[stem + _B] @ a)
            wide += delta.T if getattr(layer, "fan_in_fan_out", False) else delta
        weights[stem + rest] = wide
    return weights


def unwritten(
    source: str,
    layers: int,
    lora: dict | None,
) -> tuple[hf.PreTrainedModel, nn.ModuleList]:
    """Return a model of so many layers in training mode, and these layers; its weights are never written to.

    `source` is the model's configuration as JSON, `lora` has the arguments of `add_lora`, if any.
    """
    settings = json.loads(source)
    config = hf.CONFIG_MAPPING[settings["model_type"]].from_dict(with_infinities(settings))
    config.num_hidden_layers = layers
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:layers]
    with torch.device("meta"):
        model = getattr(hf, settings["architectures"][0])(config)
    model = model.to_empty(device="cpu").train()
    write_pattern(model.config, Pattern.dense())
    # its weights are no numbers: nothing can be tried
    model.set_attn_implementation(ATTENTION_NAME)
    if lora is not None:
        add_lora(model, **lora)
    return model, layers_of(model, layers)
