"""The net with which a run begins, and what a recipe changes in its layers."""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from longnet_cli.attention.notation import PATTERN_FIELDS
from longnet_cli.basics.errors import ConfigError
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Net

from .recipe import Recipe, TrainRecipe


def build_model(recipe: Recipe, initial: str | None, note: Callable[[str], None]) -> Net:
    """Return the net, with the weights of the model `initial`, or with random ones.

    `note` gets lines for the user. Raises ConfigError where `initial` is another net than the recipe's; its
    pattern and positions, which have no weights, may differ.
    """
    torch.manual_seed(recipe.train.seed)
    if pretrained := recipe.pretrained:
        return ModelFolder.find(pretrained.init).trainable(
            pretrained.model,
            pretrained.adapter,
            note,
        )
    if initial is None:
        return LongNet(recipe.model)
    folder = ModelFolder.find(initial)
    own = folder.native().from_pretrained(folder.path)
    without_weights = {*PATTERN_FIELDS, "position"}
    fields = type(recipe.model).model_fields.keys() - without_weights
    if changed := sorted(
        name for name in fields if getattr(own.config, name) != getattr(recipe.model, name)
    ):
        raise ConfigError(f"{initial} differs from the recipe in model.{', model.'.join(changed)}")
    with torch.device("meta"):
        model = type(own)(recipe.model)
    model.load_state_dict(own.state_dict(), assign=True)
    return model


def change_layers(model: Net, train: TrainRecipe) -> None:
    """Compile the layers, and let them compute their activations again, as the recipe says."""
    for layer in model.layer_modules:
        if train.compile:
            layer.forward = torch.compile(layer.forward)
        if train.activation_checkpointing:
            layer.forward = partial(activation_checkpoint, layer.forward, use_reentrant=False)
