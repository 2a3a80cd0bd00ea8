"""Fast = dense reference, outputs and gradients; wrong calls; what the cache keeps.

That shards equal the whole, with their far keys or their cache, is in test_pattern_options.py.
"""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from places import GOLDEN
from safetensors import safe_open
from strategies import Problem, assert_close, problems, run
from torch import Tensor

from longnet_cli.attention import FarKeys, KVCache, Pattern, dilated, dilated_attention
from longnet_cli.attention.kernels import KERNELS
from longnet_cli.attention.reference import dilated_attention_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize(("dtype", "kernel"), [*((dtype, None) for dtype in TOLERANCE), (torch.float64, "math")])
@given(problem=problems())
def test_equals_the_fp64_reference(problem: Problem, dtype: torch.dtype, kernel: str | None) -> None:
    inputs = problem.tensors(4, dtype)
    found = run(dilated_attention, inputs, problem.pattern, kernel=kernel, **problem.options)
    wide = [x.double() for x in inputs]
    expected = run(dilated_attention_reference, wide, problem.pattern, **problem.options)
    assert_close(found, expected, TOLERANCE[dtype])


def test_strided_and_expanded_inputs() -> None:
    """A fused projection hands over interleaved q, k, v; grouped-query heads are expanded; d of sum() has stride 0."""
    pattern = Pattern((8, 32), (1, 4))
    qkv = torch.randn(2, 40, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.unbind(2)
    found = dilated_attention(q, k, v, pattern)
    torch.testing.assert_close(found, dilated_attention_reference(q, k, v, pattern))
    (grad,) = torch.autograd.grad(found.sum(), qkv)
    (expected,) = torch.autograd.grad(dilated_attention_reference(q, k, v, pattern).sum(), qkv)
    torch.testing.assert_close(grad, expected)
    shared = torch.randn(2, 40, 1, 8, dtype=torch.float64).expand(2, 40, 4, 8)
    torch.testing.assert_close(
        dilated_attention(q, shared, shared, pattern), dilated_attention_reference(q, shared, shared, pattern)
    )
    last = torch.randn(2, 40, 8, 4, dtype=torch.float64).transpose(2, 3)  # the last stride is not 1
    torch.testing.assert_close(dilated_attention(last, k, v, pattern), dilated_attention_reference(last, k, v, pattern))


@pytest.mark.parametrize("kernel", ["cpu_flash", "math"])
def test_autocast_changes_no_number(kernel: str) -> None:
    """Projections under autocast hand over bf16; the kernels' own arithmetic must not be cast again."""
    problem = Problem(Pattern((8, 32), (1, 4)), 2, 50, 4, 8, 3, True, None, seed=4)
    inputs = problem.tensors(4, torch.float32)
    expected = run(dilated_attention, inputs, problem.pattern, kernel=kernel, **problem.options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(dilated_attention, inputs, problem.pattern, kernel=kernel, **problem.options)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_calls_are_split_around_kernel_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(Pattern((8, 32), (1, 4)), 3, 150, 4, 8, 5, False, None, seed=2)
    inputs = problem.tensors(4)
    whole = run(dilated_attention, inputs, problem.pattern, **problem.options)
    monkeypatch.setattr(type(KERNELS["math"]), "max_batch", lambda *_: 2)
    seen = []
    forward = KERNELS["math"].forward
    monkeypatch.setattr(KERNELS["math"], "forward", lambda q, *a: seen.append(len(q)) or forward(q, *a))
    assert_close(run(dilated_attention, inputs, problem.pattern, kernel="math", **problem.options), whole, 1e-12)
    assert max(seen) == 2


@pytest.mark.parametrize("name", ["attention_causal", "attention_bidirectional", "attention_bidirectional_zero_key"])
def test_golden(name: str) -> None:
    """The official implementation's outputs, in the regimes where it is right."""
    path = GOLDEN / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with safe_open(path, "pt") as file:
        config = file.metadata()
        q, k, v, out = (file.get_tensor(x) for x in ("q", "k", "v", "out"))
    pattern = Pattern(
        json.loads(config["segment_lengths"]), json.loads(config["dilation_rates"]), config["head_offsets"]
    )
    options = {"causal": config["causal"] == "true", "padding": "zero_key" if name.endswith("zero_key") else "exact"}
    for function in (dilated_attention, dilated_attention_reference):
        assert (function(q, k, v, pattern, **options) - out).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 9, 2, 4)}, "one shape"),
        ({"v": torch.zeros(1, 8, 2, 4, dtype=torch.float64)}, "one dtype"),
        ({"start": -1}, "start"),
        ({"lengths": [9]}, "lengths"),
        ({"lengths": [1, 2]}, "lengths"),
        ({"lengths": torch.tensor([4.0])}, "lengths needs whole numbers"),
        ({"lengths": torch.tensor(4)}, "lengths needs whole numbers, in one dimension"),
        ({"lengths": [[4]]}, "lengths needs whole numbers, in one dimension"),
        ({"documents": [5.5, 2.5]}, "documents needs whole numbers"),
        (dict.fromkeys("qkv", torch.zeros(1, 8, 2, 4, dtype=torch.int64)), r"need one of .*, got torch\.int64"),
        ({"padding": "zero"}, "padding"),
        ({"documents": [5, 2]}, "make 8 tokens"),
        ({"documents": [8], "total": 8}, "have their own lengths"),
        ({"total": 7}, "must hold the shard"),
        ({"padding": "zero_key", "start": 8}, "zero_key"),
        ({"kernel": "fast"}, "unknown attention kernel 'fast'"),
        ({"kernel": "cuda_flash"}, "cannot run here"),
        ({"start": 4, "far": [FarKeys(0, 2, 6, *torch.zeros(2, 1, 4, 2, 4))]}, "overlap"),
        ({"start": 4, "far": [FarKeys(0, 1, 4, *torch.zeros(2, 1, 2, 2, 4))]}, "need"),
        ({"start": 9, "far": [FarKeys(0, 7, 9, *torch.zeros(2, 1, 2, 2, 4))]}, "leave their segment"),
        ({"far": [FarKeys(0, 8, 9, *torch.zeros(2, 1, 2, 2, 4))]}, "after a causal shard"),
        ({"far": [FarKeys(3, 8, 9, *torch.zeros(2, 1, 2, 2, 4))]}, "name level 3"),
    ],
)
def test_wrong_calls_say_what_is_wrong(change: dict, message: str) -> None:
    call = {"q": torch.zeros(1, 8, 2, 4), "k": torch.zeros(1, 8, 2, 4), "v": torch.zeros(1, 8, 2, 4)} | change
    with pytest.raises(ValueError, match=message):
        dilated_attention(**call, pattern=Pattern((8,), (1,)))


