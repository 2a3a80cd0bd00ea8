"""LoRA (arXiv 2106.09685) with peft: only small matrices beside a model's own are trained.

An adapted matrix is `W + scale B A`. In the names of its weights, W is `X.base_layer.weight`, A and B are
`X.lora_A.default.weight` and `X.lora_B.default.weight`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import transformers as hf
from torch import Tensor

from longnet_cli.basics.errors import ConfigError

_NAME = "default"  # peft's name for a model's first adapter
_BASE, _A, _B = ".base_layer", f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"

_CONFIG = "adapter_config.json"

State = Mapping[str, Tensor]


def add_lora(
    model: hf.PreTrainedModel, rank: int, alpha: float, dropout: float, target_modules: list[str] | None
) -> Callable[[Path, State], None]:
    """Freeze a model and add LoRA matrices in place: to all of its layers, or only to `target_modules`.

    Returns a function that writes the adapter's folder for peft, given the folder and the model's state dict. Raises
    ConfigError if peft is missing, or the model has none of the modules.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"LoRA needs peft, which cannot be imported ({error}): pip install 'longnet-cli[lora]'"
        ) from None
    options = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "task_type": "CAUSAL_LM"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft uses names that transformers has renamed
            adapted = peft.get_peft_model(
                model, peft.LoraConfig(**options, target_modules=target_modules or "all-linear")
            )
    except ValueError as error:
        raise ConfigError(f"lora: {' '.join(str(error).split())}") from None

    def save(folder: Path, state: State) -> None:
        named = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
        adapted.save_pretrained(folder, state_dict=named, save_embedding_layers=False)
        settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if isinstance(settings["target_modules"], list):  # a set of peft's, in the order of its hashes
            settings["target_modules"].sort()
        (folder / _CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")

    return save


def merged(model: hf.PreTrainedModel, state: State) -> dict[str, Tensor]:
    """Return the weights of an equivalent model without LoRA, given the whole `state` of this one.

    The model itself does not change: adding to a matrix and subtracting again would not restore the same numbers.
    """
    weights = {}
    for name, tensor in state.items():
        stem, base, rest = name.rpartition(_BASE)
        if base and (a := state.get(stem + _A)) is not None and rest == ".weight":
            layer = model.get_submodule(stem)
            delta = layer.scaling[_NAME] * (state[stem + _B] @ a)
            tensor = tensor + (delta.T if getattr(layer, "fan_in_fan_out", False) else delta).to(tensor.dtype)
        if ".lora_" not in name:
            weights[stem + rest if base else name] = tensor
    return weights
