"""Kernels: each one that runs here equals plain math; selection, forcing and probing; flash-attn's real signatures.

On a GPU: tests/test_gpu.py.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from strategies import assert_close, run
from torch import Tensor

from longnet_cli.attention import Pattern, cuda_kernels, dilated_attention, kernels
from longnet_cli.attention.packing import Sequences, rows_of
from longnet_cli.attention.reference import dilated_attention_reference

CPU, MATH = torch.device("cpu"), kernels.KERNELS["math"]


@pytest.fixture(autouse=True)
def _fresh_selection():
    """Selections are remembered for the life of a process; not from one test to the next."""
    kernels._select.cache_clear()
    yield
    kernels._select.cache_clear()


def strided(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(batch, heads, rows, head_dim) with rows three tokens apart in a (batch, tokens, heads, head_dim) tensor."""
    batch, heads, rows, head_dim = shape
    x = torch.randn(batch, rows * 3, heads, head_dim, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)[:, ::3].transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_cpu_flash_on_strided_views_and_a_foreign_lse(dtype: torch.dtype, tolerance: float, causal: bool) -> None:
    """The backward is given the merged out and lse of a larger union, in the layout in which we hold them."""
    q, k, v, dout = (strided(2, 3, 70, 8, dtype=dtype, seed=s) for s in range(4))
    out, lse = kernels.KERNELS["cpu_flash"].forward(q, k, v, causal, 0.3)
    expected_out, expected_lse = MATH.forward(q, k, v, causal, 0.3)
    assert (out - expected_out).norm() <= tolerance * expected_out.norm()
    assert (lse - expected_lse).norm() <= tolerance * expected_lse.norm()
    merged = (expected_out * 0.5).to(dtype)
    merged_lse = (expected_lse + 0.7).transpose(1, 2).contiguous().transpose(1, 2)  # memory (batch, rows, heads)
    arguments = ((dout, q, k, v, merged, merged_lse), causal, 0.3)
    found, expected = kernels.KERNELS["cpu_flash"].backward(*arguments), MATH.backward(*arguments)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_cpu_flash_copies_many_rows_that_lie_far_apart() -> None:
    """More than a page apart, and as many queries as are worth it: the result is the same."""
    flash = kernels.KERNELS["cpu_flash"]
    q, k, v, dout = (strided(1, 8, 520, 64, dtype=torch.float32, seed=s) for s in range(4))
    assert all(x.is_contiguous() for x in flash._side_by_side(520, q, k))
    assert next(iter(flash._side_by_side(500, q))) is q
    out, lse = flash.forward(q, k, v, True, 0.1)
    expected = MATH.forward(*(x.double() for x in (q, k, v)), True, 0.1)
    grads = flash.backward((dout, q, k, v, out, lse), True, 0.1)
    of_expected = MATH.backward((*(x.double() for x in (dout, q, k, v)), *expected), True, 0.1)
    for a, b in zip((out, lse, *grads), (*expected, *of_expected), strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_the_cpu_gets_flash_and_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGNET_KERNEL", raising=False)
    assert kernels.select_kernel(CPU, torch.float32, 64).name == "cpu_flash"
    monkeypatch.setenv("LONGNET_KERNEL", "math")
    assert kernels.select_kernel(CPU, torch.float32, 64).name == "math"
    assert kernels.select_kernel(CPU, torch.float32, 64, "cpu_flash").name == "cpu_flash"
    monkeypatch.setenv("LONGNET_KERNEL", "quick")
    with pytest.raises(ValueError, match="choose from fa3, flash_attn, cuda_flash, cuda_efficient, cpu_flash, math"):
        kernels.select_kernel(CPU, torch.float32, 64)


def off_by_a_tenth(kernel, *arguments):
    return tuple(1.1 * x for x in type(kernel).backward(kernel, *arguments))


def own_lse(kernel, tensors, *options):
    """The gradients of a call whose out and lse are its own, not those that are merged with others'."""
    own = type(kernel).forward(kernel, *tensors[1:4], *options)
    return type(kernel).backward(kernel, (*tensors[:4], *own), *options)


def whole_tiles(kernel, tensors, *options):
    dq, dk, dv = type(kernel).backward(kernel, tensors, *options)
    dq[:, :, dq.shape[2] // 64 * 64 :] = 0
    return dq, dk, dv


def head_by_head(kernel, tensors, *options):
    dq, dk, dv = type(kernel).backward(kernel, tensors, *options)
    return dq, dk if tensors[2].stride(1) else dk / 2, dv


def fails(kernel, *_):
    """As those whose first line is an assertion about the device, and gives no reason."""
    raise AssertionError


@pytest.mark.parametrize(
    ("call", "wrong", "said"),
    [
        ("backward", off_by_a_tenth, "its dq is off"),
        ("backward", own_lse, "its dq is off"),
        ("backward", whole_tiles, "its dq is off"),
        ("backward", head_by_head, "its dk is off"),
        ("forward", fails, "AssertionError: no reason given"),
    ],
)
def test_a_kernel_that_is_wrong_or_fails_is_passed_over(monkeypatch: pytest.MonkeyPatch, call, wrong, said) -> None:
    """What only real calls have is tried: a merged lse, rows that fill no tile, heads that share a key head."""
    monkeypatch.delenv("LONGNET_KERNEL", raising=False)
    flash = kernels.KERNELS["cpu_flash"]
    monkeypatch.setattr(flash, call, partial(wrong, flash))
    with pytest.warns(UserWarning, match=f"'cpu_flash' is not used: {said}"):
        assert kernels.select_kernel(CPU, torch.float32, 16).name == "math"
    with pytest.raises(ValueError, match=f"cannot run here: {said}"):
        kernels.select_kernel(CPU, torch.float32, 16, "cpu_flash")


def test_a_kernel_is_probed_again_for_algorithms_that_are_always_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGNET_KERNEL", raising=False)
    flash = kernels.KERNELS["cpu_flash"]
    backward = flash.backward

    def refusing(*arguments):
        assert not torch.are_deterministic_algorithms_enabled(), "no such algorithm"
        return backward(*arguments)

    monkeypatch.setattr(flash, "backward", refusing)
    assert kernels.select_kernel(CPU, torch.float32, 16).name == "cpu_flash"
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.warns(UserWarning, match="'cpu_flash' is not used: AssertionError: no such algorithm"):
            assert kernels.select_kernel(CPU, torch.float32, 16).name == "math"
    finally:
        torch.use_deterministic_algorithms(False)


def test_probing_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    kernels.select_kernel(CPU, torch.float32, 24)
    assert torch.equal(state, torch.get_rng_state())


def test_cuda_limits() -> None:
    cuda = kernels.KERNELS["cuda_flash"]
    assert cuda.max_batch(12, 1, 64) <= 65_535
    assert cuda.max_batch(12, 2048, 64) * 12 * 2048 * 64 < 2**31
    assert cuda.max_batch(1, 1 << 30, 64) == 1


@pytest.mark.parametrize("name", ["cuda_flash", "cuda_efficient"])
def test_packed_shapes(name: str) -> None:
    """What torch itself says that its operators return, for sequences of 300, 1 and 70 rows."""
    kernel, counts = kernels.KERNELS[name], ([300, 1, 70], [40, 200, 9])
    queries, keys = (rows_of(Sequences([0] * 3, [1] * 3, x), torch.device("meta")) for x in counts)
    q, dout, k, v = (torch.empty(n, 64, dtype=torch.bfloat16, device="meta") for n in (371, 371, 249, 249))
    out, lse = kernel.forward_packed(q, k, v, queries, keys, False, 1.0)
    assert (out.shape, lse.shape, lse.dtype) == ((371, 64), (371,), torch.float32)
    if name == "cuda_efficient":
        return  # what torch says of its backward forgets that it takes `out`
    grads = kernel.backward_packed((dout, q, k, v, out, lse), queries, keys, False, 1.0)
    assert [d.shape for d in grads] == [(371, 64), (249, 64), (249, 64)]


# What `_flash_attn_forward` and `_flash_attn_backward` of flash-attn 2.7.4 and 2.8.3 are: custom ops of torch
FORWARD = (
    "(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a6!)? dq, Tensor(a7!)? dk, "
    "Tensor(a8!)? dv, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, "
    "SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None) "
    "-> Tensor"
)


def flash_attn_like(version: str) -> types.ModuleType:
    """flash_attn.flash_attn_interface with a release's signatures and layouts, computed by plain math."""
    module = types.ModuleType("flash_attn.flash_attn_interface")

    def compute(q, k, v, softmax_scale, causal):
        out, lse = MATH.forward(*(x.transpose(1, 2) for x in (q, k, v)), causal, softmax_scale)
        return out.transpose(1, 2).contiguous(), lse.contiguous()

    def compute_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal):
        assert softmax_lse.is_contiguous()
        heads_first = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        for total, part in zip(
            (dq, dk, dv), MATH.backward((*heads_first, softmax_lse), causal, softmax_scale), strict=True
        ):
            total.copy_(part.transpose(1, 2))

    if version == "2.6.3":

        def _flash_attn_forward(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax
        ):
            assert (dropout_p, window_size, softcap, alibi_slopes) == (0.0, (-1, -1), 0.0, None)
            out, lse = compute(q, k, v, softmax_scale, causal)
            return out, q, k, v, out, lse, None, None

        def _flash_attn_backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, softcap,
            alibi_slopes, deterministic, rng_state=None,
        ):  # fmt: skip
            assert (dropout_p, window_size, softcap, alibi_slopes) == (0.0, (-1, -1), 0.0, None)
            compute_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal)

    else:

        @torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=(), schema=FORWARD)
        def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, *others):
            assert (dropout_p, *others) == (0.0, -1, -1, 0.0, None, False)
            out, lse = compute(q, k, v, softmax_scale, causal)
            return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)

        @torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"), schema=BACKWARD)
        def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout, softmax_scale, causal, *others):
            assert (dropout, *others[:4]) == (0.0, -1, -1, 0.0, None)
            compute_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal)
            return torch.empty_like(softmax_lse)

    module._flash_attn_forward, module._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    return module


