"""All kernels for a plain attention call, the choice of one, and the kernel for CPUs.

The interface of kernels is in `plain_call`; kernels for GPUs are in `cuda_kernels`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .cuda_kernels import CudaEfficientKernel, CudaFlashKernel, FlashAttnKernel
from .plain_call import Gradients, Kernel, MathKernel, wide


class CpuFlashKernel(Kernel):
    """torch's own flash attention for CPUs. Its backward accumulates in the input dtype, so it gets at least fp32.

    torch wastes work on causal squares: it also computes the scores above the diagonal, 512 keys at a time, and masks
    them. So a short square is cut into steps of 128 rows, and a step gets only the keys up to its last row.

    It reads all keys once for each tile of queries. Rows more than a page apart are copied first, side by side.
    """

    name = "cpu_flash"
    device = "cpu"
    takes_counts = True
    _MAX_ELEMENTS = 1 << 21  # bounds the scratch memory of one call: 8 MiB per tensor in fp32
    _STEP = 128  # rows
    _MAX_STEPS = 4  # in a forward, and twice as many in a backward; with more, one call is as fast
    _COPIED = 512  # queries from which keys are copied
    _PAGE = 4096  # bytes

    def max_batch(self, heads: int, rows: int, head_dim: int) -> int:
        return max(1, self._MAX_ELEMENTS // (heads * rows * head_dim))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float,
        log_counts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        op = torch._scaled_dot_product_flash_attention_for_cpu  # `torch.ops` takes longer than this
        if q.shape[2] >= self._COPIED:
            q, k, v = (self._side_by_side(x) for x in (q, k, v))
        ends = self._step_ends(q.shape[2], causal, log_counts, self._MAX_STEPS)
        if not ends:
            hides_later, mask = self._at_once(causal, log_counts)
            return op(q, k, v, 0.0, hides_later, attn_mask=mask, scale=scale)
        parts = []
        for end, rows in zip(ends, q.split(self._STEP, 2), strict=True):
            mask = self._seen(rows, end, log_counts)
            keys = k[:, :, :end]
            values = v[:, :, :end]
            part = op(rows, keys, values, 0.0, False, attn_mask=mask, scale=scale)
            parts.append(part)
        out, lse = (torch.cat(of_steps, 2) for of_steps in zip(*parts, strict=True))
        return out, lse

    def backward(
        self,
        tensors: Sequence[Tensor],
        causal: bool,
        scale: float,
        log_counts: Tensor | None = None,
    ) -> Gradients:
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        dout, q, k, v, out, lse = map(wide, tensors)
        if q.shape[2] >= self._COPIED:
            k, v = self._side_by_side(k), self._side_by_side(v)
        ends = self._step_ends(q.shape[2], causal, log_counts, 2 * self._MAX_STEPS)
        if not ends:
            hides_later, mask = self._at_once(causal, log_counts)
            inputs = (dout, q, k, v, out, lse)
            dq, dk, dv = op(*inputs, 0.0, hides_later, attn_mask=mask, scale=scale)
            return dq, dk, dv
        dq = torch.empty_like(q)
        # The last rows come first: they see all keys, so the other gradients are added to theirs.
        for end in reversed(ends):
            rows = slice((end - 1) // self._STEP * self._STEP, end)
            dout_, q_, out_, lse_ = (x[:, :, rows] for x in (dout, q, out, lse))
            mask = self._seen(q_, end, log_counts)
            seen = (dout_, q_, k[:, :, :end], v[:, :, :end], out_, lse_)
            dq[:, :, rows], dk_, dv_ = op(*seen, 0.0, False, attn_mask=mask, scale=scale)
            if end == ends[-1]:
                dk, dv = dk_, dv_
                continue
            dk[:, :, :end] += dk_
            dv[:, :, :end] += dv_
        return dq, dk, dv

    def _side_by_side(self, x: Tensor) -> Tensor:
        """Return x (.., rows, head_dim), as a contiguous copy if its rows lie more than a page apart."""
        return x.contiguous() if x.stride(2) * x.element_size() > self._PAGE else x

    def _step_ends(
        self,
        rows: int,
        causal: bool,
        log_counts: Tensor | None,
        most: int,
    ) -> list[int]:
        """Return the end of each step of a causal square; [] if one call for all rows is as fast, or not causal."""
        if not causal or rows <= self._STEP or (log_counts is None and rows > most * self._STEP):
            return []
        return [*range(self._STEP, rows, self._STEP), rows]

    @staticmethod
    def _at_once(causal: bool, log_counts: Tensor | None) -> tuple[bool, Tensor | None]:
        """Return whether one call for all rows hides later keys by itself, and the mask to add to its scores."""
        if log_counts is None:
            return causal, None
        return False, log_counts[None]  # -inf for later keys

    def _seen(self, q: Tensor, end: int, log_counts: Tensor | None) -> Tensor:
        """Return the mask (1, 1 or heads, rows, end) to add to scores of a step whose last row sees `end` keys."""
        rows = q.shape[2]
        first_row = end - rows
        if log_counts is not None:
            return log_counts[None, :, first_row:end, :end]
        before = self._STEP * (2 * self._MAX_STEPS - 1)  # keys that all rows of the last step see
        first = before - first_row
        triangle = _triangle(self._STEP, before, q.dtype)
        return triangle[:, :, :rows, first : first + end]


@lru_cache(maxsize=4)
def _triangle(rows: int, before: int, dtype: torch.dtype) -> Tensor:
    """Return a mask (1, 1, rows, before + rows) to add to scores: row i sees the keys up to `before + i`."""
    with torch.inference_mode(False):  # the cached mask outlives the caller's inference mode
        mask = torch.full((1, 1, rows, before + rows), float("-inf"), dtype=dtype)
        return mask.triu_(before + 1)


_IN_ORDER = (  # the first that works is taken
    FlashAttnKernel(),
    CudaFlashKernel(),
    CudaEfficientKernel(),
    CpuFlashKernel(),
    MathKernel(),
)
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _IN_ORDER}


def select_kernel(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    name: str | None = None,
) -> Kernel:
    """Return the kernel for such tensors: the one named by `name` or LONGNET_KERNEL, otherwise the first that works.

    A kernel that the machine should have but that fails its probe is skipped with a warning. Raises ValueError for a
    name that does not exist or cannot serve.
    """
    name = name or os.environ.get("LONGNET_KERNEL") or None
    always_equal = torch.are_deterministic_algorithms_enabled()
    return _select(device, dtype, head_dim, name, always_equal)


@lru_cache(maxsize=256)  # results last for the life of the process
def _select(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    name: str | None,
    always_equal: bool,
) -> Kernel:
    """Return the first kernel that works.

    `always_equal` is a part of the cache's key: with deterministic algorithms, other kernels may fail.
    """
    if name is not None and name not in KERNELS:
        raise ValueError(f"unknown attention kernel {name!r}: choose from {', '.join(KERNELS)}")
    for kernel in [KERNELS[name]] if name else KERNELS.values():
        refusal = kernel.refusal(device, dtype, head_dim)
        failure = refusal or _failure(kernel, device, dtype, head_dim)
        if not failure:
            break
        if name:
            raise ValueError(f"attention kernel {name!r} cannot run here: {failure}")
        if not refusal:
            warnings.warn(f"attention kernel {kernel.name!r} is not used: {failure}", stacklevel=2)
    if not name and kernel.name == "math" and device.type == "cuda":
        warnings.warn(
            f"attention in {dtype} on {device} falls back to plain math, which is slow: "
            "use bf16, fp16 or fp32, or set LONGNET_KERNEL=math to accept that",
            stacklevel=2,
        )
    return kernel


def _failure(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Compare tiny calls, forward and backward, with plain math. Return the reason if one fails, or None."""
    if kernel.name == "math":
        return None
    # The numbers have a generator of their own, so that probing never moves the caller's random state.
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 140, 2, head_dim, generator=draw, dtype=torch.float32)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            difference = _difference(kernel, x.to(device, dtype))
    except Exception as error:  # no symbol or image of the kernel, another signature, an assertion
        reason = next(iter(str(error).splitlines()), "no reason given")
        return f"{type(error).__name__}: {reason}"
    return f"{difference} on {device} in {dtype}" if difference else None


