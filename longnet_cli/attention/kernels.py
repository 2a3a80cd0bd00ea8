"""All kernels for a plain attention call, the choice of one, and the kernel for CPUs.

The interface of kernels is in `plain_call`; kernels for GPUs are in `cuda_kernels`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import lru_cache

import torch
from torch import Tensor

from .cuda_kernels import (
    ActivatedKernel,
    CudaEfficientKernel,
    CudaFlashKernel,
    CudnnKernel,
    FlashAttnKernel,
    activate,
    flash_attn_functions,
)
from .packing import Sequences, rows_of
from .plain_call import Kernel, MathKernel, wide


class CpuFlashKernel(Kernel):
    """torch's own flash attention for CPUs. Its backward accumulates in the input dtype, so it gets at least fp32.

    torch wastes work on causal squares: it also computes the scores above the diagonal, 512 keys at a time, and masks
    them. So a short square is cut into steps of 128 rows, and a step gets only the keys up to its last row.

    It reads all keys once for each tile of queries. Rows more than a page apart are copied first, side by side.
    """

    name = "cpu_flash"
    biased = True
    _MAX_ELEMENTS = 1 << 21  # bounds the scratch memory of one call: 8 MiB per tensor in fp32
    _STEP = 128  # rows
    _MAX_STEPS = 4, 8  # in a forward, in a backward; with more steps, one call is as fast
    _COPIED, _PAGE = 512, 4096  # queries from which keys are copied, and the bytes of a page

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cpu":
            return "it runs on a CPU"
        if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"it has no {dtype}"
        return None

    def max_batch(self, heads: int, rows: int, head_dim: int) -> int:
        return max(1, self._MAX_ELEMENTS // (heads * rows * head_dim))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        op = torch._scaled_dot_product_flash_attention_for_cpu  # a call by `torch.ops` costs more than the attention
        q, k, v = self._side_by_side(q.shape[2], q, k, v)
        rows, mask = q.shape[2], None if bias is None else bias[None]
        if not causal or (steps := self._steps(rows, bias is not None, self._MAX_STEPS[0])) == [rows]:
            return op(q, k, v, 0.0, causal and bias is None, attn_mask=mask, scale=scale)
        parts = [
            op(x, k[:, :, :end], v[:, :, :end], 0.0, False, attn_mask=self._seen(x, end, bias), scale=scale)
            for x, end in zip(q.split(self._STEP, 2), steps, strict=True)
        ]
        out, lse = (torch.cat(of_steps, 2) for of_steps in zip(*parts, strict=True))
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        dout, q, k, v, out = (wide(x) for x in (dout, q, k, v, out))
        k, v = self._side_by_side(q.shape[2], k, v)
        rows, mask = q.shape[2], None if bias is None else bias[None]
        if not causal or (steps := self._steps(rows, bias is not None, self._MAX_STEPS[1])) == [rows]:
            return op(dout, q, k, v, out, lse, 0.0, causal and bias is None, attn_mask=mask, scale=scale)
        parts, dk, dv = [], None, None
        # the last rows come first: they see all keys, so the other gradients are added to theirs
        for end, *of_rows in reversed(
            [*zip(steps, *(x.split(self._STEP, 2) for x in (dout, q, out, lse)), strict=True)]
        ):
            dout_, q_, out_, lse_ = of_rows
            k_, v_, seen = k[:, :, :end], v[:, :, :end], self._seen(q_, end, bias)
            part, *of_keys = op(dout_, q_, k_, v_, out_, lse_, 0.0, False, attn_mask=seen, scale=scale)
            parts.append(part)
            if dk is None or dv is None:
                dk, dv = of_keys
                continue
            for total, d in zip((dk, dv), of_keys, strict=True):
                total[:, :, :end] += d
        assert dk is not None
        assert dv is not None
        return torch.cat(parts[::-1], 2), dk, dv

    def _side_by_side(self, queries: int, *of_rows: Tensor) -> Iterable[Tensor]:
        if queries < self._COPIED:
            return of_rows
        return [x.contiguous() if x.stride(2) * x.element_size() > self._PAGE else x for x in of_rows]

    def _steps(self, rows: int, biased: bool, most: int) -> list[int]:
        """Return the end of each step of a causal square; a single step is one call for all rows."""
        ends = [*range(self._STEP, rows, self._STEP), rows]
        return ends if biased or len(ends) <= most else [rows]

    def _seen(self, q: Tensor, end: int, bias: Tensor | None) -> Tensor:
        """Return the mask (1, 1 or heads, rows, end) to add to scores of a step whose last row sees `end` keys."""
        rows = q.shape[2]
        if bias is not None:
            return bias[None, :, end - rows : end, :end]
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
        ActivatedKernel("fa4", "flash_attn.cute.interface", (9, 10)),
        ActivatedKernel("fa3", "flash_attn_interface", (9,)),
        FlashAttnKernel(),
        CudaFlashKernel(),
        CudaEfficientKernel(),
        CudnnKernel(),
        CpuFlashKernel(),
        MathKernel(),
    )
}


def select_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, name: str | None = None) -> Kernel:
    """Return the kernel for such tensors: the one named by `name` or LONGNET_KERNEL, otherwise the first that works.

    A kernel that the machine should have but that fails its probe is skipped with a warning. A kernel that fails only
    with packed sequences does not pack. Raises ValueError for a name that does not exist or cannot serve.
    """
    name = name or os.environ.get("LONGNET_KERNEL") or None
    return _select(device, dtype, head_dim, name)


def forget_selections() -> None:
    """Make `select_kernel` probe again: otherwise it remembers its results for the life of the process."""
    _select.cache_clear()
    flash_attn_functions.cache_clear()


@lru_cache(maxsize=256)
def _select(device: torch.device, dtype: torch.dtype, head_dim: int, name: str | None) -> Kernel:
    if name is not None:
        if name not in KERNELS:
            raise ValueError(f"unknown attention kernel {name!r}: choose from {', '.join(KERNELS)}")
        kernel = KERNELS[name]
        refusal = kernel.refusal(device, dtype, head_dim) or _probe(kernel, device, dtype, head_dim)
        if refusal:
            raise ValueError(f"attention kernel {name!r} cannot run here: {refusal}")
        return _without_failing_packs(kernel, device, dtype, head_dim)
    for kernel in KERNELS.values():
        if kernel.refusal(device, dtype, head_dim) is None:
            failure = _probe(kernel, device, dtype, head_dim)
            if failure is None:
                break
            warnings.warn(f"attention kernel {kernel.name!r} is not used: {failure}", stacklevel=2)
    if kernel.name == "math" and device.type == "cuda":
        warnings.warn(
            f"attention in {dtype} on {device} falls back to plain math, slow and with all scores in memory: "
            "use bf16, fp16 or fp32, or set LONGNET_KERNEL=math to accept that",
            stacklevel=2,
        )
    return _without_failing_packs(kernel, device, dtype, head_dim)


Check = Callable[[Kernel, Tensor, float], Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]]


def _probe(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return the reason if a kernel does not agree with plain math here, or None."""
    failure = None if kernel.name == "math" else _failure(_view_calls, kernel, device, dtype, head_dim)
    if failure and isinstance(kernel, ActivatedKernel):
        activate(None)  # a failing kernel must not serve other code of this process either
    return failure


