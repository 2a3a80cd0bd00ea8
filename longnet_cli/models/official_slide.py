"""A slide encoder in the form of Prov-GigaPath's class: its options, outputs, and names of modules and weights.

The net is `nets.slide.VectorNet`. Its modules are registered under their official names, and no weight is copied. So
hooks, freezing by name, and modules put in another's place act on the net itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from longnet_cli.basics.configuration import validate
from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets.config import SlideConfig
from longnet_cli.nets.longnet import Attention, Block, FeedForward
from longnet_cli.nets.slide import VectorNet

HEADS, RATES, SHORTEST = 16, (1, 2, 4, 8, 16), 1024  # of all official architectures


class _Renamed(nn.Module):
    """A module of ours whose children are registered under official names. Its code finds them under our names."""

    official: ClassVar[dict[str, str]]  # our name of a child -> the official one, in the official order

    def __getattr__(self, name: str) -> Any:
        child, *inner = self.official.get(name, name).split(".")
        return reduce(getattr, inner, super().__getattr__(child))


class OfficialAttention(_Renamed, Attention):
    official: ClassVar = {"k": "k_proj", "v": "v_proj", "q": "q_proj", "out": "out_proj", "inner_norm": "inner_attn_ln"}


class OfficialFeedForward(_Renamed, FeedForward):
    official: ClassVar = {"fc1": "fc1", "fc2": "fc2", "inner_norm": "ffn_layernorm"}


class OfficialBlock(_Renamed, Block):
    official: ClassVar = {
        "attention": "self_attn",
        "attention_norm": "self_attn_layer_norm",
        "dropout": "dropout_module",
        "drop_path": "drop_path",
        "ffn": "ffn",
        "ffn_norm": "final_layer_norm",
    }


class OfficialNet(_Renamed, VectorNet):
    official: ClassVar = {
        "cls": "cls_token",
        "project": "patch_embed.proj",
        "dropout": "encoder.dropout_module",
        "layers": "encoder.layers",
        "final_norm": "encoder.layer_norm",
    }


class PatchEmbed(nn.Module):
    """The projection of features (B, N, in_chans) to (B, N, embed_dim)."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class OfficialEncoder(nn.Module):
    """The LongNet's part of the official tree. `OfficialNet` calls its modules."""

    def __init__(self, net: VectorNet) -> None:
        super().__init__()
        self.dropout_module, self.layers, self.layer_norm = net.dropout, net.layers, net.final_norm
        self.num_layers = net.config.num_layers


def _rename(module: nn.Module, kind: type[_Renamed]) -> None:
    """Make a module of ours one of `kind`, with the official names and order of its children."""
    children = dict(module._modules)
    module.__class__ = kind
    module._modules = {theirs: children.pop(ours) for ours, theirs in kind.official.items()} | children


def _rename_all(net: VectorNet) -> OfficialNet:
    """Give all parts of a net their official names."""
    for layer in cast(Sequence[Block], net.layers):
        _rename(layer.attention, OfficialAttention)
        _rename(layer.ffn, OfficialFeedForward)
        _rename(layer, OfficialBlock)
    net._parameters = {"cls_token": nn.Parameter(net.cls.detach().view(1, 1, -1))}
    net._modules = {"patch_embed": PatchEmbed(net.project), "encoder": OfficialEncoder(net), "norm": net.norm}
    net.__class__ = OfficialNet
    return cast(OfficialNet, net)


