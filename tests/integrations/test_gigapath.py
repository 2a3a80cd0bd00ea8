"""The drop-in for Prov-GigaPath's code: its numbers (goldens), names, checkpoints and options; what it refuses."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import read_golden
from loopback_hub import fill_cache
from torch import Tensor, nn

from longnet_cli.basics.errors import CheckpointError, ConfigError
from longnet_cli.hub.model_names import find_model
from longnet_cli.integrations import gigapath
from longnet_cli.integrations.gigapath import ARCHITECTURES, LongNetViT, create_model
from longnet_cli.models.official import slide_net
from longnet_cli.nets.config import SlideConfig

ATTENTION = [
    f"self_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj", "inner_attn_ln")
]
FEED_FORWARD = [f"ffn.{name}" for name in ("fc1", "fc2", "ffn_layernorm")]
LAYER = [*ATTENTION, "self_attn_layer_norm", *FEED_FORWARD, "final_layer_norm"]


def small(pool: bool = False, **options: object) -> LongNetViT:
    """Two layers of 64, always the same."""
    torch.manual_seed(0)
    sizes = {"in_chans": 6, "embed_dim": 64, "depth": 2, "slide_ngrids": 50, "max_wsi_size": 8192}
    return LongNetViT(**sizes | options, global_pool=pool).eval()


def tiles(count: int, side: int = 256) -> tuple[Tensor, Tensor]:
    cells = torch.arange(count) * 7 % 2500
    random = torch.Generator().manual_seed(count)
    return torch.randn(1, count, 6, generator=random), torch.stack([cells // 50, cells % 50], -1)[
        None
    ] * side


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the official code would save of a small architecture, `tiny`: its names and shapes, `model` around them."""
    monkeypatch.setitem(ARCHITECTURES, "tiny", partial(LongNetViT, embed_dim=64, depth=2))
    random = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(x.shape, generator=random) * 0.05
        for name, x in small().state_dict().items()
    }
    torch.save({"model": state}, tmp_path / "slide_encoder.pth")
    return tmp_path / "slide_encoder.pth"


@pytest.mark.parametrize(
    ("dtype", "near"),
    [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 3.5e-2)],
    ids=str,
)
@torch.no_grad()
def test_golden_vectors_of_all_layers(dtype, near):
    """In bf16, the official classes differ from their own fp32 by 3.4e-2 here."""
    state, wanted, theirs = read_golden("slide_encoder_zero_key")
    theirs.pop("final_norm_eps")
    features, coords = wanted["features"][None], wanted["coords"][None]
    for pool, name in ((False, "cls"), (True, "pooled")):
        model = LongNetViT.of(slide_net(SlideConfig(**theirs), state, "golden"), global_pool=pool)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            (last,) = model(features, coords)
            layers = model(features, coords, all_layer_embed=True)
        torch.testing.assert_close(last[0], wanted[name], rtol=0, atol=near)
        assert last.dtype == torch.float32
        if not pool:
            torch.testing.assert_close(
                torch.cat(layers), wanted["cls_of_layers"], rtol=0, atol=near
            )
    assert list(model.state_dict()) == list(small(depth=2).state_dict())
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        n: x.shape for n, x in state.items()
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_and_shapes_are_the_official_ones_in_order(arch):
    depth, dim = map(int, re.findall(r"\d+", arch))
    modules = [
        "patch_embed.proj",
        *(f"encoder.layers.{i}.{each}" for i in range(depth) for each in LAYER),
    ]
    modules += ["encoder.layer_norm", "norm"]
    names = [
        "cls_token",
        *(f"{module}.{kind}" for module in modules for kind in ("weight", "bias")),
    ]
    with torch.device("meta"):
        model = create_model("", arch, 24, global_pool=True)
    assert [*model.state_dict()] == [name for name, _ in model.named_parameters()] == names
    shapes = {"cls_token": (1, 1, dim), "patch_embed.proj.weight": (dim, 24), "norm.weight": (dim,)}
    shapes |= {f"encoder.layers.{depth - 1}.ffn.fc1.weight": (4 * dim, dim)}
    assert {name: model.state_dict()[name].shape for name in shapes} == shapes
    assert (model.encoder.num_layers, model.slide_ngrids, model.tile_size, model.global_pool) == (
        depth,
        1000,
        256,
        True,
    )
    assert model.config.pattern == SlideConfig.gigapath().pattern
    assert model.config.num_heads == 16


