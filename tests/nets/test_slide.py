"""Each slide of a batch comes out as alone, and the slide encoder saves and loads; goldens: test_official.py."""

from __future__ import annotations

import pytest
import torch
from builders import slide, slide_config, slide_encoder
from torch import Tensor

from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets.config import LongNetConfig, SlideConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.slide import SlideEncoder, grid_cells


@pytest.mark.parametrize("padding", ["zero_key", "exact"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@torch.no_grad()
def test_a_padded_batch_is_each_slide_alone(padding, pool):
    encoder, lengths = slide_encoder(padding=padding), [70, 131, 1]
    # padding may be anything
    features, coords = (torch.full((3, 131, 6), torch.nan), torch.full((3, 131, 2), -7.0))
    alone = []
    for row, tiles in enumerate(lengths):
        x, at = slide(tiles, row)
        features[row, :tiles], coords[row, :tiles] = x, at.float()
        alone.append(encoder(x[None], at[None], pool=pool, all_layers=True)[:, 0])
    together = encoder(features, coords, lengths=lengths, pool=pool, all_layers=True)
    torch.testing.assert_close(together, torch.stack(alone, 1), rtol=0, atol=1e-5)
    one = encoder(features, coords, lengths=torch.tensor(lengths), pool=pool)
    torch.testing.assert_close(
        one[0], encoder(*(x[None] for x in slide(70, 0)), pool=pool)[0], rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_the_side_of_a_tile_is_given_for_a_call_or_for_each_slide():
    encoder, sides = slide_encoder(), [256, 512, 100.5]
    slides = [slide(40, row) for row in range(3)]
    features = torch.stack([x for x, _ in slides])
    cells = torch.stack([at // 256 for _, at in slides])
    wanted = encoder(features, cells * 256)
    coords = torch.stack([(at * side).ceil() for at, side in zip(cells, sides, strict=True)])
    assert torch.equal(encoder(features, coords, tile_size=sides), wanted)
    assert torch.equal(encoder(features, coords, tile_size=torch.tensor(sides)), wanted)
    assert torch.equal(encoder(features, cells * 512, tile_size=512), wanted)
    with pytest.raises(
        ValueError,
        match=r"slide 1, tile .*: its cell .* is outside the grid of 50 x 50 of 256 pixels",
    ):
        encoder(features, coords)


def grown(encoder: SlideEncoder, dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """The gradients of a step with dropout, always the same, and the numbers that are held for the backward pass."""
    torch.manual_seed(1)
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.itemsize
        return x

    features, coords = slide(120)
    encoder.train().to(dtype).zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = (
            encoder(
                features.to(dtype).expand(2, -1, -1), coords.expand(2, -1, -1), lengths=[120, 77]
            )
            .square()
            .sum()
        )
    loss.backward()
    return {name: p.grad for name, p in encoder.named_parameters()}, sum(held.values())


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_layers_that_are_computed_again_give_the_same_gradients(dtype, near):
    encoder = slide_encoder(num_layers=4, dropout=0.25, drop_path=0.3)
    assert encoder.activation_checkpointing
    found, few = grown(encoder, dtype)
    encoder.activation_checkpointing = False
    wanted, many = grown(encoder, dtype)
    torch.testing.assert_close(found, wanted, rtol=near, atol=near)
    assert few < many / 5  # without: some 30 tensors a layer; with: its input


def test_drop_path_grows_from_layer_to_layer_and_leaves_out_whole_slides():
    encoder = slide_encoder(num_layers=4, drop_path=0.6)
    shares = [layer.drop_path.p for layer in encoder.net.layers]
    assert shares == pytest.approx([0, 0.2, 0.4, 0.6])
    drop, x = encoder.net.layers[3].drop_path, torch.randn(4000, 3, 2)
    assert torch.equal(drop(x), x)
    left = drop.train()(x)
    kept = left.flatten(1).any(1)
    assert 0.36 < kept.float().mean() < 0.44
    torch.testing.assert_close(left, x * kept[:, None, None] / 0.4)


def test_cells_are_exact_at_their_edges():
    coords = torch.tensor([[0, 255], [256, 511], [512, 2**40 * 256 - 1]])
    assert grid_cells(coords, 256).tolist() == [[0, 0], [1, 1], [2, 2**40 - 1]]
    assert grid_cells(torch.tensor([[-1.0, 0.5]]), 256).tolist() == [[-1, 0]]


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    encoder, (features, coords) = slide_encoder(), slide(40)
    encoder.save_pretrained(tmp_path)
    inputs = features[None], coords[None]
    assert torch.equal(SlideEncoder.from_pretrained(tmp_path)(*inputs), encoder(*inputs))
    exact = SlideEncoder.from_pretrained(tmp_path, padding="exact")
    assert exact.config.padding == "exact"
    assert torch.equal(exact(*inputs), slide_encoder(padding="exact")(*inputs))
    assert not torch.allclose(exact(*inputs), encoder(*inputs))
    fields = {name: getattr(slide_config(), name) for name in LongNetConfig.model_fields}
    LongNet(LongNetConfig(**fields)).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="no in_features"):
        SlideEncoder.from_pretrained(tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(1, 4, 5)}, "features have 5 numbers, the model reads 6"),
        ({"coords": None}, r"coords must have the shape \(1, 4, 2\), got none"),
        (
            {"coords": torch.zeros(1, 3, 2)},
            r"coords must have the shape \(1, 4, 2\), got \(1, 3, 2\)",
        ),
        (
            {"coords": torch.tensor([[[0, 0], [256, 0], [0, 12800], [0, 0]]])},
            "slide 0, tile 2: the tile at .0, 12800.: its cell .0, 50. is",
        ),
        ({"lengths": [5]}, "lengths must be 1 numbers of 1 to 4"),
        ({"pool": "last"}, "pool must be"),
        (
            {"tile_size": [256, 256]},
            "tile_size must be above 0, one number or one for each of 1 slides, got .256, 256.",
        ),
        ({"tile_size": 0}, "tile_size must be above 0"),
    ],
)
def test_what_is_refused(change, message):
    inputs = {"features": torch.zeros(1, 4, 6), "coords": torch.zeros(1, 4, 2), **change}
    with pytest.raises(ValueError, match=message):
        slide_encoder()(**inputs)


def test_configurations_that_cannot_be():
    with pytest.raises(ValueError, match="a dim that 4 divides"):
        slide_config(dim=34, num_heads=2)
    with pytest.raises(ValueError, match="causal"):
        slide_config(causal=True)
    assert SlideConfig.gigapath().num_parameters() == 86_330_880
    with torch.device("meta"):
        assert (
            sum(p.numel() for p in SlideEncoder(SlideConfig.gigapath()).parameters()) == 86_330_880
        )
