"""Attention kernels for CUDA: torch's own (aten), FlashAttention-3 and -4 in their place, and flash-attn's."""

from __future__ import annotations

import importlib.util
import inspect
from functools import lru_cache
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from .packing import PackedRows
from .plain_call import Kernel


class CudaKernel(Kernel):
    """A CUDA kernel. Packed sequences go through aten's flash operators, whichever flash kernel serves the views."""

    packs = True
    implementation: str | None = None  # of aten's flash operators; None: torch's own
    _MAX_ELEMENTS = 1 << 31  # beyond it, the backward addresses memory out of bounds
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
        activate(self.implementation)
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
        activate(self.implementation)
        _, q_edges, rows = queries
        _, k_edges, most = keys
        dout, q, k, v, out = (x[:, None] for x in (dout, q, k, v, out))
        no_rng = torch.empty(2, dtype=torch.uint64, device=q.device)  # read only with dropout
        dq, dk, dv = torch.ops.aten._flash_attention_backward.default(
            dout, q, k, v, out, lse[None], q_edges, k_edges, rows, most, 0.0, causal, no_rng, no_rng[:0], scale=scale
        )
        return dq[:, 0], dk[:, 0], dv[:, 0]


class CudaFlashKernel(CudaKernel):
    """The FlashAttention-2 inside torch (aten). Positional arguments are stable since 2.6, names are not."""

    name = "cuda_flash"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        activate(self.implementation)
        rows, keys = q.shape[2], k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, rows, heads, head_dim)
        out, lse = torch.ops.aten._flash_attention_forward.default(
            q, k, v, None, None, rows, keys, 0.0, causal, False, scale=scale
        )[:2]
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        activate(self.implementation)
        rows, keys = q.shape[2], k.shape[2]
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        no_rng = torch.empty(2, dtype=torch.uint64, device=q.device)  # read only with dropout
        grads = torch.ops.aten._flash_attention_backward.default(
            dout, q, k, v, out, lse.contiguous(), None, None, rows, keys, 0.0, causal, no_rng, no_rng[:0], scale=scale
        )
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv


class CudnnKernel(CudaFlashKernel):
    """The attention of cuDNN inside torch (aten), for Hopper and newer, where it is faster than FlashAttention-2.

    cuDNN plans each shape anew, which takes longer than a short call. So it is for calls of one shape, as in training,
    and serves if it is named. It has no single rows; these and packed sequences are FlashAttention-2's.
    """

    name = "cudnn"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        refusal = super().refusal(device, dtype, head_dim)
        if not refusal and head_dim > 128:
            return f"it needs a head_dim up to 128, not {head_dim}"
        if not refusal and torch.cuda.get_device_capability(device)[0] not in (9, 10):
            return "it needs compute capability 9.x or 10.x"
        return refusal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        if 1 in (q.shape[2], k.shape[2]):
            return super().forward(q, k, v, causal, scale)
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )[:2]
        return out, lse.reshape(q.shape[:3])  # (batch, heads, rows, 1)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, keys = q.shape[2], k.shape[2]
        if 1 in (rows, keys):
            return super().backward(dout, q, k, v, out, lse, causal, scale)
        dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()[..., None]  # in one layout
        no_rng = torch.empty((), dtype=torch.int64, device=q.device)  # read only with dropout
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
            dout, q, k, v, out, lse, no_rng, no_rng, None, None, None, rows, keys, 0.0, causal, scale=scale
        )
        return dq, dk, dv


class ActivatedKernel(CudaFlashKernel):
    """FlashAttention-3 or -4 inside aten's flash operators. torch activates it for the whole process."""

    def __init__(self, name: str, module: str, majors: tuple[int, ...]) -> None:
        self.name, self.implementation = name, name.upper()
        self._module, self._majors = module, majors  # imported by torch; of the compute capability

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        known: list[str] = getattr(torch.nn.attention, "list_flash_attention_impls", list)()
        if self.implementation not in known:
            return f"torch {torch.__version__} cannot activate it; 2.13 can"
        if not _can_import(self._module):
            return f"{self._module} cannot be imported"
        refusal = super().refusal(device, dtype, head_dim)
        if not refusal and torch.cuda.get_device_capability(device)[0] not in self._majors:
            return f"it needs compute capability {' or '.join(f'{major}.x' for major in self._majors)}"
        return refusal


def activate(implementation: str | None) -> None:
    """Make aten's flash operators run `implementation`; None: torch's own."""
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