def test_a_capturing_stream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a kernel is tried, which would fail there; in a backward pass too."""
    pattern, qkv = Pattern((8,), (1,)), torch.randn(3, 1, 16, 2, 8, requires_grad=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    out = dilated_attention(*qkv, pattern)  # no stream of a CPU captures
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(dilated, "select_kernel", None)
    for call in (lambda: dilated_attention(*qkv, pattern), out.sum().backward):
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            call()


@pytest.mark.parametrize("pattern", [Pattern.dense(), Pattern((8, 96), (1, 2), look_back=1)])
@pytest.mark.parametrize("keep", [0, 300])
def test_rows_of_long_segments_come_when_they_are_needed(
    pattern: Pattern, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longnet_cli.attention.cache.FIRST_ROWS", 16)
    q, k, v = torch.randn(3, 1, 300, 4, 8, dtype=torch.float64)
    cache, parts, seen = KVCache(pattern, 1, 4, 8, dtype=q.dtype, keep=keep), [], []
    begun = cache.nbytes
    for part in zip(*(x.split([1, 20, 3, 100, 76, 100], 1) for x in (q, k, v)), strict=True):
        seen.append((part, cache.position, cache.far()))
        parts.append(dilated_attention(*part, pattern, start=cache.position, far=cache.far()))
        cache.append(*part[1:])
    torch.testing.assert_close(torch.cat(parts, 1), dilated_attention(q, k, v, pattern), rtol=1e-12, atol=1e-12)
    most = min(pattern.cache_rows, 2 * 300)
    assert begun < cache.nbytes <= 2 * 4 * 8 * 8 * most
    if keep:
        again = [dilated_attention(*part, pattern, start=start, far=far) for part, start, far in seen]
        assert all(map(torch.equal, again, parts))