@pytest.mark.parametrize("version", ["2.6.3", "2.8.3"])  # 2.7.4 has the signatures of 2.8.3
def test_flash_attn_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    package, interface = types.ModuleType("flash_attn"), flash_attn_like(version)
    package.flash_attn_interface = interface
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(cuda_kernels.CudaKernel, "refusal", lambda *_: None)  # only the device is missing
    library = torch.library.Library("aten", "IMPL")  # which packs
    library.impl("_flash_attention_forward", flash_forward, "CPU")
    library.impl("_flash_attention_backward", flash_backward, "CPU")
    for kernel in ("flash_attn", "cuda_flash"):
        assert_equals_the_reference(kernel)


def assert_equals_the_reference(kernel: str, head_dim: int = 8) -> None:
    """A sequence at once; and documents, which go packed: each gets what it gets alone, its gradients too."""
    q, k, v, dout = torch.randn(4, 2, 50, 4, head_dim)
    inputs, pattern, documents = [q, k[:, :, :2], v[:, :, :2], dout], Pattern((8, 32), (1, 4)), [17, 1, 32]

    def each_alone(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        parts = zip(*(x.split(documents, 1) for x in (q, k, v)), strict=True)
        return torch.cat([dilated_attention_reference(*part, pattern) for part in parts], 1)

    assert kernels.select_kernel(CPU, torch.float32, head_dim, kernel).packs
    for options, reference in (({}, dilated_attention_reference), ({"documents": documents}, each_alone)):
        found = run(dilated_attention, inputs, pattern, kernel=kernel, **options)
        assert_close(found, run(reference, inputs, pattern), 1e-5)


def efficient_forward(
    query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, custom_mask_type,
    compute_log_sumexp=False, *, scale=None, seqlen_k=None, window_size=None,
):  # fmt: skip
    """aten's `_efficient_attention_forward`: an lse has a multiple of 32 rows for each sequence, inf beyond its own."""
    assert compute_log_sumexp
    assert query.shape[-1] * query.element_size() % 16 == 0
    parts = []
    for q, k, v in sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, (query,), (key, value)):
        out, lse = MATH.forward(q, k, v, custom_mask_type == 1, scale)
        parts.append((out, pad_lse(lse, max_seqlen_q + -max_seqlen_q % 32)))
    outs, lses = zip(*parts, strict=True)
    rng = torch.zeros((), dtype=torch.int64)
    out = torch.cat(outs, 2).transpose(1, 2).to(query.dtype).contiguous()
    return out, torch.cat(lses), rng, rng, max_seqlen_q, max_seqlen_k