class CudaEfficientKernel(CudaKernel):
    """The memory-efficient attention inside torch (aten): slower than flash, but for fp32 too, and for any head_dim.

    It reads 16 bytes at a time. A head_dim that is no multiple of that is padded with zeros, which change no score.
    """

    name = "cuda_efficient"

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
        lse = torch.nn.functional.pad(lse, (0, -rows % 32), value=float("inf"))  # as the forward pads it
        no_rng = torch.empty((), dtype=torch.int64, device=q.device)  # read only with dropout
        grads = torch.ops.aten._efficient_attention_backward.default(
            dout, q, k, v, None, out, None, None, rows, keys, lse.contiguous(), 0.0, no_rng, no_rng, int(causal),
            False, scale=scale,
        )[:3]  # fmt: skip
        dq, dk, dv = (x.transpose(1, 2)[..., :head_dim] for x in grads)
        return dq, dk, dv

    def forward_packed(
        self, q: Tensor, k: Tensor, v: Tensor, queries: PackedRows, keys: PackedRows, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        rows, head_dim = q.shape
        _, q_edges, longest = queries
        _, k_edges, most = keys
        q, k, v = (_whole_lines(x)[None, :, None] for x in (q, k, v))  # (1, rows, heads, head_dim)
        out, lse = torch.ops.aten._efficient_attention_forward.default(
            q, k, v, None, q_edges, k_edges, longest, most, 0.0, int(causal), True, scale=scale
        )[:2]
        return out[0, :, 0, :head_dim], lse.flatten()[_places_in_lse(queries, rows, lse.shape[2])]

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
        rows, head_dim = q.shape
        _, q_edges, longest = queries
        _, k_edges, most = keys
        dout, q, k, v, out = (_whole_lines(x)[None, :, None] for x in (dout, q, k, v, out))
        width = longest + -longest % 32
        padded = lse.new_full((len(q_edges) - 1, 1, width), float("inf"))
        padded.view(-1).index_copy_(0, _places_in_lse(queries, rows, width), lse)
        no_rng = torch.empty((), dtype=torch.int64, device=q.device)  # read only with dropout
        grads = torch.ops.aten._efficient_attention_backward.default(
            dout, q, k, v, None, out, q_edges, k_edges, longest, most, padded, 0.0, no_rng, no_rng, int(causal),
            False, scale=scale,
        )[:3]  # fmt: skip
        dq, dk, dv = (x[0, :, 0, :head_dim] for x in grads)
        return dq, dk, dv


def _places_in_lse(packed: PackedRows, rows: int, width: int) -> Tensor:
    """Return the indices of all rows in a flattened lse (sequences, 1, width), which pads each sequence to `width`."""
    _, edges, _ = packed
    begins = torch.arange(0, (len(edges) - 1) * width, width, device=edges.device) - edges[:-1]
    return torch.arange(rows, device=edges.device) + torch.repeat_interleave(begins, edges.diff(), output_size=rows)


def _whole_lines(x: Tensor) -> Tensor:
    """Pad the last dimension of x with zeros to a multiple of 16 bytes."""
    missing = -x.shape[-1] % (16 // x.element_size())
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


class FlashAttnKernel(CudaKernel):
    """The flash-attn package, 2.6 or newer. Arguments go by name, because they change between releases."""

    name = "flash_attn"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if not flash_attn_functions():
            return "the flash_attn package cannot be imported"
        return super().refusal(device, dtype, head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        function, _ = flash_attn_functions()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        results = _call_by_name(function, q=q, k=k, v=v, softmax_scale=scale, causal=causal)
        # since 2.7 four results, out first and lse second; in 2.6 eight, of which lse is the sixth
        out, lse = results[0], results[1] if len(results) == 4 else results[5]
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, function = flash_attn_functions()
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
def flash_attn_functions() -> tuple[Any, ...]:
    """Return (forward, backward) of the flash-attn package, or () if it is missing or its binary does not load."""
    try:
        from flash_attn import flash_attn_interface as package

        return package._flash_attn_forward, package._flash_attn_backward
    except (ImportError, OSError, AttributeError):
        return ()


def _call_by_name(function: Any, **arguments: Any) -> Any:
    """Call `function` with the arguments, and with our defaults for other arguments that it requires."""
    # a custom op of torch has the Python signature (*args, **kwargs)
    if op := getattr(function, "_opoverload", None):
        needed = [argument.name for argument in op._schema.arguments if not argument.has_default_value()]
    else:
        parameters = inspect.signature(function).parameters.values()
        needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    return function(**arguments, **{name: _FLASH_ATTN_DEFAULTS[name] for name in needed if name not in arguments})
