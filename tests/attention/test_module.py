"""DilatedAttention with one full segment = nn.MultiheadAttention, weights, outputs, gradients; the rest is refused."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from strategies import PAPER_64TH
from torch import Tensor, nn

from longnet_cli.attention import DilatedAttention, Pattern
from longnet_cli.attention.reference import dilated_attention_reference

TOKENS = 37
FULL = Pattern((TOKENS,), (1,))
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}
LATER = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
AS_FLOAT = torch.zeros(TOKENS, TOKENS).masked_fill(LATER, float("-inf"))
PADDING = torch.arange(TOKENS) >= torch.tensor([[TOKENS], [21], [1]])


def pair(dtype: torch.dtype = torch.float32, bias: bool = True, pattern: Pattern = FULL):
    """torch's module with random weights and biases, and ours with the same."""
    theirs = nn.MultiheadAttention(24, 4, bias=bias, batch_first=True, dtype=dtype)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = DilatedAttention(24, 4, pattern, bias=bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def put_ours(encoder: nn.TransformerEncoder, pattern: Pattern) -> None:
    """Give its layers our attention, with the weights of torch's."""
    for layer in encoder.layers:
        attention = DilatedAttention(24, 4, pattern)
        attention.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = attention


def outputs_and_gradients(module: nn.Module, inputs: list[Tensor], dout: Tensor, **options) -> dict[str, Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    query, key, value = inputs * 3 if len(inputs) == 1 else inputs
    out, weights = module(query, key, value, need_weights=False, **options)
    assert weights is None
    named = {**dict(module.named_parameters()), **{f"input {i}": x for i, x in enumerate(inputs)}}
    grads = torch.autograd.grad((out * dout).sum(), list(named.values()))
    return {"out": out.detach() * (dout != 0), **dict(zip(named, grads, strict=True))}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("bias", "mask", "padding", "inputs"),
    list(product([True, False], [None, "hint", "bool", "float"], [None, "bool", "float"], [1, 3])),
)
def test_one_full_segment_is_multihead_attention(dtype, bias, mask, padding, inputs) -> None:
    torch.manual_seed(0)
    theirs, ours = pair(dtype, bias)
    xs = [torch.randn(3, TOKENS, 24, dtype=dtype) for _ in range(inputs)]
    dout = torch.randn(3, TOKENS, 24, dtype=dtype)
    expected_options: dict = {}
    options: dict = {}
    if mask is not None:
        expected_options |= {"attn_mask": LATER, "is_causal": True}
        options |= {"is_causal": True, "attn_mask": {"bool": LATER, "float": AS_FLOAT.to(dtype)}.get(mask)}
    if padding is not None:
        dout = dout.masked_fill(PADDING[..., None], 0)  # what padded queries give means nothing
        expected_options |= {"key_padding_mask": PADDING}
        as_float = torch.zeros(PADDING.shape, dtype=dtype).masked_fill(PADDING, float("-inf"))
        options |= {"key_padding_mask": PADDING if padding == "bool" else as_float}
    found = outputs_and_gradients(ours, xs, dout, **options)
    expected = outputs_and_gradients(theirs, xs, dout, **expected_options)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / max(1.0, value.abs().max())
        assert error <= TOLERANCE[dtype], name


def test_starts_from_the_same_random_weights() -> None:
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True)
    torch.manual_seed(5)
    ours = DilatedAttention(24, 4, FULL)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