def efficient_backward(
    grad_out_, query, key, value, bias, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, logsumexp,
    dropout_p, philox_seed, philox_offset, custom_mask_type, bias_requires_grad, *, scale=None, num_splits_key=None,
    window_size=None, shared_storage_dqdkdv=False,
):  # fmt: skip
    number = query.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    assert logsumexp.shape == (number, query.shape[2], max_seqlen_q + -max_seqlen_q % 32)
    assert logsumexp.is_contiguous()
    lengths, of_q, of_k = (max_seqlen_q, max_seqlen_k), (grad_out_, query, out), (key, value)
    parts = []
    each = sequences(cu_seqlens_q, cu_seqlens_k, *lengths, of_q, of_k)
    for (dout, q, out_, k, v), lse in zip(each, logsumexp.split(query.shape[0]), strict=True):
        assert lse[..., q.shape[2] :].isinf().all()
        parts.append(MATH.backward((dout, q, k, v, out_, lse[..., : q.shape[2]]), custom_mask_type == 1, scale))
    grads = (torch.cat(found, 2).transpose(1, 2).to(query.dtype) for found in zip(*parts, strict=True))
    return *grads, torch.empty(0)


def flash_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *_, scale=None, **__):
    """aten's `_flash_attention_forward`: packed, q is (rows, heads, head_dim) and the lse (heads, rows).

    Heads that share a key head are none to it: they are copied.
    """
    assert all(x.stride(-2) for x in (key, value))
    one = 0 if cum_seq_q is not None else slice(None)
    heads_first = [x[None] if cum_seq_q is not None else x for x in (query, key, value)]
    each = sequences(cum_seq_q, cum_seq_k, max_q, max_k, heads_first[:1], heads_first[1:])
    out, lse = (
        torch.cat(found, 2)[one] for found in zip(*(MATH.forward(*x, is_causal, scale) for x in each), strict=True)
    )
    rng = torch.zeros(2, dtype=torch.uint64)
    return out.transpose(-3, -2).to(query.dtype).contiguous(), lse.contiguous(), rng, rng, query.new_empty(0)


def flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *_,
    scale=None, **__,
):  # fmt: skip
    assert logsumexp.is_contiguous()
    assert all(x.stride(-2) for x in (grad_out, query, key, value, out))
    one = 0 if cum_seq_q is not None else slice(None)
    of_q = [x[None] if cum_seq_q is not None else x for x in (grad_out, query, out)]
    of_q.append((logsumexp[None] if cum_seq_q is not None else logsumexp).transpose(1, 2)[..., None])
    of_k = [x[None] if cum_seq_q is not None else x for x in (key, value)]
    parts = [
        MATH.backward((dout, q, k, v, out_, lse[..., 0]), is_causal, scale)
        for dout, q, out_, lse, k, v in sequences(cum_seq_q, cum_seq_k, max_q, max_k, of_q, of_k)
    ]
    return tuple(torch.cat(found, 2)[one].transpose(-3, -2) for found in zip(*parts, strict=True))


def sequences(q_edges, k_edges, longest, most, of_q, of_k):
    """Tensors (batch, rows, heads, ..) of each sequence, heads first; without edges the batch is all there is."""
    if q_edges is None:
        assert (longest, most) == (of_q[0].shape[1], of_k[0].shape[1])
        yield [x.transpose(1, 2) for x in (*of_q, *of_k)]
        return
    assert q_edges.dtype == k_edges.dtype == torch.int32
    assert (longest, most) == (q_edges.diff().max(), k_edges.diff().max())
    for (a, b), (c, d) in zip(pairwise(q_edges.tolist()), pairwise(k_edges.tolist()), strict=True):
        yield [*(x[:, a:b].transpose(1, 2) for x in of_q), *(x[:, c:d].transpose(1, 2) for x in of_k)]


def pad_lse(lse: Tensor, rows: int) -> Tensor:
    return torch.nn.functional.pad(lse, (0, rows - lse.shape[-1]), value=float("inf"))


@pytest.mark.parametrize("head_dim", [8, 5])
def test_efficient_attention_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    """aten's own operators, which have no kernel for CPUs: here they have one. No head_dim is odd for them."""
    monkeypatch.setattr(cuda_kernels.CudaEfficientKernel, "refusal", lambda *_: None)  # only the device is missing
    library = torch.library.Library("aten", "IMPL")
    library.impl("_efficient_attention_forward", efficient_forward, "CPU")
    library.impl("_efficient_attention_backward", efficient_backward, "CPU")
    assert_equals_the_reference("cuda_efficient", head_dim)


def test_efficient_attention_serves_what_flash_does_not() -> None:
    cuda, efficient, flash = torch.device("cuda"), kernels.KERNELS["cuda_efficient"], kernels.KERNELS["cuda_flash"]
    for dtype, head_dim in ((torch.float32, 64), (torch.float32, 5)):
        assert flash.refusal(cuda, dtype, head_dim)
        assert efficient.refusal(cuda, dtype, head_dim) is None
    assert efficient.refusal(cuda, torch.bfloat16, 20) is None
    assert "no torch.float64" in efficient.refusal(cuda, torch.float64, 64)


