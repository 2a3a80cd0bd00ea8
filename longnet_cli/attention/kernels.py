"""All kernels for a plain attention call, the choice of one, and the kernel for CPUs.

The interface of kernels is in `plain_call`; kernels for GPUs are in `cuda_kernels`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
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

    name, device = "cpu_flash", "cpu"
    takes_counts = True
    _MAX_ELEMENTS = 1 << 21  # bounds the scratch memory of one call: 8 MiB per tensor in fp32
    _STEP = 128  # rows
    _MAX_STEPS = 4, 8  # in a forward, in a backward; with more steps, one call is as fast
    _COPIED, _PAGE = 512, 4096  # queries from which keys are copied, and the bytes of a page

    def max_batch(self, heads: int, rows: int, head_dim: int) -> int:
        return max(1, self._MAX_ELEMENTS // (heads * rows * head_dim))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float,
        counts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        op = (
            torch._scaled_dot_product_flash_attention_for_cpu
        )  # a call by `torch.ops` costs more than the attention
        q, k, v = self._side_by_side(q.shape[2], q, k, v)
        rows, mask = q.shape[2], None if counts is None else counts[None]
        if not causal or (steps := self._steps(rows, counts is not None, self._MAX_STEPS[0])) == [
            rows
        ]:
            return op(q, k, v, 0.0, causal and counts is None, attn_mask=mask, scale=scale)
        parts = [
            op(
                x,
                k[:, :, :end],
                v[:, :, :end],
                0.0,
                False,
                attn_mask=self._seen(x, end, counts),
                scale=scale,
            )
            for x, end in zip(q.split(self._STEP, 2), steps, strict=True)
        ]
        out, lse = (torch.cat(of_steps, 2) for of_steps in zip(*parts, strict=True))
        return out, lse

    def backward(
        self, tensors: Sequence[Tensor], causal: bool, scale: float, counts: Tensor | None = None
    ) -> Gradients:
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        dout, q, k, v, out, lse = map(wide, tensors)
        k, v = self._side_by_side(q.shape[2], k, v)
        rows, mask = q.shape[2], None if counts is None else counts[None]
        if not causal or (steps := self._steps(rows, counts is not None, self._MAX_STEPS[1])) == [
            rows
        ]:
            gradients: Gradients = op(
                dout, q, k, v, out, lse, 0.0, causal and counts is None, attn_mask=mask, scale=scale
            )
            return gradients
        parts, of_all = [], list[Tensor]()
        # the last rows come first: they see all keys, so the other gradients are added to theirs
        for end, *of_rows in reversed(
            [*zip(steps, *(x.split(self._STEP, 2) for x in (dout, q, out, lse)), strict=True)]
        ):
            dout_, q_, out_, lse_ = of_rows
            k_, v_, seen = k[:, :, :end], v[:, :, :end], self._seen(q_, end, counts)
            part, *of_keys = op(
                dout_, q_, k_, v_, out_, lse_, 0.0, False, attn_mask=seen, scale=scale
            )
            parts.append(part)
            for total, d in zip(
                of_all, of_keys, strict=False
            ):  # there are none yet for the last rows
                total[:, :, :end] += d
            of_all = of_all or of_keys
        dk, dv = of_all
        return torch.cat(parts[::-1], 2), dk, dv

    def _side_by_side(self, queries: int, *of_rows: Tensor) -> Iterable[Tensor]:
        if queries < self._COPIED:
            return of_rows
        return [
            x.contiguous() if x.stride(2) * x.element_size() > self._PAGE else x for x in of_rows
        ]

    def _steps(self, rows: int, counted: bool, most: int) -> list[int]:
        """Return the end of each step of a causal square; a single step is one call for all rows."""
        ends = [*range(self._STEP, rows, self._STEP), rows]
        return ends if counted or len(ends) <= most else [rows]

    def _seen(self, q: Tensor, end: int, counts: Tensor | None) -> Tensor:
        """Return the mask (1, 1 or heads, rows, end) to add to scores of a step whose last row sees `end` keys."""
        rows = q.shape[2]
        if counts is not None:
            return counts[None, :, end - rows : end, :end]
        before = self._STEP * (max(self._MAX_STEPS) - 1)  # keys that all rows of the last step see
        first = before + rows - end
        return _triangle(self._STEP, before, q.dtype)[:, :, :rows, first : first + end]


@lru_cache(maxsize=4)
def _triangle(rows: int, before: int, dtype: torch.dtype) -> Tensor:
    """Return a mask (1, 1, rows, before + rows) to add to scores: row i sees the keys up to `before + i`."""
    with torch.inference_mode(False):  # the cached mask outlives the caller's inference mode
        return torch.full((1, 1, rows, before + rows), float("-inf"), dtype=dtype).triu_(before + 1)


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        FlashAttnKernel(),
        CudaFlashKernel(),
        CudaEfficientKernel(),
        CpuFlashKernel(),
        MathKernel(),
    )
}


def select_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, name: str | None = None
) -> Kernel:
    """Return the kernel for such tensors: the one named by `name` or LONGNET_KERNEL, otherwise the first that works.

    A kernel that the machine should have but that fails its probe is skipped with a warning.
    Raises ValueError for a name that does not exist or cannot serve.
    """
    name = name or os.environ.get("LONGNET_KERNEL") or None
    return _select(device, dtype, head_dim, name, torch.are_deterministic_algorithms_enabled())


@lru_cache(maxsize=256)  # results last for the life of the process
def _select(
    device: torch.device, dtype: torch.dtype, head_dim: int, name: str | None, always_equal: bool
) -> Kernel:
    """Select a kernel; with other algorithms (`always_equal`: deterministic ones), one may fail that did not before."""
    if name is not None and name not in KERNELS:
        raise ValueError(f"unknown attention kernel {name!r}: choose from {', '.join(KERNELS)}")
    for kernel in [KERNELS[name]] if name else KERNELS.values():
        refusal = kernel.refusal(device, dtype, head_dim)
        failure = refusal
        if not refusal and kernel.name != "math":
            failure = _failure(kernel, device, dtype, head_dim)
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
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 3e-2)
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):  # autocast would cast plain math
            # drawn from a generator of its own, so that probing never moves the caller's random state
            draw = torch.Generator().manual_seed(0)
            x = torch.randn(4, 3, 140, 2, head_dim, generator=draw, dtype=torch.float32).to(
                device, dtype
            )
            for results in _view_calls(kernel, x, head_dim**-0.5):
                for what, a, b in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
                    error = ((wide(a) - b).norm() / b.norm()).item()
                    if not error <= tolerance:
                        return f"its {what} is off by {error:.1e} on {device} in {dtype}"
    except (
        Exception
    ) as error:  # a missing symbol, a changed signature, no kernel image, a failed assertion
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no reason given')}"
    return None


def _view_calls(
    kernel: Kernel, x: Tensor, scale: float
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Yield the results of a kernel and of plain math on strided views of x (4, segments, tokens, heads, head_dim).

    The results of the two calls merge. As in real calls, a backward gets what merged, and heads may share a key head.
    """
    math, rows = KERNELS["math"], slice(None, None, 2)
    q, k, v, dout = x[:, :, rows].transpose(2, 3)  # (segments, heads, rows, head_dim)
    shared_k, shared_v = x[1:3, :, 1::3, :1].transpose(2, 3).expand(-1, -1, q.shape[1], -1, -1)
    calls = [(k, v, True), (shared_k, shared_v, False)]
    plain = [math.forward(q, k, v, causal, scale) for k, v, causal in calls]
    out, lse = x.new_empty(x.shape[1:]), x.new_empty(x.shape[1:4], dtype=plain[0][1].dtype)
    of_rows = [
        whole[:, rows].transpose(1, 2).copy_(part)
        for whole, part in zip((out, lse), _merged(plain), strict=True)
    ]
    for (k, v, causal), forward in zip(calls, plain, strict=True):
        backward = ((dout, q, k, v, *of_rows), causal, scale)
        yield (
            (*kernel.forward(q, k, v, causal, scale), *kernel.backward(*backward)),
            (*forward, *math.backward(*backward)),
        )


def _merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge the out and lse of two calls on the same queries."""
    (out, lse), (other, other_lse) = parts
    merged = torch.logaddexp(lse, other_lse)
    return torch.lerp(out, other, (other_lse - merged).exp()[..., None]), merged
