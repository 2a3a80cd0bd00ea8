"""Prov-GigaPath's slide encoder for programs that call the official package: `create_model`, and what it returns.

    from longnet_cli.integrations.gigapath import create_model
    model = create_model("slide_encoder.pth", "gigapath_slide_enc12l768d", 1536, global_pool=True).eval()
    layers = model(features, coords, all_layer_embed=True)  # (B, N, 1536), (B, N, 2) in pixels -> 13 of (B, 768)

After `install()`, `from gigapath.slide_encoder import create_model` finds this module, in programs that stay as they
are. It needs neither flash-attn nor a GPU. The class is in `models.official_slide`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

import torch

from longnet_cli.basics.configuration import nearest
from longnet_cli.basics.errors import CheckpointError, ConfigError
from longnet_cli.hub.model_names import find_model
from longnet_cli.models.official import is_checkpoint, read_state_dict, slide_net
from longnet_cli.models.official_slide import LongNetViT
from longnet_cli.nets.weights import check_finite

FILE = "slide_encoder.pth"  # of the repositories on the hub


def create_model(
    pretrained: str,
    model_arch: str,
    in_chans: int,
    local_dir: str | None = None,
    **options: Any,
) -> LongNetViT:
    """Return the slide encoder of the architecture `model_arch`, float32, in training mode as the official one.

    `pretrained` is the path of a checkpoint, `hf_hub:ORG/NAME`, with `@REVISION` if you like, or "" for random weights.
    Files of a hub are in the cache of huggingface_hub, so `local_dir` has no effect. `options` are those of
    `LongNetViT`. Raises ConfigError for an unknown architecture and options that do not fit, CheckpointError for a file
    that is missing, is no plain state dict, or whose tensors are not those of the architecture.
    """
    if model_arch not in ARCHITECTURES:
        match = nearest(model_arch, ARCHITECTURES)
        known = f"did you mean {match}?" if match else f"there are {', '.join(ARCHITECTURES)}"
        raise ConfigError(f"unknown architecture {model_arch!r}: {known}")
    build = ARCHITECTURES[model_arch]
    if not pretrained:
        return build(in_chans=in_chans, **options)
    name = pretrained.removeprefix("hf_hub:")
    path = Path(pretrained) if name == pretrained else find_model(f"{name}:{FILE}").path
    if not is_checkpoint(path):
        what = "not a checkpoint of torch.save or safetensors" if path.exists() else "no such file"
        raise CheckpointError(
            f'{pretrained}: {what}: give the path of {FILE}, hf_hub:ORG/NAME, or "" for random weights'
        )
    with torch.device("meta"):
        model = build(in_chans=in_chans, **options)
    net = slide_net(model.config, read_state_dict(path), f"{path}: {model_arch}")
    check_finite(net.state_dict(), str(path))
    model.take(net)
    return model


def gigapath_slide_enc12l768d(**options: Any) -> LongNetViT:
    """Return Prov-GigaPath's slide encoder, with random weights."""
    return LongNetViT(depth=12, embed_dim=768, **options)


def gigapath_slide_enc24l1024d(**options: Any) -> LongNetViT:
    """Return the encoder of 24 layers of 1024, with random weights."""
    return LongNetViT(depth=24, embed_dim=1024, **options)


def gigapath_slide_enc12l1536d(**options: Any) -> LongNetViT:
    """Return the encoder of 12 layers of 1536, with random weights."""
    return LongNetViT(depth=12, embed_dim=1536, **options)


def gigapath_slide_enc12l384d(**options: Any) -> LongNetViT:
    """Return GigaPath-Flash's slide encoder, with random weights; its features have 384 numbers (`in_chans`)."""
    return LongNetViT(depth=12, embed_dim=384, **options)


ARCHITECTURES: dict[str, Callable[..., LongNetViT]] = {
    build.__name__: build
    for build in (
        gigapath_slide_enc12l768d,
        gigapath_slide_enc24l1024d,
        gigapath_slide_enc12l1536d,
        gigapath_slide_enc12l384d,
    )
}


def install() -> None:
    """Make `gigapath.slide_encoder` this module for the whole process, and register its architectures with timm.

    Call it before the program that imports gigapath. The other modules of an installed gigapath stay. Without timm,
    nothing is registered.
    """
    if "gigapath" not in sys.modules:
        if find_spec("gigapath"):
            import_module("gigapath")
        else:
            sys.modules["gigapath"] = module_from_spec(
                ModuleSpec("gigapath", None, is_package=True)
            )
    here = sys.modules[__name__]
    sys.modules["gigapath.slide_encoder"] = here
    setattr(sys.modules["gigapath"], "slide_encoder", here)  # noqa: B010 (for type checkers)
    if find_spec("timm"):
        register = import_module("timm.models").register_model
        for build in ARCHITECTURES.values():
            register(build)