def _difference(kernel: Kernel, x: Tensor) -> str | None:
    """Return how a kernel differs from plain math on views of x (4, segments, tokens, heads, head_dim), or None.

    There are two calls, a causal square and one in which heads share a key head. As in real calls, the backward gets
    the merged out and lse of both, which are strided views, too.
    """
    math = KERNELS["math"]
    scale = x.shape[-1] ** -0.5
    rows = slice(None, None, 2)
    q, k, v, dout = x[:, :, rows].transpose(2, 3)  # (segments, heads, rows, head_dim)
    of_one_head = x[1:3, :, 1::3, :1].transpose(2, 3)
    shared_k, shared_v = of_one_head.expand(-1, -1, q.shape[1], -1, -1)
    out, lse = math.forward(q, k, v, True, scale)
    other, other_lse = math.forward(q, shared_k, shared_v, False, scale)
    of_both = torch.logaddexp(lse, other_lse)
    share = (other_lse - of_both).exp()
    merged = torch.lerp(out, other, share[..., None])
    whole = x.new_empty(x.shape[1:])
    whole_lse = lse.new_empty(x.shape[1:4])
    out = whole[:, rows].transpose(1, 2).copy_(merged)
    lse = whole_lse[:, rows].transpose(1, 2).copy_(of_both)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(x.dtype, 3e-2)
    for keys, values, causal in ((k, v, True), (shared_k, shared_v, False)):
        tensors = (dout, q, keys, values, out, lse)
        of_kernel = _results(kernel, tensors, causal, scale)
        of_math = _results(math, tensors, causal, scale)
        for name, expected in of_math.items():
            difference = wide(of_kernel[name]) - expected
            error = (difference.norm() / expected.norm()).item()
            if not error <= tolerance:
                return f"its {name} is off by {error:.1e}"
    return None


def _results(
    kernel: Kernel,
    tensors: Sequence[Tensor],
    causal: bool,
    scale: float,
) -> dict[str, Tensor]:
    """Return what a kernel makes of the tensors of a backward, in its forward and its backward."""
    _, q, k, v, *_ = tensors
    out, lse = kernel.forward(q, k, v, causal, scale)
    dq, dk, dv = kernel.backward(tensors, causal, scale)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
