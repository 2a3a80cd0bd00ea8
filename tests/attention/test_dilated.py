"""Strided inputs, autocast, goldens, wrong calls. Each of many documents gets what it gets alone.

That fast = dense reference, and that shards equal the whole, with their far keys or their cache, is in
test_pattern_options.py.

DilatedAttention with one full segment = nn.MultiheadAttention, weights, outputs, gradients; the rest is refused.
"""

from __future__ import annotations

import copy
import json
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given
from places import GOLDEN
from reference import dilated_attention_reference
from safetensors import safe_open
from strategies import (
    PAPER_64TH,
    TOLERANCE,
    Choice,
    assert_close,
    choices,
    compare_with_reference,
    cuts,
    run,
    split,
    turning,
)
from torch import Tensor, nn

from longnet_cli.attention import (
    DilatedAttention,
    FarKeys,
    Pattern,
    dilated,
    dilated_attention,
)
from longnet_cli.attention.kernels import KERNELS
from longnet_cli.attention.planning import Shard, plan_calls


def test_strided_and_expanded_inputs():
    """A fused projection hands over interleaved q, k, v; grouped-query heads are expanded; d of sum() has stride 0."""
    pattern = Pattern((8, 32), (1, 4))
    qkv = torch.randn(2, 40, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.unbind(2)
    shared = q[:, :, :1].expand(2, 40, 4, 8)
    last = q.transpose(2, 3).contiguous().transpose(2, 3)  # the last stride is not 1
    for inputs in ((q, k, v), (q, shared, shared), (last, k, v)):
        outs = [f(*inputs, pattern) for f in (dilated_attention, dilated_attention_reference)]
        torch.testing.assert_close(*outs)
        grads = [torch.autograd.grad(out.sum(), qkv, retain_graph=True) for out in outs]
        torch.testing.assert_close(*grads)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dilated_attention(q, k, v, Pattern((8, 32), (1, 4))).pow(2).sum()


def gradients(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(attended(*inputs), inputs, create_graph=True)


def of_another_stride(inputs: list[Tensor]) -> None:
    """The last stride of q is not 1, so attention reads a copy."""
    q = inputs[0].detach().transpose(2, 3).contiguous().requires_grad_()
    loss = attended(q.transpose(2, 3), *(x.detach() for x in inputs[1:]))
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    torch.autograd.grad(grad.sum(), q)


SECOND_DERIVATIVES = {
    "grad of a gradient": lambda x: torch.autograd.grad(gradients(x)[0].sum(), x[2]),
    "a gradient penalty": lambda x: sum(d.pow(2).sum() for d in gradients(x)).backward(),
    "hvp": lambda x: torch.autograd.functional.hvp(attended, (*x,), (*x,)),
    "jvp, by two backwards": lambda x: torch.autograd.functional.jvp(attended, (*x,), (*x,)),
    "grad of a copy": of_another_stride,
}


@pytest.mark.parametrize("way", SECOND_DERIVATIVES)
def test_second_derivatives_are_refused(way):
    inputs = [torch.randn(1, 20, 2, 4, dtype=torch.float64, requires_grad=True) for _ in "qkv"]
    assert torch.autograd.gradcheck(attended, inputs)
    with pytest.raises(RuntimeError, match=r"^dilated attention has no second derivative$"):
        SECOND_DERIVATIVES[way](inputs)


@pytest.mark.parametrize("kernel", ["cpu_flash", "math"])
def test_autocast_changes_no_number(kernel):
    """Projections under autocast hand over bf16; the kernels' own arithmetic must not be cast again."""
    choice = Choice(Pattern((8, 32), (1, 4)), 2, 50, 4, 8, 3, True, None, seed=4)
    attend = partial(run, dilated_attention, choice.qkv(torch.float32), choice.pattern, start=3)
    expected = attend(kernel=kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, attend(kernel=kernel), expected))


def test_autocast_casts_several_types_as_sdpa_does():
    q, k, v = (torch.randn(1, 50, 4, 8, requires_grad=True) for _ in "qkv")
    pattern = Pattern((64,), (1,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dilated_attention(q, k, v.bfloat16(), pattern)
        heads_first = [x.transpose(1, 2) for x in (q, k, v.bfloat16())]
        expected = nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
        with pytest.raises(ValueError, match=r"one dtype .* torch\.float64 on cpu"):
            dilated_attention(q, k, v.double(), pattern)
    assert out.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert [x.dtype for x in torch.autograd.grad(out.sum(), (q, k, v))] == [torch.float32] * 3


@pytest.mark.parametrize("pattern", [Pattern((8, 32), (1, 4)), Pattern.window(8, sinks=2)])
def test_the_meta_device_has_shapes_and_no_numbers(pattern):
    q = torch.empty(2, 50, 4, 8, device="meta", requires_grad=True)
    out = dilated_attention(q, q, q, pattern, lengths=[50, 20])
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert out.is_meta
    assert grad.is_meta
    assert out.shape == grad.shape == q.shape


def test_calls_are_split_around_kernel_limits(monkeypatch):
    math, seen = KERNELS["math"], []
    forward = math.forward
    monkeypatch.setattr(type(math), "max_batch", lambda *_: 2)
    monkeypatch.setattr(math, "forward", lambda q, *a: seen.append(len(q)) or forward(q, *a))
    choice = Choice(Pattern((8, 32), (1, 4)), 3, 150, 4, 8, 5, False, None, seed=2)
    compare_with_reference(choice, kernel="math")
    assert max(seen) == 2


@pytest.mark.parametrize(
    "name", ["attention_causal", "attention_bidirectional", "attention_bidirectional_zero_key"]
)
def test_golden(name):
    """The official implementation's outputs, in the regimes where it is right."""
    path = GOLDEN / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with safe_open(path, "pt") as file:
        config = file.metadata()
        q, k, v, out = (file.get_tensor(x) for x in ("q", "k", "v", "out"))
    pattern = Pattern(
        json.loads(config["segment_lengths"]),
        json.loads(config["dilation_rates"]),
        config["head_offsets"],
    )
    options = {
        "causal": config["causal"] == "true",
        "padding": "zero_key" if name.endswith("zero_key") else "exact",
    }
    for function in (dilated_attention, dilated_attention_reference):
        assert (function(q, k, v, pattern, **options) - out).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 9, 2, 4)}, "one shape"),
        ({"v": torch.zeros(1, 8, 2, 4, dtype=torch.float64)}, "one dtype"),
        (
            {"v": torch.zeros(1, 8, 2, 4, device="meta")},
            r"one device, got torch\.float32 on cpu, .* torch\.float32 on meta",
        ),
        (dict.fromkeys("qkv", torch.zeros(1, 8, 2, 0)), "head_dim of at least 1"),
        ({"start": -1}, "start"),
        ({"lengths": [9]}, "lengths"),
        ({"lengths": torch.tensor([4.0])}, "lengths needs whole numbers"),
        ({"lengths": [[4]]}, "lengths needs whole numbers, got"),
        ({"documents": [5.5, 2.5]}, "documents needs whole numbers"),
        (
            dict.fromkeys("qkv", torch.zeros(1, 8, 2, 4, dtype=torch.int64)),
            r"need one of .*, got torch\.int64",
        ),
        ({"padding": "zero"}, "padding"),
        ({"documents": [5, 2]}, "make 8 tokens"),
        ({"documents": [8], "total": 8}, "have their own lengths"),
        ({"total": 7}, "must hold the shard"),
        ({"padding": "zero_key", "start": 8}, "zero_key"),
        ({"kernel": "fast"}, "unknown attention kernel 'fast'"),
        ({"kernel": "cuda_flash"}, "cannot run here"),
        ({"start": 4, "far": [FarKeys(0, 2, 6, *torch.zeros(2, 1, 4, 2, 4))]}, "overlap"),
        ({"start": 4, "far": [FarKeys(0, 1, 4, *torch.zeros(2, 1, 2, 2, 4))]}, "need"),
        (
            {"start": 9, "far": [FarKeys(0, 7, 9, *torch.zeros(2, 1, 2, 2, 4))]},
            "leave their segment",
        ),
        ({"far": [FarKeys(0, 8, 9, *torch.zeros(2, 1, 2, 2, 4))]}, "after a causal shard"),
        ({"far": [FarKeys(3, 8, 9, *torch.zeros(2, 1, 2, 2, 4))]}, "name level 3"),
    ],
)
def test_wrong_calls_say_what_is_wrong(change, message):
    call = {
        "q": torch.zeros(1, 8, 2, 4),
        "k": torch.zeros(1, 8, 2, 4),
        "v": torch.zeros(1, 8, 2, 4),
    } | change
    with pytest.raises(ValueError, match=message):
        dilated_attention(**call, pattern=Pattern((8,), (1,)))


