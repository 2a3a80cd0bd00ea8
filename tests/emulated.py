"""A GPU's attention operators on a CPU, with numbers: torch's own (aten), and those of flash-attn.

    LONGNET_TEST_DEVICE=emulated pytest -m gpu tests/test_gpu.py

They refuse what the real ones refuse, read memory as these read it, and round where these round. Sizes and types of
results are compared with what the installed torch says of its own operators. The sources, by lines in the wheels of
torch (K: include/ATen/native/transformers/cuda/mem_eff_attention/, M: _meta_registrations.py):

    efficient attention                                          2.9.0                      2.15.0
    each sequence has a multiple of 32 rows of lse               M 6218, K forward 113      M 7185, K forward 114
    rows of lse that no query has are +inf                       K forward 1176             K forward 1194
    the strides of an lse are multiples of 8                     K backward 1189            K backward 1194
    rows of q, k and v begin at multiples of 4 numbers           K backward 1213            K backward 1218
    in half precision, the rows of out follow each other         K backward 271, 683, 2525  K backward 272, 685, 2534
    bf16 is for compute capability 8.0 and newer                 K kernels/cutlassB 890     K kernels/cutlassB 875
    of a random state, it returns and takes two int64 numbers    M 6227                     M 7195
    flash attention
    an lse is (batch, heads, rows)                               M 6113                     M 6986
    of a random state, it returns two uint64 and one unused      M 6139                     M 7012

No wheel has these, which torch's repository has: efficient attention takes as many key heads as query heads, and a
kernel by the strides of heads (attention_backward.cu at 00afd8f2, `_efficient_attention_backward`); flash attention
takes fp16 and bf16, a head_dim that 8 divides, up to 256, a last stride of 1, and reads an lse from its address on,
whatever its strides (flash_attn/flash_api.cpp at 03b7c19d, `mha_fwd`, `set_params_dgrad`). FlashAttention-2 at v2.8.3:
flash_attn/flash_attn_interface.py, lines 77 and 238. Sequences that are packed into one row are not emulated.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only

from longnet_cli.attention.cuda_kernels import CudaFlashKernel
from longnet_cli.attention.kernels import CpuFlashKernel

LIBRARIES: list[torch.library.Library] = []  # an operator lives as long as its library


def emulate(capability: tuple[int, int] = (9, 0)) -> None:
    """Let this process believe that its CPU is a card, for as long as it lives."""
    torch.cuda.get_device_capability = lambda *_: capability
    CudaFlashKernel.device, CpuFlashKernel.device = "cpu", "cuda"
    aten = torch.library.Library("aten", "IMPL")
    for name in ("flash", "efficient"):
        for way in ("forward", "backward"):
            operator, function = f"_{name}_attention_{way}", globals()[f"{name}_{way}"]
            check_arguments(getattr(torch.ops.aten, operator).default._schema.arguments, function)
            aten.impl(operator, function, "CPU")
    LIBRARIES.append(aten)
    sys.modules.update({"flash_attn": types.ModuleType("flash_attn")} | flash_attn())


def check_arguments(of_torch: Sequence[Any], function: Callable[..., Any]) -> None:
    """The installed torch has the arguments that we give, in this order; it has values for all others."""
    ours = [*inspect.signature(function).parameters]
    assert [argument.name for argument in of_torch[: len(ours)]] == ours
    assert all(argument.has_default_value() for argument in of_torch[len(ours) :])


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, last: int = 0
) -> tuple[Tensor, Tensor]:
    """out, rounded as a kernel does, and lse of tensors (batch, heads, rows, D)."""
    scores = _scores(q, k, causal, scale, last)
    lse = scores.logsumexp(-1)
    return (_rounded((scores - lse[..., None]).exp(), q) @ v.float()).to(q.dtype), lse


def gradients(
    tensors: Sequence[Tensor], delta: Tensor, lse: Tensor, causal: bool, scale: float, last: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, given dout, q, k, v, the lse, and `delta`, the sum of dout * out over D."""
    dout, q, k, v = (x.float() for x in tensors)
    p = (_scores(q, k, causal, scale, last) - lse[..., None]).exp()
    ds = _rounded(p * (dout @ v.mT - delta[..., None]), tensors[1])
    found = scale * (ds @ k), scale * (ds.mT @ q), _rounded(p, tensors[1]).mT @ dout
    return tuple(x.to(tensors[1].dtype) for x in found)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float, last: int) -> Tensor:
    """Causal: row i sees the keys up to i + `last`, the last one that the first row sees."""
    scores = scale * (q.float() @ k.float().mT)
    unseen = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1 + last)
    return scores.masked_fill_(unseen, float("-inf")) if causal else scores


def _rounded(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).float()


def as_torch_says(
    operator: str, found: Sequence[Any], *arguments: Any, **options: Any
) -> Sequence[Any]:
    """What was found, if its sizes and types are those which torch gives tensors without numbers."""
    op = getattr(torch.ops.aten, operator).default
    for a, b in zip(
        found, op(*tree_map_only(Tensor, lambda x: x.to("meta"), arguments), **options), strict=True
    ):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) if isinstance(a, Tensor) else a == b
    return found


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def rows_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2).contiguous() for x in tensors]


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """FlashAttention's forward: out (batch, rows, heads, D), and lse."""
    _check_flash(q, k, v)
    out, lse = attend(*heads_first(q, k, v), causal, scale, k.shape[1] - q.shape[1])
    return *rows_first(out), lse


