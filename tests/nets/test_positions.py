"""Proves that phases are right at a billion tokens, that scores depend on distances only, and that types are kept."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from pattern_nets import net
from torch import Tensor

from longnet_cli.attention.notation import parse_pattern
from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import Placement
from longnet_cli.nets.positions import TABLE_ROWS, position_table, rotate, sink_turn


def config(position: str, segments: tuple[int, ...] = (64, 256), head_dim: int = 16) -> LongNetConfig:
    return LongNetConfig(
        vocab_size=0,
        dim=2 * head_dim,
        num_layers=1,
        num_heads=2,
        ffn_dim=8,
        segment_lengths=segments,
        dilation_rates=tuple(range(1, len(segments) + 1)),
        position=position,
    )


def drawn(tokens: int, dtype: torch.dtype, head_dim: int = 16) -> Tensor:
    return torch.randn(1, tokens, 2, head_dim, dtype=dtype, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("start", [0, 2**24 - 8, 2**30 - 8])
def test_phases_far_out(start: int) -> None:
    table = position_table(config("rope", head_dim=64), start, 16, "cpu", torch.float32)
    assert table.q is table.k
    # the oracle has 64 bits of mantissa: 1e9 rad to 1e-10
    frequencies = np.longdouble(10000) ** (-np.arange(32, dtype=np.longdouble) / 32)
    phases = np.arange(start, start + 16).astype(np.longdouble)[:, None] * frequencies
    for ours, oracle in ((table.q.real, np.cos(phases)), (table.q.imag, np.sin(phases))):
        assert ours.dtype is torch.float32
        assert np.abs(ours[:, 0].numpy() - oracle).max() <= 1e-6


@pytest.mark.parametrize(("position", "start"), [("rope", 0), ("rope", 10**9), ("xpos", 0), ("xpos", 5 * 256)])
def test_scores_depend_on_distance_only(position: str, start: int) -> None:
    """One q and one k at every position of a segment: all scores at one distance are equal."""
    tokens = 256
    q, k = (x.expand(-1, tokens, -1, -1) for x in (drawn(1, torch.float64), drawn(1, torch.float64).flip(-1)))
    table = position_table(config(position), start, tokens, "cpu", torch.float64)
    q, k = rotate(q, k, table)
    scores = torch.einsum("bnhd,bmhd->hnm", q, k)
    for distance in (0, 1, 7, 100, 255):
        diagonal = scores.diagonal(-distance, 1, 2)  # queries `distance` after their keys
        # float64 resolves a phase of 1e9 to 1e-7
        tolerance = 1e-6 if start > 2**24 else 1e-12
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal), rtol=0, atol=tolerance)


def test_xpos_equals_torchscales_formula() -> None:
    """Scores of torchscale's table, centred in the sequence, for a sequence no longer than the widest segment."""
    tokens, d = 200, 16
    q, k = drawn(tokens, torch.float64), drawn(tokens, torch.float64).flip(1)
    ours_q, ours_k = rotate(q, k, position_table(config("xpos"), 0, tokens, "cpu", torch.float64))
    zeta = (torch.arange(0, d, 2, dtype=torch.float64) + 0.4 * d) / (1.4 * d)
    decay = (zeta ** (torch.arange(-tokens // 2, tokens - tokens // 2)[:, None] / 512)).repeat_interleave(2, -1)
    phase = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2))
    cos, sin = (f(phase).repeat_interleave(2, -1)[:, None] for f in (torch.cos, torch.sin))

    def turned(x: Tensor) -> Tensor:
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin

    theirs = torch.einsum("bnhd,bmhd->hnm", turned(q) * decay[:, None], turned(k) / decay[:, None]).tril()
    torch.testing.assert_close(torch.einsum("bnhd,bmhd->hnm", ours_q, ours_k).tril(), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "reached", "seen_at"),
    [("look_back=1,overlap=once,queries=all", (0, 16, 64), (0, 16, 28)), ("look_back=1", (0, 0, 0), (0, 0, 0))],
)
def test_levels_with_their_own_positions_are_one_softmax_over_compressed_distances(options, reached, seen_at) -> None:
    """Two documents in a row, against a table of all scores."""
    pattern = parse_pattern(f"16/1,64/4,256/16,{options}")
    model = net(pattern, "rope_by_level", layers=1).double()
    attention, documents = model.layers[0].attention, (300, 401)
    heads, size = model.config.num_heads, model.config.head_dim
    x = torch.randn(1, sum(documents), model.config.dim, dtype=torch.float64, requires_grad=True)

    def expected() -> Iterator[torch.Tensor]:
        for part in x[0].split(documents):
            q, k, v = (linear(part).unflatten(-1, (heads, size)) for linear in (attention.q, attention.k, attention.v))
            place = torch.arange(len(part))
            scores, stop = [], place + 1
            for (w, r), begin, seen in zip(pattern.levels, reached, seen_at, strict=True):
                distance = (place[:, None] - place - begin) / r + seen
                phases = distance[..., None].double() * 10000.0 ** (-2 * torch.arange(size // 2).double() / size)
                pairs = [torch.view_as_complex(each.unflatten(-1, (-1, 2))) for each in (q, k)]
                turned = torch.polar(torch.ones_like(phases), phases)
                of_level = torch.einsum("ihc,jhc,ijc->hij", pairs[0], pairs[1].conj(), turned).real / size**0.5
                start = (place // w - 1).clamp(min=0) * w
                kept = place % r == torch.tensor(pattern.offsets(pattern.levels.index((w, r)), heads))[:, None]
                asks = torch.ones_like(kept) if pattern.queries == "all" else kept
                visible = (place >= start[:, None]) & (place < stop[:, None]) & kept[:, None] & asks[..., None]
                scores.append(of_level.masked_fill(~visible, -torch.inf))
                stop = start if pattern.overlap == "once" else stop
            weights = torch.cat(scores, -1).softmax(-1).unflatten(-1, (len(scores), -1)).sum(2)
            yield torch.einsum("hij,jhc->ihc", weights, v).flatten(1)

    by_definition = attention.out(attention.inner_norm(torch.cat([*expected()])[None]))
    found = attention(x, model.positions(x, 0, documents), Placement(documents=documents), None)
    weight = torch.randn(found.shape, dtype=torch.float64)
    inputs = [x, attention.q.weight, attention.k.weight, attention.v.weight]
    both = ((y, *torch.autograd.grad((y * weight).sum(), inputs)) for y in (found, by_definition))
    for mine, other in zip(*both, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("position", ["rope", "xpos"])
def test_any_start_is_a_row_of_the_whole_table(position: str) -> None:
    tokens = TABLE_ROWS + 300  # more than one block of phases
    whole = position_table(config(position), 0, tokens, "cpu", torch.float32)
    part = position_table(config(position), TABLE_ROWS - 100, 400, "cpu", torch.float32)
    assert torch.equal(whole.q[TABLE_ROWS - 100 :], part.q)
    assert torch.equal(whole.k[TABLE_ROWS - 100 :], part.k)


def test_xpos_is_finite_at_its_limit() -> None:
    table = position_table(config("xpos", (65536,)), 0, 65536, "cpu", torch.float32)
    for factors in table:
        assert torch.view_as_real(factors).isfinite().all()
        assert factors.abs().min() > torch.finfo(torch.float32).tiny


def test_xpos_refuses_float16_in_long_segments() -> None:
    position_table(config("xpos", (8192,)), 0, 4, "cpu", torch.float16)
    with pytest.raises(ConfigError, match="use bfloat16"):
        position_table(config("xpos", (16384,)), 0, 4, "cpu", torch.float16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_are_kept_and_products_are_wide(dtype: torch.dtype) -> None:
    q = drawn(8, dtype)
    table = position_table(config("rope"), 1000, 8, "cpu", dtype)
    turned, _ = rotate(q, q, table)
    assert turned.dtype is dtype
    exact, _ = rotate(q.double(), q.double(), position_table(config("rope"), 1000, 8, "cpu", torch.float64))
    # one rounding to the type, none in between
    assert ((turned.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 4e-7).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_key_turned_by_a_distance_is_one_that_far_on(dtype: torch.dtype) -> None:
    q, distances = drawn(4, dtype), torch.tensor([0, -3, 1000, 10**9])
    turn = sink_turn(config("rope"))
    assert turn is not None
    keys, _ = rotate(q, q, position_table(config("rope"), 5, 4, "cpu", dtype))
    found = turn(keys[:, None].expand(-1, 4, -1, -1, -1), distances)
    for moved, distance in zip(found.unbind(1), distances.tolist(), strict=True):
        expected, _ = rotate(q, q, position_table(config("rope"), 5 + distance, 4, "cpu", dtype))
        torch.testing.assert_close(moved, expected, rtol=0, atol=2e-6)  # float32 rounds both; phases of 1e9 are 1e-7
    assert sink_turn(config("none")) is sink_turn(config("xpos")) is None


def test_none_and_strided_views() -> None:
    q = drawn(8, torch.float32)
    assert position_table(config("none"), 0, 8, "cpu", torch.float32) is None
    assert rotate(q, q, None) == (q, q)
    fused = torch.randn(1, 8, 3, 2, 16)
    table = position_table(config("rope"), 3, 8, "cpu", torch.float32)
    assert torch.equal(rotate(fused[:, :, 0], q, table)[0], rotate(fused[:, :, 0].clone(), q, table)[0])
    assert math.isclose(rotate(q, q, table)[0].norm(), q.norm(), rel_tol=1e-6)