def test_a_capturing_stream_is_refused(monkeypatch):
    """Before a kernel is tried, which would fail there; in a backward pass too."""
    pattern, qkv = Pattern((8,), (1,)), torch.randn(3, 1, 16, 2, 8, requires_grad=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    out = dilated_attention(*qkv, pattern)  # no stream of a CPU captures
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(dilated, "select_kernel", None)
    for call in (lambda: dilated_attention(*qkv, pattern), out.sum().backward):
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            call()


def each_alone(documents: list[int]):
    def function(*qkv, **options) -> Tensor:
        *qkv, pattern = qkv
        parts = zip(*(x.split(documents, 1) for x in qkv), strict=True)
        return torch.cat(
            [dilated_attention_reference(*part, pattern, **options) for part in parts], dim=1
        )

    return function


@given(choice=choices(), sizes=cuts())
def test_documents_equal_the_reference(choice, sizes):
    """With every option of a pattern: look-back, sinks, shared key heads."""
    inputs, documents = choice.qkv(), split(choice.tokens, sizes)
    options = {"causal": choice.causal} | turning(choice)
    expected = run(each_alone(documents), inputs, choice.pattern, **options)
    found = run(dilated_attention, inputs, choice.pattern, documents=documents, **options)
    assert_close(found, expected, 1e-12)


def test_a_document_that_fits_the_first_segment_is_one_call_on_a_cpu():
    x = torch.empty(1, 2000, 6, 32)
    shard = Shard(documents=[300, 1024, 676])
    plan = plan_calls(KERNELS["cpu_flash"], x, x, x, Pattern((1024, 4096), (1, 4)), shard)
    assert [len(found) for *_, found in plan.placed] == [1, 1, 1]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [100, 129, 512, 700, 1030])