def flash_gradients(
    tensors: Sequence[Tensor], lse: Tensor, causal: bool, scale: float
) -> list[Tensor]:
    _check_flash(*tensors)
    dout, q, k, v, out = heads_first(*tensors)
    contiguous = torch.empty(lse.shape, device="meta").stride()
    lse = lse.as_strided(lse.shape, contiguous, lse.storage_offset())
    delta = (dout.float() * out.float()).sum(-1)
    last = k.shape[2] - q.shape[2]
    return rows_first(*gradients((dout, q, k, v), delta, lse, causal, scale, last))


def _check_flash(*tensors: Tensor) -> None:
    """Check what flash attention asks of tensors (batch, rows, heads, D)."""
    for x in tensors:
        assert x.dtype in (torch.float16, torch.bfloat16), "only fp16 and bf16"
        assert x.stride(-1) == 1, "contiguous last dimension"
        assert x.shape[-1] % 8 == 0
        assert x.shape[-1] <= 256
        assert x.dim() == 4
        assert x.shape[0] <= 65_535, "invalid configuration argument"


def flash_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
    *, scale=None,
):  # fmt: skip
    assert cum_seq_q is cum_seq_k is None
    seed, unused = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    out, lse = flash(query, key, value, is_causal, scale or query.shape[-1] ** -0.5)
    found = out, lse, seed, unused, query.new_empty(0)
    sizes = cum_seq_q, cum_seq_k, max_q, max_k
    arguments = query, key, value, *sizes, dropout_p, is_causal, return_debug_mask
    return as_torch_says("_flash_attention_forward", found, *arguments, scale=scale)


def flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None,
):  # fmt: skip
    assert cum_seq_q is cum_seq_k is None
    assert rng_state.dtype == unused.dtype == torch.uint64
    tensors = grad_out, query, key, value, out
    found = flash_gradients(tensors, logsumexp, is_causal, scale or query.shape[-1] ** -0.5)
    sizes = cum_seq_q, cum_seq_k, max_q, max_k
    arguments = *tensors, logsumexp, *sizes, dropout_p, is_causal, rng_state, unused
    return as_torch_says("_flash_attention_backward", found, *arguments, scale=scale)


def efficient_forward(
    query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, custom_mask_type,
    compute_log_sumexp=False, *, scale=None,
):  # fmt: skip
    assert cu_seqlens_q is cu_seqlens_k is None
    _check_efficient(query, key, value)
    heads = heads_first(query, key, value)
    out, lse = attend(*heads, custom_mask_type == 1, scale or query.shape[-1] ** -0.5)
    lse = pad(lse, (0, -query.shape[1] % 32), value=float("inf"))
    rng = torch.zeros((), dtype=torch.int64)
    found = *rows_first(out), lse, rng, rng, max_seqlen_q, max_seqlen_k
    sizes = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    arguments = query, key, value, bias, *sizes, dropout_p, custom_mask_type, compute_log_sumexp
    return as_torch_says("_efficient_attention_forward", found, *arguments, scale=scale)


def efficient_backward(
    grad_out_, query, key, value, bias, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, logsumexp,
    dropout_p, philox_seed, philox_offset, custom_mask_type, bias_requires_grad, *, scale=None,
):  # fmt: skip
    assert cu_seqlens_q is cu_seqlens_k is None
    _check_efficient(query, key, value)
    assert philox_seed.dtype == philox_offset.dtype == torch.int64
    assert all(
        size <= 1 or stride % 8 == 0
        for size, stride in zip(logsumexp.shape[:2], logsumexp.stride(), strict=False)
    )
    if out.dtype != torch.float32:
        by_row = out.stride(0), out.shape[2] * out.shape[3], out.stride(2), 1
        out = out.as_strided(out.shape, by_row, out.storage_offset())
    rows = query.shape[1]
    assert logsumexp.shape[-1] == rows + -rows % 32
    assert logsumexp[..., rows:].isposinf().all()
    dout, q, k, v, out = heads_first(grad_out_, query, key, value, out)
    delta = (dout.float() * out.float()).sum(-1)
    options = custom_mask_type == 1, scale or query.shape[-1] ** -0.5
    found = gradients((dout, q, k, v), delta, logsumexp[..., :rows], *options)
    return *rows_first(*found), torch.empty(0)


def _check_efficient(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check what efficient attention asks of tensors (batch, rows, heads, D)."""
    assert q.dtype != torch.bfloat16 or torch.cuda.get_device_capability() >= (8, 0), (
        "no kernel found to launch!"
    )
    assert q.shape[2] == k.shape[2]
    for x in (q, k, v):
        assert x.stride(-1) == 1
        assert all(number % 4 == 0 for number in (*x.stride()[:3], x.storage_offset())), (
            "no kernel found to launch!"
        )
        assert x.shape[-1] * x.element_size() % 16 == 0
        assert x.shape[0] <= 65_535, "invalid configuration argument"


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
MODULE = "flash_attn.flash_attn_interface"


def flash_attn() -> dict[str, types.ModuleType]:
    module: Any = types.ModuleType(MODULE)

    @torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=(), schema=FORWARD)
    def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, *others):
        assert (dropout_p, *others) == (0.0, -1, -1, 0.0, None, False)
        return (
            *flash(q, k, v, causal, softmax_scale),
            q.new_empty(0),
            torch.empty(2, dtype=torch.int64),
        )

    @torch.library.custom_op(
        "flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"), schema=BACKWARD
    )
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, *others
    ):
        assert (dropout_p, *others[:4]) == (0.0, -1, -1, 0.0, None)
        _written(
            (dq, dk, dv),
            flash_gradients((dout, q, k, v, out), softmax_lse, causal, softmax_scale),
        )
        return torch.empty_like(softmax_lse)

    module._flash_attn_forward, module._flash_attn_backward = (
        _flash_attn_forward,
        _flash_attn_backward,
    )
    return {MODULE: module}


def _written(places: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    for place, x in zip(places, found, strict=True):
        place.copy_(x)
