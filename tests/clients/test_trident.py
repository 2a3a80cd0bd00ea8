"""What TRIDENT asks of Prov-GigaPath's package, in its order, on the drop-in: the vectors of our encoder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from longnet_cli.integrations import gigapath
from longnet_cli.models.official import read_state_dict, slide_net
from longnet_cli.nets.config import SlideConfig

ARCH, IN_CHANS = "gigapath_slide_enc12l384d", 384


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The drop-in in place of gigapath, and a flash-attn that has nothing but the version that TRIDENT looks for."""
    flash = ModuleType("flash_attn")
    flash.__version__ = "2.5.8"
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    gigapath.install()
    yield
    for name in ("gigapath", "gigapath.slide_encoder"):
        sys.modules.pop(name)


def test_its_calls(installed: None, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path, side = tmp_path / "slide_encoder.pth", 512
    torch.manual_seed(0)
    torch.save({"model": gigapath.create_model("", ARCH, IN_CHANS).state_dict()}, path)
    cells = np.argwhere(np.random.default_rng(0).random((30, 30)) < 0.3)
    with h5py.File(tmp_path / "slide.h5", "w") as file:
        file["features"] = np.random.default_rng(1).normal(size=(len(cells), IN_CHANS)).astype(np.float16)
        file["coords"] = cells * side
        file["coords"].attrs["patch_size_level0"] = side

    from gigapath.slide_encoder import create_model

    if find_spec("timm"):
        import timm

        assert timm.is_model(ARCH)
        assert isinstance(timm.create_model(ARCH, pretrained=False, in_chans=8), gigapath.LongNetViT)
    import flash_attn

    assert flash_attn.__version__ == "2.5.8"
    model = create_model(str(path), ARCH, IN_CHANS, global_pool=True)
    for param in model.parameters():
        param.requires_grad = False
    model.eval()
    model.to("cpu")
    with h5py.File(tmp_path / "slide.h5") as file:
        coords, features = file["coords"][:], file["features"][:]
        attributes = dict(file["coords"].attrs)
    batch_features = torch.from_numpy(features).float().unsqueeze(0)
    batch_coords = torch.from_numpy(coords).to(torch.int64).unsqueeze(0)
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        model.tile_size = attributes["patch_size_level0"]
        found = model(batch_features, batch_coords, all_layer_embed=True)[11]
    assert found.shape == (1, 384)

    config = SlideConfig(**dict(SlideConfig.gigapath()) | {"dim": 384, "ffn_dim": 1536, "in_features": IN_CHANS})
    net = slide_net(config, read_state_dict(path), "the same weights")
    with torch.no_grad():
        wanted = net.encode(batch_features, batch_coords, tile_size=side, pool="mean", all_layers=True)
        other = net.encode(batch_features, batch_coords, pool="mean", all_layers=True)
    torch.testing.assert_close(found, wanted[11], rtol=0, atol=1e-2)
    assert not torch.allclose(found, other[11], rtol=0, atol=1e-2)  # without the side of a tile