def test_plain_math_on_a_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGNET_KERNEL", raising=False)
    with pytest.warns(UserWarning, match="attention in torch.float64 on cuda falls back to plain math") as said:
        assert kernels.select_kernel(torch.device("cuda"), torch.float64, 64).name == "math"
    assert [str(warning.message).count("\n") for warning in said] == [0]
    kernels.select_kernel(torch.device("cuda"), torch.float64, 64, "math")  # as was asked for: nothing to say


# What the operators `fwd` and `bwd` of flash_attn_3 are: in FlashAttention-3 since 2025
FLASH_3 = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!)? k_new=None, Tensor(b!)? v_new=None, Tensor? q_v=None, "
    "Tensor(c!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!)? dq=None, "
    "Tensor(b!)? dk=None, Tensor(c!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor)",
)


EDGES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def flash_3(monkeypatch: pytest.MonkeyPatch) -> torch.library.Library:
    """flash_attn_interface: importing it registers operators, whose gradients are written into arguments."""

    names = [re.findall(r" (\w+)[,=)]", schema) for schema in FLASH_3]

    def by_aten(function, names: list[str], tensors: int, arguments: tuple):
        """Aten's operators have the same layouts."""
        given = dict(zip(names, arguments, strict=False))  # torch leaves out defaults at the end
        *edges, rows, keys = (given.get(name) for name in EDGES)
        sizes = *edges, rows or given["q"].shape[1], keys or given["k"].shape[1]
        causal, scale = given.get("is_causal", False), given["softmax_scale"]
        return function(*arguments[:tensors], *sizes, 0.0, causal, scale=scale)

    def forward(*arguments):
        out, lse, *_ = by_aten(flash_forward, names[0], 3, arguments)
        return out, lse, torch.empty(0), torch.empty(0)

    def backward(*arguments):
        for total, part in zip(arguments[6:9], by_aten(flash_backward, names[1], 6, arguments), strict=True):
            total.copy_(part)
        return torch.empty(0), torch.empty(0)

    library = torch.library.Library("flash_attn_3", "DEF")
    for name, schema, function in zip(("fwd", "bwd"), FLASH_3, (forward, backward), strict=True):
        library.define(f"{name}{schema}")
        library.impl(name, function, "CPU")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("flash_attn_interface"))
    return library


def test_flash_attention_3_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directly: torch's own attention, which it could replace, stays what it is in this process."""
    library = flash_3(monkeypatch)
    for names in ("activate", "restore", "register"):  # which torch has, or has not, by its version
        monkeypatch.delattr(torch.nn.attention, f"{names}_flash_attention_impl", raising=False)
    monkeypatch.setattr(cuda_kernels.Flash3Kernel, "refusal", lambda *_: None)  # only the device is missing
    assert_equals_the_reference("fa3")
    library._destroy()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], torch.device]:
    """Make this machine say that it has a card, of a compute capability."""

    def of(major: int) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))
        return torch.device("cuda")

    return of


def test_a_broken_package_stops_no_other_kernel(monkeypatch: pytest.MonkeyPatch, card) -> None:
    """As flash-attn's with another nvidia-cutlass-dsl, or of another torch: on a CPU nobody imports it."""
    imported = []

    def broken(name: str) -> None:
        imported.append(name)
        raise AttributeError("module 'cutlass' has no attribute 'Int32'\nin line 3")

    monkeypatch.setattr(cuda_kernels.importlib, "import_module", broken)
    monkeypatch.delenv("LONGNET_KERNEL", raising=False)
    assert kernels.select_kernel(CPU, torch.float32, 64).name == "cpu_flash"
    assert not imported
    for name in ("fa3", "flash_attn"):
        why = kernels.KERNELS[name].refusal(card(9), torch.bfloat16, 64)
        assert why == f"{imported[-1]} cannot be imported: AttributeError: module 'cutlass' has no attribute 'Int32'"
    assert imported == ["flash_attn_interface", "flash_attn.flash_attn_interface"]


@pytest.mark.parametrize(("major", "first"), [(8, "flash_attn"), (9, "fa3"), (10, "flash_attn")])
def test_each_card_gets_the_kernel_that_is_made_for_it(
    monkeypatch: pytest.MonkeyPatch, card, major: int, first: str
) -> None:
    monkeypatch.delenv("LONGNET_KERNEL", raising=False)
    monkeypatch.setattr(kernels, "_failure", lambda *_: None)
    for kernel in (cuda_kernels.Flash3Kernel, cuda_kernels.FlashAttnKernel):
        monkeypatch.setattr(kernel, "functions", lambda _: (print, print))
    assert kernels.select_kernel(card(major), torch.bfloat16, 64).name == first