@pytest.mark.parametrize("causal", [True, False])
def test_the_pattern_is_that_of_the_reference(causal: bool) -> None:
    theirs, ours = pair(torch.float64, pattern=PAPER_64TH)
    x = torch.randn(2, 333, 24, dtype=torch.float64)
    projected = nn.functional.linear(x, theirs.in_proj_weight, theirs.in_proj_bias)
    q, k, v = (y.unflatten(-1, (4, 6)) for y in projected.chunk(3, -1))
    mixed = dilated_attention_reference(q, k, v, PAPER_64TH, causal=causal)
    torch.testing.assert_close(
        ours(x, x, x, is_causal=causal)[0], theirs.out_proj(mixed.flatten(2)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("pattern", [FULL, Pattern((8, 32), (1, 4))])
def test_inside_torchs_encoder(pattern: Pattern, norm_first: bool, padded: bool) -> None:
    """In eval mode torch calls a fused dense layer wherever it can: never around our module."""
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    dense = copy.deepcopy(encoder)
    put_ours(encoder, pattern)
    x, padding = torch.randn(3, TOKENS, 24), PADDING if padded else None
    true = ~PADDING[..., None] if padded else torch.tensor(True)
    learned = encoder(x, src_key_padding_mask=padding)
    learned.sum().backward()
    with torch.no_grad():
        found = encoder.eval()(x, src_key_padding_mask=padding)
        expected = dense.train()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found * true, learned * true)
    assert torch.allclose(found * true, expected * true, atol=2e-6) == (pattern is FULL)


def test_causal_mask_through_torchs_encoder() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 48, 0.0, batch_first=True), 2)
    dense = copy.deepcopy(encoder)
    put_ours(encoder, FULL)
    x = torch.randn(2, TOKENS, 24)
    mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    torch.testing.assert_close(encoder(x, mask), dense(x, mask))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"need_weights": True}, "need_weights=False"),
        ({"key": torch.zeros(2, 9, 24)}, "cross-attention"),
        ({"query": torch.zeros(TOKENS, 24), "key": torch.zeros(TOKENS, 24), "value": torch.zeros(TOKENS, 24)}, "shape"),
        ({"attn_mask": LATER}, "is_causal=True"),
        ({"attn_mask": LATER.logical_not(), "is_causal": True}, "but the causal one of 37 tokens"),
        ({"attn_mask": LATER[:9, :9], "is_causal": True}, "but the causal one of 37 tokens"),
        ({"attn_mask": AS_FLOAT + 1, "is_causal": True}, "but the causal one of 37 tokens"),
        ({"attn_mask": LATER.expand(8, -1, -1), "is_causal": True}, "but the causal one of 37 tokens"),
        ({"key_padding_mask": PADDING[:2].flip(1)}, "on the right only, and row 1 "),
        ({"key_padding_mask": torch.arange(TOKENS).expand(2, -1) == 5}, "on the right only, and row 0 "),
        ({"key_padding_mask": torch.full((2, TOKENS), -1.0)}, "0 and -inf"),
        ({"key_padding_mask": PADDING[0]}, r"\(batch, tokens\)"),
        ({"key_padding_mask": torch.zeros(2, TOKENS - 1, dtype=torch.bool)}, r"needs \(2, 37\), .* got \(2, 36\)"),
        ({"key_padding_mask": torch.zeros(3, TOKENS, dtype=torch.bool)}, r"needs \(2, 37\), .* got \(3, 37\)"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options: dict, message: str) -> None:
    x = torch.zeros(2, TOKENS, 24)
    with pytest.raises(ValueError, match=message):
        DilatedAttention(24, 4, FULL)(**({"query": x, "key": x, "value": x} | options))


def test_nested_tensors_are_refused() -> None:
    """As torch's encoder makes them of a padded batch in eval mode, if it is older than the module in it."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 48, batch_first=True), 1).eval()
    put_ours(encoder, FULL)
    with torch.no_grad(), pytest.raises(ValueError, match="with enable_nested_tensor=False"):
        encoder(torch.zeros(3, TOKENS, 24), src_key_padding_mask=PADDING)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "dropout must be 0, got 0.1"),
        ({"batch_first": False}, "batch_first must be True"),
        ({"num_heads": 5}, "multiple of num_heads, got 24 and 5"),
    ],
)
def test_modules_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DilatedAttention(**({"embed_dim": 24, "num_heads": 4, "pattern": FULL} | options))
