"""Proves that the net never looks ahead, and gives one answer however its input is cut; goldens: test_official.py.

Under autocast each layer casts what its products read once, and its norms do not widen what they read.

Proves that phases are right at a billion tokens, and that types are kept.
"""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pattern_nets import draw, net
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longnet_cli.attention import SINKS, FarKeys, Outside, Pattern
from longnet_cli.attention.notation import parse_pattern
from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.positions import position_table, rotate
from longnet_cli.running import device

PATTERN = {"segment_lengths": (16, 48, 96), "dilation_rates": (1, 2, 5)}


def small(**changes: object) -> LongNetConfig:
    sizes = {"vocab_size": 50, "dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 64}
    return LongNetConfig(**(sizes | PATTERN | changes))


def build(dtype: torch.dtype = torch.float64, **changes: object) -> LongNet:
    torch.manual_seed(0)
    return LongNet(small(**changes)).to(dtype)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_a_token_reaches_as_far_as_the_pattern_says(num_layers, causal):
    """Change each of 200 tokens: the outputs that change are those within num_layers hops of rows that it shares."""
    net = build(num_layers=num_layers, causal=causal, position="rope")
    tokens = draw(1, 200)
    changed_tokens = tokens.repeat(200, 1)  # row i differs in token i
    changed_tokens.diagonal().add_(1).remainder_(50)
    with torch.no_grad():
        base = net(tokens)
        # (token, output)
        change = torch.cat([net(rows) - base for rows in changed_tokens.split(50)]).abs().amax(-1)
    hop = torch.eye(200, dtype=torch.bool)
    position = torch.arange(200)
    for level, (w, r) in enumerate(net.config.pattern.levels):
        for offset in set(net.config.pattern.offsets(level, net.config.num_heads)):
            row = position % w % r == offset
            hop |= row[:, None] & row & (position[:, None] // w == position // w)
    if causal:
        hop &= position[:, None] <= position  # (token, output)
    reached = torch.linalg.matrix_power(hop.double(), num_layers) > 0
    assert torch.equal(change > 1e-12, reached)
    assert not reached.all()


@pytest.mark.parametrize("causal", [True, False])
def test_a_padded_row_is_what_it_would_be_alone(causal):
    net, tokens = build(causal=causal, position="rope"), draw(3, 70)
    hidden = net(tokens, lengths=[70, 33, 1])
    for row, length in enumerate((70, 33, 1)):
        torch.testing.assert_close(
            hidden[row : row + 1, :length], net(tokens[row : row + 1, :length])
        )


@pytest.mark.parametrize("position", ["rope", "xpos", "none"])
def test_documents_in_a_row_are_what_they_would_be_alone(position):
    net, documents = build(position=position), [5, 64, 1, 30]
    tokens = draw(2, sum(documents))
    alone = torch.cat([net(part) for part in tokens.split(documents, 1)], 1)
    torch.testing.assert_close(net(tokens, documents=documents), alone, rtol=0, atol=1e-12)


@torch.no_grad()
def test_sinks_are_seen_at_one_distance_however_far_the_rest_is():
    """8,192 tokens, all but the sinks moved: every segment sees those right before its window."""
    torch.manual_seed(0)
    net, tokens = (
        LongNet(small(position="rope", **vars(Pattern.window(64, sinks=4)))),
        draw(1, 8192),
    )
    sinks: list[tuple[Tensor, Tensor]] = []

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Outside:
        sinks.append((k, v))
        return Outside()

    def hidden(sinks: list[tuple[Tensor, Tensor]], moved: int = 0) -> Tensor:
        far = [Outside([FarKeys(SINKS, 0, 4, *rows)]) for rows in sinks]
        return net(tokens[:, 4:], start=2 * 64 + moved, far=lambda layer, q, k, v: far[layer])

    net(tokens[:, :4], far=keep)
    near = hidden(sinks)
    for moved in (10**6, 10**8):
        torch.testing.assert_close(hidden(sinks, moved), near, rtol=0, atol=1e-4)
    # and they matter to every token: with other values there, all are others
    other = hidden([(k, v.flip(1)) for k, v in sinks])
    assert (other - near).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("limit", [1, 50 * 10, 50 * 130])
def test_chunked_nll_is_cross_entropy(tied, limit):
    net, tokens = build(tie_embeddings=tied), draw(2, 65)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    wanted = F.cross_entropy(
        net.logits(net(tokens)).flatten(0, 1), targets.flatten(), reduction="none"
    ).view(2, 65)
    wanted.sum().backward()
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    nll = net.nll(net(tokens), targets, limit=limit)
    torch.testing.assert_close(nll, wanted, rtol=0, atol=1e-12)
    assert (nll[:, -1] == 0).all()
    nll.sum().backward()
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        assert torch.equal(net.nll(net(tokens), targets, limit=limit), nll)


def test_only_one_chunk_of_logits_lives(monkeypatch):
    net, tokens = build(torch.float32), draw(1, 100)
    sizes: list[int] = []
    logits = LongNet.logits
    monkeypatch.setattr(
        LongNet, "logits", lambda self, h: sizes.append(logits(self, h).numel()) or logits(self, h)
    )
    saved: list[int] = []
    hidden = net(tokens)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        nll = net.nll(hidden, tokens, limit=50 * 16)
    assert nll.dtype is torch.float32
    assert max(sizes) == 50 * 16
    assert len(sizes) == 7
    assert 50 * 16 not in saved  # no logits wait for the backward
    nll.sum().backward()
    assert len(sizes) == 14


@pytest.mark.parametrize("norm", ["subln", "pre", "rmsnorm"])
@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize(("kv_heads", "ffn"), [(4, "gelu"), (2, "gelu"), (4, "swiglu")])
def test_counts_its_parameters(norm, switch, kv_heads, ffn):
    options = dict.fromkeys(("final_norm", "tie_embeddings", "bias"), switch)
    config = small(norm=norm, kv_heads=kv_heads, ffn=ffn, **options)
    assert (
        sum(parameter.numel() for parameter in LongNet(config).parameters())
        == config.num_parameters()
    )
    matrices = [p for name, p in LongNet(config).layers.named_parameters() if p.dim() == 2]
    assert sum(matrix.numel() for matrix in matrices) == config.layer_weights


@torch.no_grad()
def test_query_heads_that_share_a_key_head_are_those_of_a_net_that_repeats_it():
    shared = build(kv_heads=2)
    weights = shared.state_dict()
    for name, weight in weights.items():
        if ".k." in name or ".v." in name:
            weights[name] = weight.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    repeated = build()
    repeated.load_state_dict(weights)
    tokens = draw(2, 200)
    torch.testing.assert_close(shared(tokens), repeated(tokens), rtol=0, atol=1e-12)


def test_initial_weights():
    """MAGNETO's gains: xavier_uniform has the variance gain^2 * 2 / (fan_in + fan_out)."""
    net = LongNet(small(dim=256, num_layers=6, ffn_dim=1024, vocab_size=1000, ffn="swiglu"))
    gain = torch.log(torch.tensor(12.0)).sqrt().item()
    attention, ffn = net.layers[0].attention, net.layers[0].ffn
    expected = [
        (attention.q, 2**-0.5),
        (attention.k, 2**-0.5),
        (attention.v, gain * 2**-0.5),
        (attention.out, gain),
        (ffn.fc1, gain),
        (ffn.gate, gain),
        (ffn.fc2, gain),
    ]
    for linear, scale in expected:
        std = scale * (2 / sum(linear.weight.shape)) ** 0.5
        assert linear.weight.std().item() == pytest.approx(std, rel=0.02)
        assert (linear.bias == 0).all()
    assert net.embedding.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert LongNet(small(norm="pre")).layers[0].ffn.fc1.weight.std().item() == pytest.approx(
        (2 / 96) ** 0.5, rel=0.1
    )


def test_meta_device_then_weights():
    with torch.device("meta"):
        net = LongNet(small())
    assert all(parameter.is_meta for parameter in net.parameters())
    net.to_empty(device="cpu")
    other = build(torch.float32)
    for each in (net, other):
        torch.manual_seed(1)
        each.init_weights()
    for ours, wanted in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, wanted)


def test_a_net_without_embedding_says_so():
    net = build(vocab_size=0, causal=False, position="none")
    assert net(embeddings=torch.randn(1, 20, 32, dtype=torch.float64)).shape == (1, 20, 32)
    with pytest.raises(ConfigError, match="no token embedding"):
        net(draw(1, 4))
    with pytest.raises(ConfigError, match="no vocabulary"):
        net.logits(torch.randn(1, 4, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="either tokens or embeddings"):
        net()


class Casts(TorchDispatchMode):
    """Counts casts of activations, and the types that norms read."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
        self.normed: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dim() >= 3:
            self.casts[args[0].dtype, found.dtype] += 1
        if func is torch.ops.aten.native_layer_norm.default:
            self.normed.append(args[0].dtype)
        return found


def test_products_share_one_cast_and_inner_norms_stay_narrow():
    wide, narrow = torch.float32, torch.bfloat16
    config = LongNetConfig(
        vocab_size=50, dim=32, num_layers=1, num_heads=4, ffn_dim=48, segment_lengths=(16,), dilation_rates=(1,),
        position="none",
    )  # fmt: skip
    model, ids = LongNet(config), torch.arange(40)[None]
    expected = model(ids)
    with torch.no_grad(), torch.autocast("cpu", dtype=narrow):
        model(ids)  # which probes the kernel
        with Casts() as counted:
            found = model(ids)
    # of attention's input and of the feed-forward's; out of attention its fp32 sums
    assert counted.casts[wide, narrow] <= 3
    assert counted.normed == [wide, narrow, wide, narrow, wide]
    assert found.dtype is wide
    assert (found - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize(
    ("flags", "notes"),
    [
        ("flags : sse avx2 avx512f", 1),
        ("flags\t\t: avx512_bf16", 0),
        ("Features : bf16", 0),
        ("", 0),
    ],
)
def test_slow_bf16_is_said_once(tmp_path, monkeypatch, flags, notes):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr(device, "CPU_INFO", tmp_path / "cpuinfo")
    device._warn_of_slow_bf16.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        chosen = [
            device.resolve_dtype(name, torch.device("cpu"))
            for name in ("auto", "fp32", "bf16", "bf16")
        ]
    assert chosen == ["fp32", "fp32", "bf16", "bf16"]
    said = "this CPU has no bf16 instructions: --dtype fp32 is faster here"
    assert [str(each.message) for each in found] == [said] * notes


def config(
    position: str, segments: tuple[int, ...] = (64, 256), head_dim: int = 16
) -> LongNetConfig:
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
    return torch.randn(
        1, tokens, 2, head_dim, dtype=dtype, generator=torch.Generator().manual_seed(tokens)
    )


@pytest.mark.parametrize("start", [0, 2**24 - 8, 2**30 - 8])
def test_phases_far_out(start):
    table = position_table(
        config("rope", head_dim=64), torch.arange(start, start + 16), torch.float32
    )
    assert table.q is table.k
    # the oracle has 64 bits of mantissa: 1e9 rad to 1e-10
    frequencies = np.longdouble(10000) ** (-np.arange(32, dtype=np.longdouble) / 32)
    phases = np.arange(start, start + 16).astype(np.longdouble)[:, None] * frequencies
    for ours, oracle in ((table.q.real, np.cos(phases)), (table.q.imag, np.sin(phases))):
        assert ours.dtype is torch.float32
        assert np.abs(ours[:, 0].numpy() - oracle).max() <= 1e-6


@pytest.mark.parametrize(
    ("options", "reached", "seen_at"),
    [
        ("look_back=1,overlap=once,queries=all", (0, 16, 64), (0, 16, 28)),
        ("look_back=1", (0, 0, 0), (0, 0, 0)),
    ],
)
def test_levels_with_their_own_positions_compress_distances(options, reached, seen_at):
    """In two documents that follow each other. That levels are one softmax, the reference of attention shows."""
    model = net(parse_pattern(f"16/1,64/4,256/16,{options}"), "rope_by_level", layers=1).double()
    attention, documents = model.layers[0].attention, (100, 130)
    x = torch.randn(1, sum(documents), model.config.dim, dtype=torch.float64)
    q, k, _ = attention.project(x, model.positions(x, 0, documents))
    scores = torch.einsum("bilhd,bjlhd->lhij", q, k)
    unturned = (y.unflatten(-1, (-1, 2)) for y in attention.project(x, None)[:2])
    pairs_q, pairs_k = (torch.view_as_complex(y)[0].split(documents) for y in unturned)
    speeds = 10000.0 ** (-torch.arange(q.shape[-1] // 2, dtype=torch.float64) / (q.shape[-1] // 2))
    for document, part in enumerate((slice(0, 100), slice(100, 230))):
        place = torch.arange(documents[document])
        for level, (rate, begin, seen) in enumerate(zip((1, 4, 16), reached, seen_at, strict=True)):
            phases = ((place[:, None] - place - begin) / rate + seen)[..., None] * speeds
            turned = pairs_k[document].conj(), torch.polar(torch.ones_like(phases), phases)
            expected = torch.einsum("ihc,jhc,ijc->hij", pairs_q[document], *turned).real
            torch.testing.assert_close(scores[level, :, part, part], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("position", ["rope", "xpos"])
def test_any_start_is_a_row_of_the_whole_table(position):
    places = torch.arange(66000)
    whole = position_table(config(position), places, torch.float32)
    part = position_table(config(position), places[65400:], torch.float32)
    assert torch.equal(whole.q[65400:], part.q)
    assert torch.equal(whole.k[65400:], part.k)


def test_xpos_is_finite_at_its_limit():
    table = position_table(config("xpos", (65536,)), torch.arange(65536), torch.float32)
    for factors in table:
        assert torch.view_as_real(factors).isfinite().all()
        assert factors.abs().min() > torch.finfo(torch.float32).tiny


def test_xpos_refuses_float16_in_long_segments():
    position_table(config("xpos", (8192,)), torch.arange(4), torch.float16)
    with pytest.raises(ConfigError, match="use bfloat16"):
        position_table(config("xpos", (16384,)), torch.arange(4), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_are_kept_and_products_are_wide(dtype):
    q = drawn(8, dtype)
    table = position_table(config("rope"), torch.arange(1000, 1008), dtype)
    turned, _ = rotate(q, q, table)
    assert turned.dtype is dtype
    exact, _ = rotate(
        q.double(),
        q.double(),
        position_table(config("rope"), torch.arange(1000, 1008), torch.float64),
    )
    # one rounding to the type, none in between
    assert (
        (turned.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 4e-7
    ).all()
