"""Attention kernels for CUDA: torch's own (aten), and those of the flash-attn package."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .pattern import ceil_div
from .plain_call import Gradients, Kernel


class CudaFlashKernel(Kernel):
    """The FlashAttention-2 inside torch (aten), and what all CUDA kernels have in common.

    Each has its own `attend` and `gradients`. The positional arguments of aten's flash operators are stable since torch
    2.6, names are not.
    """

    name = "cuda_flash"
    device = "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    _MAX_ELEMENTS = 1 << 31  # beyond it, the backward addresses memory out of bounds
    _MAX_SEGMENTS = 65_535  # the batch is a grid dimension

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if refusal := super().refusal(device, dtype, head_dim):
            return refusal
        if head_dim % 8 or head_dim > 256:
            return f"it needs a head_dim that 8 divides, up to 256, not {head_dim}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs compute capability 8.0"
        return None

    def max_batch(self, heads: int, rows: int, head_dim: int) -> int:
        elements = heads * (ceil_div(rows, 128) * 128) * max(head_dim, 32)
        return max(1, min(self._MAX_SEGMENTS, (self._MAX_ELEMENTS - 1) // elements))

    def attend(self, qkv: Sequence[Tensor], causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Return out like q, and lse (batch, heads, rows), given views (batch, rows, heads, head_dim)."""
        q, k, v = qkv
        op = torch.ops.aten._flash_attention_forward.default
        sizes = (None, None, q.shape[1], k.shape[1])
        out, lse, *_ = op(q, k, v, *sizes, 0.0, causal, False, scale=scale)
        return out, lse

    def gradients(self, tensors: Sequence[Tensor], causal: bool, scale: float) -> Gradients:
        """Return dq, dk and dv, given dout, q, k, v, out and a contiguous lse, in the shapes of `attend`."""
        _, q, k, *_ = tensors
        op = torch.ops.aten._flash_attention_backward.default
        no_rng = torch.empty(2, dtype=torch.uint64, device=q.device)  # read only with dropout
        rng = (no_rng, no_rng[:0])
        sizes = (None, None, q.shape[1], k.shape[1])
        dq, dk, dv = op(*tensors, *sizes, 0.0, causal, *rng, scale=scale)
        return dq, dk, dv

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        rows_first = [x.transpose(1, 2) for x in (q, k, v)]
        out, lse = self.attend(rows_first, causal, scale)
        return out.transpose(1, 2), lse

    def backward(self, tensors: Sequence[Tensor], causal: bool, scale: float) -> Gradients:
        *of_rows, lse = tensors
        rows_first = [x.transpose(1, 2) for x in of_rows]
        # Kernels ignore the strides of the lse.
        dq, dk, dv = self.gradients([*rows_first, lse.contiguous()], causal, scale)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class CudaEfficientKernel(CudaFlashKernel):
    """The memory-efficient attention inside torch (aten): slower than flash, but for fp32 too, and for any head_dim.

    It reads 16 bytes at a time. A head_dim that is no multiple of that is padded with zeros, which change no score. An
    lse has a multiple of 32 rows.
    """

    name = "cuda_efficient"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if refusal := Kernel.refusal(self, device, dtype, head_dim):
            return refusal
        old = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0)
        return "it needs compute capability 8.0 for bf16" if old else None

    def attend(self, qkv: Sequence[Tensor], causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, _ = qkv
        op = torch.ops.aten._efficient_attention_forward.default
        padded = map(_whole_lines, qkv)
        rows, head_dim = q.shape[1], q.shape[-1]
        sizes = (None, None, rows, k.shape[1])
        mask = int(causal)
        out, lse, *_ = op(*padded, None, *sizes, 0.0, mask, True, scale=scale)
        return out[..., :head_dim], lse[..., :rows]

    def gradients(self, tensors: Sequence[Tensor], causal: bool, scale: float) -> Gradients:
        op = torch.ops.aten._efficient_attention_backward.default
        dout, q, k, v, out, lse = tensors
        rows = q.shape[1]
        head_dim = q.shape[-1]
        sizes = (None, None, rows, k.shape[1])
        # in half precision, its rows are read as if they followed each other
        out = out.contiguous()
        dout, q, k, v, out = map(_whole_lines, (dout, q, k, v, out))
        missing_rows = -rows % 32
        lse = pad(lse, (0, missing_rows), value=float("inf"))
        no_rng = torch.empty((), dtype=torch.int64, device=q.device)  # read only with dropout
        no_dropout = (0.0, no_rng, no_rng)
        inputs = (dout, q, k, v, None, out)
        mask = int(causal)
        dq, dk, dv, _ = op(*inputs, *sizes, lse, *no_dropout, mask, False, scale=scale)
        return dq[..., :head_dim], dk[..., :head_dim], dv[..., :head_dim]


def _whole_lines(x: Tensor) -> Tensor:
    """Pad the last dimension of x with zeros to a multiple of 16 bytes."""
    missing = -x.shape[-1] % (16 // x.element_size())
    return pad(x, (0, missing)) if missing else x


class FlashAttnKernel(CudaFlashKernel):
    """The flash-attn package, 2.7 or newer: two operators that it registers with torch. Arguments go by name.

    It is imported on the first GPU that it may serve.
    """

    name = "flash_attn"

    def functions(self) -> tuple[Any, Any]:
        """Import the package, and return its forward and its backward function."""
        module = importlib.import_module("flash_attn.flash_attn_interface")
        return module._flash_attn_forward, module._flash_attn_backward

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if refusal := super().refusal(device, dtype, head_dim):
            return refusal
        try:
            self.functions()
        except Exception as error:  # parts that do not fit this torch or this CUDA fail in any way
            reason = next(iter(str(error).splitlines()), "no reason given")
            return f"flash_attn cannot be imported: {type(error).__name__}: {reason}"
        return None

    def attend(self, qkv: Sequence[Tensor], causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = qkv
        forward, _ = self.functions()
        out, lse, *_ = forward(
            q=q,
            k=k,
            v=v,
            softmax_scale=scale,
            causal=causal,
            return_softmax=False,
            **_PLAIN,
        )
        return out, lse

    def gradients(self, tensors: Sequence[Tensor], causal: bool, scale: float) -> Gradients:
        dout, q, k, v, out, lse = tensors
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        _, backward = self.functions()
        backward(
            dout=dout,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse,
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_PLAIN,
        )
        return dq, dk, dv


# options of flash-attn's operators that have no default
_PLAIN: dict[str, Any] = {
    "dropout_p": 0.0,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}