def test_causal_squares_of_all_sizes(tokens, dtype):
    """They go in steps of rows, or as one call; with several levels and without."""
    for pattern in (Pattern((2048,), (1,)), Pattern((1024, 2048), (1, 2))):
        choice = Choice(pattern, 1, tokens, 2, 8, 0, True, None, seed=tokens)
        compare_with_reference(choice, dtype, "cpu_flash")


TOKENS = 37
FULL = Pattern((TOKENS,), (1,))
NEAR = {torch.float32: 1e-6, torch.float64: 1e-13}
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


def outputs_and_gradients(
    module: nn.Module, inputs: list[Tensor], dout: Tensor, **options
) -> dict[str, Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    query, key, value = inputs * 3 if len(inputs) == 1 else inputs
    out, weights = module(query, key, value, need_weights=False, **options)
    assert weights is None
    named = {**dict(module.named_parameters()), **{f"input {i}": x for i, x in enumerate(inputs)}}
    grads = torch.autograd.grad((out * dout).sum(), list(named.values()))
    return {"out": out.detach() * (dout != 0), **dict(zip(named, grads, strict=True))}


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize(
    ("bias", "mask", "padding", "inputs"),
    list(product([True, False], [None, "hint", "bool", "float"], [None, "bool", "float"], [1, 3])),
)
def test_one_full_segment_is_multihead_attention(dtype, bias, mask, padding, inputs):
    torch.manual_seed(0)
    theirs, ours = pair(dtype, bias)
    xs = [torch.randn(3, TOKENS, 24, dtype=dtype) for _ in range(inputs)]
    dout = torch.randn(3, TOKENS, 24, dtype=dtype)
    expected_options: dict = {}
    options: dict = {}
    if mask is not None:
        expected_options |= {"attn_mask": LATER, "is_causal": True}
        options |= {
            "is_causal": True,
            "attn_mask": {"bool": LATER, "float": AS_FLOAT.to(dtype)}.get(mask),
        }
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
        assert error <= NEAR[dtype], name


def test_starts_from_the_same_random_weights():
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True)
    torch.manual_seed(5)
    ours = DilatedAttention(24, 4, FULL)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


