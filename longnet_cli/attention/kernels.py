"""One plain attention call, by whichever kernel the machine has: (q, k, v) -> (out, log-sum-exp), and its backward.

Shapes: q, out (batch, heads, rows, head_dim); k, v (batch, heads, keys, head_dim); lse (batch, heads, rows), natural
log, fp32 (fp64 for fp64 inputs). All are strided views whose last stride is 1. A causal call has rows == keys.

Each backward takes the *merged* out and lse of all branches, which makes the sum of the branches' gradients exact:
the probabilities are exp(score - lse) and the correction is rowsum(dout * out), whatever keys the softmax ran over.

Kernels have traps of their own, guarded here: empty q or k kills the process on the CPU, a last stride other than 1
gives garbage silently, a fully masked row has no defined lse (no branch has one), limits on batch and element counts.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import warnings
from functools import lru_cache
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from .packing import PackedRows


class Kernel:
    """What every kernel offers. `max_batch` bounds the first dimension of a call; the caller splits around it."""

    name = ""
    biased = False  # whether a bias (heads, rows, keys), -inf where a key is not seen, can be added to scores
    packs = False  # whether it has `forward_packed` and `backward_packed`

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Return why this kernel cannot serve such tensors, or None."""
        raise NotImplementedError

    def max_batch(self, heads: int, rows: int, head_dim: int) -> int:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, queries: PackedRows, keys: PackedRows, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Sequences of q against those of k and v, all (rows, head_dim) -> out (rows, head_dim), lse (rows,)."""
        raise NotImplementedError

    def backward_packed(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        queries: PackedRows,
        keys: PackedRows,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


class MathKernel(Kernel):
    """Plain torch, anywhere, any dtype; computes in fp32 or wider. Also what the other kernels are probed against."""

    name = "math"
    biased = True
    _MAX_SCORES = 1 << 26

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def max_batch(self, heads: int, rows: int, head_dim: int) -> int:
        return max(1, self._MAX_SCORES // (heads * rows * rows))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        scores = self._scores(q, k, causal, scale, bias)
        lse = scores.logsumexp(-1)
        return (scores - lse[..., None]).exp_() @ _wide(v), lse

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
        dout, out = _wide(dout), _wide(out)
        p = (self._scores(q, k, causal, scale, bias) - lse[..., None]).exp_()
        dv = p.mT @ dout
        ds = (dout @ _wide(v).mT).sub_((dout * out).sum(-1, keepdim=True)).mul_(p).mul_(scale)
        return ds @ _wide(k), ds.mT @ _wide(q), dv

    def _scores(self, q: Tensor, k: Tensor, causal: bool, scale: float, bias: Tensor | None) -> Tensor:
        scores = (_wide(q) @ _wide(k).mT).mul_(scale)
        if bias is not None:
            scores += bias
        elif causal:
            n = scores.shape[-1]
            scores.masked_fill_(torch.ones(n, n, dtype=torch.bool, device=q.device).triu_(1), float("-inf"))
        return scores


class CpuFlashKernel(Kernel):
    """torch's own flash attention for CPUs. Its backward accumulates in the input dtype, so it is given fp32.

    A causal call of it computes the scores above the diagonal too, in blocks of 512 keys, and hides them. So a short
    square goes in steps of a few rows, each against the keys up to its last row.
    """

    name = "cpu_flash"
    biased = True
    _MAX_ELEMENTS = 1 << 21  # bounds the scratch of one call: 8 MiB a tensor in fp32
    _STEP = 128  # rows
    _MAX_STEPS = 4, 8  # of a forward and of a backward, beyond which one call is as fast

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
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        rows, mask = q.shape[2], None if bias is None else bias[None]
        if not causal or (steps := self._steps(rows, bias is not None, self._MAX_STEPS[0])) == [rows]:
            return op(q, k, v, 0.0, causal and bias is None, attn_mask=mask, scale=scale)
        parts = [
            op(x, k[:, :, :end], v[:, :, :end], 0.0, False, attn_mask=self._seen(x, end, bias), scale=scale)
            for x, end in zip(q.split(self._STEP, 2), steps, strict=True)
        ]
        out, lse = (torch.cat(found, 2) for found in zip(*parts, strict=True))
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
        dout, q, k, v, out = (_wide(x) for x in (dout, q, k, v, out))
        rows, mask = q.shape[2], None if bias is None else bias[None]
        if not causal or (steps := self._steps(rows, bias is not None, self._MAX_STEPS[1])) == [rows]:
            return op(dout, q, k, v, out, lse, 0.0, causal and bias is None, attn_mask=mask, scale=scale)
        parts, dk, dv = [], None, None
        # the last rows, which see all keys, come first: to their gradients the others are added
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

    def _steps(self, rows: int, biased: bool, most: int) -> list[int]:
        """Return where the steps of a causal square end; one step is the whole of it."""
        ends = [*range(self._STEP, rows, self._STEP), rows]
        return ends if biased or len(ends) <= most else [rows]

    def _seen(self, q: Tensor, end: int, bias: Tensor | None) -> Tensor:
        """Return what is added to the scores (1, 1 or heads, rows, end) of a step whose last row sees `end` keys."""
        rows = q.shape[2]
        if bias is not None:
            return bias[None, :, end - rows : end, :end]
        before = self._STEP * (max(self._MAX_STEPS) - 1)  # keys that all rows of the last step see
        first = before + rows - end
        return _triangle(self._STEP, before, q.dtype)[:, :, :rows, first : first + end]


class _CudaKernel(Kernel):
    """Packed sequences go through torch's own flash attention (aten), whichever kernel serves the views."""

    packs = True
    implementation: str | None = None  # of aten's flash operators; None: torch's own
    _MAX_ELEMENTS = 1 << 31  # beyond it the backward addresses memory that is not there
    _MAX_SEGMENTS = 65_535  # the batch is a grid dimension

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cuda":
            return "it runs on a CUDA device"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it has no {dtype}"
        if head_dim % 8 or head_dim > 256:
            return f"it needs a head_dim that 8 divides, up to 256, not {head_dim}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs compute capability 8.0"
        return None

    def max_batch(self, heads: int, rows: int, head_dim: int) -> int:
        elements = heads * (-(-rows // 128) * 128) * max(head_dim, 32)
        return max(1, min(self._MAX_SEGMENTS, (self._MAX_ELEMENTS - 1) // elements))

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, queries: PackedRows, keys: PackedRows, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        _activate(self.implementation)
        _, q_edges, rows = queries
        _, k_edges, most = keys
        q, k, v = (x[:, None] for x in (q, k, v))  # (rows, heads, head_dim)
        out, lse = torch.ops.aten._flash_attention_forward.default(
            q, k, v, q_edges, k_edges, rows, most, 0.0, causal, False, scale=scale
        )[:2]
        return out[:, 0], lse[0]

    def backward_packed(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        queries: PackedRows,
        keys: PackedRows,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _activate(self.implementation)
        _, q_edges, rows = queries
        _, k_edges, most = keys
        dout, q, k, v, out = (x[:, None] for x in (dout, q, k, v, out))
        no_rng = torch.empty(2, dtype=torch.uint64, device=q.device)  # read only with dropout
        dq, dk, dv = torch.ops.aten._flash_attention_backward.default(
            dout, q, k, v, out, lse[None], q_edges, k_edges, rows, most, 0.0, causal, no_rng, no_rng[:0], scale=scale
        )
        return dq[:, 0], dk[:, 0], dv[:, 0]


class CudaFlashKernel(_CudaKernel):
    """The FlashAttention-2 inside torch (aten). Positional arguments are stable since 2.6, names are not."""

    name = "cuda_flash"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        _activate(self.implementation)
        rows, keys = q.shape[2], k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, rows, heads, head_dim)
        out, lse = torch.ops.aten._flash_attention_forward.default(
            q, k, v, None, None, rows, keys, 0.0, causal, False, scale=scale
        )[:2]
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        _activate(self.implementation)
        rows, keys = q.shape[2], k.shape[2]
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        no_rng = torch.empty(2, dtype=torch.uint64, device=q.device)  # read only with dropout
        grads = torch.ops.aten._flash_attention_backward.default(
            dout, q, k, v, out, lse.contiguous(), None, None, rows, keys, 0.0, causal, no_rng, no_rng[:0], scale=scale
        )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv


class ActivatedKernel(CudaFlashKernel):
    """FlashAttention-3 or -4 in the place of aten's flash operators, for the whole process, as torch offers it."""

    def __init__(self, name: str, module: str, majors: tuple[int, ...]) -> None:
        self.name, self.implementation = name, name.upper()
        self._module, self._majors = module, majors  # what torch imports; of the compute capability

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        found: list[str] = getattr(torch.nn.attention, "list_flash_attention_impls", list)()
        if self.implementation not in found:
            return f"torch {torch.__version__} cannot activate it; 2.13 can"
        if not _can_import(self._module):
            return f"{self._module} cannot be imported"
        refusal = super().refusal(device, dtype, head_dim)
        if not refusal and torch.cuda.get_device_capability(device)[0] not in self._majors:
            return f"it needs compute capability {' or '.join(f'{major}.x' for major in self._majors)}"
        return refusal


def _activate(implementation: str | None) -> None:
    """Make aten's flash operators those of `implementation`; None: torch's own."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
    if current() == implementation:
        return
    if implementation is None:
        torch.nn.attention.restore_flash_attention_impl()
    else:
        torch.nn.attention.activate_flash_attention_impl(implementation)


def _can_import(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, OSError, ValueError):  # a package above it is missing, or its binary does not load
        return False


class CudaEfficientKernel(_CudaKernel):
    """The memory-efficient attention inside torch (aten): slower than flash, for fp32 and any head_dim.

    It reads 16 bytes at a time: a head_dim that is no multiple of that is padded with zeros, which change no score.
    """

    name = "cuda_efficient"
    packs = False

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if device.type != "cuda":
            return "it runs on a CUDA device"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it has no {dtype}"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        rows, keys, head_dim = q.shape[2], k.shape[2], q.shape[3]
        q, k, v = (_whole_lines(x).transpose(1, 2) for x in (q, k, v))
        out, lse = torch.ops.aten._efficient_attention_forward.default(
            q, k, v, None, None, None, rows, keys, 0.0, int(causal), True, scale=scale
        )[:2]
        return out.transpose(1, 2)[..., :head_dim], lse[..., :rows]  # lse has a multiple of 32 rows

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, keys, head_dim = q.shape[2], k.shape[2], q.shape[3]
        dout, q, k, v, out = (_whole_lines(x).transpose(1, 2) for x in (dout, q, k, v, out))
        lse = torch.nn.functional.pad(lse, (0, -rows % 32), value=float("inf"))  # as in the forward
        no_rng = torch.empty((), dtype=torch.int64, device=q.device)  # read only with dropout
        grads = torch.ops.aten._efficient_attention_backward.default(
            dout, q, k, v, None, out, None, None, rows, keys, lse.contiguous(), 0.0, no_rng, no_rng, int(causal),
            False, scale=scale,
        )[:3]  # fmt: skip
        dq, dk, dv = (x.transpose(1, 2)[..., :head_dim] for x in grads)
        return dq, dk, dv


def _whole_lines(x: Tensor) -> Tensor:
    """x, its last dimension padded with zeros to a multiple of 16 bytes."""
    missing = -x.shape[-1] % (16 // x.element_size())
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


class FlashAttnKernel(_CudaKernel):
    """The flash-attn package, 2.6 or newer. Arguments go by name: which there are changes between releases."""

    name = "flash_attn"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if not _flash_attn_functions():
            return "the flash_attn package cannot be imported"
        return super().refusal(device, dtype, head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        function, _ = _flash_attn_functions()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        found = _call_by_name(function, q=q, k=k, v=v, softmax_scale=scale, causal=causal)
        # since 2.7 four results, out first and lse second; in 2.6 eight, of which lse is the sixth
        out, lse = found[0], found[1] if len(found) == 4 else found[5]
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, function = _flash_attn_functions()
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        lse = lse.contiguous()  # the kernel ignores its strides
        _call_by_name(
            function,
            dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv,
            softmax_scale=scale, causal=causal, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


_FLASH_ATTN_DEFAULTS: dict[str, Any] = {
    "dropout_p": 0.0,
    "window_size": (-1, -1),
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
    "return_softmax": False,
}


@lru_cache(maxsize=1)
def _flash_attn_functions() -> tuple[Any, ...]:
    """(forward, backward) of the flash-attn package, or () where it is missing or its binary does not load."""
    try:
        from flash_attn import flash_attn_interface as package

        return package._flash_attn_forward, package._flash_attn_backward
    except (ImportError, OSError, AttributeError):
        return ()


def _call_by_name(function: Any, **arguments: Any) -> Any:
    """Call with the named arguments, and our defaults for the others that have none of their own."""
    if op := getattr(
        function, "_opoverload", None
    ):  # a custom op of torch: its signature in Python is (*args, **kwargs)
        needed = [argument.name for argument in op._schema.arguments if not argument.has_default_value()]
    else:
        parameters = inspect.signature(function).parameters.values()
        needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    return function(**arguments, **{name: _FLASH_ATTN_DEFAULTS[name] for name in needed if name not in arguments})


@lru_cache(maxsize=4)
def _triangle(rows: int, before: int, dtype: torch.dtype) -> Tensor:
    """A mask (1, 1, rows, before + rows), to be added to scores: row i sees the keys up to `before + i`."""
    with torch.inference_mode(False):  # it outlives the mode of the caller
        return torch.full((1, 1, rows, before + rows), float("-inf"), dtype=dtype).triu_(before + 1)


def _wide(x: Tensor) -> Tensor:
    """fp32 at least; no copy where it is already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        ActivatedKernel("fa4", "flash_attn.cute.interface", (9, 10)),
        ActivatedKernel("fa3", "flash_attn_interface", (9,)),
        FlashAttnKernel(),
        CudaFlashKernel(),
        CudaEfficientKernel(),
        CpuFlashKernel(),
        MathKernel(),
    )
}


def select_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, name: str | None = None) -> Kernel:
    """The kernel for such tensors: the one named by `name` or LONGNET_KERNEL, else the first that works.

    Raises ValueError for a name that does not exist or cannot serve. A kernel that the machine should have but that
    fails its probe is passed over with a warning.
    """
    name = name or os.environ.get("LONGNET_KERNEL") or None
    return _select(device, dtype, head_dim, name)


def forget_selections() -> None:
    """Probe again what `select_kernel` has found: it remembers for the life of a process."""
    _select.cache_clear()
    _flash_attn_functions.cache_clear()


@lru_cache(maxsize=256)
def _select(device: torch.device, dtype: torch.dtype, head_dim: int, name: str | None) -> Kernel:
    if name is not None:
        if name not in KERNELS:
            raise ValueError(f"unknown attention kernel {name!r}: choose from {', '.join(KERNELS)}")
        refusal = KERNELS[name].refusal(device, dtype, head_dim) or _probe(name, device, dtype, head_dim)
        if refusal:
            raise ValueError(f"attention kernel {name!r} cannot run here: {refusal}")
        return KERNELS[name]
    for kernel in KERNELS.values():
        if kernel.refusal(device, dtype, head_dim) is None:
            failure = _probe(kernel.name, device, dtype, head_dim)
            if failure is None:
                break
            warnings.warn(f"attention kernel {kernel.name!r} is passed over: {failure}", stacklevel=2)
    if kernel.name == "math" and device.type == "cuda":
        warnings.warn(
            f"attention in {dtype} on {device} falls back to plain math, slow and with every score in memory: "
            "use bf16, fp16 or fp32, or LONGNET_KERNEL=math to say that it is meant",
            stacklevel=2,
        )
    return kernel


def _probe(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why a kernel does not compute here as plain math does, or None."""
    failure = _failure(name, device, dtype, head_dim)
    if failure and isinstance(KERNELS[name], ActivatedKernel):
        _activate(None)  # nor may it serve others in this process
    return failure


def _failure(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Run a tiny forward and backward on strided views against plain math; why it failed, or None."""
    if name == "math":
        return None
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 3e-2)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # the caller's would cast plain math
            # drawn from a generator of its own, so that probing never moves the caller's random state
            draw = torch.Generator().manual_seed(0)
            x = torch.randn(4, 2, 40, 2, head_dim, generator=draw, dtype=torch.float32).to(device, dtype)
            q, k, v, dout = x[:, :, ::2].transpose(2, 3)  # (batch, heads, rows, head_dim), rows two tokens apart
            scale = head_dim**-0.5
            for causal in (False, True):
                out, lse = KERNELS["math"].forward(q, k, v, causal, scale)
                merged = (out.to(dtype), lse, causal, scale)
                expected = (out, lse, *KERNELS["math"].backward(dout, q, k, v, *merged))
                found = (
                    *KERNELS[name].forward(q, k, v, causal, scale),
                    *KERNELS[name].backward(dout, q, k, v, *merged),
                )
                for what, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
                    error = ((_wide(a) - b).norm() / b.norm()).item()
                    if not error <= tolerance:
                        return f"its {what} is off by {error:.1e} on {device} in {dtype}"
    except Exception as error:  # a missing symbol, a changed signature, no kernel image, a failed assertion: all say no
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no reason given')}"
    return None