class LongNetViT(nn.Module):
    """A slide encoder with the official class's options, outputs and names of modules and weights.

    `tile_size` and `max_wsi_size`, in pixels, choose the segment lengths. Later, set the attribute `tile_size` to the
    side of a slide's tiles: it moves the grid of positions, `slide_ngrids` cells wide, and nothing else. `global_pool`
    takes the mean over the tiles in place of CLS. `dropout` and `drop_path_rate` act in training. There are 16 heads,
    and a feed-forward of 4 x `embed_dim`. As in the official class, options that are not named here have no effect.

    The backward pass computes each layer again from its input, so that long slides fit in memory; set
    `activation_checkpointing = False` for short ones. Gradients are exact, where the official code takes the shares of
    the segment lengths in attention for constants. Raises ConfigError for options that do not fit, such as another
    `mlp_ratio` than 4.
    """

    activation_checkpointing = True
    net: OfficialNet  # not a child: its children and parameters are this module's own, in the same dictionaries

    def __init__(
        self,
        in_chans: int = 1536,
        embed_dim: int = 256,
        depth: int = 12,
        slide_ngrids: int = 1000,
        tile_size: float = 256,
        max_wsi_size: float = 262144,
        global_pool: bool = False,
        dropout: float = 0.25,
        drop_path_rate: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__()
        if options.get("pretrained"):
            raise ConfigError("pretrained=True names no weights: give create_model their file, or hf_hub:ORG/NAME")
        if options.get("mlp_ratio", 4) != 4:
            raise ConfigError(f"mlp_ratio must be 4, as in all official models, got {options['mlp_ratio']}")
        settings = {
            "in_features": in_chans,
            "dim": embed_dim,
            "num_layers": depth,
            "num_heads": HEADS,
            "ffn_dim": 4 * embed_dim,
            "segment_lengths": _segment_lengths(max_wsi_size, tile_size),
            "dilation_rates": RATES,
            "grid": slide_ngrids,
            "dropout": dropout,
            "drop_path": drop_path_rate,
        }
        net = VectorNet(validate(SlideConfig, settings, "LongNetViT"))
        if not net.cls.is_meta:
            _draw(net)
        self.take(net)
        self.tile_size, self.global_pool = tile_size, global_pool

    @classmethod
    def of(cls, net: VectorNet, *, global_pool: bool = False) -> LongNetViT:
        """Return the official form of a net of any sizes, such as `SlideEncoder.from_pretrained(folder).net`.

        The net itself gets the official names.
        """
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.take(net)
        model.tile_size, model.global_pool = net.config.tile_size, global_pool
        return model.train(net.training)

    def take(self, net: VectorNet) -> None:
        """Make `net` the one that this module shows."""
        self.__dict__["net"] = net = _rename_all(net)
        self._modules, self._parameters = net._modules, net._parameters
        self.slide_ngrids = net.config.grid
        self.encoder_name = f"LongNet_{net.config.num_layers}_layers_{net.config.dim}_dim"

    def forward(
        self,
        x: Tensor,
        coords: Tensor,
        all_layer_embed: bool = False,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> list[Tensor]:
        """Return vectors (B, embed_dim) of features x (B, N, in_chans) and coords (B, N, 2) in pixels.

        The list has one tensor; with `all_layer_embed`, depth + 1: of the first layer's input, then of each layer's
        output. `lengths`, which the official class does not have, gives the number of tiles of each
        right-padded row. Raises ValueError for wrong shapes, and for a tile outside the grid, with its coords.
        """
        return self.net.encode(
            x,
            coords,
            tile_size=self.tile_size,
            lengths=lengths,
            pool="mean" if self.global_pool else "cls",
            all_layers=all_layer_embed,
            again=self.activation_checkpointing,
        )


def _segment_lengths(max_wsi_size: float, tile_size: float) -> tuple[int, ...]:
    """Return the official lengths: from 1024 to the tiles of the largest slide, in five steps of equal ratio.

    Raises ConfigError where the largest slide has no tile.
    """
    tiles = int(max_wsi_size // tile_size) ** 2 if tile_size > 0 else 0
    if tiles < 1:
        raise ConfigError(f"max_wsi_size {max_wsi_size} must be at least tile_size {tile_size}, and both above 0")
    steps = np.linspace(math.log2(SHORTEST), int(math.log2(tiles)), len(RATES))
    return tuple(int(length) for length in 2**steps)


@torch.no_grad()
def _draw(net: VectorNet) -> None:
    """Draw weights as the official class does, without the gains of sub-LN."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
