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
    an lse is (batch, heads, rows), packed (heads, rows)         M 6106, 6113               M 6979, 6986
    of a random state, it returns two uint64 and one unused      M 6139                     M 7012

No wheel has these, which torch's repository has: efficient attention takes as many key heads as query heads, int32
edges, one batch row of packed sequences, and a kernel by the strides of heads (attention_backward.cu at 00afd8f2,
`_efficient_attention_backward`); flash attention takes fp16 and bf16, a head_dim that 8 divides, up to 256, a last
stride of 1, int32 edges, and reads an lse from its address on, whatever its strides (flash_attn/flash_api.cpp at
03b7c19d, `mha_fwd`, `set_params_dgrad`). FlashAttention-2 at v2.8.3: flash_attn/flash_attn_interface.py, lines
77 and 238.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
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


def sequences(
    edges: Sequence[Any], of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    """The tensors (batch, heads, rows, ..) of each sequence, given tensors (batch, rows, heads, ..)."""
    q_edges, k_edges, most_rows, most_keys = edges
    if q_edges is None:
        yield [x.transpose(1, 2) for x in (*of_queries, *of_keys)]
        return
    assert q_edges.dtype == k_edges.dtype == torch.int32
    assert most_rows >= q_edges.diff().max()  # rows beyond are not computed
    assert most_keys >= k_edges.diff().max()
    for (a, b), (c, d) in zip(pairwise(q_edges.tolist()), pairwise(k_edges.tolist()), strict=True):
        yield [
            *(x[:, a:b].transpose(1, 2) for x in of_queries),
            *(x[:, c:d].transpose(1, 2) for x in of_keys),
        ]


def joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The tensors (batch, rows, heads, ..) of all sequences."""
    return [torch.cat(of_sequences, 2).transpose(1, 2) for of_sequences in zip(*parts, strict=True)]


def flash(
    tensors: Sequence[Tensor], edges: Sequence[Any], causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """FlashAttention's forward: out (batch, rows, heads, D), packed (rows, heads, D), and lse."""
    q, k, v = _accepted(tensors, edges)
    calls = sequences(edges, [q], [k, v])
    parts = [attend(*call, causal, scale, call[1].shape[2] - call[0].shape[2]) for call in calls]
    out, lse = joined([(out, lse[..., None]) for out, lse in parts])
    lse = lse[..., 0].transpose(1, 2).contiguous()
    return (out.contiguous(), lse) if edges[0] is None else (out[0].contiguous(), lse[0])


def flash_gradients(
    tensors: Sequence[Tensor], lse: Tensor, edges: Sequence[Any], causal: bool, scale: float
) -> tuple[Tensor, ...]:
    dout, q, k, v, out = _accepted(tensors, edges)
    lse = lse.as_strided(
        lse.shape, torch.empty(lse.shape, device="meta").stride(), lse.storage_offset()
    )
    lse = (lse if edges[0] is None else lse[None]).transpose(1, 2)[..., None]
    delta = (dout.float() * out.float()).sum(-1, keepdim=True)
    parts = [
        gradients(
            (dout_, q_, k_, v_),
            delta_[..., 0],
            lse_[..., 0],
            causal,
            scale,
            k_.shape[2] - q_.shape[2],
        )
        for dout_, q_, delta_, lse_, k_, v_ in sequences(edges, [dout, q, delta, lse], [k, v])
    ]
    return tuple(x.contiguous() if edges[0] is None else x[0].contiguous() for x in joined(parts))


def _accepted(tensors: Sequence[Tensor], edges: Sequence[Any]) -> list[Tensor]:
    """The tensors (batch, rows, heads, D), if flash attention takes them."""
    for x in tensors:
        assert x.dtype in (torch.float16, torch.bfloat16), "only fp16 and bf16"
        assert x.stride(-1) == 1, "contiguous last dimension"
        assert x.shape[-1] % 8 == 0
        assert x.shape[-1] <= 256
        assert x.dim() == (4 if edges[0] is None else 3)
        assert x.shape[0] <= 65_535 or edges[0] is not None, "invalid configuration argument"
    return [*tensors] if edges[0] is None else [x[None] for x in tensors]


def flash_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
    *, scale=None,
):  # fmt: skip
    edges = cum_seq_q, cum_seq_k, max_q, max_k
    rng = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    found = (
        *flash((query, key, value), edges, is_causal, scale or query.shape[-1] ** -0.5),
        *rng,
        query.new_empty(0),
    )
    arguments = query, key, value, *edges, dropout_p, is_causal, return_debug_mask
    return as_torch_says("_flash_attention_forward", found, *arguments, scale=scale)


def flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None,
):  # fmt: skip
    assert rng_state.dtype == unused.dtype == torch.uint64
    edges, tensors = (cum_seq_q, cum_seq_k, max_q, max_k), (grad_out, query, key, value, out)
    found = flash_gradients(tensors, logsumexp, edges, is_causal, scale or query.shape[-1] ** -0.5)
    arguments = *tensors, logsumexp, *edges, dropout_p, is_causal, rng_state, unused
    return as_torch_says("_flash_attention_backward", found, *arguments, scale=scale)


def efficient_forward(
    query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, custom_mask_type,
    compute_log_sumexp=False, *, scale=None,
):  # fmt: skip
    edges = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    _aligned((query, key, value), edges)
    calls = sequences(edges, [query], [key, value])
    parts = [
        attend(*call, custom_mask_type == 1, scale or query.shape[-1] ** -0.5) for call in calls
    ]
    rows = query.shape[1] if cu_seqlens_q is None else max_seqlen_q
    lses = torch.cat(
        [pad(x, (0, rows + -rows % 32 - x.shape[-1]), value=float("inf")) for _, x in parts]
    )
    rng = torch.zeros((), dtype=torch.int64)
    found = (
        joined([[out] for out, _ in parts])[0].contiguous(),
        lses,
        rng,
        rng,
        max_seqlen_q,
        max_seqlen_k,
    )
    arguments = query, key, value, bias, *edges, dropout_p, custom_mask_type, compute_log_sumexp
    return as_torch_says("_efficient_attention_forward", found, *arguments, scale=scale)


def efficient_backward(
    grad_out_, query, key, value, bias, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, logsumexp,
    dropout_p, philox_seed, philox_offset, custom_mask_type, bias_requires_grad, *, scale=None,
):  # fmt: skip
    edges = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    _aligned((query, key, value), edges)
    assert philox_seed.dtype == philox_offset.dtype == torch.int64
    assert all(
        size <= 1 or stride % 8 == 0
        for size, stride in zip(logsumexp.shape[:2], logsumexp.stride(), strict=False)
    )
    if out.dtype != torch.float32:
        by_row = out.stride(0), out.shape[2] * out.shape[3], out.stride(2), 1
        out = out.as_strided(out.shape, by_row, out.storage_offset())
    delta = (grad_out_.float() * out.float()).sum(-1, keepdim=True)
    each, parts = sequences(edges, [grad_out_, query, delta], [key, value]), []
    for (dout, q, delta_, k, v), lse in zip(each, logsumexp.split(query.shape[0]), strict=True):
        assert lse[..., q.shape[2] :].isposinf().all()
        given = (
            delta_[..., 0],
            lse[..., : q.shape[2]],
            custom_mask_type == 1,
            scale or query.shape[-1] ** -0.5,
        )
        parts.append(gradients((dout, q, k, v), *given))
    return *(x.contiguous() for x in joined(parts)), torch.empty(0)


def _aligned(tensors: Sequence[Tensor], edges: Sequence[Any]) -> None:
    """Check what efficient attention asks of tensors (batch, rows, heads, D)."""
    q, k, _ = tensors
    assert q.dtype != torch.bfloat16 or torch.cuda.get_device_capability() >= (8, 0), (
        "no kernel found to launch!"
    )
    assert q.shape[2] == k.shape[2]
    assert edges[0] is None or (
        q.shape[0] == 1 and edges[2] <= q.shape[1] and edges[3] <= k.shape[1]
    )
    for x in tensors:
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
WHOLE = (None, None, 0, 0)  # the edges of a call that is not packed
MODULE = "flash_attn.flash_attn_interface"


def flash_attn() -> dict[str, types.ModuleType]:
    module: Any = types.ModuleType(MODULE)

    @torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=(), schema=FORWARD)
    def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, *others):
        assert (dropout_p, *others) == (0.0, -1, -1, 0.0, None, False)
        return (
            *flash((q, k, v), WHOLE, causal, softmax_scale),
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
            flash_gradients((dout, q, k, v, out), softmax_lse, WHOLE, causal, softmax_scale),
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