def _without_failing_packs(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """Return the kernel or, if its packed calls fail here, a copy of it that does not pack."""
    failure = _failure(_packed_calls, kernel, device, dtype, head_dim) if kernel.packs else None
    if not failure:
        return kernel
    warnings.warn(f"attention kernel {kernel.name!r} takes documents one by one: packed, {failure}", stacklevel=3)
    kernel = copy(kernel)
    kernel.packs = False
    return kernel


def _failure(check: Check, kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Compare tiny calls, forward and backward, with plain math. Return the reason if one fails, or None."""
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 3e-2)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # autocast would cast plain math
            # drawn from a generator of its own, so that probing never moves the caller's random state
            draw = torch.Generator().manual_seed(0)
            x = torch.randn(4, 2, 40, 2, head_dim, generator=draw, dtype=torch.float32).to(device, dtype)
            for results in check(kernel, x, head_dim**-0.5):
                for what, a, b in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
                    error = ((wide(a) - b).norm() / b.norm()).item()
                    if not error <= tolerance:
                        return f"its {what} is off by {error:.1e} on {device} in {dtype}"
    except Exception as error:  # a missing symbol, a changed signature, no kernel image, a failed assertion
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no reason given')}"
    return None


def _view_calls(kernel: Kernel, x: Tensor, scale: float) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Yield the results of a kernel and of plain math on strided views of x (4, batch, tokens, heads, head_dim)."""
    q, k, v, dout = x[:, :, ::2].transpose(2, 3)  # (batch, heads, rows, head_dim), rows two tokens apart
    for causal in (False, True):
        out, lse, *grads = _plain((q, k, v, dout), causal, scale)
        merged = (out.to(x.dtype), lse, causal, scale)
        yield (
            (*kernel.forward(q, k, v, causal, scale), *kernel.backward(dout, q, k, v, *merged)),
            (out, lse, *grads),
        )


def _packed_calls(kernel: Kernel, x: Tensor, scale: float) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Yield the results for packed sequences of several lengths, with as many keys as queries or a different number."""
    q, k, v, dout = x.flatten(1, 3)[:, :80]
    for q_counts, k_counts in (([20, 3, 57], [20, 3, 57]), ([20, 3, 57], [1, 46, 33])):
        causal = q_counts == k_counts
        queries, keys = (
            rows_of(Sequences([0] * len(counts), [1] * len(counts), counts), x.device)
            for counts in (q_counts, k_counts)
        )
        each = zip(
            *(t.split(n) for t, n in ((q, q_counts), (k, k_counts), (v, k_counts), (dout, q_counts))), strict=True
        )
        parts = [_plain((t[None, None] for t in tensors), causal, scale) for tensors in each]
        out, lse, *grads = (torch.cat(of_sequences, 2)[0, 0] for of_sequences in zip(*parts, strict=True))
        merged = (out.to(x.dtype), lse, queries, keys, causal, scale)
        yield (
            (
                *kernel.forward_packed(q, k, v, queries, keys, causal, scale),
                *kernel.backward_packed(dout, q, k, v, *merged),
            ),
            (out, lse, *grads),
        )


def _plain(inputs: Iterable[Tensor], causal: bool, scale: float) -> tuple[Tensor, ...]:
    """Return out, lse, dq, dk, dv by plain math; as in real calls, the backward gets out in the dtype of q."""
    q, k, v, dout = inputs
    out, lse = KERNELS["math"].forward(q, k, v, causal, scale)
    return out, lse, *KERNELS["math"].backward(dout, q, k, v, out.to(q.dtype), lse, causal, scale)
