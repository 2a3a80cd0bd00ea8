"""A slide encoder in the form of Prov-GigaPath's class: its options, outputs, and names of modules and weights.

The net is `nets.slide.VectorNet`; its modules are built as ours, and then have their official names. So hooks, freezing
by name, and modules put in another's place act on the net itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from longnet_cli.basics.configuration import validate
from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets.config import LongNetConfig, SlideConfig
from longnet_cli.nets.longnet import Attention, FeedForward, Layer
from longnet_cli.nets.slide import VectorNet

# of all official architectures
HEADS = 16
RATES = (1, 2, 4, 8, 16)
SHORTEST = 1024


class _Official(nn.Module):
    """A module of ours whose children have official names, in the official order. Our code finds them by our names."""

    # our name of a child -> the official one, with that of a module around it
    official: ClassVar[dict[str, str]]

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        for ours, theirs in self.official.items():
            child = getattr(self, ours)
            delattr(self, ours)
            around, _, name = theirs.rpartition(".")
            if around and around not in self._modules:
                self.add_module(around, _AROUND[around]())
            setattr(self.get_submodule(around), name, child)

    def __getattr__(self, name: str) -> Any:
        if name in self.official and name not in self._modules and name not in self._parameters:
            return attrgetter(self.official[name])(self)
        return super().__getattr__(name)


class OfficialAttention(_Official, Attention):
    official: ClassVar = {
        "k": "k_proj",
        "v": "v_proj",
        "q": "q_proj",
        "out": "out_proj",
        "inner_norm": "inner_attn_ln",
    }


class OfficialFeedForward(_Official, FeedForward):
    official: ClassVar = {"fc1": "fc1", "fc2": "fc2", "inner_norm": "ffn_layernorm"}


class OfficialBlock(_Official, Layer):
    attention_kind = OfficialAttention
    ffn_kind = OfficialFeedForward
    official: ClassVar = {
        "attention": "self_attn",
        "attention_norm": "self_attn_layer_norm",
        "dropout": "dropout_module",
        "drop_path": "drop_path",
        "ffn": "ffn",
        "ffn_norm": "final_layer_norm",
    }


class PatchEmbed(nn.Module):
    """The projection of features (B, N, in_chans) to (B, N, embed_dim)."""

    proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class OfficialEncoder(nn.Module):
    """The LongNet's part of the official tree. The net calls its modules."""

    num_layers: int


_AROUND = {"patch_embed": PatchEmbed, "encoder": OfficialEncoder}


class LongNetViT(_Official, VectorNet):
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
    cls_token: nn.Parameter
    layer_kind = OfficialBlock
    official: ClassVar = {
        "cls": "cls_token",
        "project": "patch_embed.proj",
        "dropout": "encoder.dropout_module",
        "layers": "encoder.layers",
        "final_norm": "encoder.layer_norm",
        "norm": "norm",
    }

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
        if options.get("pretrained"):
            raise ConfigError(
                "pretrained=True names no weights: give create_model their file, or hf_hub:ORG/NAME"
            )
        if options.get("mlp_ratio", 4) != 4:
            raise ConfigError(
                f"mlp_ratio must be 4, as in all official models, got {options['mlp_ratio']}"
            )
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
        self._build(validate(SlideConfig, settings, "LongNetViT"))
        if not self.cls_token.is_meta:
            _draw(self)
        self.tile_size = tile_size
        self.global_pool = global_pool

    @classmethod
    def of(cls, net: VectorNet, *, global_pool: bool = False) -> LongNetViT:
        """Return the official form of a net of any sizes, such as `SlideEncoder.from_pretrained(folder).net`.

        The two share their weights.
        """
        model = cls.__new__(cls)
        with torch.device("meta"):
            model._build(net.config)
        model.take(net)
        model.tile_size = net.config.tile_size
        model.global_pool = global_pool
        return model.train(net.training)

    def _build(self, config: SlideConfig) -> None:
        super().__init__(config)
        self.cls_token = nn.Parameter(self.cls_token.detach().view(1, 1, -1))
        self.encoder.num_layers = config.num_layers
        self.slide_ngrids = config.grid
        self.encoder_name = f"LongNet_{config.num_layers}_layers_{config.dim}_dim"

    def take(self, net: VectorNet) -> None:
        """Take the weights of a net, without a copy."""
        state = {slide_name(name): tensor for name, tensor in net.state_dict().items()}
        self.load_state_dict(state | {"cls_token": net.cls.detach().view(1, 1, -1)}, assign=True)

    def forward(  # type: ignore[override]
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
        return self.encode(
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
    if not 0 < tile_size <= max_wsi_size:
        raise ConfigError(
            f"max_wsi_size {max_wsi_size} must be at least tile_size {tile_size}, and both above 0"
        )
    tiles = int(max_wsi_size // tile_size) ** 2
    steps = np.linspace(math.log2(SHORTEST), int(math.log2(tiles)), len(RATES))
    return tuple(map(int, 2**steps))


@torch.no_grad()
def _draw(net: VectorNet) -> None:
    """Draw weights as the official class does, without the gains of sub-LN."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


# our name -> the official one: of all but the layers, of modules of the net, then of a layer
_SLIDE = {
    "cls": "cls_token",
    "project.weight": "patch_embed.proj.weight",
    "project.bias": "patch_embed.proj.bias",
}
_SLIDE |= {"norm.weight": "norm.weight", "norm.bias": "norm.bias"}
_MODULES = {"embedding": "embed_tokens", "final_norm": "layer_norm", "output": "output_projection"}
_MODULES |= OfficialBlock.official
for _part, _kind in (("attention", OfficialAttention), ("ffn", OfficialFeedForward)):
    _MODULES |= {
        f"{_part}.{ours}": f"{_MODULES[_part]}.{theirs}" for ours, theirs in _kind.official.items()
    }


def official_name(ours: str) -> str:
    """Return torchscale's name of one of our tensors."""
    ((layer, module, kind),) = re.findall(r"^(layers\.\d+\.|)(.+)\.(weight|bias)$", ours)
    return f"{layer}{_MODULES[module]}.{kind}"


def slide_name(ours: str) -> str:
    """Return the official name of a tensor of our slide encoder's net."""
    return _SLIDE.get(ours) or f"encoder.{official_name(ours)}"