@pytest.mark.parametrize("causal", [True, False])
def test_the_pattern_is_that_of_the_reference(causal):
    theirs, ours = pair(torch.float64, pattern=PAPER_64TH)
    x = torch.randn(2, 333, 24, dtype=torch.float64)
    projected = nn.functional.linear(x, theirs.in_proj_weight, theirs.in_proj_bias)
    q, k, v = (y.unflatten(-1, (4, 6)) for y in projected.chunk(3, -1))
    mixed = dilated_attention_reference(q, k, v, PAPER_64TH, causal=causal)
    torch.testing.assert_close(
        ours(x, x, x, is_causal=causal)[0],
        theirs.out_proj(mixed.flatten(2)),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("pattern", [FULL, Pattern((8, 32), (1, 4))])
def test_inside_torchs_encoder(pattern, norm_first, padded):
    """In eval mode torch calls a fused dense layer wherever it can: never around our module."""
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(
        24, 4, 48, dropout=0.0, batch_first=True, norm_first=norm_first
    )
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"need_weights": True}, "need_weights=False"),
        ({"key": torch.zeros(2, 9, 24)}, "cross-attention"),
        (
            {
                "query": torch.zeros(TOKENS, 24),
                "key": torch.zeros(TOKENS, 24),
                "value": torch.zeros(TOKENS, 24),
            },
            "shape",
        ),
        ({"attn_mask": LATER}, "is_causal=True"),
        ({"attn_mask": LATER.logical_not(), "is_causal": True}, "but the causal one of 37 tokens"),
        ({"attn_mask": LATER[:9, :9], "is_causal": True}, "but the causal one of 37 tokens"),
        ({"attn_mask": AS_FLOAT + 1, "is_causal": True}, "but the causal one of 37 tokens"),
        ({"key_padding_mask": PADDING[:2].flip(1)}, "on the right only, and row 1 "),
        ({"key_padding_mask": torch.full((2, TOKENS), -1.0)}, "0 and -inf"),
        ({"key_padding_mask": PADDING[0]}, r"\(batch, tokens\)"),
        (
            {"key_padding_mask": torch.zeros(3, TOKENS, dtype=torch.bool)},
            r"needs \(2, 37\), .* got \(3, 37\)",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options, message):
    x = torch.zeros(2, TOKENS, 24)
    with pytest.raises(ValueError, match=message):
        DilatedAttention(24, 4, FULL)(**({"query": x, "key": x, "value": x} | options))


def test_nested_tensors_are_refused():
    """As torch's encoder makes them of a padded batch in eval mode, if it is older than the module in it."""
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(24, 4, 48, batch_first=True), 1
    ).eval()
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
def test_modules_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        DilatedAttention(**({"embed_dim": 24, "num_heads": 4, "pattern": FULL} | options))