def test_checkpoints_go_both_ways(checkpoint, tmp_path):
    state = torch.load(checkpoint)["model"]
    model = create_model(str(checkpoint), "tiny", 6)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    found = model.state_dict()
    assert [*found] == [*state]
    assert all(torch.equal(found[name], state[name]) for name in state)
    other = create_model("", "tiny", 6)
    assert str(other.load_state_dict(found, strict=True)) == "<All keys matched successfully>"
    features, coords = tiles(20)
    assert torch.equal(other.eval()(features, coords)[0], model.eval()(features, coords)[0])


def test_what_create_model_refuses(checkpoint, tmp_path):
    state = torch.load(checkpoint)["model"]
    state["norm.bias"] *= torch.nan
    torch.save({"model": state}, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=r"nan.pth: norm.bias has numbers that are NaN"):
        create_model(str(tmp_path / "nan.pth"), "tiny", 6)
    for refused, said in (
        (
            lambda: create_model(str(checkpoint), "tiny", 7),
            r"patch_embed.proj.weight has shape \(64, 6\), and the net needs \(64, 7\)",
        ),
        (
            lambda: create_model("./no.pth", "tiny", 6),
            "no.pth: no such file: give the path of slide_encoder.pth, hf_hub:",
        ),
        (
            lambda: create_model(__file__, "tiny", 6),
            "not a checkpoint of torch.save or safetensors",
        ),
        (
            lambda: create_model("", "gigapath_slide_enc12l38d", 6),
            "did you mean gigapath_slide_enc12l384d",
        ),
        (
            lambda: gigapath.gigapath_slide_enc12l384d(pretrained=True),
            "pretrained=True names no weights",
        ),
        (lambda: small(mlp_ratio=2), "mlp_ratio must be 4"),
        (lambda: small(max_wsi_size=200), "max_wsi_size 200 must be at least tile_size 256"),
        (lambda: small(drop_path_rate=1.5), "drop_path: .* less than 1"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=said):
            refused()


def test_a_name_on_a_hub_comes_from_the_cache(checkpoint, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = fill_cache(tmp_path, "org/gigapath", {"slide_encoder.pth": checkpoint.read_bytes()})
    wanted = torch.load(checkpoint)["model"]["norm.weight"]
    assert torch.equal(
        create_model("hf_hub:org/gigapath", "tiny", 6, local_dir="nowhere").norm.weight, wanted
    )
    pinned = find_model(f"org/gigapath@{commit}:slide_encoder.pth")
    assert pinned.path.read_bytes() == checkpoint.read_bytes()
    assert pinned.name == f"org/gigapath@{commit}:slide_encoder.pth"
    with pytest.raises(
        CheckpointError,
        match=r"org/none:slide_encoder.pth: .*HF_HUB_OFFLINE is set",
    ):
        create_model("hf_hub:org/none", "tiny", 6)
    with pytest.raises(
        CheckpointError, match=r"gigapath:slide_encoder.pth: .*HF_HUB_OFFLINE is set"
    ):
        create_model("hf_hub:gigapath", "tiny", 6)


@torch.no_grad()
def test_tile_size_moves_the_grid_alone_and_tiles_outside_it_are_refused():
    model, (features, coords) = small(tile_size=128), tiles(80)
    # Of (8192 / 128)^2 = 2^12 tiles
    assert model.config.segment_lengths == (
        1024,
        1448,
        2048,
        2896,
        4096,
    )
    assert small(tile_size=256, max_wsi_size=250_000).config.segment_lengths == (
        1024,
        4870,
        23170,
        110217,
        524288,
    )
    wanted = model(features, coords // 2, all_layer_embed=True)
    model.tile_size = np.int64(512)  # as in an HDF5 file
    found = model(features, coords * 2, all_layer_embed=True)
    assert len(found) == 3  # of the input, and of two layers
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert model.config.segment_lengths == (1024, 1448, 2048, 2896, 4096)
    model.tile_size = 64
    with pytest.raises(
        ValueError, match=r"slide 0, tile 2: the tile at \(0, 3584\): its cell \(0, 56\) is outside"
    ):
        model(features, coords)
    together = small(True)(torch.cat([features] * 2), torch.cat([coords] * 2), lengths=[80, 30])
    alone = small(True)(features[:, :30], coords[:, :30])
    torch.testing.assert_close(together[0][1:], alone[0])


def test_training_has_the_official_dropout_and_every_module_is_the_nets():
    model, (features, coords) = small(True, depth=3), tiles(60)
    assert torch.equal(model(features, coords)[0], model(features, coords)[0])
    model.train()
    assert not torch.equal(model(features, coords)[0], model(features, coords)[0])
    assert [layer.drop_path.p for layer in model.encoder.layers] == pytest.approx([0, 0.05, 0.1])
    drops = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert drops == [0.25] * 4  # before the first layer, and in each
    frozen = [p for name, p in model.named_parameters() if "layers.1." in name]
    for p in frozen:
        p.requires_grad = False
    sum(x.sum() for x in model(features, coords, all_layer_embed=True)).backward()
    assert all(p.grad is None for p in frozen)
    trained = [
        p
        for name, p in model.named_parameters()
        if "layers.1." not in name and "layer_norm" not in name
    ]
    assert all(p.grad is not None for p in trained)


@torch.no_grad()
def test_every_module_is_the_nets_own():
    """Hooks see the forward pass, and what is put in a module's place takes part in it."""
    model, (features, coords) = small(True), tiles(60)
    layer, seen = model.encoder.layers[1], []
    parts = [
        model.patch_embed.proj,
        layer,
        layer.self_attn,
        layer.self_attn.q_proj,
        layer.ffn,
        model.norm,
    ]
    for part in parts:
        part.register_forward_hook(lambda module, inputs, output: seen.append(module))
    wanted = model(features, coords)[0]
    assert [id(part) for part in parts] == [id(part) for part in sorted(seen, key=parts.index)]
    twin = copy.deepcopy(model)
    assert torch.equal(twin(features, coords)[0], wanted)
    for holder, name in (
        (twin.encoder.layers[1].self_attn, "q_proj"),
        (twin.patch_embed, "proj"),
        (twin, "norm"),
    ):
        before = twin(features, coords)[0]
        new = (
            nn.Linear(*reversed(getattr(holder, name).weight.shape))
            if name != "norm"
            else nn.LayerNorm(64, 0.5)
        )
        setattr(holder, name, new)
        assert not torch.allclose(twin(features, coords)[0], before, atol=1e-4), name
    assert torch.equal(model(features, coords)[0], wanted)


@torch.no_grad()
def test_any_dtype_of_weights():
    features, coords = tiles(70)
    wanted = small().double()(features.double(), coords)[0]
    assert wanted.dtype == torch.float64
    for dtype, near in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)):
        found = small().to(dtype)(features.to(dtype), coords)[0]
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=near)


@pytest.fixture
def installed() -> Iterator[None]:
    gigapath.install()
    yield
    for name in ("gigapath", "gigapath.slide_encoder"):
        sys.modules.pop(name)


def test_install_answers_the_official_imports(installed):
    import gigapath.slide_encoder as module
    from gigapath.slide_encoder import create_model as found

    assert found is module.create_model is create_model
    with pytest.raises(ModuleNotFoundError, match=r"gigapath.tile_encoder"):
        import gigapath.tile_encoder  # noqa: F401


def test_the_import_needs_no_library_of_the_official_code():
    program = (
        "import sys; sys.modules |= dict.fromkeys('timm fairscale einops flash_attn xformers huggingface_hub'.split());"
        "from longnet_cli.integrations.gigapath import create_model, install; install();"
        "print(len(create_model('', 'gigapath_slide_enc12l384d', 6).state_dict()))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "247\n"
